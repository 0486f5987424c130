"""What rounds do when clients fail, answer nonsense, or are too few."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

import fedkit
from fedkit.errors import ConfigError, Reason, RunError, RunFailed
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedBuff
from fedkit.strategy import Federation, Strategy
from fedkit.testing import InMemoryFederation, refuse, toy_task
from fedkit.weights import Entry, Manifest, Weights
from fedkit.work import Answer, Update

CLIENTS = ["ann", "bob", "cyd", "dan", "eve"]
FIT = fedkit.Fit(steps=3, batch_size=8, lr=0.1)


def with_weights(change: Callable[[Weights], Weights]) -> Callable[[Answer], Answer]:
    return with_update(lambda update: dataclasses.replace(update, weights=change(update.weights)))


def with_update(change: Callable[[Update], Update]) -> Callable[[Answer], Answer]:
    return lambda answer: change(answer) if isinstance(answer, Update) else answer


def poisoned(value: float) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        vector = weights.vector.copy()
        vector[3] = value
        return weights.with_vector(vector)

    return change


FAULTS = {
    "NaN": (with_weights(poisoned(float("nan"))), Reason.NOT_FINITE),
    "infinity": (with_weights(poisoned(float("inf"))), Reason.NOT_FINITE),
    "too large": (with_weights(lambda w: 1e6 * w), Reason.NORM),
    "another shape": (with_weights(lambda w: Weights(Manifest((Entry("w", (3,)),)), np.zeros(3))), Reason.SHAPE),
    "broadcastable shape": (with_weights(lambda w: Weights(Manifest((Entry("w", (1,)),)), np.zeros(1))), Reason.SHAPE),
    "negative examples": (lambda a: dataclasses.replace(a, examples=-5), Reason.EXAMPLES),
    "absurd examples": (lambda a: dataclasses.replace(a, examples=10**15), Reason.EXAMPLES),
    "no examples": (lambda a: dataclasses.replace(a, examples=0), Reason.NO_DATA),
    "examples as a float": (lambda a: dataclasses.replace(a, examples=3.0), Reason.EXAMPLES),
    "NaN loss": (with_update(lambda a: dataclasses.replace(a, loss=float("nan"))), Reason.NOT_FINITE),
    "an extra vector nobody asked for": (
        with_update(lambda a: dataclasses.replace(a, extra={"x": np.zeros(2, np.float32)})),
        Reason.SHAPE,
    ),
    "a refusal": (refuse, Reason.POLICY),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_update_costs_that_client_alone_and_leaves_the_bits_of_the_run_without_it(name: str) -> None:
    fault, reason = FAULTS[name]
    strategy = FedAvg(rounds=2, local=FIT, participation=fedkit.Participation(max_update_norm=50.0, quorum=2))
    found = InMemoryFederation(toy_task(), CLIENTS, faults={"cyd": fault}).run(strategy)
    without = InMemoryFederation(toy_task(), [c for c in CLIENTS if c != "cyd"]).run(strategy)
    assert found.weights == without.weights
    assert [(r.client, r.reason) for record in found.history for r in record.refusals] == [("cyd", reason)] * 2


def test_a_client_whose_code_raises_costs_its_contribution_only() -> None:
    def data(client: str) -> fedkit.Data:
        if client == "bob":
            raise ZeroDivisionError("bob's disk is empty")
        return toy_task().data(client)

    found = InMemoryFederation(toy_task(data=data), CLIENTS).run(FedAvg(rounds=1, local=FIT))
    (refusal,) = found.history[0].refusals
    assert (refusal.client, refusal.reason) == ("bob", Reason.FAILED)
    assert "ZeroDivisionError: bob's disk is empty" in refusal.detail


def test_below_the_quorum_a_round_is_abandoned_tried_again_and_then_fails_by_name() -> None:
    rule = fedkit.Participation(quorum=4, attempts=3)
    world = InMemoryFederation(toy_task(), CLIENTS, faults={"ann": refuse, "bob": refuse})
    with pytest.raises(
        RunFailed, match=r"of 5 clients asked 2 will not contribute, the quorum is 4\. ann: policy .* tried 3 times"
    ):
        world.run(FedAvg(rounds=2, local=FIT, participation=rule))
    assert [(record.round, record.attempt) for record in world.journal.abandoned()] == [(1, 1), (1, 2), (1, 3)]
    assert world.journal.last().round == 0


def test_an_abandoned_attempt_rolls_back_the_strategy_and_draws_anew() -> None:
    calls: list[tuple[str, ...]] = []

    class Counting(Strategy):
        async def round(self, federation: Federation, model: Weights) -> Weights:
            self.count = getattr(self, "count", 0) + 1
            cohort = self.cohort(federation)
            calls.append((*cohort, str(self.count)))
            mean = await federation.mean(cohort, model, self.local)
            return model + mean.update

    rule = fedkit.Participation(fraction=0.4, quorum=2, attempts=99)
    world = InMemoryFederation(toy_task(), CLIENTS, seed=1, faults=dict.fromkeys(["ann", "bob", "cyd"], refuse))
    world.run(Counting(rounds=1, local=FIT, participation=rule))
    assert len(calls) > 1
    assert len(set(calls)) > 1
    assert all(call[-1] == "1" for call in calls)
    assert world.journal.last().state == {"count": 1}


def test_a_client_that_cannot_be_visited_is_skipped_on_record() -> None:
    strategy = CyclicWeightTransfer(rounds=1, local=FIT)
    found = InMemoryFederation(toy_task(), CLIENTS, faults={"cyd": refuse}).run(strategy)
    without = InMemoryFederation(toy_task(), [c for c in CLIENTS if c != "cyd"]).run(strategy)
    assert found.weights == without.weights
    assert [r.client for r in found.history[0].refusals] == ["cyd"]


def test_a_deadline_closes_the_call_and_the_late_do_not_count() -> None:
    rule = fedkit.Participation(deadline_s=10.0, quorum=2)
    latency = {"ann": 1.0, "bob": 9.9, "cyd": 10.0, "dan": 500.0, "eve": float("inf")}
    world = InMemoryFederation(toy_task(), CLIENTS, latency=lambda assignment: latency[assignment.client])
    found = world.run(FedAvg(rounds=1, local=FIT, participation=rule))
    assert found.history[0].clients == ("ann", "bob")
    reasons = {r.client: r.reason for r in found.history[0].refusals}
    assert reasons == {"cyd": Reason.DEADLINE, "dan": Reason.DEADLINE, "eve": Reason.LOST}


def test_of_an_over_selected_cohort_the_first_ones_count() -> None:
    rule = fedkit.Participation(fraction=0.6, over_select=1.6)
    speed = {"ann": 5.0, "bob": 1.0, "cyd": 4.0, "dan": 2.0, "eve": 3.0}
    world = InMemoryFederation(toy_task(), CLIENTS, latency=lambda assignment: speed[assignment.client])
    found = world.run(FedAvg(rounds=1, local=FIT, participation=rule))
    assert found.history[0].clients == ("bob", "dan", "eve")
    assert {r.client: r.reason for r in found.history[0].refusals} == {"ann": Reason.SURPLUS, "cyd": Reason.SURPLUS}


@pytest.mark.parametrize("seed", range(5))
def test_the_model_does_not_depend_on_the_order_of_arrival(seed: int) -> None:
    draw = np.random.default_rng(seed)
    speed = {client: float(draw.uniform(0.1, 9.0)) for client in CLIENTS}
    task = toy_task(prepare=fedkit.Standardize())
    plain = InMemoryFederation(task, CLIENTS, holds_out_valid=True).run(FedAvg(rounds=2, local=FIT))
    mixed = InMemoryFederation(task, CLIENTS, holds_out_valid=True, latency=lambda a: speed[a.client])
    assert mixed.run(FedAvg(rounds=2, local=FIT)).weights == plain.weights


def test_fedbuff_goes_on_without_clients_that_refuse() -> None:
    world = InMemoryFederation(toy_task(), CLIENTS, faults={"ann": refuse})
    found = world.run(FedBuff(rounds=5, concurrency=3, buffer=2, local=FIT))
    assert len(found.history) == 5
    assert all("ann" not in record.clients for record in found.history)
    assert any(r.client == "ann" for record in found.history for r in record.refusals)


def test_asynchronous_updates_above_the_norm_do_not_count() -> None:
    huge = with_weights(lambda weights: 1e6 * weights)
    rule = fedkit.Participation(max_update_norm=50.0)
    world = InMemoryFederation(toy_task(), CLIENTS, faults={"ann": huge})
    found = world.run(FedBuff(rounds=5, concurrency=3, buffer=2, local=FIT, participation=rule))
    refusals = [(r.client, r.reason) for record in found.history for r in record.refusals]
    assert set(refusals) == {("ann", Reason.NORM)}
    assert all("ann" not in record.clients for record in found.history)


def test_fedbuff_fails_by_name_where_every_client_refuses() -> None:
    world = InMemoryFederation(toy_task(), ["ann", "bob"], faults={"ann": refuse, "bob": refuse})

    class Once(FedBuff):
        def keep_busy(self, federation: Federation, model: Weights) -> None:
            if not getattr(self, "begun", False):
                super().keep_busy(federation, model)
            self.begun = True

    with pytest.raises(RunFailed, match="no work is under way"):
        world.run(Once(rounds=1, concurrency=2, buffer=1, local=FIT))


class Returns(Strategy):
    """Returns whatever it is told to."""

    async def round(self, federation: Federation, model: Weights) -> Weights:
        await federation.mean(federation.clients, model, self.local)
        return RETURNED[0](model)


RETURNED: list[Callable[[Weights], object]] = []


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda model: None, "returned NoneType where Weights are due"),
        (lambda model: model * float("nan"), "NaN or infinity; round 0's stands"),
    ],
)
def test_a_strategy_that_returns_no_usable_model_is_stopped_before_the_commit(
    returned: Callable[[Weights], object], words: str
) -> None:
    RETURNED[:] = [returned]
    world = InMemoryFederation(toy_task(), CLIENTS)
    with pytest.raises(RunError, match=words):
        world.run(Returns(rounds=1, local=FIT))
    assert world.journal.last().round == 0


def test_a_cohort_may_hold_only_the_rounds_clients() -> None:
    class Stranger(Strategy):
        async def round(self, federation: Federation, model: Weights) -> Weights:
            await federation.mean(["ann", "zoe"], model, self.local)
            return model

    world = InMemoryFederation(toy_task(), CLIENTS)
    with pytest.raises(ConfigError, match=r"round 1: 'zoe' is not one of the round's clients \(ann, bob"):
        world.run(Stranger(rounds=1, local=FIT))
    assert world.trained == 0


def test_site_state_of_an_abandoned_attempt_is_undone() -> None:
    def train(model: object, batches: object, site: fedkit.Site) -> None:
        site.state["visits"] = site.state.get("visits", np.zeros(1)) + 1
        site.send("visits", site.state["visits"])

    seen: list[float] = []

    class Watches(Strategy):
        async def round(self, federation: Federation, model: Weights) -> Weights:
            mean = await federation.mean(self.cohort(federation), model, self.local)
            seen.append(float(mean.extra["visits"][0]))
            if len(seen) == 1:
                await federation.mean(["ann"], model, self.local)
            return model

    rule = fedkit.Participation(quorum=2, attempts=3)
    task = toy_task(loss=None, train=train)
    world = InMemoryFederation(task, CLIENTS)
    world.run(Watches(rounds=2, local=FIT, participation=rule))
    assert seen == [1.0, 1.0, 2.0]
