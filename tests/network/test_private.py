"""Private training over a network: the client plans, reserves, accounts and refuses, whatever the coordinator asks."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedkit
from fedkit.cli import show
from fedkit.cli.main import app
from fedkit.errors import IncompatibleStrategy, Reason, RefusalWarning
from fedkit.loopback import Loopback
from fedkit.privacy.accounting import epsilon_of, rdp_of
from fedkit.privacy.ledger import Ledger
from fedkit.rounds.shield import EVERY_CLIENT
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedBuff, FedSGD
from fedkit.work import Gradient, Steps
from tests.network import tasks
from tests.network.conftest import CLIENTS, loopback
from tests.network.gates import here

LOCAL = fedkit.Fit(steps=3, batch_size=8, lr=0.05)
DELTA = 1e-3
POLICY = f"""
aggregation = ["plain", "masked"]
[tasks.plain]
data = "cohort-7"

[budgets.cohort-7]
epsilon = 6.0
delta = {DELTA}
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory):
    """Ada has a budget; the others have none, as on loopback nothing leaves the machine."""
    folder = tmp_path_factory.mktemp("private")
    (folder / "ada.toml").write_text(POLICY)
    running = loopback(folder, (), heartbeat_s=2.0)
    with running:
        for name in CLIENTS:
            running.client_options[:] = ["--policy", str(folder / "ada.toml")] if name == "ada" else []
            running.start_client(name)
        here(running, *CLIENTS)
        trained(running, FedAvg(rounds=1, local=LOCAL), name="warm", privacy=private(epsilon=0.2))
        yield running


def private(**changes: Any) -> fedkit.Privacy:
    return fedkit.Privacy(dp=fedkit.DP(**({"epsilon": 2.0, "delta": DELTA} | changes)))


def trained(federation: Loopback, strategy: Any = None, name: str | None = None, **given: Any) -> fedkit.Result:
    strategy = strategy or FedAvg(rounds=2, local=LOCAL)
    with fedkit.connect(federation.address) as coordinator:
        return coordinator.run(tasks.plain, strategy, name=name, seed=3, min_clients=3, progress=False, **given)


def ledger(federation: Loopback, name: str) -> Ledger:
    return Ledger(federation.folder / "clients" / name / "ledger.db", look=True)


def why(result: fedkit.Result, client: str = "ada") -> set[tuple[Reason, str]]:
    found = [refusal for record in result.history for refusal in record.refusals]
    return {(refusal.reason, refusal.detail) for refusal in found if refusal.client == client}


def test_each_round_says_what_the_run_has_cost_each_client_so_far(federation: Loopback) -> None:
    result = trained(federation, privacy=private(), name="first")
    costs = [record.epsilon for record in result.history]
    assert [set(cost) for cost in costs] == [set(CLIENTS)] * 2
    assert all(record.loss is None for record in result.history)
    for name in CLIENTS:
        assert 0.0 < costs[0][name] < costs[1][name] <= 2.0
        book = ledger(federation, name)
        [account] = book.accounts()
        book.close()
        steps = [one.steps for one in account.reservations if one.run.startswith("first.")]
        assert [(one.q, one.count) for one in steps] == [(8 / account.rows, 3)] * 2
        assert epsilon_of(rdp_of(steps), DELTA) == pytest.approx(costs[1][name])
        assert account.open == frozenset()
        [(clipped, gradients)] = [counts for run, counts in account.clipped.items() if run.startswith("first.")]
        assert 0 <= clipped <= gradients
        assert gradients > 0
    assert costs[1]["ada"] > 1.9  # the plan uses what it may


def test_the_same_seed_gives_other_noise_each_time(federation: Loopback) -> None:
    first, again = (trained(federation, FedAvg(rounds=1, local=LOCAL), privacy=private(epsilon=0.5)) for _ in range(2))
    assert first.weights != again.weights


@pytest.mark.parametrize(
    "strategy",
    [FedSGD(rounds=2, lr=0.1, local=Gradient(batch_size=8)), CyclicWeightTransfer(rounds=1, local=LOCAL)],
    ids=["FedSGD", "CyclicWeightTransfer"],
)
def test_every_kind_of_training_is_private(federation: Loopback, strategy: Any) -> None:
    result = trained(federation, strategy, privacy=private(noise_multiplier=4.0, epsilon=None))
    assert set(result.history[-1].epsilon) == set(CLIENTS)
    assert all(0.0 < epsilon < 1.0 for epsilon in result.history[-1].epsilon.values())


def test_training_without_privacy_is_refused_where_there_is_a_budget(federation: Loopback) -> None:
    expected = (Reason.POLICY, "privacy: none (allowed: differential privacy, as cohort-7 has a budget)")
    assert why(trained(federation)) == {expected}


def test_what_the_budget_has_no_room_for_is_refused_with_both_numbers(federation: Loopback) -> None:
    before = ledger(federation, "ada")
    head = before.head
    before.close()
    result = trained(federation, privacy=private(epsilon=50.0))
    [(reason, detail)] = why(result)
    assert reason is Reason.PRIVACY
    assert detail.startswith("cohort-7 would have cost epsilon ")
    assert "its budget is 6 at delta 0.001; " in detail
    assert set(result.history[0].epsilon) == {"bea", "cyd"}
    after = ledger(federation, "ada")
    assert after.head == head  # refused before anything was touched
    after.close()


def test_a_delta_that_could_give_a_row_away_is_refused(federation: Loopback) -> None:
    result = trained(
        federation, FedAvg(rounds=1, local=LOCAL, participation=fedkit.Participation(quorum=1)), privacy=private()
    )
    assert why(result) == set()
    with (
        fedkit.connect(federation.address) as coordinator,
        pytest.raises(fedkit.errors.RunFailed, match="is more than"),
    ):
        coordinator.run(
            tasks.plain,
            FedAvg(rounds=1, local=LOCAL),
            seed=3,
            min_clients=3,
            progress=False,
            privacy=private(delta=0.4),
        )


def test_scores_of_data_with_a_budget_are_exact_and_so_refused_unless_the_site_allows_them(
    federation: Loopback,
) -> None:
    result = trained(
        federation, FedAvg(rounds=1, local=LOCAL), privacy=private(epsilon=0.1), evaluate=fedkit.Evaluation()
    )
    expected = (Reason.POLICY, "scores: exact ones (allowed: none, as cohort-7 has a budget without evaluate = true)")
    assert why(result) == {expected}
    assert why(result, "bea") == set()


def test_whole_clients_are_protected_by_the_coordinator_and_a_budget_for_rows_does_not_allow_it(
    federation: Loopback,
) -> None:
    strategy = FedAvg(rounds=2, local=LOCAL)
    privacy = private(epsilon=8.0, delta=0.2, level="client", few_clients=True, max_update_norm=0.1)
    result = trained(federation, strategy, name="whole", privacy=privacy)
    expected = (Reason.POLICY, "privacy: none (allowed: differential privacy, as cohort-7 has a budget)")
    assert why(result) == {expected}
    [first, last] = result.history
    assert (first.clients, first.loss) == (("bea", "cyd"), None)
    assert 0.0 < first.epsilon[EVERY_CLIENT] < last.epsilon[EVERY_CLIENT] <= 8.0
    assert last.clip == 0.1
    book = ledger(federation, "bea")
    assert not [one for account in book.accounts() for one in account.reservations if one.run.startswith("whole.")]
    book.close()


def test_a_budget_whose_delta_could_give_a_row_away_covers_nothing(federation: Loopback, tmp_path: Path) -> None:
    loose = tmp_path / "loose.toml"
    loose.write_text(POLICY.replace(f"delta = {DELTA}", "delta = 0.4"))
    federation.client_options[:] = ["--policy", str(loose)]
    federation.start_client("dan")
    here(federation, *CLIENTS, "dan")
    try:
        result = trained(federation, FedAvg(rounds=1, local=LOCAL), privacy=private(epsilon=0.1))
        [(reason, detail)] = why(result, "dan")
        assert reason is Reason.PRIVACY
        assert detail.startswith("the budget of cohort-7 has delta 0.4, and its ")
    finally:
        federation.processes["dan"].terminate()  # so that it says that it goes, and nobody waits for it
        federation.processes["dan"].wait(20)


def test_a_restart_forgets_nothing(federation: Loopback) -> None:
    before = ledger(federation, "ada")
    accounts, head = before.accounts(), before.head
    before.close()
    federation.kill("ada")
    federation.client_options[:] = ["--policy", str(federation.folder / "ada.toml")]
    federation.start_client("ada")
    here(federation, *CLIENTS)
    after = ledger(federation, "ada")
    assert (after.accounts(), after.head) == (accounts, head)
    after.close()


def test_a_ledger_that_cannot_be_written_costs_the_assignment_and_nothing_else(federation: Loopback) -> None:
    strategy, privacy = FedAvg(rounds=1, local=LOCAL), private(epsilon=0.1)
    with contextlib.closing(sqlite3.connect(federation.folder / "clients" / "bea" / "ledger.db")) as book:
        book.execute("CREATE TRIGGER full BEFORE INSERT ON entries BEGIN SELECT RAISE(ABORT, 'disk full'); END")
        with pytest.warns(RefusalWarning, match="bea: StorageError"):
            result = trained(federation, strategy, privacy=privacy)
        assert why(result, "bea") == {(Reason.FAILED, "StorageError")}
        assert result.history[0].clients == ("ada", "cyd")
        book.execute("DROP TRIGGER full")
    assert why(trained(federation, strategy, privacy=privacy), "bea") == set()


def test_what_was_spent_can_be_looked_at_while_the_agent_runs(
    federation: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show.console, "width", 160)
    path = str(federation.folder / "clients" / "ada" / "ledger.db")
    rules = ["--policy", str(federation.folder / "ada.toml")]
    report = CliRunner().invoke(app, ["privacy", "report", path, *rules])
    assert report.exit_code == 0, report.output
    assert "warm." in report.stdout
    assert "Not covered:" in report.stdout
    [told] = json.loads(CliRunner().invoke(app, ["privacy", "budget", path, *rules, "--json"]).stdout)
    assert told["data"] == "cohort-7"
    assert told["left"] == pytest.approx(6.0 - told["spent"]["rdp"])
    last = Steps(told["runs"][-1]["noise_multipliers"][0], told["runs"][-1]["sampling_rates"][0], 1)
    assert told["rounds"] >= 0
    assert last.q <= 1.0
    nothing = CliRunner().invoke(app, ["privacy", "budget", str(Path(path).with_name("none.db"))])
    assert nothing.exit_code == 1


def test_what_cannot_be_planned_is_refused_at_submission(federation: Loopback) -> None:
    with pytest.raises(IncompatibleStrategy, match="noise_multiplier"):
        trained(federation, FedBuff(rounds=2, local=LOCAL), privacy=private())
    with fedkit.connect(federation.address) as coordinator, pytest.raises(IncompatibleStrategy, match="own train loop"):
        coordinator.run(tasks.counting, FedAvg(rounds=1), privacy=private(), progress=False)
