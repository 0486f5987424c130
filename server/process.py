"""The coordinator process: one port for agents and operators, one folder that survives."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import grpc
import structlog
from prometheus_client import start_http_server
from pydantic import Field

from fedkit.config import Settings
from fedkit.errors import ConfigError
from fedkit.process import fast_loop, on_stop, tune_malloc
from fedkit.protos import agents_pb2, operators_pb2
from fedkit.protos.wire import SERVER_OPTIONS, handlers
from fedkit.server.agents import AgentService
from fedkit.server.attendance import Attendance
from fedkit.server.database import Database
from fedkit.server.metrics import Metrics
from fedkit.server.operators import OperatorService
from fedkit.server.runs import Runs
from fedkit.task import Task

__all__ = ["Coordinator", "CoordinatorSettings", "coordinate", "require_loopback"]

log = structlog.get_logger("fedkit.server")

_GRACE_S = 1.0

Seconds = Annotated[float, Field(gt=0, le=3600)]


class CoordinatorSettings(Settings):
    """One coordinator: where it listens, and the folder it keeps.

    Agents send a heartbeat every `heartbeat_s`; one that is silent for two of them counts as away, and as lost when it
    has not come back within `rejoin_s`. `metrics` is an address for Prometheus, such as 127.0.0.1:9464.
    """

    listen: str = "127.0.0.1:8443"
    state: Path = Path("fedkit-server")
    heartbeat_s: Seconds = 10.0
    rejoin_s: Seconds = 30.0
    metrics: str | None = None


def require_loopback(address: str) -> tuple[str, int]:
    """Host and port of a loopback address; raises `ConfigError` that explains why no other will do."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"an address is host:port, such as 127.0.0.1:8443, got {address!r}")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback:
            return host, int(port)
    raise ConfigError(
        f"{address}: without TLS a coordinator listens on loopback only, because anybody on the network could read "
        "models and updates and pose as a client; use 127.0.0.1 and a tunnel (such as ssh -L) between machines"
    )


class Coordinator:
    """Everything a coordinator is made of; `start` opens its port, `stop` leaves its runs to the next one."""

    def __init__(self, settings: CoordinatorSettings, tasks: Mapping[str, Task]) -> None:
        require_loopback(settings.listen)
        self._settings = settings
        self.metrics = Metrics()
        self.database = Database(settings.state / "coordinator.db")
        self.attendance = Attendance(settings.rejoin_s)
        for client in self.database.clients():
            if client.state != "left":
                self.attendance.expect(client.name, frozenset(client.tasks))
        self.runs = Runs(settings.state, self.database, self.attendance, self.metrics, tasks)
        self._agents = AgentService(self.attendance, self.database, self.metrics, heartbeat_s=settings.heartbeat_s)
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listens, takes up open runs, and returns the port."""
        services = [(agents_pb2, "Agents", self._agents), (operators_pb2, "Operators", OperatorService(self.runs))]
        self._server.add_generic_rpc_handlers(
            tuple(handlers(module.DESCRIPTOR.services_by_name[name], servicer) for module, name, servicer in services)
        )
        port = self._listen()
        self._serve_metrics()
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())
        self.runs.resume()
        host = self._settings.listen.rpartition(":")[0]
        (self._settings.state / "address").write_text(f"{host}:{port}\n")
        log.info("listening", address=f"{host}:{port}", state=str(self._settings.state))
        return port

    async def _watch(self) -> None:
        """Notices silent agents in time, and keeps the gauges fresh."""
        while True:
            self._agents.end_silent()
            self.metrics.show(self.attendance.states(), self.runs.states())
            await asyncio.sleep(self._settings.heartbeat_s / 4)

    def _listen(self) -> int:
        try:
            return self._server.add_insecure_port(self._settings.listen)
        except RuntimeError:
            raise ConfigError(f"{self._settings.listen} is in use by another process, or not to be had here") from None

    def _serve_metrics(self) -> None:
        if self._settings.metrics is not None:
            host, port = require_loopback(self._settings.metrics)
            try:
                start_http_server(port, addr=host, registry=self.metrics.registry)
            except OSError:
                text = f"{self._settings.metrics} is in use by another process, or not to be had here (for metrics)"
                raise ConfigError(text) from None

    async def stop(self) -> None:
        """Says goodbye to agents, ends calls, closes files."""
        self._agents.say_stopping()
        await self.runs.close()
        await self._server.stop(_GRACE_S)
        if self._watching is not None:
            self._watching.cancel()
        self.database.close()


def coordinate(settings: CoordinatorSettings, tasks: Mapping[str, Task], *, tethered: bool = False) -> None:
    """Runs a coordinator until it is told to end, or, `tethered`, until standard input does; raises `ConfigError`."""
    tune_malloc()
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        runner.run(_coordinate(settings, tasks, tethered))


async def _coordinate(settings: CoordinatorSettings, tasks: Mapping[str, Task], tethered: bool) -> None:
    coordinator = Coordinator(settings, tasks)
    stopping = asyncio.Event()
    on_stop(stopping.set, tethered=tethered)
    await coordinator.start()
    await stopping.wait()
    await coordinator.stop()
