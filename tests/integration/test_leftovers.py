"""A run that is over leaves no model behind, and one that goes on two: nothing waits for the garbage collector."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fedkit
from fedkit.errors import RunError
from fedkit.rounds.assignment import Transport
from fedkit.rounds.conduct import Plan, conduct
from fedkit.rounds.journal import Commit, Journal, MemoryJournal
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedBuff
from fedkit.strategy import Federation, Strategy
from fedkit.testing import InMemoryFederation, refuse, toy_task
from fedkit.weights import Weights

CLIENTS = ["ann", "bob", "cyd", "dan"]
FIT = fedkit.Fit(steps=1, batch_size=8, lr=0.1)


class Watching(MemoryJournal):
    """Remembers the models of all commits without holding them, and how many are alive at each commit."""

    def __init__(self) -> None:
        super().__init__()
        self.models: list[weakref.ref[object]] = []
        self.alive: list[int] = []

    def commit(self, commit: Commit) -> None:
        self.models.append(weakref.ref(commit.model.vector))
        super().commit(commit)
        self.alive.append(sum(model() is not None for model in self.models))


class Broken(Strategy):
    async def round(self, federation: Federation, model: Weights) -> Weights:
        await federation.mean(self.cohort(federation), model, self.local)
        if federation.round == 2:
            raise RunError("a bug")
        return 0.5 * model


@pytest.fixture
def no_collector() -> Iterator[None]:
    run(FedAvg(rounds=1, local=FIT))  # torch keeps frames of the first training in a process
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def run(strategy: Strategy, **federation: Any) -> Watching:
    """The models of a run that has come to its end, or to an error."""
    journal = Watching()
    place = InMemoryFederation(toy_task(), CLIENTS, **federation)
    plan = Plan(name="test", task=place.task, strategy=strategy, evaluate=fedkit.Evaluation(every=1))
    asyncio.run(to_its_end(plan, place.transport, journal))
    return journal


async def to_its_end(plan: Plan, transport: Transport, journal: Journal) -> None:
    with contextlib.suppress(RunError):  # here, as a coordinator does, and not around asyncio.run, which keeps its task
        await conduct(plan, transport, journal)


def slow(assignment: object) -> float:
    return math.inf if getattr(assignment, "client", "") == "dan" else 1.0


RUNS: dict[str, Callable[[], Watching]] = {
    "all answer": lambda: run(FedAvg(rounds=3, local=FIT)),
    "one refuses": lambda: run(FedAvg(rounds=3, local=FIT), faults={"bob": refuse}),
    "one is too late": lambda: run(
        FedAvg(rounds=3, local=FIT, participation=fedkit.Participation(deadline_s=5, quorum=2)), latency=slow
    ),
    "the first ones count": lambda: run(
        FedAvg(rounds=3, local=FIT, participation=fedkit.Participation(fraction=0.5, over_select=2.0)), latency=slow
    ),
    "nobody answers": lambda: run(FedAvg(rounds=3, local=FIT), faults=dict.fromkeys(CLIENTS, refuse)),
    "the strategy fails": lambda: run(Broken(rounds=3, local=FIT)),
    "weights travel": lambda: run(CyclicWeightTransfer(rounds=3, local=FIT), faults={"bob": refuse}),
    "work is under way at the end": lambda: run(FedBuff(rounds=3, local=FIT, concurrency=3, buffer=2)),
}


@pytest.mark.unmeasured
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("name", RUNS)
def test_once_a_run_and_its_journal_are_gone_no_model_of_it_is_left(name: str) -> None:
    models = RUNS[name]().models  # the journal itself is forgotten here
    assert models
    assert [model() for model in models if model() is not None] == []


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("name", ["all answer", "one refuses", "one is too late", "the first ones count"])
def test_at_a_commit_the_new_model_and_the_one_before_are_all_there_is(name: str) -> None:
    assert max(RUNS[name]().alive) <= 2
