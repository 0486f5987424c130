"""A line that breaks again and again: tensors go on where they stopped, and not a bit of the model changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import fedkit
from bench import echo
from bench.processes import free_port
from bench.proxy import Lined, Proxy
from fedkit.strategies import FedAvg
from tests.network import gates
from tests.network.conftest import ROOT
from tests.network.gates import Gate, Running, eventually, here, states

pytestmark = pytest.mark.slow

CUTS = 5
BYTES = 25_000_000
STRATEGY = FedAvg(rounds=1, local=fedkit.Fit(steps=1))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lined]:
    folder = tmp_path_factory.mktemp("line")
    environment = {"PYTHONPATH": str(ROOT), gates.FOLDER: str(folder / "gate")}
    Gate(folder / "gate")
    known = ["bench.echo:mb1", "bench.echo:mb25", "tests.network.gates:gated"]
    times = {"heartbeat_s": 0.5, "rejoin_s": 60.0}
    running = Lined(folder, known, ["ada"], port=free_port(), environment=environment, **times)
    with Proxy(running.address) as running.line, running:
        here(running, "ada")
        yield running


def run(federation: Lined, task: fedkit.Task) -> fedkit.Result:
    with fedkit.connect(federation.address) as coordinator:
        return coordinator.run(task, STRATEGY, min_clients=1, progress=False)


def expected(task: fedkit.Task) -> fedkit.Weights:
    return fedkit.simulate(task, STRATEGY, clients=["ada"], progress=False).weights


@dataclass
class Cut:
    """A run during which the line broke five times in each direction, and the bytes that went over it."""

    result: fedkit.Result
    cuts: int
    up: int
    down: int


@pytest.fixture(scope="module")
def cut(federation: Lined) -> Cut:
    line, draw = federation.line, random.Random(5)
    line.delay_s = 0.0005  # no faster than 128 MB/s, so that no more is on its way than on a real line
    for side in ("up", "down"):
        line.cut_at(side, sorted(draw.randrange(BYTES) for _ in range(CUTS)))
    result = run(federation, echo.mb25)
    line.delay_s = 0.0
    return Cut(result, line.cuts, line.count["up"], line.count["down"] - BYTES)  # the test scores need the new model


def test_an_upload_that_breaks_off_resends_little(cut: Cut) -> None:
    assert cut.cuts == 2 * CUTS
    assert BYTES < cut.up <= 1.15 * BYTES


def test_a_download_that_breaks_off_resends_little(cut: Cut) -> None:
    assert BYTES < cut.down <= 1.15 * BYTES


def test_a_line_that_breaks_changes_no_bit(cut: Cut) -> None:
    assert cut.result.weights == expected(echo.mb25)
    assert cut.result.history[0].refusals == ()
    assert cut.result.history[0].bytes_up == BYTES


def test_a_slow_line_is_not_taken_for_a_dead_one(federation: Lined) -> None:
    line, before = federation.line, dict(federation.line.count)
    line.delay_s = 0.02  # 25 MB take 8 s, and the buffers on the way hold more than two heartbeats
    connected = events(federation, "connected")
    result = run(federation, echo.mb25)
    line.delay_s = 0.0
    assert (
        line.count["down"] - before["down"] < 1.1 * 2 * BYTES
    )  # the model, and the new one, whose scores are asked for
    assert line.count["up"] - before["up"] < 1.1 * BYTES
    assert events(federation, "connected") == connected
    assert result.weights == expected(echo.mb25)


def test_a_line_that_falls_silent_is_noticed_on_both_sides_and_changes_no_bit(federation: Lined) -> None:
    gate = Gate(federation.folder / "gate")
    gate.hold("ada")
    running = Running(federation, gates.gated, rounds=2, min_clients=1)
    gate.wait("ada")
    disconnected = events(federation, "disconnected")
    federation.line.silence(True)
    eventually(lambda: states(federation)["ada"] == "away", "the coordinator notices")
    eventually(lambda: events(federation, "disconnected") > disconnected, "the agent notices")
    federation.line.silence(False)
    eventually(lambda: states(federation)["ada"] == "working", "ada is back")
    gate.open()
    assert running.result.weights == running.expected("ada")
    assert len(gate.trainings("ada")) == 2


def events(federation: Lined, event: str) -> int:
    """How often the agent has logged this."""
    return (federation.folder / "logs" / "ada.log").read_text().count(f'"event": "{event}"')
