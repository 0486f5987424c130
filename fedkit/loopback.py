"""A coordinator and its agents as processes of this machine: started, watched, killed and started again.

For demonstrations, tests and measurements. They are real processes that talk over real sockets; they end when the
process that started them does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from fedkit.errors import RunError, Unreachable

if TYPE_CHECKING:
    from fedkit.crypto.box import Owner

__all__ = ["Loopback"]

_STOP_S = 10.0


class Loopback:
    """One federation under `folder`: the state of each process, and its log under `logs/`.

    `tasks` are registered names or `module:attr`. With `tls` there is an authority, everybody enrols, and everything
    is mutual TLS; with `roster`, the clients and the operator are members of one besides. Options are added to the
    command lines as they are at each start. Use as a context manager: everything is stopped at its end.
    """

    def __init__(
        self,
        folder: Path,
        tasks: Sequence[str],
        clients: Sequence[str],
        *,
        port: int = 0,
        heartbeat_s: float = 10.0,
        rejoin_s: float = 30.0,
        strategies: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        tls: bool = False,
        roster: bool = False,
        server_options: Sequence[str] = (),
        client_options: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.clients = tuple(clients)
        self.port = port
        self.tls = tls or roster
        self.roster = folder / "roster.json" if roster else None
        self.server_options = list(server_options)
        self.client_options = list(client_options)
        self.authority = folder / "authority"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped = False
        self._lock = threading.Lock()
        self._tasks = [part for task in tasks for part in ("--task", task)]
        self._imported = [part for task in tasks if ":" in task for part in ("--task", task)]
        self._times = ["--heartbeat-s", str(heartbeat_s), "--rejoin-s", str(rejoin_s)]
        self._strategies = [part for path in strategies for part in ("--strategy", path)]
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    @property
    def operator(self) -> Path | None:
        """The folder of an operator's identity, for `fedkit.connect`; None without TLS."""
        return self.identity("operator") if self.tls else None

    @property
    def owner(self) -> Owner | None:
        """The operator as the owner of sealed runs; None without a roster."""
        from fedkit.crypto.box import Owner

        return None if self.roster is None else Owner.load(self.identity("operator"), self.roster)

    def identity(self, name: str) -> Path:
        """The folder of a participant's identity."""
        return self.folder / "identities" / name

    @property
    def address(self) -> str:
        """Where the coordinator listens."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        if self.tls:
            self._make_authority()
        self.start_server()
        for name in self.clients:
            self.start_client(name)
        self.wait_for_server()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _make_authority(self) -> None:
        from fedkit.trust.authority import found

        found(self.authority, "loopback", self.clients, self.identity)
        if self.roster is not None:
            from fedkit.trust.roster import agree

            agree(self.roster, "loopback", {name: self.identity(name) for name in (*self.clients, "operator")})

    # -- beginning -----------------------------------------------------------------------------------------------------

    def start_server(self) -> None:
        """Starts the coordinator; on its port of before, where it had one."""
        if self.port == 0:
            self.port = _free_port()
        listen = ["--listen", self.address, "--state", str(self.folder / "server")]
        if self.tls:
            listen += ["--authority", str(self.authority)]
        if self.roster is not None:
            listen += ["--roster", str(self.roster)]
        self._start("server", "server", *listen, *self._times, *self._imported, *self._strategies, *self.server_options)

    def start_client(self, name: str) -> None:
        """Starts one agent."""
        given = ["--name", name, "--coordinator", self.address, "--state", str(self.folder / "clients")]
        if self.tls:
            given += ["--identity", str(self.identity(name))]
        if self.roster is not None:
            given += ["--roster", str(self.roster)]
        self._start(name, "client", *given, "--threads", "1", *self._tasks, *self.client_options)

    def _start(self, name: str, command: str, *arguments: str) -> None:
        before = self.processes.get(name)
        if before is not None and before.stdin is not None:
            before.stdin.close()
        with self._log(name) as log:
            self.processes[name] = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "fedkit", command, *arguments, "--log", "json", "--tethered"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environment,
            )

    def _log(self, name: str) -> IO[bytes]:
        return open(self.folder / "logs" / f"{name}.log", "ab")

    def wait_for_server(self, seconds: float = 60.0) -> None:
        """Returns when the coordinator listens; raises `RunError` where it ended or did not come up in time."""
        from fedkit.remote import connect

        until = time.monotonic() + seconds
        while True:
            if self.processes["server"].poll() is not None or time.monotonic() > until:
                raise RunError(f"the coordinator did not come up: see {self.folder / 'logs' / 'server.log'}")
            with contextlib.suppress(Unreachable), connect(self.address, self.operator, patience_s=0.5) as coordinator:
                coordinator.status()
                return

    # -- ending --------------------------------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """SIGKILL to "server" or a client."""
        self.processes[name].kill()
        self.processes[name].wait()

    def revive(self) -> list[str]:
        """Starts again whoever has ended; their names."""
        ended = [name for name, process in self.processes.items() if process.poll() is not None]
        for name in ended:
            self._restart(name)
        return ended

    def _restart(self, name: str) -> None:
        if name == "server":
            self.start_server()
        else:
            self.start_client(name)

    def keep_alive(self, say: Callable[[str], None]) -> None:
        """From now on, whoever ends is started again at once, and `say` is told the name."""
        for name in self.processes:
            threading.Thread(target=self._attend_to, args=(name, say), daemon=True).start()

    def _attend_to(self, name: str, say: Callable[[str], None]) -> None:
        while True:
            self.processes[name].wait()
            with self._lock:
                if self._stopped:
                    return
                say(name)
                self._restart(name)

    def stop(self) -> None:
        """Ends every process, politely at first."""
        with self._lock:
            self._stopped = True
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _free_port() -> int:
    """A port that nobody listens on at the moment."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
