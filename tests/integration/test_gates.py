"""A hop that does not keep to the gate is undone by the next client; a round that makes things worse does not stand."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import fedkit
from fedkit.errors import IncompatibleStrategy, Reason, Refused, RunError, RunFailed
from fedkit.gate import VERDICT
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.rounds.call import Refusal
from fedkit.rounds.conduct import Outcome
from fedkit.simulation.transport import SimulatedTransport
from fedkit.strategies import (
    CyclicWeightTransfer,
    FedAvg,
    FedBuff,
    Scaffold,
    SingleWeightTransfer,
    StochasticWeightTransfer,
)
from fedkit.strategy import Strategy
from fedkit.testing import Crash, Fuse, InMemoryFederation, refuse, toy_task
from fedkit.trainer.trainer import Trainer
from fedkit.weights import Weights
from fedkit.work import Answer, Fit, Update

CLIENTS = ["ann", "bob", "cyd", "dan"]
FIT = fedkit.Fit(steps=4, batch_size=8, lr=0.1)
GATE = fedkit.Gate(max_drop=0.2)
CYCLE = CyclicWeightTransfer(rounds=2, local=FIT, gate=GATE)

Fault = Callable[[Answer], Answer]


def times(factor: float) -> Fault:
    """A client that hands on something else than it trained."""

    def lie(answer: Answer) -> Answer:
        return dataclasses.replace(answer, weights=factor * answer.weights) if isinstance(answer, Update) else answer

    return lie


def once(fault: Fault, at: int) -> Fault:
    """The fault, in the client's `at`-th training only."""
    seen: list[Answer] = []

    def sometimes(answer: Answer) -> Answer:
        if not isinstance(answer, Update):
            return answer
        seen.append(answer)
        return fault(answer) if len(seen) == at else answer

    return sometimes


def run(
    strategy: Strategy,
    faults: dict[str, Fault] | None = None,
    evaluate: fedkit.Evaluation | None = None,
    **task: object,
) -> Outcome:
    world = InMemoryFederation(toy_task(**task), CLIENTS, seed=3, faults=faults, holds_out_valid=True)
    return world.run(strategy, evaluate=evaluate)


def undone(outcome: Outcome) -> list[tuple[int, str, Reason]]:
    return [(r.round, one.client, one.reason) for r in outcome.history for one in r.refusals]


# -- hops --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        CYCLE,
        CYCLE.replace(reshuffle=True),
        SingleWeightTransfer(local=FIT, gate=GATE),
        StochasticWeightTransfer(rounds=3, clients_per_round=2, local=FIT, gate=GATE),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_a_gate_that_lets_pass_changes_no_bit(strategy: Strategy) -> None:
    task = {"model": lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))}
    open_gate = strategy.replace(gate=fedkit.Gate(max_norm=1e6, max_ratio=1e6, max_drop=1e6))
    found, without = run(open_gate, **task), run(strategy.replace(gate=None), **task)
    assert found.weights == without.weights
    assert undone(found) == []
    assert [record.clients for record in found.history] == [record.clients for record in without.history]


@pytest.mark.parametrize(
    "gate", [fedkit.Gate(max_norm=3.0), fedkit.Gate(max_ratio=2.0), GATE], ids=["norm", "ratio", "score"]
)
def test_a_bad_hop_leaves_the_model_of_the_run_without_it(gate: fedkit.Gate) -> None:
    strategy = SingleWeightTransfer(local=FIT, gate=gate)
    found, without = run(strategy, {"bob": times(-30.0)}), run(strategy, {"bob": refuse})
    assert found.weights == without.weights
    assert found.history[0].clients == without.history[0].clients == ("ann", "cyd", "dan")
    assert found.history[0].examples == without.history[0].examples
    assert found.history[0].loss == without.history[0].loss
    assert undone(found) == [(1, "bob", Reason.GATE)]
    assert run(strategy.replace(gate=None), {"bob": times(-30.0)}).weights != without.weights


def test_the_record_says_who_did_not_accept_it_and_why() -> None:
    (refusal,) = run(SingleWeightTransfer(local=FIT, gate=GATE), {"bob": times(-30.0)}).history[0].refusals
    assert refusal.client == "bob"
    assert refusal.detail.startswith("cyd did not accept it: its loss on validation data went from ")
    assert refusal.detail.endswith("max_drop is 0.2")


def test_several_bad_hops_in_a_row_are_each_undone() -> None:
    liars = {"ann": times(-30.0), "bob": times(50.0), "cyd": times(-9.0)}
    found = run(SingleWeightTransfer(local=FIT, gate=GATE), liars)
    without = run(SingleWeightTransfer(local=FIT, gate=GATE), dict.fromkeys(liars, refuse))
    # ann's has nothing before it but the model at the start of the run, which bob judges it against.
    assert undone(found) == [(1, "ann", Reason.GATE), (1, "bob", Reason.GATE), (1, "cyd", Reason.GATE)]
    assert found.weights == without.weights


def test_the_last_hop_of_a_round_is_judged_by_the_first_client_of_the_next() -> None:
    found = run(CYCLE, {"dan": once(times(-30.0), at=1)})
    (refusal,) = found.history[1].refusals
    assert (refusal.client, refusal.reason) == ("dan", Reason.GATE)
    assert refusal.detail.startswith("ann did not accept it")
    assert found.history[1].clients == tuple(CLIENTS)
    assert found.test["loss"] < 1.0


def test_the_last_hop_of_a_run_is_judged_with_its_round_which_stands_without_it() -> None:
    strategy = SingleWeightTransfer(local=FIT, gate=GATE)
    found = run(strategy, {"dan": times(-30.0)}, fedkit.Evaluation(best="loss:min", max_drop=0.1))
    (record,) = found.history
    assert record.stands
    assert record.clients == ("ann", "bob", "cyd")
    assert [(one.client, one.reason) for one in record.refusals] == [("dan", Reason.GATE)]
    assert record.refusals[0].detail.startswith("the round does not stand with it: loss is ")
    assert found.weights == run(strategy, {"dan": refuse}).weights
    assert found.best.weights == found.weights


def test_a_round_that_does_not_stand_without_its_last_hop_either_is_undone_whole() -> None:
    strategy, rule = SingleWeightTransfer(local=FIT, gate=GATE), fedkit.Evaluation(best="loss:min", max_drop=0.1)
    found = run(strategy, {"cyd": times(-30.0), "dan": times(-30.0)}, rule)
    assert [r.client for r in found.history[0].refusals] == ["cyd", "dan"]  # dan did not accept cyd's
    pass_all = strategy.replace(gate=fedkit.Gate(max_norm=1e6))
    found = run(pass_all, {"cyd": times(-30.0)}, rule)
    assert [record.stands for record in found.history] == [False]


def test_nobody_judges_its_own_hop() -> None:
    """Bob ruins the model last in a round, is the first in the next, and would accept it."""

    class BobTwice(CyclicWeightTransfer):
        def order(self, federation):
            return ["ann", "bob"] if federation.round == 1 else ["bob", "cyd"]

    found = run(BobTwice(rounds=2, local=FIT, gate=fedkit.Gate(max_norm=3.0)), {"bob": times(-30.0)})
    (refusal,) = found.history[1].refusals
    assert (refusal.client, refusal.reason) == ("bob", Reason.GATE)
    assert refusal.detail.startswith("cyd did not accept it")
    assert found.history[1].clients == ("cyd",)


def test_a_skipped_client_judges_nothing_and_the_next_one_does() -> None:
    found = run(SingleWeightTransfer(local=FIT, gate=GATE), {"ann": times(-30.0), "bob": refuse})
    assert undone(found) == [(1, "bob", Reason.POLICY), (1, "ann", Reason.GATE)]
    assert found.history[0].refusals[1].detail.startswith("cyd did not")


def test_the_norm_bound_of_a_run_counts_from_the_model_that_was_trained() -> None:
    rule = fedkit.Participation(max_update_norm=100.0)
    found = run(SingleWeightTransfer(local=FIT, gate=GATE, participation=rule), {"bob": times(-9.0)})
    assert undone(found) == [(1, "bob", Reason.GATE)]
    tight = fedkit.Participation(max_update_norm=5.0)
    assert undone(run(SingleWeightTransfer(local=FIT, gate=GATE, participation=tight), {"bob": times(-9.0)})) == [
        (1, "bob", Reason.NORM)
    ]


def _counting(model: nn.Module, batches: object, site: fedkit.Site) -> float:
    assert dict(site.received) == {}
    site.state["visits"] = site.state.get("visits", np.zeros(1)) + 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * float(site.state["visits"][0]))
    return 0.0


def test_what_an_undone_visit_left_at_its_client_is_undone_too() -> None:
    gate = CYCLE.replace(gate=fedkit.Gate(max_norm=3.0))
    world = InMemoryFederation(toy_task(train=_counting), CLIENTS, seed=3, faults={"bob": once(times(-30.0), at=1)})
    found = world.run(gate)
    assert undone(found) == [(1, "bob", Reason.GATE)]
    visits = {name: int(client._store.state()["visits"][0]) for name, client in world.place.clients.items()}
    assert visits == {"ann": 2, "bob": 1, "cyd": 2, "dan": 2}


@pytest.mark.parametrize("said", [None, [9.0, 1.0], [1.0, 1.0]])
def test_a_client_that_does_not_say_what_it_made_of_the_hop_is_skipped(said: list[float] | None) -> None:
    def lie(answer: Answer) -> Answer:
        if not isinstance(answer, Update):
            return answer
        return dataclasses.replace(answer, extra={} if said is None else {VERDICT: np.array(said, np.float32)})

    strategy = SingleWeightTransfer(local=FIT, gate=GATE)
    found = run(strategy, {"cyd": lie})
    assert undone(found) == [(1, "cyd", Reason.SHAPE)]
    assert found.weights == run(strategy, {"cyd": refuse}).weights


def test_a_client_without_validation_rows_cannot_judge_and_says_so() -> None:
    def data(client: str) -> fedkit.Data:
        whole = toy_task().data(client)
        valid = whole.test if client != "cyd" else torch.utils.data.Subset(whole.test, [])
        return fedkit.Data(train=whole.train, test=whole.test, valid=valid)

    found = run(SingleWeightTransfer(local=FIT, gate=GATE), data=data)
    assert found.history[0].refusals == (Refusal("cyd", Reason.NO_DATA, "cyd has no valid rows"),)


def test_a_gate_without_the_model_before_is_refused() -> None:
    task = toy_task()
    at = Assignment("0" * 32, "run", 0, 1, "ann", FIT.replace(gate=GATE), "weights")
    with pytest.raises(Refused, match="needs the model before"):
        Trainer(task, 0, device="cpu").perform(at, Parcel(Weights.from_module(task.build(0))), {})


@pytest.mark.parametrize(
    ("strategy", "task", "says"),
    [
        (CYCLE.replace(gate=fedkit.Gate(max_drop=1, metric="auroc:max")), {}, "looks at 'auroc', which toy does not"),
        (CYCLE, {"loss": None, "train": _counting}, "with neither|neither loss nor step"),
        (FedAvg(local=FIT.replace(gate=GATE)), {}, "not to FedAvg's local work"),
        (CYCLE.replace(local=FIT.replace(gate=GATE)), {}, "not to CyclicWeightTransfer's local work"),
    ],
)
def test_a_gate_that_cannot_work_is_refused_before_anything_is_asked(
    strategy: Strategy, task: dict[str, object], says: str
) -> None:
    world = InMemoryFederation(toy_task(**task), CLIENTS)
    with pytest.raises(IncompatibleStrategy, match=says):
        world.run(strategy)
    assert world.trained == 0


def test_a_simulation_sets_validation_rows_aside_for_a_gate_that_scores() -> None:
    found = fedkit.simulate(toy_task(), SingleWeightTransfer(local=FIT, gate=GATE), clients=CLIENTS, progress=False)
    assert found.history[0].refusals == ()
    assert len(found.history[0].clients) == len(CLIENTS)


# -- rounds ------------------------------------------------------------------------------------------------------------

EVALUATE = fedkit.Evaluation(best="loss:min", max_drop=0.1)
AVERAGE = FedAvg(rounds=4, local=FIT)


@pytest.mark.parametrize(
    "strategy",
    [AVERAGE, Scaffold(rounds=4, local=FIT), CyclicWeightTransfer(rounds=4, local=FIT)],
    ids=lambda strategy: type(strategy).__name__,
)
def test_a_round_that_makes_the_model_worse_does_not_stand(strategy: Strategy) -> None:
    found = run(strategy, {"dan": once(times(-300.0), at=3)}, EVALUATE)
    assert [record.stands for record in found.history] == [True, True, False, True]
    bad = found.history[2]
    assert bad.metrics["loss"] > 1
    assert bad.rejected.startswith(f"loss is {bad.metrics['loss']:.4g} after {found.history[1].metrics['loss']:.4g} in")
    assert bad.rejected.endswith("in round 2, max_drop is 0.1")
    assert not bad.best
    assert found.test["loss"] < 1


def test_a_rejected_round_leaves_model_and_state_as_they_were() -> None:
    seen: list[tuple[int, Weights, object]] = []

    class Watched(Scaffold):
        async def round(self, federation, model):
            seen.append((federation.round, model, self.state_dict()))
            return await super().round(federation, model)

    run(Watched(rounds=4, local=FIT), {"dan": once(times(-300.0), at=3)}, EVALUATE)
    (_, before, kept), (_, after, state) = seen[2:]
    assert before == after
    assert kept == state


def test_what_clients_kept_of_a_rejected_round_is_undone() -> None:
    task = toy_task(train=_counting)
    world = InMemoryFederation(task, CLIENTS, seed=3, faults={"dan": once(times(-30000.0), at=2)}, holds_out_valid=True)
    found = world.run(FedAvg(rounds=3, local=FIT), evaluate=fedkit.Evaluation(best="loss:min", max_drop=1.0))
    assert [record.stands for record in found.history] == [True, False, True]
    assert {int(client._store.state()["visits"][0]) for client in world.place.clients.values()} == {2}


def test_the_first_round_is_compared_with_the_initial_model() -> None:
    good = run(AVERAGE).weights
    world = InMemoryFederation(
        toy_task(), CLIENTS, seed=3, faults={"ann": once(times(-300.0), at=1)}, holds_out_valid=True
    )
    found = world.run(FedAvg(rounds=1, local=FIT), evaluate=EVALUATE)
    assert [record.stands for record in found.history] == [False]
    assert found.weights == world.journal.last().model
    assert found.weights != good
    assert found.best is None


def test_rounds_that_never_stand_end_a_run_by_its_patience() -> None:
    always = {"ann": times(-300.0)}
    found = run(FedAvg(rounds=9, local=FIT), {"ann": once(times(1.0), at=1)}, EVALUATE.replace(patience=2))
    assert len(found.history) > 3
    found = run(FedAvg(rounds=9, local=FIT), always, EVALUATE)
    assert not any(record.stands for record in found.history)
    assert len(found.history) == 9


def test_a_model_that_is_not_finite_costs_its_round_and_not_the_run() -> None:
    class Diverges(FedAvg):
        async def round(self, federation, model):
            model = await super().round(federation, model)
            return model * float("inf") if federation.round == 2 else model

    found = run(Diverges(rounds=3, local=FIT), evaluate=EVALUATE)
    assert [record.rejected for record in found.history] == ["", "the new model holds NaN or infinity", ""]
    with pytest.raises(RunError, match="holds NaN or infinity; round 1's stands"):
        run(Diverges(rounds=3, local=FIT))


def test_asynchronous_work_goes_on_after_a_round_that_does_not_stand() -> None:
    strategy = FedBuff(rounds=5, local=FIT, concurrency=3, buffer=2)
    found = run(strategy, {"bob": once(times(-300.0), at=1)}, EVALUATE)
    assert sum(not record.stands for record in found.history) == 1
    assert found.test["loss"] < run(strategy, {"bob": once(times(-300.0), at=1)}).test["loss"]


def test_a_metric_nobody_reports_ends_the_run_by_name() -> None:
    with pytest.raises(RunError, match="there is no metric 'auroc'; there are loss"):
        run(AVERAGE, evaluate=fedkit.Evaluation(best="auroc:max", max_drop=0.1))


class _Away(SimulatedTransport):
    """Clients of which some are not there in some rounds, or do not answer some of its questions."""

    away: dict[int, set[str]] = {}
    silent: dict[tuple[int, int], set[str]] = {}

    def __init__(self, *args: object, **more: object) -> None:
        super().__init__(*args, **more)
        self.asked: list[tuple[int, str, Weights]] = []

    async def perform(self, assignment: Assignment, parcel: Parcel, *, race: bool) -> Answer:
        if not isinstance(assignment.work, Fit):
            models = {one.digest for at, _, one in self.asked if at == assignment.round}
            self.asked.append((assignment.round, assignment.client, parcel.model))
            nth = len(models | {parcel.model.digest})
            if assignment.client in self.silent.get((assignment.round, nth), set()):
                raise Refused(Reason.LOST, "away")
        if assignment.client in self.away.get(assignment.round, set()):
            raise Refused(Reason.LOST, "away")
        return await super().perform(assignment, parcel, race=race)


def with_absences(**changes: object) -> tuple[InMemoryFederation, Outcome]:
    world = InMemoryFederation(toy_task(), CLIENTS, seed=3, holds_out_valid=True)
    world.transport = _Away(CLIENTS, world.place, seed=3)
    for name, value in changes.items():
        setattr(world.transport, name, value)
    return world, world.run(AVERAGE, evaluate=EVALUATE)


def test_scores_are_compared_over_the_same_clients() -> None:
    world, found = with_absences(away={3: {"ann"}})
    assert [record.stands for record in found.history] == [True] * 4
    scored = {at: {(name, model.digest) for r, name, model in world.transport.asked if r == at} for at in (2, 3, 4)}
    assert len(scored[2]) == 4  # the new model at each client
    assert len(scored[3]) == 4 + 3  # and the one before at those who scored the new one
    assert len(scored[4]) == 4 + 4


def test_whoever_answers_for_one_model_only_has_no_say() -> None:
    world, found = with_absences(away={2: {"ann"}}, silent={(2, 2): {"bob"}})
    again = [name for at, name, _ in world.transport.asked if at == 2]
    assert again == [*CLIENTS, *CLIENTS[1:], *CLIENTS[2:]]
    assert found.history[1].stands


def test_a_round_that_nobody_scores_is_abandoned() -> None:
    world = InMemoryFederation(toy_task(), CLIENTS, seed=3, holds_out_valid=True)
    world.transport = _Away(CLIENTS, world.place, seed=3)
    world.transport.silent = {(2, 1): set(CLIENTS)}
    with pytest.raises(RunFailed, match=r"round 2: nobody scored the model, which max_drop=0.1 needs\. .* 3 times"):
        world.run(AVERAGE, evaluate=EVALUATE)
    assert world.journal.last().round == 1


# -- crashes -----------------------------------------------------------------------------------------------------------

CHAINS = {
    "hops": (CYCLE.replace(gate=fedkit.Gate(max_norm=3.0)), None),
    "rounds": (FedAvg(rounds=3, local=FIT), fedkit.Evaluation(best="loss:min", max_drop=0.05)),
    "both": (CYCLE.replace(gate=fedkit.Gate(max_norm=3.0)), fedkit.Evaluation(best="loss:min", max_drop=0.05)),
}


def _poison(model: nn.Module, batches: object, site: fedkit.Site) -> float:
    """Deterministic: the second visit at bob and each one at dan ruin the model."""
    _counting(model, batches, site)
    if site.client == "dan" or (site.client, site.state["visits"][0]) == ("bob", 2.0):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-30)
    return 0.0


@pytest.mark.unmeasured
@pytest.mark.parametrize("keep_answers", [False, True], ids=["asked again", "kept"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_crash_at_any_step_changes_no_verdict(name: str, keep_answers: bool) -> None:
    strategy, evaluate = CHAINS[name]

    def world() -> InMemoryFederation:
        task = toy_task(train=_poison)
        return InMemoryFederation(task, CLIENTS, seed=3, keep_answers=keep_answers, holds_out_valid=True)

    reference, steps = world(), Fuse()
    expected = reference.run(strategy, fuse=steps, evaluate=evaluate)
    assert any(record.refusals or not record.stands for record in expected.history)
    for step in range(1 + random.Random(name).randrange(5), steps.steps + 1, 5):
        crashed = world()
        with pytest.raises(Crash):
            crashed.run(strategy, fuse=Fuse(step), evaluate=evaluate)
        again = crashed.run(strategy, evaluate=evaluate)
        assert again.weights == expected.weights
        assert [facts(r) for r in again.history] == [facts(r) for r in expected.history]
        assert crashed.trained == reference.trained


def facts(record: fedkit.RoundRecord) -> fedkit.RoundRecord:
    return dataclasses.replace(record, seconds=0.0, bytes_down=0, bytes_up=0)
