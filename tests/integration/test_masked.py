"""Masked runs, simulated: the same as plain ones but for rounding, whoever drops out, and nothing else to be seen."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fedkit
from fedkit.crypto.messages import Advertised
from fedkit.crypto.ring import FULL_WEIGHT, weight_of
from fedkit.errors import ConfigError, IncompatibleStrategy, PayloadError, Reason, Refused, RunFailed
from fedkit.rounds.conduct import Outcome
from fedkit.rounds.layout import Layout
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedAvgM, FedBuff, FedSGD, Krum, Scaffold
from fedkit.strategy import Federation, Strategy
from fedkit.testing import Crash, Fuse, InMemoryFederation, refuse, toy_task
from fedkit.weights import Weights
from fedkit.work import Answer, Reply, Update

CLIENTS = [f"site-{number}" for number in range(6)]
FIT = fedkit.Fit(steps=3, batch_size=8, lr=0.1)
MASKED = fedkit.Privacy(aggregation="masked")
BOUNDS = fedkit.Standardize(bounds=[(-5.0, 5.0)] * 5)


def world(clients: list[str] = CLIENTS, **changes: Any) -> InMemoryFederation:
    return InMemoryFederation(toy_task(prepare=BOUNDS), clients, seed=3, holds_out_valid=True, **changes)


def run(strategy: Strategy, here: InMemoryFederation | None = None, privacy: fedkit.Privacy = MASKED) -> Outcome:
    return (here or world()).run(strategy, privacy=privacy, evaluate=fedkit.Evaluation(best="loss:min"))


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        FedAvg(rounds=3, local=FIT),
        FedAvgM(rounds=3, local=FIT),
        FedSGD(rounds=3, lr=0.1),
        Scaffold(rounds=3, local=FIT),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_a_masked_run_comes_to_what_a_plain_one_does_but_for_rounding(strategy: Strategy) -> None:
    masked, plain = run(strategy), run(strategy, privacy=fedkit.Privacy())
    assert np.abs(masked.weights.vector - plain.weights.vector).max() < 1e-4
    for mine, theirs in zip(masked.history, plain.history, strict=True):
        assert (mine.clients, mine.examples) == (theirs.clients, theirs.examples)
        assert mine.loss == pytest.approx(theirs.loss, abs=1e-4)
        assert dict(mine.metrics) == pytest.approx(dict(theirs.metrics), abs=1e-3)
        assert theirs.per_client
        assert not mine.per_client
    assert masked.test == pytest.approx(plain.test, abs=1e-3)


class Kept(FedAvg):
    """FedAvg that keeps each mean."""

    async def round(self, federation: Federation, model: Weights) -> Weights:
        mean = await federation.mean(self.cohort(federation), model, self.local)
        self.update = mean.update
        return model + mean.update


class Collected(Strategy):
    """Keeps what each client would send in the clear."""

    uses = frozenset({"updates"})

    async def round(self, federation: Federation, model: Weights) -> Weights:
        found = {name: u async for name, u in federation.updates(federation.clients, model, FIT)}
        self.updates = {name: found[name].weights for name in sorted(found)}
        self.rows = {name: found[name].examples for name in sorted(found)}
        return model


@pytest.mark.parametrize("bits", [12, 20])
def test_the_mean_is_off_by_no_more_than_the_formula_says(bits: int) -> None:
    single = run(Collected(rounds=1), privacy=fedkit.Privacy()).state
    rows = np.array(list(single["rows"].values()))
    cap = math.ceil(4 * rows.sum() / len(rows))
    weights = np.array([weight_of(int(count), cap) for count in rows])
    exact = sum(w * u.vector.astype(np.float64) for w, u in zip(weights, single["updates"].values(), strict=True))
    found = run(Kept(rounds=1, local=FIT), privacy=fedkit.Privacy(aggregation="masked", bits=bits, clip=2.0)).state
    bound = Layout("mean", 1, len(CLIENTS), 2.0, bits, cap).error_bound(len(CLIENTS), int(weights.sum()))
    assert bound == len(CLIENTS) * 2.0**-bits * 2.0 / (weights.sum() / FULL_WEIGHT)
    apart = np.abs(found["update"].vector - exact / weights.sum()).max()
    assert bound / 100 < apart <= bound * (1 + 1e-3)


def test_what_a_coordinator_sees_of_one_client_says_nothing() -> None:
    seen: list[np.ndarray] = []

    def peek(answer: Answer) -> Answer:
        if isinstance(answer, Update):
            seen.append(answer.weights.vector.view(np.uint32).copy())
            assert (answer.examples, answer.loss, dict(answer.extra)) == (0, None, {})
        return answer

    run(FedAvg(rounds=2, local=FIT), world(faults={"site-1": peek}))
    words = np.concatenate(seen)
    ones = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 6 * 0.5 / math.sqrt(32 * words.size)
    assert len({vector.tobytes() for vector in seen}) == len(seen)


# -- who drops out -----------------------------------------------------------------------------------------------------


def drops(step: int) -> Any:
    """A client that says nothing from its `step`-th answer on."""
    answers = 0

    def fault(answer: Answer) -> Answer:
        nonlocal answers
        answers += 1
        if answers > step:
            raise Refused(Reason.LOST, "gone")
        return answer

    return fault


# Its answers are five for the rows, five for the statistics, five for the mean: the third of each is its vector.
@pytest.mark.parametrize(
    ("step", "plain_step"),
    [(0, 0), (2, 0), (5, 0), (7, 0), (8, 1), (10, 1), (12, 1), (13, 2), (14, 2), (16, 2), (18, 2), (99, 2)],
)
def test_one_that_drops_out_at_any_step_costs_nothing_but_its_own_part(step: int, plain_step: int) -> None:
    outcome = run(FedAvg(rounds=1, local=FIT), world(faults={"site-4": drops(step)}))
    plain = run(FedAvg(rounds=1, local=FIT), world(faults={"site-4": drops(plain_step)}), privacy=fedkit.Privacy())
    without = tuple(name for name in CLIENTS if name != "site-4")
    assert outcome.history[0].clients == plain.history[0].clients == (tuple(CLIENTS) if plain_step == 2 else without)
    assert np.abs(outcome.weights.vector - plain.weights.vector).max() < 1e-3
    assert math.isfinite(outcome.test["loss"])


def test_too_few_end_the_round_and_nothing_of_it_is_opened() -> None:
    faults = dict.fromkeys(CLIENTS[:4], refuse)
    with pytest.raises(RunFailed, match="members"):
        run(FedAvg(rounds=1, local=FIT), world(faults=faults))


def test_a_member_that_answers_something_else_costs_its_own_part_only() -> None:
    def rubbish(answer: Answer) -> Answer:
        return Reply(b"rubbish") if isinstance(answer, Reply) else answer

    outcome = run(FedAvg(rounds=1, local=FIT), world(faults={"site-2": rubbish}))
    [record] = outcome.history
    assert record.clients == tuple(name for name in CLIENTS if name != "site-2")
    assert {(refusal.client, refusal.reason) for refusal in record.refusals} == {("site-2", Reason.MASKING)}


@pytest.mark.parametrize("fault", ["signature", "same key twice"])
def test_keys_that_the_others_would_refuse_cost_their_sender_alone(fault: str) -> None:
    def forge(answer: Answer) -> Answer:
        try:
            advert = Advertised.from_bytes(answer.message) if isinstance(answer, Reply) else None
        except PayloadError:
            return answer
        if advert is None:
            return answer
        change = {"signature": bytes(64)} if fault == "signature" else {"share_key": advert.mask_key}
        return Reply(replace(advert, **change).to_bytes())

    [record] = run(FedAvg(rounds=1, local=FIT), world(faults={"site-2": forge})).history
    assert record.clients == tuple(name for name in CLIENTS if name != "site-2")
    assert {(refusal.client, refusal.reason) for refusal in record.refusals} == {("site-2", Reason.MASKING)}


# -- a coordinator that dies -------------------------------------------------------------------------------------------


@pytest.mark.unmeasured
@pytest.mark.parametrize("keep_answers", [False, True], ids=["asked again", "kept"])
def test_a_crash_at_any_step_changes_neither_the_model_nor_the_work_done(keep_answers: bool) -> None:
    strategy, clients = FedAvg(rounds=2, local=FIT), CLIENTS[:4]
    reference, steps = world(clients, keep_answers=keep_answers), Fuse()
    expected = reference.run(strategy, privacy=MASKED, fuse=steps)
    for step in range(1, steps.steps + 1, 17):
        here = world(clients, keep_answers=keep_answers)
        with pytest.raises(Crash):
            here.run(strategy, privacy=MASKED, fuse=Fuse(step))
        again = here.run(strategy, privacy=MASKED)
        assert again.weights == expected.weights, f"crashed at step {step} of {steps.steps}"
        assert here.trained == reference.trained


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["masked", "bfv", "ckks"])
@pytest.mark.parametrize(
    ("strategy", "privacy", "task", "said"),
    [
        (Krum(), {}, {}, "and Krum: it needs single updates"),
        (CyclicWeightTransfer(), {}, {}, "CyclicWeightTransfer: it needs one client's model"),
        (FedBuff(), {}, {}, "FedBuff: it needs updates one by one"),
        (FedAvg(participation=fedkit.Participation(fraction=0.2)), {}, {}, "at least 3 clients, and FedAvg may ask 1"),
        (FedAvg(participation=fedkit.Participation(max_update_norm=1.0)), {}, {}, "max_update_norm"),
        (FedAvg(), {}, {"prepare": fedkit.Standardize()}, "Standardize needs bounds"),
        (
            FedAvg(),
            {"dp": fedkit.DP(level="client", noise_multiplier=1.0, delta=1e-5, few_clients=True)},
            {},
            "level client",
        ),
    ],
)
def test_what_needs_more_than_a_sum_is_refused_naming_both(
    aggregation: Any, strategy: Strategy, privacy: dict[str, Any], task: dict[str, Any], said: str
) -> None:
    rule = fedkit.Privacy(aggregation=aggregation, **privacy)
    with pytest.raises(IncompatibleStrategy, match=f"^aggregation {aggregation} .*{said}"):
        fedkit.simulate(toy_task(**task), strategy, clients=CLIENTS, privacy=rule, progress=False)


def test_a_cohort_for_which_the_bits_leave_no_room_is_refused() -> None:
    many = [f"phone-{number}" for number in range(300)]
    with pytest.raises(ConfigError, match="do not fit"):
        fedkit.simulate(
            toy_task(), FedAvg(), clients=many, privacy=fedkit.Privacy(aggregation="masked", bits=24), progress=False
        )


def test_masked_updates_may_be_private_too() -> None:
    rule = fedkit.Privacy(aggregation="masked", dp=fedkit.DP(epsilon=3.0, delta=1e-3))
    record = run(FedAvg(rounds=2, local=FIT), privacy=rule).history[-1]
    assert record.clients == tuple(CLIENTS)
    assert record.loss is None
    assert all(0.0 < epsilon <= 3.0 for epsilon in record.epsilon.values())
    assert set(record.epsilon) == set(CLIENTS)
