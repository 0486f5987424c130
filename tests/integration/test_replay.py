"""A coordinator that dies at any step is taken up again from its journal: same bits, nothing trained twice."""

from __future__ import annotations

import asyncio
import random

import pytest

import fedkit
from fedkit.errors import NonDeterministicStrategy
from fedkit.rounds.conduct import Outcome
from fedkit.strategies import (
    CoordinateMedian,
    CyclicWeightTransfer,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBuff,
    FedSGD,
    FedYogi,
    Scaffold,
    SingleWeightTransfer,
    StochasticWeightTransfer,
)
from fedkit.strategy import Federation, Strategy
from fedkit.testing import Crash, Fuse, InMemoryFederation, toy_task
from fedkit.weights import Weights

CLIENTS = ["ann", "bob", "cyd", "dan"]
FIT = fedkit.Fit(steps=2, batch_size=8, lr=0.1)
STRIDE = 4  # of the steps at which a run crashes, each strategy's beginning somewhere else
EVALUATE = fedkit.Evaluation(every=2, best="loss:min")


class GatheredChains(Strategy):
    """Two chains of hops at the same time, then their mean."""

    async def round(self, federation: Federation, model: Weights) -> Weights:
        async def chain(clients: tuple[str, ...]) -> Weights:
            end = model
            for client in clients:
                end = await federation.hop(client, end, self.local)
            return end

        ends = await asyncio.gather(chain(federation.clients[:1]), chain(federation.clients[1:]))
        return 0.5 * (ends[0] + ends[1])


class OrderMatters(Strategy):
    """Folds single updates in the order they come."""

    async def round(self, federation: Federation, model: Weights) -> Weights:
        total = 0.0 * model
        async for _, update in federation.updates(self.cohort(federation), model, self.local):
            total = 0.7 * total + update.weights
        return model + 0.3 * total


STRATEGIES = {
    "FedAvg": FedAvg(rounds=3, local=FIT),
    "FedAvg over-selected": FedAvg(
        rounds=3, local=FIT, participation=fedkit.Participation(fraction=0.5, over_select=1.5)
    ),
    "FedProx": FedAvg(rounds=2, local=FIT.replace(proximal=0.1)),
    "FedSGD": FedSGD(rounds=3, lr=0.1),
    "FedSGD with Adam": FedSGD(rounds=3, lr=0.1, server_optimizer="Adam"),
    "FedAvgM": FedAvgM(rounds=3, local=FIT),
    "FedAdam": FedAdam(rounds=2, local=FIT),
    "FedYogi": FedYogi(rounds=2, local=FIT),
    "FedAdagrad": FedAdagrad(rounds=2, local=FIT),
    "Scaffold": Scaffold(rounds=3, local=FIT),
    "FedBuff": FedBuff(rounds=4, local=FIT, concurrency=3, buffer=2),
    "CyclicWeightTransfer": CyclicWeightTransfer(rounds=2, local=FIT, reshuffle=True),
    "SingleWeightTransfer": SingleWeightTransfer(local=FIT),
    "StochasticWeightTransfer": StochasticWeightTransfer(rounds=2, clients_per_round=3, local=FIT),
    "CoordinateMedian": CoordinateMedian(rounds=2, local=FIT),
    "gated hops": CyclicWeightTransfer(rounds=2, local=FIT, gate=fedkit.Gate(max_norm=0.068, max_drop=0.1)),
    "gathered chains": GatheredChains(rounds=2, local=FIT),
    "single updates": OrderMatters(rounds=2, local=FIT),
}


def federation(*, keep_answers: bool = False) -> InMemoryFederation:
    task = toy_task(prepare=fedkit.Standardize())
    return InMemoryFederation(task, CLIENTS, seed=3, keep_answers=keep_answers, holds_out_valid=True)


def facts(outcome: Outcome) -> list[object]:
    rows = [(r.round, r.attempt, r.clients, r.examples, r.loss, dict(r.metrics), r.best) for r in outcome.history]
    return [outcome.weights, dict(outcome.test), outcome.best, rows]


@pytest.mark.unmeasured
@pytest.mark.parametrize("keep_answers", [False, True], ids=["asked again", "kept"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_crash_at_any_step_changes_neither_the_model_nor_the_work_done(name: str, keep_answers: bool) -> None:
    strategy = STRATEGIES[name]
    reference, steps = federation(keep_answers=keep_answers), Fuse()
    expected = reference.run(strategy, fuse=steps, evaluate=EVALUATE)
    first = 1 + random.Random(f"{name} {keep_answers}").randrange(STRIDE)
    for step in range(first, steps.steps + 1, STRIDE):
        world = federation(keep_answers=keep_answers)
        with pytest.raises(Crash):
            world.run(strategy, fuse=Fuse(step), evaluate=EVALUATE)
        again = world.run(strategy, evaluate=EVALUATE)
        assert facts(again) == facts(expected), f"crashed at step {step} of {steps.steps}"
        assert world.trained == reference.trained, f"crashed at step {step} of {steps.steps}"


def test_a_run_survives_many_crashes_in_a_row() -> None:
    strategy = STRATEGIES["FedBuff"]
    expected = federation().run(strategy, evaluate=EVALUATE)
    world, draw, crashes = federation(), random.Random(5), 0
    while True:
        try:
            again = world.run(strategy, fuse=Fuse(1 + draw.randrange(40)), evaluate=EVALUATE)
            break
        except Crash:
            crashes += 1
    assert crashes >= 3
    assert facts(again) == facts(expected)


class ChangesItsMind(Strategy):
    """Asks for other work than before when it is run again."""

    async def round(self, federation: Federation, model: Weights) -> Weights:
        mean = await federation.mean(federation.clients, model, FIT.replace(steps=LENGTHS.pop(0)))
        other = await federation.mean(federation.clients, model + mean.update, FIT)
        return model + other.update


LENGTHS: list[int] = []


def crashed_with_a_call_on_record(strategy: Strategy, lengths: list[int]) -> InMemoryFederation:
    """A world whose coordinator died in round 1 with one of its calls journaled."""
    for step in range(1, 200):
        LENGTHS[:] = lengths
        world = federation()
        with pytest.raises(Crash):
            world.run(strategy, fuse=Fuse(step))
        found = world.journal.open()
        if found is not None and found.round == 1 and found.entries:
            return world
    raise AssertionError("no step leaves a journaled call")


def test_a_strategy_that_asks_for_something_else_on_replay_is_named_with_both_questions() -> None:
    world = crashed_with_a_call_on_record(ChangesItsMind(rounds=1), [1])
    trained = world.trained
    LENGTHS[:] = [2]
    with pytest.raises(NonDeterministicStrategy, match=r"journal holds \[Fit\(.*steps=1.*asks for \[Fit\(.*steps=2"):
        world.run(ChangesItsMind(rounds=1))
    assert world.trained == trained


class LeavesEarly(Strategy):
    """Asks for less than before when it is run again."""

    async def round(self, federation: Federation, model: Weights) -> Weights:
        if not LENGTHS:
            return model
        LENGTHS.pop()
        mean = await federation.mean(federation.clients, model, FIT)
        second = await federation.mean(federation.clients, model + mean.update, FIT)
        return model + second.update


def test_a_strategy_that_ends_without_asking_what_the_journal_holds_is_refused() -> None:
    world = crashed_with_a_call_on_record(LeavesEarly(rounds=1), [1])
    LENGTHS[:] = []
    with pytest.raises(NonDeterministicStrategy, match="asks for \\[commit of round 1"):
        world.run(LeavesEarly(rounds=1))
