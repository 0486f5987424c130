"""kill -9 at each named step: the run goes on by itself, not a bit differs, and nothing stored is worked out again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedkit
from tests.network import steps, tasks
from tests.network.gates import eventually, here
from tests.network.hatchery import Hatched
from tests.network.recomputed import CLIENTS, SEED, STRATEGY, require_undisturbed


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hatched]:
    folder = tmp_path_factory.mktemp("steps")
    (folder / "archive").mkdir()
    about = {"environment": {steps.ARCHIVE: str(folder / "archive")}, "is_measured": False}
    with Hatched(folder, ["tests.network.tasks:large"], CLIENTS, rejoin_s=60.0, **about) as running:
        yield running


class Run(threading.Thread):
    """A run that a user waits for."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._address = address
        self.result: fedkit.Result | None = None
        self.start()

    def run(self) -> None:
        with fedkit.connect(self._address) as coordinator:
            self.result = coordinator.run(tasks.large, STRATEGY, seed=SEED, min_clients=len(CLIENTS), progress=False)


@pytest.mark.parametrize("step", steps.STEPS)
def test_a_process_that_is_killed_at_a_named_step_costs_no_bit(federation: Hatched, step: str) -> None:
    victim = step.partition(":")[0]
    federation.kill(victim)
    federation.due[victim] = step
    federation._restart(victim)
    federation.wait_for_server()
    here(federation, *CLIENTS)
    run = Run(federation.address)
    assert federation.processes[victim].wait(30) == -signal.SIGKILL
    federation._restart(victim)
    run.join(60)
    assert run.result is not None
    require_undisturbed(run.result, federation.folder)
    eventually(lambda: leftovers(federation) == [], "no result is left in an outbox")


def leftovers(federation: Hatched) -> list[Path]:
    """Payloads that an agent still keeps."""
    return [path for path in (federation.folder / "clients").glob("*/outbox/*") if len(path.name) == 32]
