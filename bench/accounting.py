"""What accounting says beside a second implementation, and how long it takes beside the work it accounts for."""

from __future__ import annotations

import itertools
import time

import numpy as np
from opacus.accountants import PRVAccountant

from bench.table import Figure
from fedkit.privacy.accounting import epsilon_of, rdp_of, spent
from fedkit.work import Steps

__all__ = ["accounting"]

DELTA = 1e-5
GRID = list(itertools.product((0.8, 1.1, 2.0), (0.002, 0.01, 0.05), (100, 1000)))  # noise, sampling rate, steps


def accounting() -> list[Figure]:
    """Epsilon against Opacus' PRV on a grid of 18 settings, and a history of a thousand different steps."""
    apart = [_apart(*setting) for setting in GRID]
    worst = max(range(len(GRID)), key=lambda i: abs(apart[i]))
    noise, q, steps = GRID[worst]
    note = f"worst at noise {noise:g}, q {q:g}, {steps} steps; delta 1e-5"
    return [Figure("epsilon against PRV, 18 settings", abs(apart[worst]), "<= 0.015", note), _many()]


def _apart(noise: float, q: float, steps: int) -> float:
    """Relative to PRV's upper bound, which is computed to half a percent."""
    found = spent([Steps(noise, q, steps)], DELTA).epsilon
    second = PRVAccountant()
    second.history = [(noise, q, steps)]
    return found / float(second.get_epsilon(DELTA, eps_error=0.005 * found)) - 1.0


def _many() -> Figure:
    draw = np.random.default_rng(0)
    history = [Steps(1.0 + draw.random(), 0.01 + 0.05 * draw.random(), 10) for _ in range(1000)]
    began = time.perf_counter()
    epsilon_of(rdp_of(history), DELTA)
    return Figure("seconds for 1,000 kinds of steps", time.perf_counter() - began, "<= 5", "RDP, none seen before")
