"""Sealed runs, simulated: the bits of plain ones, whoever drops out; nothing of a model at the coordinator."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
from torch import nn

import fedkit
from fedkit.crypto.sealing import SealedModel
from fedkit.errors import ConfigError, IncompatibleStrategy, ModelSealed, Reason, Refused, RunFailed
from fedkit.rounds.assignment import Assignment
from fedkit.rounds.conduct import Outcome
from fedkit.simulation.roster import open_any
from fedkit.strategies import CyclicWeightTransfer, FedAvg, SingleWeightTransfer, StochasticWeightTransfer
from fedkit.strategy import Federation, Strategy
from fedkit.testing import Crash, Fuse, InMemoryFederation, refuse, toy_task
from fedkit.weights import Weights
from fedkit.work import Answer, Fit, Update

pytestmark = pytest.mark.unmeasured  # its lines are gone over by runs between processes, too

CLIENTS = [f"site-{number}" for number in range(6)]
FIT = fedkit.Fit(steps=3, batch_size=8, lr=0.1)
SEALED = fedkit.Privacy(sealed=True)
SCORED = fedkit.Evaluation(best="loss:min")
CYCLE = CyclicWeightTransfer(rounds=2, local=FIT)


def simulated(strategy: Strategy, privacy: fedkit.Privacy = SEALED, **more: Any) -> fedkit.Result:
    given = {"seed": 3, "threads": 1, "evaluate": SCORED, "progress": False, "task": toy_task()} | more
    return fedkit.simulate(given.pop("task"), strategy, clients=CLIENTS, privacy=privacy, **given)


def world(clients: list[str] = CLIENTS, **changes: Any) -> InMemoryFederation:
    return InMemoryFederation(toy_task(), clients, seed=3, holds_out_valid=True, **changes)


def run(strategy: Strategy = CYCLE, here: InMemoryFederation | None = None, **more: Any) -> Outcome:
    return (here or world()).run(strategy, privacy=SEALED, **({"evaluate": SCORED} | more))


def told(result: fedkit.Result | Outcome) -> list[object]:
    return [
        (record.clients, record.examples, record.loss, record.metrics, record.rejected) for record in result.history
    ]


# -- what comes out ----------------------------------------------------------------------------------------------------


def poisoned(liar: str) -> fedkit.Task:
    """A task in which one site ruins the model; the others move it a little, each in its own direction."""

    def train(model: nn.Module, batches: object, site: fedkit.Site) -> float:
        for parameter in model.parameters():
            parameter.data += 50.0 if site.client == liar else 0.01 * (int(site.client[-1]) + 1)
        return 0.0

    return toy_task(train=train)


GATED = CyclicWeightTransfer(rounds=2, local=FIT, gate=fedkit.Gate(max_norm=1.0), reshuffle=True)
STANDS = fedkit.Evaluation(best="loss:min", max_drop=0.5)


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        (CyclicWeightTransfer(rounds=3, local=FIT, reshuffle=True), {}),
        (SingleWeightTransfer(local=FIT), {}),
        (StochasticWeightTransfer(rounds=3, clients_per_round=3, local=FIT), {}),
        (CyclicWeightTransfer(rounds=2, local=FIT, gate=fedkit.Gate(max_drop=0.1, max_ratio=2.0)), {}),
        (GATED, {"task": poisoned("site-2")}),
        (GATED.replace(reshuffle=False), {"task": poisoned("site-5"), "evaluate": STANDS}),
        (CYCLE, {"task": poisoned("site-5"), "evaluate": STANDS}),
    ],
    ids=[
        "cyclic",
        "single",
        "stochastic",
        "gated",
        "a bad hop undone",
        "the last one undone",
        "bad rounds undone",
    ],
)
def test_a_sealed_run_gives_the_bits_of_a_plain_one(strategy: Strategy, more: dict[str, Any]) -> None:
    plain = simulated(strategy, fedkit.Privacy(), **more)
    sealed = simulated(strategy, fedkit.Privacy(sealed=True, owner="olga"), **more)
    assert sealed.weights == plain.weights
    assert sealed.outcome.best == plain.outcome.best
    assert (told(sealed), sealed.test) == (told(plain), plain.test)
    undone = [[(one.client, one.reason) for one in record.refusals] for record in plain.history]
    assert [[(one.client, one.reason) for one in record.refusals] for record in sealed.history] == undone
    assert any(undone) == ("task" in more and strategy is not CYCLE)


def test_scores_and_statistics_may_be_masked_while_hops_are_sealed() -> None:
    rule = fedkit.Privacy(sealed=True, aggregation="masked")
    task = toy_task(prepare=fedkit.Standardize(bounds=[(-5.0, 5.0)] * 5))
    masked, plain = simulated(CYCLE, rule, task=task), simulated(CYCLE, fedkit.Privacy(), task=task)
    assert masked.weights == plain.weights
    assert not masked.history[-1].per_client
    assert masked.test == pytest.approx(dict(plain.test), abs=1e-3)


def test_each_site_may_add_noise_of_its_own() -> None:
    result = simulated(CYCLE, fedkit.Privacy(sealed=True, dp=fedkit.DP(epsilon=3.0, delta=1e-3)))
    assert all(0.0 < epsilon <= 3.0 for epsilon in result.history[-1].epsilon.values())
    assert result.history[-1].loss is None


def test_patience_ends_a_sealed_run() -> None:
    patient = fedkit.Evaluation(best="loss:min", patience=1)
    strategy = CyclicWeightTransfer(rounds=9, local=FIT.replace(lr=3.0))
    results = [simulated(strategy, privacy, evaluate=patient) for privacy in (SEALED, fedkit.Privacy())]
    assert len(results[0].history) == len(results[1].history) < 9


# -- what the coordinator has ------------------------------------------------------------------------------------------


def test_the_coordinator_has_nothing_of_a_model_after_the_first_hop() -> None:
    plain, seen = {}, []

    class Watched(CyclicWeightTransfer):
        async def round(self, federation: Federation, model: Weights) -> Weights:
            after = await super().round(federation, model)
            seen.append(after)
            return after

    def peek(answer: Answer) -> Answer:
        if isinstance(answer, Update):
            seen.append(answer.weights)
            assert dict(answer.extra) == {}
        return answer

    outcome = run(Watched(rounds=2, local=FIT), world(faults=dict.fromkeys(CLIENTS, peek)))
    assert len(seen) == 2 * len(CLIENTS) + 2
    for weights in (*seen, outcome.weights):
        plain[weights.digest] = open_any(weights).vector.tobytes()
        words = weights.vector.tobytes()
        assert not any(part in words for one in plain.values() for part in (one[:8], one[-8:]))
    with pytest.raises(ModelSealed):
        outcome.weights.to_module(toy_task().build(3))


def test_a_strategy_can_only_pass_a_sealed_model_on() -> None:
    class Averages(CyclicWeightTransfer):
        async def round(self, federation: Federation, model: Weights) -> Weights:
            after = await federation.hop(federation.clients[0], model, self.local)
            assert isinstance(after, SealedModel)
            return 0.5 * model + 0.5 * after

    with pytest.raises(ModelSealed, match="can be passed on to the next site"):
        simulated(Averages(rounds=1, local=FIT))


def test_chains_of_hops_may_go_side_by_side() -> None:
    class Chains(CyclicWeightTransfer):
        async def chain(self, federation: Federation, model: Weights, names: tuple[str, ...]) -> Weights:
            for i, name in enumerate(names, 1):
                model = await federation.hop(name, model, self.local, then=names[i:])
            return model

        async def round(self, federation: Federation, model: Weights) -> Weights:
            names = federation.clients
            both = await asyncio.gather(*(self.chain(federation, model, part) for part in (names[:3], names[3:])))
            return both[federation.round % 2]

    chains = Chains(rounds=3, local=FIT)
    assert simulated(chains).weights == simulated(chains, fedkit.Privacy()).weights


# -- who drops out -----------------------------------------------------------------------------------------------------


def dead(*names: str, after: int = 0) -> dict[str, Any]:
    """Clients who are lost from their `after`-th answer on."""

    def fault() -> Any:
        answers = 0

        def die(answer: Answer) -> Answer:
            nonlocal answers
            answers += 1
            if answers > after:
                raise Refused(Reason.LOST, "went away")
            return answer

        return die

    return {name: fault() for name in names}


@pytest.mark.parametrize("after", [0, 1], ids=["before it gave its key", "after it gave its key"])
@pytest.mark.parametrize("names", [("site-1",), ("site-1", "site-2"), ("site-5",), ("site-4", "site-5"), ("site-0",)])
def test_the_chain_goes_on_without_sites_that_are_away(names: tuple[str, ...], after: int) -> None:
    """Each is lost for good; two neighbours are as many as successors can stand in for."""
    sealed = run(SingleWeightTransfer(local=FIT), world(faults=dead(*names, after=after)), evaluate=None)
    plain = world(faults=dead(*names)).run(SingleWeightTransfer(local=FIT))
    assert open_any(sealed.weights) == plain.weights
    assert sealed.history[0].clients == plain.history[0].clients
    assert {one.client for one in sealed.history[0].refusals} == set(names)
    assert not sealed.abandoned


def test_a_round_in_which_nobody_is_left_who_could_open_the_model_is_abandoned() -> None:
    lost, once = ("site-1", "site-2", "site-3"), fedkit.Participation(attempts=1)
    strategy = SingleWeightTransfer(local=FIT, participation=once)
    with pytest.raises(RunFailed, match="nobody is left of those for whom the model was sealed") as caught:
        run(strategy, world(faults=dead(*lost, after=1)), evaluate=None)
    assert "(site-1, site-2, site-3). site-1: lost" in str(caught.value)


def test_a_round_that_was_abandoned_is_tried_again_from_the_last_committed_model() -> None:
    """Of the second round's first model, the three who could open it are lost, and are back when it is drawn anew."""
    away = dict.fromkeys(("site-1", "site-2", "site-3"), 2)

    def flaky(name: str) -> Any:
        def once(answer: Answer) -> Answer:
            away[name] -= isinstance(answer, Update)
            if isinstance(answer, Update) and away[name] == 0:  # its second visit
                raise Refused(Reason.LOST, "went away")
            return answer

        return once

    sealed = run(CYCLE, world(faults={name: flaky(name) for name in away}), evaluate=None)
    assert [(one.round, one.attempt) for one in sealed.abandoned] == [(2, 1)]
    assert open_any(sealed.weights) == world().run(CYCLE).weights


def test_a_site_that_refuses_is_passed_over_and_on_record() -> None:
    sealed = run(CYCLE, world(faults={"site-3": refuse}))
    plain = world(faults={"site-3": refuse}).run(CYCLE, evaluate=SCORED)
    assert open_any(sealed.weights) == plain.weights
    assert told(sealed) == told(plain)


class _Later(InMemoryFederation):
    """The last client comes with round 2."""

    def __init__(self) -> None:
        super().__init__(toy_task(), CLIENTS, seed=3, holds_out_valid=True)
        self.transport.present = self._present  # type: ignore[method-assign]

    def _present(self) -> list[str]:
        last = self.journal.last()
        return CLIENTS if last is not None and last.round >= 1 else CLIENTS[:-1]


class _Backwards(CyclicWeightTransfer):
    """The last by name is the first."""

    def order(self, federation: Federation) -> list[str]:
        return list(reversed(federation.clients))


def test_a_site_that_comes_later_waits_until_the_model_is_sealed_for_it_too() -> None:
    outcome = run(_Backwards(rounds=3, local=FIT), _Later())
    text = "the model was sealed before site-5 came, or for others"
    refusals = [[(one.client, one.detail) for one in record.refusals] for record in outcome.history]
    assert refusals == [[], [("site-5", text)], []]
    assert [len(record.clients) for record in outcome.history] == [5, 5, 6]
    assert [len(record.scored) for record in outcome.history] == [5, 6, 6]


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_answers", [False, True], ids=["asked again", "kept"])
@pytest.mark.parametrize("strategy", [CYCLE, GATED], ids=["plain", "gated"])
def test_a_crash_at_any_step_changes_neither_the_model_nor_the_work_done(
    strategy: Strategy, keep_answers: bool
) -> None:
    four = CLIENTS[:4]
    reference, steps = world(four, keep_answers=keep_answers), Fuse()
    expected = run(strategy, reference, fuse=steps)
    first = 1 + random.Random(f"{keep_answers} {strategy.gate}").randrange(9)
    for step in range(first, steps.steps + 1, 9):
        here = world(four, keep_answers=keep_answers)
        with pytest.raises(Crash):
            run(strategy, here, fuse=Fuse(step))
        again = run(strategy, here)
        assert open_any(again.weights) == open_any(expected.weights), f"crashed at step {step} of {steps.steps}"
        assert (told(again), again.test) == (told(expected), expected.test)
        assert here.trained == reference.trained, f"crashed at step {step} of {steps.steps}"


# -- refused before anything is asked ----------------------------------------------------------------------------------


class _Both(Strategy):
    """Hops and means."""

    uses = frozenset({"hop", "mean"})


@pytest.mark.parametrize(
    ("strategy", "privacy", "why"),
    [
        (FedAvg(local=FIT), SEALED, r"sealed and FedAvg, which uses mean: .* aggregation='masked'"),
        (_Both(local=FIT), SEALED, "sealed and _Both, which uses mean"),
        (CYCLE.replace(participation=fedkit.Participation(max_update_norm=1.0)), SEALED, "sees no model's norm"),
        (CYCLE, fedkit.Privacy(aggregation="masked"), "masked and CyclicWeightTransfer: .* with sealed=True"),
        (CYCLE, fedkit.Privacy(sealed=True, dp=fedkit.DP(epsilon=3, delta=1e-3, level="client")), "sealed and dp at"),
    ],
    ids=["mean", "mean too", "norm", "masked alone", "client-level"],
)
def test_what_cannot_be_sealed_is_refused_with_the_way_out(
    strategy: Strategy, privacy: fedkit.Privacy, why: str
) -> None:
    with pytest.raises(IncompatibleStrategy, match=why):
        simulated(strategy, privacy)


def test_only_what_is_sealed_has_an_owner() -> None:
    with pytest.raises(ConfigError, match="owner has a meaning with sealed=True"):
        fedkit.Privacy(owner="olga")
    with pytest.raises(ConfigError, match="owner_box is the key of an owner"):
        fedkit.Privacy(sealed=True, owner_box="00")


def test_vectors_of_a_task_that_would_travel_beside_the_model_are_refused() -> None:
    def train(model: nn.Module, batches: object, site: fedkit.Site) -> float:
        site.send("statistics", np.zeros(3))
        return 0.0

    result = simulated(SingleWeightTransfer(local=FIT), task=toy_task(train=train), evaluate=None)
    assert {(one.client, one.reason) for one in result.history[0].refusals} == {
        (name, Reason.SHAPE) for name in CLIENTS
    }


def test_a_coordinator_that_asks_for_a_hop_unsealed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can have the first one in the clear where the site's policy lets it, and no other."""
    about: list[Assignment] = []

    class Stripped(InMemoryFederation):
        def __init__(self) -> None:
            super().__init__(toy_task(), CLIENTS, seed=3)
            perform = self.place.perform

            async def unsealed(assignment: Assignment, parcel: Any) -> Answer:
                if isinstance(assignment.work, Fit) and assignment.returns == "weights" and about:
                    assignment = _without(assignment)
                about.append(assignment)
                return await perform(assignment, parcel)

            self.place.perform = unsealed  # type: ignore[method-assign]

    def _without(assignment: Assignment) -> Assignment:
        from dataclasses import replace

        return replace(assignment, sealing=None)

    outcome = run(SingleWeightTransfer(local=FIT), Stripped(), evaluate=None)
    assert outcome.weights.manifest.is_sealed is False
    assert all(one.reason is Reason.SHAPE for one in outcome.history[0].refusals)
