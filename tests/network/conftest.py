"""What the tests of this folder share: a federation to which they do no harm, and one coordinator a file to misuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import fedkit
from fedkit.loopback import Loopback
from tests.network.hatchery import Hatched
from tests.network.place import MAL, Place
from tests.network.scripted import honest

CLIENTS = ("ada", "bea", "cyd")
TASKS = [f"tests.network.tasks:{name}" for name in ("plain", "stateful", "counting", "stuck", "leaky", "hostile")]
ROOT = Path(__file__).parents[2]


def loopback(folder: Path, clients: tuple[str, ...] = CLIENTS, **changes: object) -> Hatched:
    return Hatched(folder, TASKS, clients, environment={"PYTHONPATH": str(ROOT)}, **changes)


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("federation"), heartbeat_s=2.0, rejoin_s=20.0) as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A coordinator that has to stay up through everything a file of tests sends to it."""
    running = Place(tmp_path_factory.mktemp("coordinator"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def alone(place: Place) -> fedkit.Result:
    """What the honest clients come to without the bad one."""
    return place.run()


@pytest.fixture(scope="module")
def together(place: Place) -> fedkit.Result:
    """What three honest clients come to."""
    return place.run((MAL, honest))
