"""A run ends with the same bits over every bad line: reset, cut after N bytes each way, delayed, and a black hole."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

import fedkit
from bench.processes import free_port
from bench.proxy import Lined, Proxy, Side
from tests.network import steps, tasks
from tests.network.gates import here
from tests.network.hatchery import Hatched
from tests.network.recomputed import CLIENTS, SEED, STRATEGY, require_undisturbed

MODEL = 3_000_000  # bytes; two of them and some go each way in a round
# In the middle of what HTTP/2 says first, of hello, of a frame, of a piece, just before and after the end of a piece
CUTS = [1, 30, 200, 1_000, 9_999, 1 << 16, 400_000, 1 << 20, (1 << 20) + 100, 2_000_000, MODEL, 5_000_000, 2 * MODEL]


class Proxied(Lined, Hatched):
    """Processes that are forked from a warm one, over a bad line."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    folder = tmp_path_factory.mktemp("line")
    (folder / "archive").mkdir()
    environment = {steps.ARCHIVE: str(folder / "archive")}
    times = {"heartbeat_s": 0.5, "rejoin_s": 60.0}
    known = ["tests.network.tasks:large"]
    running = Proxied(folder, known, CLIENTS, port=free_port(), environment=environment, **times)
    with Proxy(running.address) as running.line, running:
        here(running, *CLIENTS)
        yield running


def require_the_same(federation: Proxied) -> None:
    """A run over the line as it is now is like any other."""
    with fedkit.connect(federation.address) as coordinator:
        result = coordinator.run(tasks.large, STRATEGY, seed=SEED, min_clients=len(CLIENTS), progress=False)
    require_undisturbed(result, federation.folder)


@pytest.mark.parametrize("side", ["up", "down"])
def test_a_line_that_is_reset_after_so_many_bytes_changes_no_bit(federation: Proxied, side: Side) -> None:
    before = federation.line.cuts
    federation.line.cut_at(side, CUTS)
    require_the_same(federation)
    assert federation.line.cuts - before >= len(CUTS) - 1  # two that are close may be one


@pytest.mark.parametrize("side", ["up", "down"])
def test_a_line_that_becomes_a_black_hole_after_so_many_bytes_changes_no_bit(federation: Proxied, side: Side) -> None:
    before = federation.line.swallowed
    federation.line.swallow_at(side, [20, 500_000, 4_000_000])
    require_the_same(federation)
    assert federation.line.swallowed - before == 3


def test_a_line_that_delays_everything_changes_no_bit(federation: Proxied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation.line, "delay_s", 0.01)
    began, before = time.monotonic(), dict(federation.line.count)
    require_the_same(federation)
    pieces = max(federation.line.count[side] - before[side] for side in before) / (1 << 16) / len(CLIENTS)
    assert time.monotonic() - began >= 0.01 * pieces  # which follow one another on each agent's connection


def test_a_line_that_is_reset_while_nobody_works_is_there_again(federation: Proxied) -> None:
    here(federation, *CLIENTS)
    before = federation.line.cuts
    federation.line.cut()
    assert federation.line.cuts == before + 1
    require_the_same(federation)
