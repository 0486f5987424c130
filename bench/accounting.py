"""What accounting says beside a second implementation, and how long it takes beside the work it accounts for."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
from opacus.accountants import PRVAccountant

from bench.bare.coordinator import cpu_seconds
from bench.processes import with_children
from bench.table import Figure
from fedkit.config import DP, Privacy
from fedkit.demo.heart import HOSPITALS
from fedkit.loopback import Loopback
from fedkit.privacy.accounting import Tally, epsilon_of, rdp_of, spent
from fedkit.privacy.ledger import Budget, Ledger, Reservation
from fedkit.privacy.plan import planned
from fedkit.remote import connect
from fedkit.rounds.assignment import Private
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
    return [Figure("epsilon against PRV, 18 settings", abs(apart[worst]), "<= 0.015", note), _many(), *_shares()]


def _apart(noise: float, q: float, steps: int) -> float:
    """Relative to PRV's upper bound, which is computed to half a percent."""
    found = spent([Steps(noise, q, steps)], DELTA).epsilon
    second = PRVAccountant()
    second.history = [(noise, q, steps)]
    return found / float(second.get_epsilon(DELTA, eps_error=0.005 * found)) - 1.0


def _shares() -> list[Figure]:
    """What four sites compute of epsilon for each round, and what their ledgers take, beside a round's whole time."""
    rounds, local, dp = 150, Fit(epochs=1, batch_size=16, lr=0.05), DP(epsilon=3.0, delta=1e-3)
    with tempfile.TemporaryDirectory() as folder, Loopback(Path(folder), ["heart"], HOSPITALS) as federation:
        pids = [process.pid for process in federation.processes.values()]
        with connect(federation.address) as coordinator:
            about = {"privacy": Privacy(dp=dp), "min_clients": len(HOSPITALS), "progress": False}
            coordinator.run("heart", FedAvg(rounds=1, local=local), **about)  # loads what there is to load
            before = cpu_seconds(with_children(pids))
            coordinator.run("heart", FedAvg(rounds=rounds, local=local), **about)
            round_s = (cpu_seconds(with_children(pids)) - before) / rounds
    cost = planned(Private(dp, 1000, 1), local, 199).cost
    shares = [len(HOSPITALS) * seconds / round_s for seconds in (_accounted(cost), _on_record(cost))]
    note = "processor time; heart, four sites, 1,000 rounds"
    return [
        Figure("accounting / a round", shares[0], "<= 0.01", note),
        Figure("ledgers on disk, accounting among it / a round", shares[1], "", note),
    ]


def _accounted(cost: Steps) -> float:
    """Seconds in which one assignment is accounted for, the mean over a thousand: three checks and a report."""
    tally, count = Tally(), 1000
    began = time.process_time()
    for _ in range(count):
        for _ in range(3):
            epsilon_of(rdp_of(tally.plus(cost)), 1e-3)
        tally = tally.plus(cost)
        spent(tally, 1e-3, tight=False)
    return (time.process_time() - began) / count


def _on_record(cost: Steps) -> float:
    """Seconds of a ledger for one assignment, the mean over a thousand."""
    data, budget, count = "hearts", Budget(8.0, 1e-3), 1000
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Ledger(Path(folder) / "ledger.db")) as ledger:
        began = time.process_time()
        for number in range(count):
            wish = Reservation(f"{number:032x}", "run", data, cost, 1.0)
            ledger.check(wish, budget)
            ledger.identify(data, 199, "")
            ledger.reserve(wish, budget, Budget(3.0, 1e-3))
            ledger.close_reservation(wish.assignment, is_stored=True)
            ledger.account(data).spent(1e-3, run="run", tight=False)
        return (time.process_time() - began) / count


def _many() -> Figure:
    draw = np.random.default_rng(0)
    history = [Steps(1.0 + draw.random(), 0.01 + 0.05 * draw.random(), 10) for _ in range(1000)]
    began = time.perf_counter()
    epsilon_of(rdp_of(history), DELTA)
    return Figure("seconds for 1,000 kinds of steps", time.perf_counter() - began, "<= 5", "RDP, none seen before")
