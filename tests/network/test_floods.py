"""Strangers take little memory, and whoever belongs trains on; `bench/floods.py` measures it with all their might."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedkit
from bench.flooder import KINDS
from bench.floods import peak_mb
from bench.processes import free_port
from fedkit.protos.wire import SERVER_OPTIONS, STRANGERS_OPTIONS
from fedkit.strategies import FedAvg
from tests.network import tasks
from tests.network.conftest import ROOT
from tests.network.hatchery import Hatched
from tests.network.place import Place

CLIENTS = ("ada", "bea")
STRATEGY = FedAvg(rounds=2, local=fedkit.Fit(steps=1))
MOST_MB = 64


class Flooded(Hatched):
    """A federation with TLS, and a port for those who have no certificate yet."""

    def __init__(self, folder: Path) -> None:
        self.enrolment = f"127.0.0.1:{free_port()}"
        known, options = ["tests.network.tasks:large"], ["--enrolment", self.enrolment]
        super().__init__(folder, known, CLIENTS, tls=True, server_options=options)

    @property
    def pid(self) -> int:
        return self.processes["server"].pid


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flooded]:
    with Flooded(tmp_path_factory.mktemp("floods")) as running:
        assert trained(running) == trained(running)
        yield running


def trained(federation: Flooded) -> fedkit.Weights:
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        return coordinator.run(tasks.large, STRATEGY, seed=3, min_clients=len(CLIENTS), progress=False).weights


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_take_little_memory_and_an_honest_run_changes_no_bit(federation: Flooded, kind: str) -> None:
    before = peak_mb(federation.pid, anew=True)
    command = [sys.executable, "-m", "bench.flooder", kind, federation.enrolment, "--seconds", "1.5"]
    if kind in ("connections", "handshakes"):
        command.insert(5, federation.address)
    flooding = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert flooding.stdout.readline() == "ready\n"
    weights = trained(federation)
    said, _ = flooding.communicate(timeout=60)
    assert '"calls"' in said or '"connections"' in said
    assert peak_mb(federation.pid) - before <= MOST_MB
    assert weights == fedkit.simulate(tasks.large, STRATEGY, clients=CLIENTS, seed=3, progress=False).weights


def test_a_handshake_that_stops_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options in {
        "process.SERVER_OPTIONS": SERVER_OPTIONS,
        "trust.STRANGERS_OPTIONS": STRANGERS_OPTIONS,
    }.items():
        soon = [(key, 300 if "handshake" in key else value) for key, value in options]  # under the names used there
        monkeypatch.setattr(f"fedkit.server.{name}", soon)
    place = Place(tmp_path, tls=True)
    for address in (place.address, place.enrolment):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as stranger:
            stranger.sendall(b"\x16\x03\x01")
            began = time.monotonic()
            assert stranger.recv(100) == b""
            assert time.monotonic() - began < 15
    place.close()
