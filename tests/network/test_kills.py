"""Runs whose processes are killed one after the other lose nothing, train nothing twice, and end with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedkit
from bench.faults import survive
from fedkit.strategies import CyclicWeightTransfer, FedAvg
from fedkit.strategy import Strategy
from tests.network.hatchery import Hatched

pytestmark = pytest.mark.slow

KILLS = 6


@pytest.mark.parametrize(
    "strategy",
    [
        FedAvg(rounds=72, local=fedkit.Fit(steps=60, batch_size=4, lr=0.003)),
        CyclicWeightTransfer(rounds=48, local=fedkit.Fit(steps=40, batch_size=4, lr=0.001)),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_six_kills_lose_nothing(strategy: Strategy, tmp_path: Path) -> None:
    report = survive(tmp_path, strategy, KILLS, seed=1, place=Hatched)
    assert report.lost_commits == 0
    assert report.trained_twice == 0
    assert report.differing_weights == 0
    assert report.history == ""
    assert report.kills == KILLS, "the run was over too soon: give it more rounds"
