"""Real processes on loopback: a coordinator with its agents, and the bare program. Linux only."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Literal

import fedkit
import fedkit.remote
from bench import echo
from bench.bare.coordinator import cpu_seconds
from fedkit.strategies import FedAvg
from fedkit.trust.authority import found
from fedkit.trust.roster import agree

__all__ = ["ROOT", "Bare", "Federation", "command", "free_port", "with_children"]

ROOT = Path(__file__).parents[1]
_FEDKIT = str(Path(sys.executable).with_name("fedkit"))
_START_S = 180.0


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """`fedkit ...` in a session of its own, run from the repository's root."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("wb") as out:
        return subprocess.Popen(
            [_FEDKIT, *arguments], cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    except ProcessLookupError:
        process.wait()


class Federation:
    """A coordinator and its agents, started on entry, over on exit. `task` names one of `bench.echo`."""

    def __init__(self, task: str, clients: int, *, tls: bool = False, roster: bool = False) -> None:
        self.tls = tls or roster
        self.roster = roster
        self.task: fedkit.Task = getattr(echo, task)
        self.clients = clients
        self.address = f"127.0.0.1:{free_port()}"
        self._registered = ("--task", f"bench.echo:{task}")
        self._stack = ExitStack()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Federation:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        self._identities = self._enrolled() if self.tls else {}
        with self._stack:
            self.start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def start(self) -> None:
        """Begins every process at once; waits for none."""
        where = ["--listen", self.address, "--state", str(self.folder / "server")]
        known = ["--roster", str(self.folder / "roster.json")] if self.roster else []
        self._begin("server", "server", *where, *(["--authority", str(self.folder / "ca")] if self.tls else []), *known)
        for name in self._names():
            where = ["--coordinator", self.address, "--state", str(self.folder / name)]
            shown = ["--identity", str(self._identities[name])] if self.tls else []
            self._begin(name, "client", "--name", name, "--threads", "1", *where, *shown, *known)

    def _names(self) -> list[str]:
        return [f"c{index:02d}" for index in range(self.clients)]

    def _enrolled(self) -> dict[str, Path]:
        where = {name: self.folder / f"id-{name}" for name in self._names()}
        identities = found(self.folder / "ca", "bench", self._names(), lambda name: self.folder / f"id-{name}")
        if self.roster:
            agree(self.folder / "roster.json", "bench", where)
        return identities

    def connect(self, patience_s: float = 300.0) -> fedkit.remote.Coordinator:
        """The coordinator, as an operator sees it."""
        return fedkit.connect(self.address, self._identities.get("operator"), patience_s=patience_s)

    def _begin(self, name: str, *arguments: str) -> None:
        process = command(*arguments, *self._registered, log=self.folder / f"{name}.log")
        self._stack.callback(_stop, process)
        self._processes.append(process)

    def wait(self) -> None:
        """Returns once every agent attends; raises `TimeoutError` with the logs' ends."""
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            if self._attending() == self.clients:
                return
            time.sleep(0.2)
        tails = [log.read_text(errors="replace")[-300:] for log in sorted(self.folder.glob("*.log"))]
        raise TimeoutError("not every agent attends:\n" + "\n".join(tails))

    def _attending(self) -> int:
        try:
            with self.connect(patience_s=0.0) as coordinator:
                return sum(client.state == "ready" for client in coordinator.status().clients)
        except fedkit.FedkitError:
            return 0

    def rounds(self, count: int, aggregation: Literal["plain", "masked", "bfv"] = "plain") -> float:
        """The median seconds between the commits of `count` + 1 rounds of FedAvg."""
        marks: list[float] = []
        strategy = FedAvg(rounds=count + 1, local=fedkit.Fit(steps=1))
        with self.connect() as coordinator:
            result = coordinator.run(
                self.task,
                strategy,
                min_clients=self.clients,
                progress=False,
                privacy=fedkit.Privacy(aggregation=aggregation),
                on_round=lambda record: marks.append(time.perf_counter()),
            )
        assert all(len(record.clients) == self.clients for record in result.history)
        off = abs(float(result.weights.vector[0]) - (count + 1))
        assert off <= (0.0 if aggregation == "plain" else 1e-3)
        return statistics.median(after - before for before, after in pairwise(marks))

    def memory(self, field: str) -> float:
        """`VmRSS` or `VmHWM` of the coordinator in millions of bytes."""
        lines = Path(f"/proc/{self._processes[0].pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))

    def forget_peak(self) -> None:
        """Lets `VmHWM` of the coordinator begin anew."""
        Path(f"/proc/{self._processes[0].pid}/clear_refs").write_text("5")

    def cpu_seconds(self) -> float:
        """User and system time of coordinator, agents and their workers, so far."""
        leaders = {process.pid for process in self._processes}
        return cpu_seconds([pid for pid in _pids() if _session(pid) in leaders])


def with_children(pids: list[int]) -> list[int]:
    """These processes and all that descend from them."""
    parents = {pid: _parent(pid) for pid in _pids()}
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


class Bare:
    """The bare program with its clients, started on entry, over on exit. With `kept`, it never closes a call."""

    def __init__(self, megabytes: int, clients: int, *, kept: bool = False) -> None:
        size = ("--bytes", str(megabytes * 1_000_000), "--clients", str(clients))
        self._command = [sys.executable, "-m", "bench.bare.coordinator", *size, *(["--kept"] if kept else [])]

    def __enter__(self) -> Bare:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.cpu_s = 0.0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate(timeout=60)

    def rounds(self, count: int) -> float:
        """The median seconds of `count` rounds; `cpu_s` keeps the processor seconds of one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        found = json.loads(self._process.stdout.readline())
        self.cpu_s = found["cpu_s"] / count
        return statistics.median(found["seconds"])
