"""What accounting says beside a second implementation, and how long it takes beside the work it accounts for."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
from opacus.accountants import PRVAccountant

from bench.table import Figure
from fedkit.config import DP, Privacy
from fedkit.demo.heart import HOSPITALS, task
from fedkit.privacy.accounting import epsilon_of, rdp_of, spent
from fedkit.privacy.ledger import Budget, Ledger, Reservation
from fedkit.privacy.plan import planned
from fedkit.rounds.assignment import Private
from fedkit.simulation import simulate
from fedkit.strategies import FedAvg
from fedkit.work import Fit, Steps

__all__ = ["accounting"]

DELTA = 1e-5
GRID = list(itertools.product((0.8, 1.1, 2.0), (0.002, 0.01, 0.05), (100, 1000)))  # noise, sampling rate, steps


def accounting() -> list[Figure]:
    """Epsilon against Opacus' PRV on a grid of 18 settings, and a history of a thousand different steps."""
    apart = [_apart(*setting) for setting in GRID]
    worst = max(range(len(GRID)), key=lambda i: abs(apart[i]))
    noise, q, steps = GRID[worst]
    note = f"worst at noise {noise:g}, q {q:g}, {steps} steps; delta 1e-5"
    return [Figure("epsilon against PRV, 18 settings", abs(apart[worst]), "<= 0.015", note), _many(), _share()]


def _apart(noise: float, q: float, steps: int) -> float:
    """Relative to PRV's upper bound, which is computed to half a percent."""
    found = spent([Steps(noise, q, steps)], DELTA).epsilon
    second = PRVAccountant()
    second.history = [(noise, q, steps)]
    return found / float(second.get_epsilon(DELTA, eps_error=0.005 * found)) - 1.0


def _share() -> Figure:
    """What a site's ledger does for a run of 1,000 rounds, beside that site's training in them."""
    rounds, local = 1000, Fit(epochs=1, batch_size=16, lr=0.05)
    dp = DP(epsilon=3.0, delta=1e-3)
    began = time.perf_counter()
    simulate(task, FedAvg(rounds=rounds, local=local), clients=HOSPITALS[:1], privacy=Privacy(dp=dp), threads=1)
    trained = time.perf_counter() - began
    rows, data, budget = 199, "hearts", Budget(8.0, 1e-3)
    cost = planned(Private(dp, rounds, 1), local, rows).cost
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Ledger(Path(folder) / "ledger.db")) as ledger:
        began = time.perf_counter()
        for number in range(rounds):
            wish = Reservation(f"{number:032x}", "run", data, cost, 1.0)
            ledger.check(wish, budget)
            ledger.identify(data, rows, "")
            ledger.reserve(wish, budget, Budget(3.0, 1e-3))
            ledger.close_reservation(wish.assignment)
            ledger.account(data).spent(1e-3, run="run", tight=False)
        accounted = time.perf_counter() - began
    return Figure("accounting / one site's training, 1,000 rounds", accounted / trained, "<= 0.01", "ledger on disk")


def _many() -> Figure:
    draw = np.random.default_rng(0)
    history = [Steps(1.0 + draw.random(), 0.01 + 0.05 * draw.random(), 10) for _ in range(1000)]
    began = time.perf_counter()
    epsilon_of(rdp_of(history), DELTA)
    return Figure("seconds for 1,000 kinds of steps", time.perf_counter() - began, "<= 5", "RDP, none seen before")
