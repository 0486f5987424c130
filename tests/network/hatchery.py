"""A federation of real processes that are forked from one which has imported everything: each starts in a moment.

A process may be told to kill itself at a named step: whatever is patched for that is patched in that process alone,
after the fork, and fedkit's own code knows nothing of it.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedkit.loopback import Loopback

__all__ = ["Hatched"]

PRELOADED = [
    *("fedkit.server.process", "fedkit.client.process", "fedkit.client.agent", "fedkit.cli.serving", "fedkit.remote"),
    *("fedkit.simulation", "tests.network.tasks", "tests.network.gates", "tests.network.steps", "tests.network.warm"),
]

_hatchery = multiprocessing.get_context("forkserver")
_hatchery.set_forkserver_preload(PRELOADED)


def _live(arguments: list[str], log: str, environment: dict[str, str], tether: Connection, step: str) -> None:
    """What a process does from its fork to its end: the command line of `fedkit`."""
    from fedkit.cli import app
    from tests.network import steps

    os.setsid()
    os.environ.update(environment)
    os.dup2(tether.fileno(), 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
    steps.archive_updates(environment.get(steps.ARCHIVE))
    if step:
        every = steps.STEPS | steps.SPENDING | steps.MASKING | steps.ENCRYPTING | steps.SEALING
        every[step].arm()
    app(arguments)


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
    """As `Loopback`. The next start of a process in `due` kills itself at that step (a key of `steps.STEPS`)."""

    def __init__(self, folder: Path, *given: Any, **more: Any) -> None:
        super().__init__(folder, *given, **more)
        self.due: dict[str, str] = {}

    def _start(self, name: str, command: str, *arguments: str) -> None:
        before = self.processes.get(name)
        if before is not None:
            before.stdin.close()
        theirs, ours = _hatchery.Pipe(duplex=False)
        line = [command, *arguments, "--log", "json", "--tethered"]
        log = str(self.folder / "logs" / f"{name}.log")
        environment = {key: self._environment[key] for key in self._environment.keys() - os.environ.keys()}
        given = (line, log, environment, theirs, self.due.pop(name, ""))
        process = _hatchery.Process(target=_live, args=given, daemon=False)
        process.start()
        theirs.close()
        self.processes[name] = _Process(process, ours)  # type: ignore[assignment]
