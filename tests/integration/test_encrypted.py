"""Encrypted runs, simulated: the bits of masked ones, whoever drops out or lies, and no sum opened twice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

import fedkit
from fedkit.crypto import seal
from fedkit.crypto.ceremony import LETTER_BYTES, Delivery
from fedkit.crypto.chunks import TAG_BYTES, Scheme
from fedkit.errors import ConfigError, Reason, Refused
from fedkit.rounds.assignment import Assignment, MaskStep, Parcel
from fedkit.rounds.conduct import Outcome
from fedkit.strategies import FedAvg, FedAvgM, FedSGD, Scaffold
from fedkit.strategy import Strategy
from fedkit.testing import Crash, Fuse, InMemoryFederation, toy_task
from fedkit.weights import Weights
from fedkit.work import Answer, Fit, Reply, Update
from tests.integration.test_masked import CLIENTS, FIT, Collected, Kept, world
from tests.integration.test_masked import run as masked_run

pytestmark = pytest.mark.unmeasured  # its lines are gone over by runs between processes, too

BFV = fedkit.Privacy(aggregation="bfv", bits=20)
MASKED = fedkit.Privacy(aggregation="masked", bits=20)
CKKS = fedkit.Privacy(aggregation="ckks")
ONE = FedAvg(rounds=1, local=FIT)


def run(strategy: Strategy, here: InMemoryFederation | None = None, privacy: fedkit.Privacy = BFV) -> Outcome:
    return masked_run(strategy, here, privacy)


def faulty(step: str, fault: Callable[[Assignment, Answer], Answer], *names: str) -> InMemoryFederation:
    """A federation in which some clients' answers to one step of each mean pass through `fault`."""
    return watched(world(), step, fault, *names)


def watched(
    here: InMemoryFederation, step: str, fault: Callable[[Assignment, Answer], Answer], *names: str
) -> InMemoryFederation:
    """The federation, in which answers to one more step do so."""
    perform = here.place.perform

    async def changed(assignment: Assignment, parcel: Parcel) -> Answer:
        answer = await perform(assignment, parcel)
        masking = assignment.masking
        is_meant = masking is not None and masking.step == step and isinstance(assignment.work, Fit)
        return fault(assignment, answer) if is_meant and assignment.client in names else answer

    here.place.perform = changed  # type: ignore[method-assign]
    return here


def gone(assignment: Assignment, answer: Answer) -> Answer:
    raise Refused(Reason.LOST, "gone")


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        FedAvg(rounds=3, local=FIT),
        FedAvgM(rounds=2, local=FIT),
        FedSGD(rounds=2, lr=0.1),
        Scaffold(rounds=2, local=FIT),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_bfv_gives_the_bits_of_masking(strategy: Strategy) -> None:
    encrypted, masked = run(strategy), run(strategy, privacy=MASKED)
    assert encrypted.weights == masked.weights
    assert encrypted.test == masked.test
    for mine, theirs in zip(encrypted.history, masked.history, strict=True):
        assert (mine.clients, mine.examples, mine.loss) == (theirs.clients, theirs.examples, theirs.loss)
        assert mine.metrics == theirs.metrics
        assert not mine.per_client


def test_ckks_means_are_off_by_less_than_a_millionth_of_the_clip() -> None:
    single = run(Collected(rounds=1), privacy=fedkit.Privacy()).state
    weights = [4096 * rows // max(single["rows"].values()) for rows in single["rows"].values()]
    assert len(set(weights)) > 1
    found = run(Kept(rounds=1, local=FIT), privacy=CKKS)
    uniform = run(Uniform(rounds=1, local=FIT), privacy=CKKS)
    exact = np.mean([update.vector.astype(np.float64) for update in single["updates"].values()], axis=0)
    assert np.abs(uniform.state["update"].vector - exact).max() < 1e-6
    masked = run(Kept(rounds=1, local=FIT), privacy=fedkit.Privacy(aggregation="masked", bits=24, clip=1.0))
    assert np.abs(found.state["update"].vector - masked.state["update"].vector).max() < 1e-6
    assert found.history[0].examples == masked.history[0].examples


class Uniform(FedAvg):
    """FedAvg in which all clients weigh the same; keeps each mean."""

    async def round(self, federation: Any, model: Weights) -> Weights:
        mean = await federation.mean(self.cohort(federation), model, self.local, weights="uniform")
        self.update = mean.update
        return model + mean.update


def test_what_a_coordinator_sees_of_one_client_says_nothing() -> None:
    seen: list[bytes] = []

    def peek(assignment: Assignment, answer: Answer) -> Answer:
        assert isinstance(answer, Update)
        assert (answer.examples, answer.loss, dict(answer.extra)) == (0, None, {})
        data = answer.weights.vector.tobytes()
        size = Scheme("bfv", 4).seeded_bytes
        seen.extend(data[start + TAG_BYTES : start + size] for start in range(0, len(data), size))
        return answer

    run(FedAvg(rounds=2, local=FIT), faulty("encrypt", peek, *CLIENTS))
    assert len(seen) == len(set(seen)) == 2 * len(CLIENTS)
    low = np.concatenate([np.frombuffer(chunk[64:], np.uint8).reshape(-1, 5)[:, :4].reshape(-1) for chunk in seen])
    assert abs(np.unpackbits(low).mean() - 0.5) < 6 * 0.5 / np.sqrt(8 * low.size)


@pytest.mark.parametrize("aggregation", ["masked", "bfv"])
def test_noise_is_asked_and_paid_for_where_the_work_is_done_and_in_no_other_step(aggregation: Any) -> None:
    asked: set[tuple[str, bool]] = set()

    def note(assignment: Assignment, answer: Answer) -> Answer:
        assert assignment.masking is not None
        asked.add((assignment.masking.step, assignment.private is not None))
        return answer

    here = world()
    for step in get_args(MaskStep):
        watched(here, step, note, *CLIENTS)
    run(ONE, here, fedkit.Privacy(aggregation=aggregation, dp=fedkit.DP(epsilon=3.0, delta=1e-3)))
    assert {step for step, is_private in asked if is_private} == {{"masked": "vector", "bfv": "encrypt"}[aggregation]}
    assert len(asked) == {"masked": 5, "bfv": 6}[aggregation]


# -- who drops out, and who lies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["offer", "receive", "encrypt"])
def test_one_that_drops_out_before_it_has_encrypted_costs_its_own_part(step: str) -> None:
    outcome = run(ONE, faulty(step, gone, "site-4"))
    plain = run(ONE, faulty("vector", gone, "site-4"), privacy=MASKED)
    assert outcome.history[0].clients == tuple(name for name in CLIENTS if name != "site-4")
    assert outcome.weights == plain.weights


@pytest.mark.parametrize("step", ["attest", "open"])
def test_those_that_drop_out_after_that_cost_nothing(step: str) -> None:
    outcome = run(ONE, faulty(step, gone, "site-2", "site-4"))
    assert outcome.history[0].clients == tuple(CLIENTS)
    assert outcome.weights == run(ONE).weights


def test_another_member_makes_the_key_where_one_does_not() -> None:
    asked: list[str] = []

    def note(assignment: Assignment, answer: Answer) -> Answer:
        asked.append(assignment.client)
        if len(asked) == 1:
            raise Refused(Reason.FAILED, "no memory")
        return Reply(b"rubbish") if len(asked) == 2 else answer

    outcome = run(ONE, faulty("deliver", note, *CLIENTS))
    assert len(asked) == len(set(asked)) == 3
    assert outcome.weights == run(ONE).weights
    assert [refusal.reason for refusal in outcome.history[0].refusals] == [Reason.FAILED, Reason.ENCRYPTION]


def test_a_member_that_makes_keys_nobody_can_open_costs_an_attempt_and_no_run() -> None:
    """Nobody but the recipients sees that; it is another one's turn in the next attempt."""
    liars: set[str] = set()

    def spoil(assignment: Assignment, answer: Answer) -> Answer:
        liars.add(assignment.client)
        delivery = Delivery.from_bytes(answer.message) if isinstance(answer, Reply) else None
        if delivery is None or liars != {assignment.client}:
            return answer
        return Reply(replace(delivery, letters=dict.fromkeys(delivery.letters, bytes(LETTER_BYTES))).to_bytes())

    here = faulty("deliver", spoil, *CLIENTS)
    outcome = run(ONE, here)
    assert len(liars) == 2
    assert [(record.attempt, record.stands) for record in outcome.history] == [(2, True)]
    assert outcome.history[0].clients == tuple(CLIENTS)


def flipped(assignment: Assignment, answer: Answer) -> Answer:
    """A coefficient beyond its modulus."""
    return _changed(answer, lambda data: data[:200] + b"\xff" * 7 + data[207:])


def untagged(assignment: Assignment, answer: Answer) -> Answer:
    """A chunk of another key."""
    return _changed(answer, lambda data: bytes([data[0] ^ 1]) + data[1:])


def empty(assignment: Assignment, answer: Answer) -> Answer:
    return _changed(answer, lambda data: bytes(len(data)))


def _changed(answer: Answer, change: Callable[[bytes], bytes]) -> Answer:
    assert isinstance(answer, Update)
    data = np.frombuffer(change(answer.weights.vector.tobytes()), np.float32)
    return Update(Weights(answer.weights.manifest, data), 0)


@pytest.mark.parametrize("fault", [flipped, untagged, empty], ids=lambda fault: fault.__name__)
def test_what_is_no_ciphertext_of_this_sum_costs_its_sender_alone_and_never_reaches_native_code(fault: Any) -> None:
    outcome = run(ONE, faulty("encrypt", fault, "site-4"))
    [record] = outcome.history
    assert record.clients == tuple(name for name in CLIENTS if name != "site-4")
    assert [(one.client, one.reason) for one in record.refusals] == [("site-4", Reason.ENCRYPTION)]
    assert outcome.weights == run(ONE, faulty("vector", gone, "site-4"), privacy=MASKED).weights


def test_one_that_says_something_else_of_the_sum_is_outvoted() -> None:
    """Whoever opens it first lies; a third is asked, and two who say the same decide."""
    lied: list[str] = []

    def lie(assignment: Assignment, answer: Answer) -> Answer:
        if lied:
            return answer
        lied.append(assignment.client)
        return _changed(answer, lambda data: bytes([data[0] ^ 1]) + data[1:])

    outcome = run(ONE, faulty("open", lie, *CLIENTS))
    assert lied
    assert outcome.weights == run(ONE).weights


def test_a_client_that_encrypts_noise_spoils_its_round_which_is_passed_over() -> None:
    """Its chunks are well formed; what comes out is no sum, and no second sum of that round is opened."""

    def noise(assignment: Assignment, answer: Answer) -> Answer:
        if assignment.round != 1:
            return answer
        return _changed(answer, lambda data: data[:TAG_BYTES] + bytes(64) + data[TAG_BYTES + 64 :])

    opened: list[int] = []
    here = faulty("encrypt", noise, "site-4")
    inner = here.place.perform

    async def noting(assignment: Assignment, parcel: Parcel) -> Answer:
        if assignment.masking is not None and assignment.masking.step == "open" and isinstance(assignment.work, Fit):
            opened.append(assignment.round)
        return await inner(assignment, parcel)

    here.place.perform = noting  # type: ignore[method-assign]
    outcome = run(FedAvg(rounds=3, local=FIT), here)
    assert [bool(record.rejected) for record in outcome.history] == [True, False, False]
    assert "no 2 of the members asked say the same" in outcome.history[0].rejected
    assert not outcome.abandoned
    assert opened.count(1) <= 5
    assert opened.count(2) == opened.count(3) == 2


def test_a_round_whose_sum_too_few_sign_is_passed_over_and_the_run_goes_on() -> None:
    def lost(assignment: Assignment, answer: Answer) -> Answer:
        if assignment.round == 1:
            raise Refused(Reason.LOST, "gone")
        return answer

    outcome = run(FedAvg(rounds=2, local=FIT), faulty("attest", lost, *CLIENTS[:3]))
    assert "3 members signed the encrypted sum, and 4 are needed" in outcome.history[0].rejected
    assert outcome.history[1].stands
    assert outcome.history[1].clients == tuple(CLIENTS)


class Twice(FedAvg):
    """Asks for two means of the same round."""

    async def round(self, federation: Any, model: Weights) -> Weights:
        await federation.mean(self.cohort(federation), model, self.local)
        mean = await federation.mean(self.cohort(federation)[:4], model, self.local)
        return model + mean.update


def test_no_second_sum_of_updates_is_opened_in_a_round() -> None:
    """Two that differ in who is in them would tell the others' updates."""
    outcome = run(Twice(rounds=2, local=FIT))
    assert all("0 members signed" in record.rejected for record in outcome.history)
    assert "another sum of that round was signed before" in outcome.history[0].rejected
    assert run(Twice(rounds=1, local=FIT), privacy=MASKED).history[0].stands


# -- a coordinator that dies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_answers", [False, True], ids=["asked again", "kept"])
def test_a_crash_at_any_step_changes_neither_the_model_nor_the_work_done(keep_answers: bool) -> None:
    strategy, clients = FedAvg(rounds=1, local=FIT), CLIENTS[:4]
    reference, steps = world(clients, keep_answers=keep_answers), Fuse()
    expected = reference.run(strategy, privacy=BFV, fuse=steps)
    for step in range(1, steps.steps + 1, 37):
        here = world(clients, keep_answers=keep_answers)
        with pytest.raises(Crash):
            here.run(strategy, privacy=BFV, fuse=Fuse(step))
        again = here.run(strategy, privacy=BFV)
        assert again.weights == expected.weights, f"crashed at step {step} of {steps.steps}"
        assert here.trained == reference.trained


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_a_cohort_whose_noise_leaves_no_room_is_refused() -> None:
    many = [f"phone-{number}" for number in range(700)]
    with pytest.raises(ConfigError, match="take fewer bits or clients, or masked"):
        fedkit.simulate(toy_task(), FedAvg(), clients=many, privacy=BFV, progress=False)


def test_without_tenseal_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    monkeypatch.setattr(seal.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedkit\[he\]'"):
        fedkit.simulate(toy_task(), FedAvg(), clients=CLIENTS, privacy=BFV, progress=False)
    result = fedkit.simulate(toy_task(), ONE, clients=CLIENTS, privacy=MASKED, progress=False)
    assert result.history[0].clients == tuple(CLIENTS)
