"""`make faults`: a real federation whose processes are killed at random, and what is left of its run afterwards.

Beside it the bad inputs of `tests/hostile`, many more that hypothesis makes up, and lines that are cut.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest

import fedkit
from bench import echo
from bench.processes import free_port
from bench.proxy import Lined, Proxy, Side
from bench.table import Figure, show
from fedkit import history
from fedkit.demo.heart import HOSPITALS, task
from fedkit.errors import StorageError
from fedkit.loopback import Loopback
from fedkit.rounds.journal import RoundRecord
from fedkit.strategies import CyclicWeightTransfer, FedAvg, Scaffold
from fedkit.strategy import Strategy


@dataclass
class Report:
    """What a run that was killed again and again came to."""

    kills: int = 0
    resumed_s: list[float] = field(default_factory=list)
    lost_commits: int = 0
    trained_twice: int = 0
    differing_weights: int = 0
    history: str = ""  # what is wrong with it
    records: list[RoundRecord] = field(default_factory=list)


class _Watch(threading.Thread):
    """Runs the strategy from Python, as a user would, and notes when rounds are committed."""

    def __init__(self, address: str, strategy: Strategy, seed: int) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, RoundRecord]] = []
        self.result: fedkit.Result | None = None
        self.moved = threading.Condition()
        self._address, self._strategy, self._seed = address, strategy, seed

    def run(self) -> None:
        with fedkit.connect(self._address) as coordinator:
            result = coordinator.run(
                task, self._strategy, seed=self._seed, min_clients=len(HOSPITALS), progress=False, on_round=self._note
            )
        with self.moved:
            self.result = result
            self.moved.notify_all()

    def _note(self, record: RoundRecord) -> None:
        with self.moved:
            self.seen.append((time.monotonic(), record))
            self.moved.notify_all()

    def wait_for_more(self, than: int, seconds: float) -> bool:
        """Whether another round was committed, or the run ended, in time."""
        with self.moved:
            return self.moved.wait_for(lambda: len(self.seen) > than or self.result is not None, seconds)


def survive(folder: Path, strategy: Strategy, kills: int, seed: int, place: type[Loopback] = Loopback) -> Report:
    """Runs `strategy` over the four hospitals and kills one process after the other, each at a random moment."""
    report, draw = Report(), random.Random(seed)
    with place(folder, ["heart"], HOSPITALS, rejoin_s=60.0) as federation:
        watch = _Watch(federation.address, strategy, seed)
        watch.start()
        watch.wait_for_more(0, 60)
        while report.kills < kills and watch.result is None:
            time.sleep(draw.uniform(0.0, 0.5))
            committed = len(watch.seen)
            federation.kill(draw.choice(["server", *HOSPITALS]))
            killed = time.monotonic()
            federation.revive()
            report.kills += 1
            if not watch.wait_for_more(committed, 90):
                raise RuntimeError(f"nothing was committed for 90 s after a kill: see {folder / 'logs'}")
            report.resumed_s.append(time.monotonic() - killed)
        watch.join(900)  # the rounds that are left
    assert watch.result is not None, "the run did not end"
    return _judge(report, folder, watch, fedkit.simulate(task, strategy, clients=HOSPITALS, seed=seed, threads=1))


def _judge(report: Report, folder: Path, watch: _Watch, expected: fedkit.Result) -> Report:
    assert watch.result is not None
    report.records = watch.result.history
    seen = {record.round: record for _, record in watch.seen}
    report.lost_commits = sum(seen.get(record.round) != record for record in report.records)
    report.lost_commits += len(expected.history) - len(report.records)
    report.trained_twice = sum(count - 1 for count in stored(folder).values())
    report.differing_weights = int((watch.result.weights.vector != expected.weights.vector).sum())
    report.history = _wrong_with_history(folder, expected)
    return report


def _wrong_with_history(folder: Path, expected: fedkit.Result) -> str:
    """What contradicts in the run's history: rounds in order, each result in one, the model that of a simulation."""
    [path] = (folder / "server" / "history").iterdir()
    try:
        found = history.check(path)
    except StorageError as error:
        return str(error)
    if found.rounds != len(expected.history) + 1:
        return f"{path}: {found.rounds} rounds"
    return "" if found.model == expected.weights.digest else f"{path}: another model than that of a simulation"


def stored(folder: Path) -> Counter[str]:
    """How often each assignment's result was stored at an agent, from the agents' logs."""
    found: Counter[str] = Counter()
    for log in (folder / "logs").glob("*.log"):
        for line in log.read_text().splitlines():
            if '"event": "stored"' in line:
                found[f"{log.stem} {json.loads(line)['assignment']}"] += 1
    return found


class BadLine(Lined):
    """One agent that reaches its coordinator over a line which can be cut."""

    def __init__(self, folder: Path, task: str) -> None:
        here = str(Path(__file__).parents[1])
        super().__init__(folder, [task], ["ada"], port=free_port(), rejoin_s=60.0, environment={"PYTHONPATH": here})
        self.line = Proxy(self.address)
        self.line.delay_s = 0.0005  # no faster than 128 MB/s, so that no more is on its way than on a real line


def resent(side: Side, cuts: int, seed: int) -> float:
    """Bytes that went over the line for 100 MB in one direction, cut at random moments, as a multiple of them."""
    size, draw = 100_000_000, random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        federation = BadLine(Path(folder), "bench.echo:mb100")
        with federation.line as line, federation:
            line.cut_at(side, sorted(draw.randrange(size) for _ in range(cuts)))
            with fedkit.connect(federation.address) as coordinator:
                coordinator.run(echo.mb100, FedAvg(rounds=1), min_clients=1, progress=False)
        assert line.cuts == cuts
    also = size if side == "down" else 0  # the new model, whose scores are asked for
    return (line.count[side] - also) / size


class _Tally:
    """Counts, as a plugin of pytest, how many bad inputs were tried, and how many did any harm."""

    def __init__(self) -> None:
        self.tried = 0
        self.harmful = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One test, or its preparation, is over."""
        if report.when == "call":
            self.tried += int(dict(report.user_properties).get("inputs", 1))
        self.harmful += report.failed


def _tested(*names: str, **environment: str) -> _Tally:
    """What these files of network tests come to."""
    os.environ.update(environment)
    tally, folder = _Tally(), Path(__file__).parents[1] / "tests" / "network"
    files = [str(folder / f"test_{name}.py") for name in names]
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *files], plugins=[tally])
    return tally


def bad_inputs() -> _Tally:
    """Everything in `tests/hostile`, and what is made up for every RPC: each must cost nothing else."""
    return _tested("hostile_table", "hostile_updates", "fuzz", FEDKIT_FUZZ_EXAMPLES="400")


def spending() -> list[Figure]:
    """Processes killed at each step at which privacy is spent, 15 times each."""
    tally = _tested("spending", FEDKIT_SPENDING_KILLS="15")
    where = "reserve, train, store, send, commit"
    return [
        Figure("kills where privacy is spent", tally.tried, ">= 200", where),
        Figure("of them, counted too low", tally.harmful, "== 0", "or refused, or noised twice"),
    ]


STRATEGIES: dict[str, tuple[Strategy, int]] = {  # with the kills that one run of it takes: 200 in all
    "FedAvg": (FedAvg(rounds=420, local=fedkit.Fit(steps=400, batch_size=4, lr=0.003)), 140),
    "CyclicWeightTransfer": (CyclicWeightTransfer(rounds=120, local=fedkit.Fit(steps=200, batch_size=4, lr=0.001)), 30),
    "Scaffold": (Scaffold(rounds=130, local=fedkit.Fit(steps=300, batch_size=4, lr=0.003)), 30),
}


def killed(name: str, seed: int) -> tuple[Report, list[Figure]]:
    """A run of that strategy under random kills, and what it came to."""
    strategy, kills = STRATEGIES[name]
    with tempfile.TemporaryDirectory() as folder:
        report = survive(Path(folder), strategy, kills, seed)
    if report.history:
        print(report.history)
    return report, [
        Figure(f"{name}: kills survived", report.kills, f">= {kills}", "kill -9 of coordinator or agents, one run"),
        Figure(f"{name}: lost commits", report.lost_commits, "== 0"),
        Figure(f"{name}: stored results trained again", report.trained_twice, "== 0"),
        Figure(f"{name}: weights that differ from simulation", report.differing_weights, "== 0"),
        Figure(f"{name}: contradictions in the history", bool(report.history), "== 0", "rounds, results, model"),
    ]


def totals(reports: list[Report], tally: _Tally) -> list[Figure]:
    """What all of it comes to."""
    seconds = [each for report in reports for each in report.resumed_s]
    return [
        Figure("kills survived", sum(report.kills for report in reports), "", "in all"),
        Figure("seconds to resume, median", statistics.median(seconds), "", "kill to next committed round"),
        Figure("seconds to resume, longest", max(seconds), "<= 10"),
        Figure("bad inputs tried", tally.tried, ">= 1000", "files and fuzzed requests"),
        Figure("bad inputs that did harm", tally.harmful, "== 0"),
    ]


def main() -> None:
    """Kills and counts; exits with 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*STRATEGIES, "spending"], help="of all that is killed, this alone")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.only == "spending":
        sys.exit(not show("Faults", spending()))
    reports, figures = [], []
    for name in [chosen.only] if chosen.only else STRATEGIES:
        report, found = killed(name, chosen.seed)
        reports.append(report)
        figures += found
    ways: dict[Side, str] = {"up": "upload", "down": "download"}
    for side, way in ways.items():
        ratio = resent(side, 20, chosen.seed)
        figures.append(Figure(f"{way} of 100 MB, cut 20 times: bytes sent / size", ratio, "<= 1.15"))
    sys.exit(not show("Faults", figures + spending() + totals(reports, bad_inputs())))


if __name__ == "__main__":
    main()
