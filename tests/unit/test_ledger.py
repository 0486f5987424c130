"""What the ledger holds: nothing is counted too low, nothing is forgotten, and no entry can be changed unseen."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from fedkit.errors import Reason, Refused, StorageError
from fedkit.privacy.accounting import epsilon_of, rdp_of
from fedkit.privacy.ledger import Budget, Ledger, Reservation
from fedkit.privacy.report import report
from fedkit.work import Steps

DELTA = 1e-5
WIDE = Budget(100.0, DELTA)
STEPS = Steps(1.0, 0.1, 100)


@pytest.fixture
def ledger(tmp_path: Path):
    found = Ledger(tmp_path / "ledger.db")
    yield found
    found.close()


def wish(number: int, steps: Steps = STEPS, data: str = "hearts", run: str = "one") -> Reservation:
    return Reservation(f"{number:032x}", run, data, steps, 1.0)


def cost(*steps: Steps) -> float:
    return epsilon_of(rdp_of(steps), DELTA)


def refused(ledger: Ledger, one: Reservation, budget: Budget) -> str:
    with pytest.raises(Refused) as caught:
        ledger.reserve(one, budget)
    assert caught.value.reason is Reason.PRIVACY
    return caught.value.detail


def test_what_is_reserved_counts_at_once_and_in_full(ledger: Ledger) -> None:
    ledger.reserve(wish(1), WIDE)
    assert ledger.account("hearts").spent(DELTA).rdp == cost(STEPS)
    assert ledger.account("hearts").open == {wish(1).assignment}
    assert ledger.account("lungs").spent(DELTA).epsilon == 0.0


def test_an_assignment_has_one_reservation_however_often_it_is_asked(ledger: Ledger) -> None:
    for _ in range(3):
        ledger.reserve(wish(1), WIDE)
    assert list(ledger.account("hearts").steps) == [STEPS]
    assert "another reservation" in refused(ledger, wish(1, Steps(1.0, 0.1, 50)), WIDE)


def test_what_was_noised_and_stored_once_is_not_noised_again(tmp_path: Path, ledger: Ledger) -> None:
    ledger.reserve(wish(1), WIDE)
    ledger.close_reservation(wish(1).assignment)
    assert "was done" in refused(ledger, wish(1), WIDE)
    ledger.close()
    again = Ledger(tmp_path / "ledger.db")
    assert "was done" in refused(again, wish(1), WIDE)
    assert list(again.account("hearts").steps) == [STEPS]
    again.close()


def test_ending_what_was_never_reserved_does_nothing(ledger: Ledger) -> None:
    ledger.close_reservation(wish(1).assignment)
    assert ledger.head == "00" * 32


def test_the_clipped_share_of_a_run_is_that_of_all_its_assignments(ledger: Ledger) -> None:
    for number, (clipped, gradients) in enumerate([(3, 10), (0, 20), (0, 0)]):
        ledger.reserve(wish(number), WIDE)
        ledger.close_reservation(wish(number).assignment, clipped, gradients)
    ledger.reserve(wish(3, run="other"), WIDE)
    found = report(ledger.account("hearts"), None, 1e-5)
    assert [(run.clipped_share, run.open) for run in found.runs] == [(0.1, 0), (None, 1)]


def test_a_wish_beyond_the_budget_is_refused_with_both_numbers_and_leaves_no_trace(ledger: Ledger) -> None:
    budget = Budget(cost(STEPS, STEPS), DELTA)
    ledger.reserve(wish(1), budget)
    ledger.reserve(wish(2), budget)  # exactly all of it
    head = ledger.head
    said = refused(ledger, wish(3), budget)
    more = math.ceil(cost(STEPS, STEPS, STEPS) * 1000) / 1000
    assert said == (
        f"hearts would have cost epsilon {more:g}, its budget is {budget.epsilon:g} at delta 1e-05; 0 are left"
    )
    assert ledger.head == head
    ledger.reserve(wish(3, data="lungs"), budget)
    assert "infinity" in refused(ledger, wish(4, Steps(0.0, 0.1, 1)), budget)


def test_another_content_of_the_data_keeps_what_was_spent(ledger: Ledger) -> None:
    ledger.identify("hearts", 300, "aa")
    head = ledger.head
    ledger.identify("hearts", 300, "aa")
    assert ledger.head == head
    ledger.reserve(wish(1), WIDE)
    ledger.identify("hearts", 310, "bb")
    account = ledger.account("hearts")
    assert (account.rows, account.fingerprint, list(account.steps)) == (310, "bb", [STEPS])


def test_everything_is_there_when_the_ledger_is_opened_again(tmp_path: Path, ledger: Ledger) -> None:
    ledger.identify("hearts", 300, "aa")
    for number in range(3):
        ledger.reserve(wish(number, run=f"run-{number}"), WIDE)
    ledger.close_reservation(wish(1).assignment)
    accounts, head = ledger.accounts(), ledger.head
    ledger.close()
    again = Ledger(tmp_path / "ledger.db")
    assert (again.accounts(), again.head) == (accounts, head)
    again.close()


def test_two_processes_cannot_spend_the_same_budget(tmp_path: Path, ledger: Ledger) -> None:
    ledger.reserve(wish(1), WIDE)
    with pytest.raises(StorageError, match="end the other agent"):
        Ledger(tmp_path / "ledger.db")
    looked = Ledger(tmp_path / "ledger.db", look=True)
    assert looked.accounts() == ledger.accounts()
    with pytest.raises(StorageError, match="readonly"):
        looked.reserve(wish(2), WIDE)
    looked.close()
    with pytest.raises(StorageError, match="No such file"):
        Ledger(tmp_path / "none.db", look=True)


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        ("UPDATE entries SET body = replace(body, '\"count\":100', '\"count\":1') WHERE seq = 2", 2),
        ("DELETE FROM entries WHERE seq = 2", 2),
        ("DELETE FROM entries WHERE seq = 1", 1),
        ("UPDATE entries SET seq = -1 WHERE seq = 3", 1),
        ("INSERT INTO entries SELECT 9, body, digest FROM entries WHERE seq = 2", 5),
    ],
)
def test_an_entry_that_is_altered_removed_or_moved_is_named(
    tmp_path: Path, ledger: Ledger, change: str, entry: int
) -> None:
    for number in range(4):
        ledger.reserve(wish(number), WIDE)
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            connection.execute("UPDATE entries SET body = ''")
        connection.execute("DROP TRIGGER no_change")
        connection.execute("DROP TRIGGER no_removal")
        connection.execute(change)
    connection.close()
    with pytest.raises(StorageError, match=f"entry {entry} was altered"):
        Ledger(tmp_path / "ledger.db")


def test_a_ledger_that_cannot_be_written_spends_nothing(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").mkdir()
    with pytest.raises(StorageError, match=r"ledger\.db"):
        Ledger(tmp_path / "ledger.db")


class Spending(RuleBasedStateMachine):
    """Reservations, ends, and processes that die at any moment: what counts is never below what was done."""

    asked = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self._folder = tempfile.TemporaryDirectory()
        self._ledger = Ledger(Path(self._folder.name) / "ledger.db")
        self._number = 0
        self._made: dict[str, Steps] = {}  # what may have been noised and sent

    @rule(target=asked, sigma=st.sampled_from([1.0, 2.0]), count=st.integers(1, 50))
    def reserve(self, sigma: float, count: int) -> Reservation:
        self._number += 1
        one = wish(self._number, Steps(sigma, 0.1, count))
        self._ledger.reserve(one, WIDE)
        self._made[one.assignment] = one.steps
        return one

    @rule(one=asked)
    def ask_again(self, one: Reservation) -> None:
        self._ledger.reserve(one, WIDE)

    @rule(one=consumes(asked))
    def end(self, one: Reservation) -> None:
        self._ledger.close_reservation(one.assignment)
        with pytest.raises(Refused):
            self._ledger.reserve(one, WIDE)

    @rule()
    def die(self) -> None:
        self._ledger.close()
        self._ledger = Ledger(Path(self._folder.name) / "ledger.db")

    @invariant()
    def nothing_is_counted_too_low(self) -> None:
        found = self._ledger.account("hearts").spent(DELTA, tight=False).rdp
        assert found == pytest.approx(cost(*self._made.values()), rel=1e-9)

    def teardown(self) -> None:
        self._ledger.close()
        self._folder.cleanup()


TestSpending = Spending.TestCase
TestSpending.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
