"""A task whose training waits at a gate, so that a test can do things to a federation in the middle of a round."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fedkit
from fedkit.loopback import Loopback
from fedkit.strategies import FedAvg
from fedkit.testing import toy_task
from tests.network.conftest import CLIENTS

FOLDER = "FEDKIT_TEST_GATE"
PATIENCE_S = 60.0
FIT = fedkit.Fit(steps=2, batch_size=8, lr=0.1)


def _gated(model: nn.Module, batches: Any, site: fedkit.Site) -> float:
    visits = int(site.state.get("visits", torch.zeros(1).numpy())[0]) + 1
    site.state["visits"] = torch.full((1,), float(visits)).numpy()
    if FOLDER in os.environ:
        _wait(Path(os.environ[FOLDER]), site.client, visits)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * visits * len(site.client))
    return float(visits)


def _wait(folder: Path, client: str, visits: int) -> None:
    (folder / f"{client}.{visits}.{os.getpid()}").touch()
    while (folder / f"{client}.held").exists():
        time.sleep(0.01)


# The update says how often this client has trained in this run: a repeated training would show in the bits.
gated = toy_task(name="gated", loss=None, train=_gated)


class Gate:
    """What the test sees of the trainings, and holds up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()

    def hold(self, *clients: str) -> None:
        """From now on these wait in their training."""
        for client in clients:
            (self.folder / f"{client}.held").touch()

    def open(self) -> None:
        """Nobody waits any more."""
        for path in self.folder.glob("*.held"):
            path.unlink()

    def trainings(self, client: str) -> list[int]:
        """The process ids in which this client has begun to train."""
        return [int(path.name.rpartition(".")[2]) for path in self.folder.glob(f"{client}.[0-9]*")]

    def wait(self, client: str, trainings: int = 1) -> list[int]:
        """Returns when the client has begun so many trainings."""
        eventually(lambda: len(self.trainings(client)) >= trainings, f"{client} begins training {trainings}")
        return self.trainings(client)


def eventually(claim: Callable[[], bool], what: str) -> None:
    """Returns when the claim holds; fails where it does not within a minute."""
    until = time.monotonic() + PATIENCE_S
    while not claim():
        assert time.monotonic() < until, f"within {PATIENCE_S:.0f} s it did not come to this: {what}"
        time.sleep(0.02)


def states(federation: Loopback) -> dict[str, str]:
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        return {client.name: client.state for client in coordinator.status().clients}


def here(federation: Loopback, *clients: str) -> None:
    eventually(
        lambda: all(states(federation).get(client) == "ready" for client in clients), f"{', '.join(clients)} are ready"
    )


class Running(threading.Thread):
    """A run that a user waits for."""

    def __init__(self, federation: Loopback, task: fedkit.Task, rounds: int, **more: Any) -> None:
        super().__init__(daemon=True)
        self._address = federation.address
        self._task = task
        self._more = {"seed": 3, "min_clients": len(CLIENTS), "progress": False, **more}
        self._strategy = FedAvg(
            rounds=rounds, local=FIT, participation=self._more.pop("participation", fedkit.Participation())
        )
        self._result: fedkit.Result | None = None
        self.start()

    def run(self) -> None:
        with fedkit.connect(self._address) as coordinator:
            self._result = coordinator.run(self._task, self._strategy, **self._more)

    @property
    def result(self) -> fedkit.Result:
        self.join(90)
        assert self._result is not None, "the run did not end"
        return self._result

    def expected(self, *clients: str) -> fedkit.Weights:
        return fedkit.simulate(
            self._task, self._strategy, clients=clients or CLIENTS, seed=3, threads=1, progress=False
        ).weights
