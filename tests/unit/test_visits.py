"""What a site counts: rounds a day, evaluations a round, questions about the data a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedkit.client.visits import Visit, Visits
from fedkit.errors import Reason, Refused, StorageError
from fedkit.policy import Policy

HOUR = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def visits(tmp_path: Path, clock: Clock) -> Visits:
    return Visits(tmp_path / "visits.db", clock)


def fit(number: int, run: str = "one", round: int | None = None, data: str = "heart") -> Visit:
    return Visit(f"{run}-{number}-{data}", run, number if round is None else round, "fit", data, "")


def ask(number: int, question: str, run: str = "one", data: str = "heart") -> Visit:
    return Visit(f"{run}-q{number}-{data}", run, 0, "summarize", data, question)


def score(number: int, round: int = 1) -> Visit:
    return Visit(f"e{number}-{round}", "one", round, "evaluate", "heart", "")


def refused(visits: Visits, visit: Visit, policy: Policy) -> str:
    with pytest.raises(Refused) as caught:
        visits.admit(visit, policy)
    assert caught.value.reason is Reason.POLICY
    return caught.value.detail


def test_rounds_of_a_day_are_counted_for_each_data_set_over_all_runs(visits: Visits, clock: Clock) -> None:
    policy = Policy(rounds_per_day=2)
    visits.admit(fit(1), policy)
    visits.admit(fit(1, "two"), policy)
    expected = "rounds within 24 hours: 3 (allowed: at most 2)"
    assert refused(visits, fit(2), policy) == expected
    assert refused(visits, fit(1, "three"), policy) == expected
    visits.admit(fit(1), policy)  # the same assignment again
    visits.admit(fit(9, round=1), policy)  # another one of a round that is counted
    visits.admit(fit(2, data="lung"), policy)
    clock.now += 25 * HOUR
    visits.admit(fit(2), policy)


def test_evaluations_are_counted_for_each_round(visits: Visits) -> None:
    policy = Policy(evaluations_per_round=2)
    for number in (1, 2, 1):
        visits.admit(score(number), policy)
    assert refused(visits, score(3), policy) == "evaluations in one round: 3 (allowed: at most 2)"
    visits.admit(score(3, round=2), policy)


def test_one_question_about_the_data_is_answered_in_a_run(visits: Visits) -> None:
    visits.admit(ask(1, "moments"), Policy())
    visits.admit(ask(2, "moments"), Policy())  # the same question of another attempt
    expected = "questions about the data in one run: 2 (allowed: at most 1)"
    assert refused(visits, ask(3, "histogram"), Policy()) == expected
    visits.admit(ask(3, "histogram", data="lung"), Policy())
    visits.admit(ask(3, "histogram", run="two"), Policy())


def test_another_question_is_answered_if_it_is_noised_and_charged(visits: Visits) -> None:
    visits.admit(ask(1, "moments"), Policy())
    visits.admit(dataclasses.replace(ask(2, "histogram"), is_charged=True), Policy())
    assert refused(visits, ask(3, "histogram"), Policy())


def test_what_was_asked_is_not_forgotten_with_the_process(tmp_path: Path, visits: Visits, clock: Clock) -> None:
    visits.admit(ask(1, "moments"), Policy())
    visits.admit(fit(1), Policy(rounds_per_day=1))
    clock.now += HOUR
    again = Visits(tmp_path / "visits.db", clock)
    assert refused(again, ask(2, "histogram"), Policy())
    assert refused(again, fit(2), Policy(rounds_per_day=1))
    clock.now += 400 * 24 * HOUR
    again = Visits(tmp_path / "visits.db", clock)
    again.admit(fit(2), Policy(rounds_per_day=1))
    assert refused(again, ask(2, "histogram"), Policy())


def test_an_id_that_was_given_to_something_else_is_refused(visits: Visits) -> None:
    policy = Policy(rounds_per_day=1)
    visits.admit(fit(1), policy)
    for other in (
        dataclasses.replace(score(1), id=fit(1).id),
        dataclasses.replace(fit(2), id=fit(1).id),
        dataclasses.replace(ask(1, "moments"), id=fit(1).id),
    ):
        assert "stands for something else" in refused(visits, other, policy)
    visits.admit(fit(1), policy)


def test_what_is_refused_is_not_counted(visits: Visits) -> None:
    policy = Policy(rounds_per_day=1)
    visits.admit(fit(1), policy)
    refused(visits, fit(2), policy)
    visits.admit(fit(3), Policy(rounds_per_day=2))


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "visits.db").mkdir()
    with pytest.raises(StorageError, match=r"visits\.db"):
        Visits(tmp_path / "visits.db")
