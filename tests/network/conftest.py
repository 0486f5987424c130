"""One federation of real processes for all tests of this folder that do no harm to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedkit.loopback import Loopback

CLIENTS = ("ada", "bea", "cyd")
TASKS = [f"tests.network.tasks:{name}" for name in ("plain", "stateful", "counting", "stuck", "leaky", "hostile")]
ROOT = Path(__file__).parents[2]


def loopback(folder: Path, clients: tuple[str, ...] = CLIENTS, **changes: object) -> Loopback:
    return Loopback(folder, TASKS, clients, environment={"PYTHONPATH": str(ROOT)}, **changes)


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("federation"), heartbeat_s=2.0, rejoin_s=20.0) as running:
        yield running
