"""A model check of `GroupCall`: any events at any times, and what must hold after each of them."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

import fedkit
from fedkit.config import Participation
from fedkit.errors import ConfigError, Reason
from fedkit.rounds.call import Ask, Cancel, Command, GroupCall, State
from fedkit.strategies import FedAvg

CLIENTS = [f"c{i}" for i in range(6)]
OWN_REASONS = [Reason.FAILED, Reason.LOST, Reason.POLICY, Reason.NOT_FINITE, Reason.NO_DATA, Reason.SHAPE]
SECONDS = st.integers(0, 4).map(float)

participations = st.builds(
    Participation,
    quorum=st.none() | st.integers(1, 7),
    over_select=st.sampled_from([1.0, 1.3, 2.0, 10.0]),
    deadline_s=st.none() | st.integers(1, 12).map(float),
    max_update_norm=st.none() | st.just(1.0),
)


class Calls(RuleBasedStateMachine):
    """Drives one call with events in random order and compares it with what its rules promise."""

    @initialize(cohort=st.lists(st.sampled_from(CLIENTS), min_size=1, unique=True), rules=participations, now=SECONDS)
    def begin(self, cohort: list[str], rules: Participation, now: float) -> None:
        self.call = GroupCall(cohort, rules, now)
        self.now, self.cohort, self.rules = now, set(cohort), rules
        self.waiting = set(cohort)
        self.cancelled: list[str] = []
        self.states = [State.OPEN]
        self.start()

    def start(self) -> None:
        """Everybody is asked, or nobody where the quorum is out of reach."""
        out_of_reach = self.call.quorum > len(self.cohort)
        assert self.call.start() == ([] if out_of_reach else [Ask(client) for client in sorted(self.cohort)])
        if out_of_reach:
            self.states.append(State.ABANDONED)
            self.waiting = set()

    # -- events --------------------------------------------------------------------------------------------------------

    @rule(client=st.sampled_from([*CLIENTS, "stranger", ""]), norm=st.sampled_from([0.0, 1.0, 1.1, math.inf, math.nan]))
    def answer(self, client: str, norm: float) -> None:
        was_open, accepted, refusals = self.is_open, len(self.call.accepted), len(self.call.refusals)
        counts = was_open and client in self.waiting and self.now < self.call.deadline
        fits = norm <= (self.rules.max_update_norm or math.inf)
        commands = self.call.answered(client, self.now, norm=norm)
        assert (len(self.call.accepted) == accepted + 1) == (counts and fits)
        if not (counts and fits):
            said = self.call.refusals[refusals]
            assert (said.client, said.reason) == (client, self.why_not(client, counts))
        self.waiting.discard(client)
        self.obey(commands)

    def why_not(self, client: str, counts: bool) -> Reason:
        if client not in self.cohort:
            return Reason.UNKNOWN
        if counts:
            return Reason.NORM
        return Reason.DUPLICATE if client in self.call.accepted else Reason.LATE

    @rule(client=st.sampled_from([*CLIENTS, "stranger"]), reason=st.sampled_from(OWN_REASONS))
    def refuse(self, client: str, reason: Reason) -> None:
        counts, before = self.is_open and client in self.waiting, list(self.call.refusals)
        commands = self.call.refused(client, reason, self.now, "why")
        if counts:
            said = self.call.refusals[len(before)]
            assert (said.client, said.reason, said.detail) == (client, reason, "why")
        self.waiting.discard(client)
        self.obey(commands)

    @rule(seconds=SECONDS)
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.obey(self.call.tick(self.now))

    # -- what follows --------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self.call.state is State.OPEN

    def obey(self, commands: list[Command]) -> None:
        """Keeps the commands; those that cancel are exactly for whoever was waiting when the call ended."""
        assert all(isinstance(command, Cancel) for command in commands)
        cancels = [command.client for command in commands]
        if self.call.state is not self.states[-1]:
            self.states.append(self.call.state)
            assert cancels == sorted(self.waiting)
            self.waiting = set()
        else:
            assert cancels == []
        self.cancelled += cancels

    @invariant()
    def it_ends_once(self) -> None:
        assert len(self.states) <= 2
        assert self.states[-1] is self.call.state

    @invariant()
    def it_is_open_only_while_more_answers_are_wanted_and_can_come_in_time(self) -> None:
        if self.is_open and len(self.call.refusals) + len(self.call.accepted) > 0:
            assert len(self.call.accepted) < self.call.wanted
            assert self.waiting
            assert len(self.call.accepted) + len(self.waiting) >= min(self.call.quorum, len(self.cohort))

    @invariant()
    def it_is_closed_only_with_a_quorum_and_abandoned_only_without(self) -> None:
        enough = len(self.call.accepted) >= self.call.quorum
        assert self.call.state is not State.CLOSED or enough
        assert self.call.state is not State.ABANDONED or not enough

    @invariant()
    def nobody_counts_twice_and_no_more_than_wanted(self) -> None:
        assert len(set(self.call.accepted)) == len(self.call.accepted) <= self.call.wanted
        assert set(self.call.accepted) <= self.cohort
        assert 1 <= self.call.quorum <= self.call.wanted

    @invariant()
    def whoever_is_accepted_is_refused_only_as_a_duplicate(self) -> None:
        reasons = {refusal.reason for refusal in self.call.refusals if refusal.client in self.call.accepted}
        assert reasons <= {Reason.DUPLICATE}

    @invariant()
    def a_client_has_one_reason_and_after_it_is_only_late(self) -> None:
        for client in self.cohort - set(self.call.accepted):
            reasons = [refusal.reason for refusal in self.call.refusals if refusal.client == client]
            assert set(reasons[1:]) <= {Reason.LATE}, reasons
            assert bool(reasons) == (client not in self.waiting)

    @invariant()
    def at_the_end_every_client_is_accepted_or_has_a_reason(self) -> None:
        if not self.is_open:
            refused = {refusal.client for refusal in self.call.refusals}
            assert self.cohort <= set(self.call.accepted) | refused

    @invariant()
    def a_call_that_is_over_has_cancelled_each_client_at_most_once_and_none_that_answered(self) -> None:
        assert max(Counter(self.cancelled).values(), default=0) <= 1
        assert not set(self.cancelled) & set(self.call.accepted)
        assert set(self.cancelled) <= self.cohort


Calls.TestCase.settings = settings(max_examples=300, stateful_step_count=25)
TestCalls = Calls.TestCase


# -- examples ----------------------------------------------------------------------------------------------------------


def call(clients: str = "abcd", **rules: object) -> GroupCall:
    made = GroupCall(list(clients), Participation(**rules))
    made.start()
    return made


def reasons(made: GroupCall) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for refusal in made.refusals:
        found.setdefault(refusal.client, []).append(refusal.reason.value)
    return found


@pytest.mark.parametrize("cohort", [[], ["a", "a"]])
def test_a_cohort_is_one_or_more_different_clients(cohort):
    with pytest.raises(ConfigError, match="one or more different clients"):
        GroupCall(cohort, Participation())


def test_a_call_that_cannot_reach_its_quorum_asks_nobody_and_cancels_nobody():
    made = GroupCall(["a", "b"], Participation(quorum=3))
    assert made.start() == []
    assert made.state is State.ABANDONED


def test_a_call_closes_as_soon_as_enough_have_answered():
    made = call("abcdef", over_select=2.0)
    assert made.answered("e", 0.0) == []
    assert made.answered("a", 1.0) == []
    assert made.answered("c", 2.0) == [Cancel("b"), Cancel("d"), Cancel("f")]
    assert (made.state, made.accepted) == (State.CLOSED, ["e", "a", "c"])
    assert reasons(made) == {client: ["surplus"] for client in "bdf"}


def test_a_call_closes_at_its_deadline_with_those_who_have_answered_by_then():
    made = call(deadline_s=10.0)
    made.answered("a", 1.0)
    made.answered("b", 9.9)
    assert made.tick(9.99) == []
    assert made.tick(10.0) == [Cancel("c"), Cancel("d")]
    assert (made.state, made.accepted) == (State.CLOSED, ["a", "b"])


def test_a_call_below_its_quorum_is_abandoned_at_its_deadline():
    made = call(deadline_s=10.0, quorum=2)
    made.answered("a", 1.0)
    assert made.tick(10.0) == [Cancel(client) for client in "bcd"]
    assert made.state is State.ABANDONED


def test_an_answer_at_the_deadline_is_late_and_its_client_is_refused_once():
    made = call("ab", deadline_s=10.0)
    made.answered("a", 1.0)
    assert made.answered("b", 10.0) == []
    assert (made.state, made.accepted) == (State.CLOSED, ["a"])
    assert reasons(made) == {"b": ["late"]}


def test_a_call_is_abandoned_as_soon_as_the_quorum_is_out_of_reach():
    made = call(quorum=3)
    made.answered("a", 0.0)
    assert made.refused("b", Reason.FAILED, 0.0) == []
    assert made.refused("c", Reason.LOST, 0.0) == [Cancel("d")]
    assert made.state is State.ABANDONED


def test_a_call_is_made_of_no_fewer_than_its_least_number():
    for quorum, least, needed in ((None, 1, 3), (None, 5, 5), (2, 4, 4), (4, 2, 4)):
        made = GroupCall("abcdef", Participation(quorum=quorum), least=least)
        assert made.quorum == needed
    assert GroupCall("abcdef", Participation(over_select=3.0), least=4).wanted == 4


def test_nobody_is_told_that_enough_have_answered_when_too_few_have():
    made = call(quorum=3)
    made.refused("b", Reason.FAILED, 0.0)
    made.refused("c", Reason.LOST, 0.0)
    assert made.state is State.ABANDONED
    assert "surplus" not in reasons(made)["d"]


def test_the_deadline_is_not_the_reason_where_a_call_ends_because_all_have_answered():
    made = call("ab", deadline_s=10.0)
    made.refused("a", Reason.FAILED, 1.0)
    made.answered("b", 2.0)
    assert made.state is State.CLOSED
    assert reasons(made) == {"a": ["failed"]}


def test_an_update_that_is_too_large_costs_its_client_the_round_and_the_message_says_how_large():
    made = call("ab", max_update_norm=1.5)
    made.answered("a", 0.0, norm=1.5)
    made.answered("b", 0.0, norm=2.0)
    assert made.accepted == ["a"]
    assert [(r.reason, r.detail) for r in made.refusals] == [(Reason.NORM, "norm 2 is above 1.5")]


def test_a_norm_that_is_no_number_is_too_large():
    made = call("ab", max_update_norm=1.5)
    made.answered("a", 0.0, norm=math.nan)
    assert made.accepted == []


def test_over_selection_never_lowers_how_many_answers_count():
    def rows(client: str) -> fedkit.Data:
        return fedkit.Data((torch.ones(4, 2), torch.ones(4, 1)))

    task = fedkit.Task(name="all", model=lambda: nn.Linear(2, 1), data=rows, loss=nn.MSELoss())
    rules = Participation(fraction=1.0, over_select=2.0)
    result = fedkit.simulate(task, FedAvg(rounds=1, participation=rules), clients=list("abcd"), device="cpu")
    assert result.history[0].clients == ("a", "b", "c", "d")
