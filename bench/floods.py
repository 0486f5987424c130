"""Traffic of strangers against a coordinator with TLS: the memory it takes, and what an honest round then costs."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fedkit
from bench import echo
from bench.flooder import KINDS
from bench.processes import ROOT, free_port
from bench.table import Figure, show
from fedkit.errors import RunCancelled
from fedkit.loopback import Loopback
from fedkit.strategies import FedAvg

__all__ = ["floods", "peak_mb", "resident_mb"]

AGENTS = ("ada", "bea", "cyd")
TURNS = 3
SECONDS = 5.0  # of each turn


def _status(pid: int, field: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def resident_mb(pid: int) -> float:
    """What a process has in memory, in millions of bytes."""
    return _status(pid, "VmRSS")


def peak_mb(pid: int, *, anew: bool = False) -> float:
    """The most it has had since the last time that this was asked `anew`."""
    found = _status(pid, "VmHWM")
    if anew:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    return found


class _Rounds(threading.Thread):
    """Honest rounds without end, and when each was committed."""

    def __init__(self, federation: Loopback) -> None:
        super().__init__(daemon=True)
        self._federation = federation
        self.marks: list[float] = []

    def run(self) -> None:
        """Trains until the run is cancelled."""
        with fedkit.connect(self._federation.address, self._federation.operator, patience_s=120) as coordinator:
            try:
                coordinator.run(
                    echo.mb1,
                    FedAvg(rounds=1_000_000, local=fedkit.Fit(steps=1)),
                    name="honest",
                    min_clients=len(AGENTS),
                    progress=False,
                    on_round=lambda _: self.marks.append(time.monotonic()),
                )
            except RunCancelled:
                return

    def between(self, start: float, end: float) -> list[float]:
        """The seconds of all rounds that lie between."""
        return [after - before for before, after in pairwise(self.marks) if start <= before and after <= end]


def _flood(kind: str, addresses: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.flooder", kind, *addresses, "--seconds", str(SECONDS)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _against(kind: str, addresses: list[str], pid: int, rounds: _Rounds) -> list[Figure]:
    """Quiet and flooded turns in alternation: the median round of each, and the most memory of each."""
    quiet: list[float] = []
    flooded: list[float] = []
    memory: list[float] = []
    done: dict[str, int] = {}
    for _ in range(TURNS):
        peak_mb(pid, anew=True)
        began = time.monotonic()
        time.sleep(SECONDS)
        quiet += rounds.between(began, time.monotonic())
        before = peak_mb(pid)
        flooding = _flood(kind, addresses)
        assert flooding.stdout is not None
        flooding.stdout.readline()  # it is ready
        began, _ = time.monotonic(), peak_mb(pid, anew=True)
        said, _ = flooding.communicate()
        flooded += rounds.between(began + 0.5, time.monotonic())
        memory.append(peak_mb(pid) - before)
        done = {key: done.get(key, 0) + value for key, value in json.loads(said).items()}
    ratio = statistics.median(flooded) / statistics.median(quiet)
    note = (
        f"{statistics.median(flooded) * 1e3:.0f} against {statistics.median(quiet) * 1e3:.0f} ms, {len(flooded)} rounds"
    )
    what = ", ".join(f"{value:,} {key}" for key, value in sorted(done.items()))
    return [
        Figure(f"{kind}: memory they add, MB", max(memory), "<= 64", what),
        Figure(f"{kind}: honest round / without", ratio, "<= 1.5", note),
    ]


def floods(kinds: list[str] | None = None) -> list[Figure]:
    """Every kind of flood against one coordinator, while three agents train a model of 1 MB."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        enrolment = f"127.0.0.1:{free_port()}"
        environment = {"PYTHONPATH": str(ROOT)}
        known, options = ["bench.echo:mb1"], ["--enrolment", enrolment]
        federation = Loopback(
            Path(folder), known, AGENTS, tls=True, server_options=options, environment=environment, rejoin_s=60
        )
        with federation:
            rounds = _Rounds(federation)
            rounds.start()
            while len(rounds.marks) < 50:
                time.sleep(0.1)
            pid, found = federation.processes["server"].pid, []
            for kind in kinds or KINDS:
                talking = [enrolment] if kind in ("bodies", "bombs") else [federation.address, enrolment]
                found += _against(kind, talking, pid, rounds)
            with fedkit.connect(federation.address, federation.operator) as coordinator:
                coordinator.cancel("honest")
            rounds.join(30)
    return found


def main() -> None:
    """Floods, and prints what it cost; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=KINDS, action="append", help="of the floods, this one; may be repeated")
    sys.exit(not show("Floods", floods(parser.parse_args().only)))


if __name__ == "__main__":
    main()
