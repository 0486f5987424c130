"""A federation of real processes that are forked from one which has imported everything: each starts in a moment.

A process may be told to kill itself at a named step: whatever is patched for that is patched in that process alone,
after the fork, and fedkit's own code knows nothing of it.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedkit.loopback import Loopback

__all__ = ["Hatched"]

PRELOADED = [
    *("fedkit.server.process", "fedkit.client.process", "fedkit.client.agent", "fedkit.cli.serving", "fedkit.remote"),
    *("fedkit.simulation", "tests.network.tasks", "tests.network.gates", "tests.network.steps", "tests.network.warm"),
]

MEASURE = "COVERAGE_PROCESS_CONFIG"  # in the environment of processes that coverage is to follow

_hatchery = multiprocessing.get_context("forkserver")
_hatchery.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Due:
    """What is to become of a process: at which step it kills itself, and whether coverage follows it."""

    step: str
    is_measured: bool


def _live(arguments: list[str], log: str, environment: dict[str, str], tether: Connection, due: Due) -> None:
    """What a process does from its fork to its end: the command line of `fedkit`."""
    from fedkit.cli import app
    from tests.network import steps

    os.setsid()
    if not due.is_measured:
        _unmeasured()
    os.environ.update(environment)
    os.dup2(tether.fileno(), 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
    steps.archive_updates(environment.get(steps.ARCHIVE))
    if due.step:
        every = steps.STEPS | steps.SPENDING | steps.MASKING | steps.ENCRYPTING | steps.SEALING
        every[due.step].arm()
    app(arguments)


def _unmeasured() -> None:
    """Coverage slows this process down by half, and forgets what a killed one did."""
    os.environ.pop(MEASURE, None)
    if "coverage" in sys.modules:
        running = sys.modules["coverage"].Coverage.current()
        if running is not None:
            running.stop()


class _Process:
    """Of `subprocess.Popen`, what `Loopback` and tests use."""

    def __init__(self, process: Any, tether: Connection) -> None:
        self._process = process
        self.stdin = tether
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("fedkit", timeout)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Hatched(Loopback):
    """As `Loopback`. The next start of a process in `due` kills itself at that step (a key of `steps.STEPS`).

    Coverage follows the processes that a fixture starts for many tests, unless `is_measured` is False.
    """

    def __init__(self, folder: Path, *given: Any, is_measured: bool = True, **more: Any) -> None:
        super().__init__(folder, *given, **more)
        self.due: dict[str, str] = {}
        self.is_measured = is_measured

    def _start(self, name: str, command: str, *arguments: str) -> None:
        before = self.processes.get(name)
        if before is not None:
            before.stdin.close()
        theirs, ours = _hatchery.Pipe(duplex=False)
        line = [command, *arguments, "--log", "json", "--tethered"]
        log = str(self.folder / "logs" / f"{name}.log")
        environment = {key: self._environment[key] for key in self._environment.keys() - os.environ.keys() - {MEASURE}}
        due = Due(self.due.pop(name, ""), self.is_measured and MEASURE in os.environ)
        given = (line, log, environment, theirs, due)
        process = _hatchery.Process(target=_live, args=given, daemon=False)
        process.start()
        theirs.close()
        self.processes[name] = _Process(process, ours)  # type: ignore[assignment]
