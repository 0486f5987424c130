"""Real processes that are killed, stopped, replaced and misused; the rounds go on, and say what happened."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedkit
from fedkit.cli import app
from fedkit.client.outbox import Outbox
from fedkit.errors import ConfigError, Reason, RunCancelled, RunFailed
from fedkit.loopback import Loopback
from fedkit.report.page import policy
from fedkit.server.process import Coordinator, CoordinatorSettings
from fedkit.strategies import FedAvg
from tests.network import gates, tasks
from tests.network.browser import Browser
from tests.network.conftest import CLIENTS, ROOT, TASKS
from tests.network.gates import Gate, Running, eventually, here, states
from tests.network.hatchery import Hatched
from tests.report.reader import parsed

pytestmark = pytest.mark.slow

FIT = fedkit.Fit(steps=2, batch_size=8, lr=0.1)


def loopback(folder: Path, clients: tuple[str, ...], rejoin_s: float) -> Loopback:
    environment = {"PYTHONPATH": str(ROOT), gates.FOLDER: str(folder / "gate")}
    known = [*TASKS, "tests.network.gates:gated"]
    times = {"heartbeat_s": 0.5, "rejoin_s": rejoin_s}
    listening = ["--metrics", "127.0.0.1:0"]
    return Hatched(folder, known, clients, **times, environment=environment, server_options=listening)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("life"), CLIENTS, rejoin_s=60.0) as running:
        yield running


@pytest.fixture
def federation(started: Loopback) -> Iterator[Loopback]:
    """All three clients are here, and nobody waits at a gate, when a test begins."""
    Gate(started.folder / "gate")
    started.revive()
    here(started, *CLIENTS)
    yield started
    Gate(started.folder / "gate")


@pytest.fixture
def gate(federation: Loopback) -> Gate:
    return Gate(federation.folder / "gate")


def refusals(result: fedkit.Result) -> list[tuple[int, str, Reason]]:
    return [(record.round, one.client, one.reason) for record in result.history for one in record.refusals]


def test_a_client_that_is_killed_and_restarted_in_a_round_changes_no_bit(federation: Loopback, gate: Gate) -> None:
    gate.hold("bea")
    running = Running(federation, gates.gated, rounds=2)
    [worker] = gate.wait("bea")
    federation.kill("bea")
    eventually(lambda: not Path(f"/proc/{worker}").exists(), "the training process ends with its agent")
    federation.start_client("bea")
    gate.wait("bea", trainings=2)
    gate.open()
    assert running.result.weights == running.expected()
    assert refusals(running.result) == []


def test_a_client_that_was_killed_after_its_training_trains_nothing_twice(federation: Loopback, gate: Gate) -> None:
    gate.hold("ada")
    running = Running(federation, gates.gated, rounds=2)
    gate.wait("bea")
    eventually(lambda: '"event": "stored"' in events_of(federation, "bea")[-1], "bea has stored its result")
    federation.kill("bea")
    federation.start_client("bea")
    eventually(lambda: states(federation)["bea"] in ("ready", "working"), "bea is back")
    gate.open()
    assert running.result.weights == running.expected()
    assert len(gate.trainings("bea")) == 2


def events_of(federation: Loopback, name: str) -> list[str]:
    return (federation.folder / "logs" / f"{name}.log").read_text().splitlines() or [""]


def test_a_stopped_client_is_reported_away_and_goes_on_when_it_may(federation: Loopback, gate: Gate) -> None:
    gate.hold("bea")
    running = Running(federation, gates.gated, rounds=2)
    gate.wait("bea")
    federation.processes["bea"].send_signal(signal.SIGSTOP)
    eventually(lambda: states(federation)["bea"] == "away", "bea is reported away")
    federation.processes["bea"].send_signal(signal.SIGCONT)
    eventually(lambda: states(federation)["bea"] == "working", "bea works again")
    gate.open()
    assert running.result.weights == running.expected()
    assert refusals(running.result) == []
    assert len(gate.trainings("bea")) == 2


def test_a_stopped_client_misses_the_deadline_and_the_round_closes(federation: Loopback, gate: Gate) -> None:
    gate.hold("bea")

    def go_on(_: fedkit.RoundRecord) -> None:
        federation.processes["bea"].send_signal(signal.SIGCONT)
        gate.open()

    rule = fedkit.Participation(deadline_s=2.0)
    running = Running(federation, gates.gated, rounds=1, participation=rule, on_round=go_on)
    gate.wait("bea")
    federation.processes["bea"].send_signal(signal.SIGSTOP)
    assert refusals(running.result) == [(1, "bea", Reason.DEADLINE)]
    assert running.result.weights == running.expected("ada", "cyd")


def test_a_client_that_comes_later_takes_part_in_the_next_round(federation: Loopback, gate: Gate) -> None:
    federation.processes["cyd"].terminate()
    federation.processes["cyd"].wait(20)
    gate.hold("ada")
    running = Running(federation, gates.gated, rounds=2, min_clients=2)
    gate.wait("ada")
    federation.start_client("cyd")
    here(federation, "cyd")
    gate.open()
    assert [record.clients for record in running.result.history] == [("ada", "bea"), CLIENTS]


@pytest.mark.filterwarnings("ignore::fedkit.errors.RefusalWarning")
def test_a_training_process_that_is_killed_costs_one_contribution(federation: Loopback, gate: Gate) -> None:
    gate.hold("bea")
    running = Running(federation, gates.gated, rounds=2)
    [worker] = gate.wait("bea")
    gate.open()
    os.kill(worker, signal.SIGKILL)
    [refusal] = [one for record in running.result.history for one in record.refusals]
    assert (refusal.client, refusal.reason) == ("bea", Reason.FAILED)
    assert refusal.detail == "the training process died, most likely out of memory"
    assert [record.clients for record in running.result.history] == [("ada", "cyd"), CLIENTS]


def test_a_training_process_that_is_killed_while_it_waits_costs_nothing(federation: Loopback, gate: Gate) -> None:
    running = Running(federation, gates.gated, rounds=1)
    assert running.result.weights == running.expected()
    [worker] = gate.trainings("bea")
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{worker}").exists(), "the training process has ended")
    again = Running(federation, gates.gated, rounds=1)
    assert again.result.weights == running.result.weights
    assert refusals(again.result) == []


def test_a_client_that_has_nothing_to_do_stays_connected(federation: Loopback) -> None:
    def longest() -> float:
        with fedkit.connect(federation.address) as coordinator:
            ready = [client.since_s for client in coordinator.status().clients if client.state == "ready"]
            return min(ready, default=0.0)

    eventually(lambda: longest() > 2.0, "all clients have been ready for four heartbeats")


def test_cancelling_a_run_that_is_deaf_frees_its_clients(federation: Loopback) -> None:
    with fedkit.connect(federation.address) as coordinator:
        name = coordinator.submit(tasks.stuck, FedAvg(rounds=1, local=FIT), min_clients=3)
        eventually(lambda: set(states(federation).values()) == {"working"}, "all clients train")
        cancel = [sys.executable, "-m", "fedkit", "cancel", name, "--coordinator", federation.address]
        done = subprocess.run(cancel, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        with pytest.raises(RunCancelled):
            list(coordinator.watch(name))
        result = coordinator.run(tasks.plain, FedAvg(rounds=1, local=FIT), min_clients=3, progress=False)
    assert result.history[0].clients == CLIENTS


def test_a_second_process_of_the_same_name_takes_the_place_of_the_first(federation: Loopback, tmp_path: Path) -> None:
    first = federation.processes["ada"]
    where = ["--coordinator", federation.address, "--state", str(tmp_path), "--task", "tests.network.tasks:plain"]
    federation._start("other", "client", "--name", "ada", *where)
    assert first.wait(60) == 1
    assert "another process attends as ada" in events_of(federation, "ada")[-1]
    running = Running(federation, tasks.plain, rounds=1)
    assert running.result.weights == running.expected()
    federation.start_client("ada")
    other = federation.processes.pop("other")
    assert other.wait(60) == 1
    other.stdin.close()


def test_the_text_of_an_error_in_a_task_stays_at_its_site(federation: Loopback) -> None:
    with fedkit.connect(federation.address) as coordinator:
        with pytest.raises(RunFailed, match=r"(ada|bea|cyd): failed \(ValueError\)"):
            coordinator.run(tasks.leaky, FedAvg(rounds=1, local=FIT), name="leaky", min_clients=3, progress=False)
        abandoned = coordinator.status("leaky").runs[0].detail
    assert "ValueError" in abandoned
    for path in federation.folder.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            assert b"canary" not in raw, path
            assert b"is a patient" not in raw, path
    told = [json.loads(line) for line in events_of(federation, "bea") if '"task failed"' in line]
    assert told[-1]["error"] == "ValueError"
    assert told[-1]["where"][-1].startswith("tasks.py:")


def test_every_line_of_the_logs_is_an_event_that_says_what_it_is_about(federation: Loopback) -> None:
    running = Running(federation, tasks.plain, rounds=1, name="told")
    assert running.result
    server = events(federation, "server", "told.")
    assert {"round", "clients", "seconds"} <= next(one for one in server if one["event"] == "round committed").keys()
    for client in CLIENTS:
        stored = next(one for one in events(federation, client, "told.") if one["event"] == "stored")
        assert stored["round"] == 1
        assert stored["client"] == client
        assert len(stored["assignment"]) == 32


def test_a_refusal_is_logged_with_run_round_client_and_assignment(federation: Loopback) -> None:
    with fedkit.connect(federation.address) as coordinator, pytest.raises(RunFailed):
        coordinator.run(tasks.leaky, FedAvg(rounds=1, local=FIT), name="refused", min_clients=3, progress=False)
    for name in ("server", "ada"):
        found = next(one for one in events(federation, name, "refused.") if one["event"] == "refused")
        assert {"run", "round", "client", "assignment", "reason", "timestamp", "level"} <= found.keys()
        assert found["reason"] == "failed"


def events(federation: Loopback, name: str, run: str) -> list[dict[str, Any]]:
    """The events of a run; every line is one, but for the last word of a process that was turned away."""
    lines = [line for line in events_of(federation, name) if line and not line.startswith("fedkit: ")]
    found = [json.loads(line) for line in lines]
    return [one for one in found if one.get("run", "").startswith(run)]


def test_a_client_that_never_comes_back_costs_its_contribution_alone(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    gate.hold("bea")
    with loopback(tmp_path, ("ada", "bea"), rejoin_s=1.0) as federation:
        here(federation, "ada", "bea")
        running = Running(federation, gates.gated, rounds=2, min_clients=1)
        gate.wait("bea")
        federation.kill("bea")
        result = running.result
        assert states(federation) == {"ada": "ready", "bea": "away"}
    assert refusals(result) == [(1, "bea", Reason.LOST)]
    assert [record.clients for record in result.history] == [("ada",), ("ada",)]
    assert result.weights == running.expected("ada")


def said(*command: str | Path) -> str:
    """What a process says that cannot begin: one sentence, and no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "fedkit", *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def test_a_port_that_is_in_use_is_named(federation: Loopback, tmp_path: Path) -> None:
    found = said("server", "--listen", federation.address, "--state", tmp_path)
    assert found == f"fedkit: {federation.address} is in use by another process, or not to be had here"


def test_a_second_coordinator_in_one_folder_is_refused(federation: Loopback) -> None:
    folder, owner = federation.folder / "server", federation.processes["server"].pid
    with pytest.raises(ConfigError, match=rf"{folder} is in use by another coordinator \(process {owner}\): end it"):
        asyncio.run(begin(CoordinatorSettings(listen="127.0.0.1:0", state=folder)))
    assert {states(federation)[client] for client in CLIENTS} == {"ready"}


def test_a_second_agent_in_one_folder_is_refused(federation: Loopback) -> None:
    folder = federation.folder / "clients" / "ada" / "outbox"
    with pytest.raises(ConfigError, match=f"{folder} is in use by another agent process: end it, or choose another"):
        Outbox(folder)
    assert {states(federation)[client] for client in CLIENTS} == {"ready"}


@pytest.mark.parametrize("address", ["0.0.0.0:8443", "[::]:8443", "192.168.1.1:8443", "example.org:8443"])
def test_without_tls_a_coordinator_listens_on_loopback_only(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without TLS a coordinator listens on loopback only, .* fedkit ca init"):
        asyncio.run(begin(CoordinatorSettings(state=tmp_path, listen=address)))
    with pytest.raises(ConfigError, match="metrics are served without TLS, so on loopback only"):
        asyncio.run(begin(CoordinatorSettings(state=tmp_path, listen="127.0.0.1:0", metrics=address)))


def test_a_port_for_metrics_that_is_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{address} is in use by another process"):
            asyncio.run(begin(CoordinatorSettings(listen="127.0.0.1:0", state=tmp_path, metrics=address)))


@pytest.mark.parametrize("address", ["8443", "localhost", "127.0.0.1:x", "127.0.0.1:65536", ":8443", ""])
def test_an_address_is_a_host_and_a_port(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        asyncio.run(begin(CoordinatorSettings(listen=address, state=tmp_path)))


async def begin(settings: CoordinatorSettings) -> None:
    coordinator = Coordinator(settings, {})
    try:
        await coordinator.start()
    finally:
        await coordinator.stop()


def test_a_run_is_shown_as_it_goes_on_to_whoever_has_the_key_alone(
    federation: Loopback, gate: Gate, tmp_path: Path
) -> None:
    file = federation.folder / "server" / "pages"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    browser = Browser(file.read_text())
    gate.hold("bea")
    running = Running(federation, gates.gated, rounds=2, name="seen", evaluate=fedkit.Evaluation())
    gate.wait("bea")
    assert browser.page("/runs").one("main").all("a")[0].attributes["href"] == "/runs/seen"
    begun = browser.page("/runs/seen").one("main")
    assert begun.attributes["data-live"] == "yes"
    assert "Running, round 0 of 2." in begun.text
    report = ["report", "seen", "--out", str(tmp_path / "seen.html"), "--coordinator", federation.address]
    assert CliRunner().invoke(app, report).exit_code == 0
    assert "not known here until it has ended" in (tmp_path / "seen.html").read_text()
    gate.open()
    assert running.result.history
    eventually(
        lambda: "data-live" not in browser.page("/runs/seen").one("main").attributes, "the page knows of the end"
    )
    ended = browser.page("/runs/seen").one("main").text
    assert "Finished, round 2 of 2." in ended
    assert all(name in ended for name in CLIENTS)
    assert CliRunner().invoke(app, [*report, "--json"]).exit_code == 0
    assert parsed((tmp_path / "seen.html").read_text()).one("main").text == ended
    _nobody_else_sees_it(browser)


def _nobody_else_sees_it(browser: Browser) -> None:
    for path in ("/runs", "/runs/seen", "/runs/none"):
        for key in (None, "", browser.key[:-1], f"{browser.key}x"):
            status, text, headers = browser.get(path, key=key)
            assert (status, "seen" in text) == (401, False)
            assert headers["WWW-Authenticate"].startswith("Basic ")
    assert browser.get("/runs/none", key=browser.key)[0] == 404
    assert browser.get("/runs/..%2Fcoordinator.db", key=browser.key)[0] == 404
    assert browser.get("/runs/seen", key=browser.key, method="POST")[0] == 405
    status, text, headers = browser.get("/runs/seen", key=browser.key, method="HEAD")
    assert (status, text) == (200, "")
    assert headers["Content-Security-Policy"] == f"{policy(live=True)}; frame-ancestors 'none'"
    assert headers["Cache-Control"] == "no-store"
    status, metrics, _ = browser.get("/metrics")
    assert status == 200
    assert "fedkit_rounds_total" in metrics
    assert not any(name in metrics for name in (*CLIENTS, "seen"))
