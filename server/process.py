"""The coordinator process: one port for agents and operators, one folder that survives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import grpc
import structlog
from prometheus_client import make_wsgi_app
from pydantic import Field

from fedkit.address import is_loopback, parts
from fedkit.audit import AuditLog
from fedkit.config import Settings
from fedkit.errors import ConfigError
from fedkit.logs import keep, where
from fedkit.process import fast_loop, on_stop, open_many_files, tune_malloc
from fedkit.protos import agents_pb2, operators_pb2
from fedkit.protos.wire import SERVER_OPTIONS, handlers
from fedkit.rounds.checks import MAX_EXAMPLES
from fedkit.server.agents import AgentService
from fedkit.server.attendance import Attendance
from fedkit.server.database import Database
from fedkit.server.listener import Listener
from fedkit.server.metrics import Metrics
from fedkit.server.operators import DescribingService, OperatorService
from fedkit.server.pages import Pages, page_key, say_where
from fedkit.server.runs import Runs
from fedkit.server.trust import Trust, listen
from fedkit.task import Task
from fedkit.trust.authority import Authority
from fedkit.trust.roster import Chain

__all__ = ["Coordinator", "CoordinatorSettings", "coordinate"]

log = structlog.get_logger("fedkit.server")

_GRACE_S = 1.0
_AGAIN_S = 1.0  # after which a watch that has ended begins again
_ROSTER_BYTES = 3 << 20  # which fits into one message

Seconds = Annotated[float, Field(gt=0, le=3600)]


class CoordinatorSettings(Settings):
    """One coordinator: where it listens, and the folder it keeps.

    Agents send a heartbeat every `heartbeat_s`; one that is silent for two of them counts as away, and as lost when it
    has not come back within `rejoin_s`. `metrics` is an address for Prometheus, such as 127.0.0.1:9464;
    there it shows the runs too, to whoever has the key in the file `pages` of the folder.

    With the folder of an `authority` everything is mutual TLS; without one a coordinator listens on loopback only.
    `enrolment` is the address at which tokens are taken; `hosts` are names and addresses under which it is dialled,
    besides those it finds itself. `roster` is the members' roster, which goes to every agent.

    No result counts for more than `max_examples` training rows, whatever a client declares: what one site can weigh.
    """

    listen: str = "127.0.0.1:8443"
    state: Path = Path("fedkit-server")
    heartbeat_s: Seconds = 10.0
    rejoin_s: Seconds = 30.0
    metrics: str | None = None
    authority: Path | None = None
    enrolment: str | None = None
    roster: Path | None = None
    hosts: tuple[str, ...] = ()
    max_examples: Annotated[int, Field(gt=0, le=MAX_EXAMPLES)] = 1_000_000


def _require_loopback(address: str) -> tuple[str, int]:
    """Host and port of a loopback address; raises `ConfigError` that explains why no other will do."""
    host, port = parts(address)
    if not is_loopback(host):
        raise ConfigError(
            f"{address}: without TLS a coordinator listens on loopback only, because anybody on the network could read "
            "models and updates and pose as a client; make an authority with fedkit ca init, and give --authority"
        )
    return host, port


def _require_safe(settings: CoordinatorSettings) -> None:
    if settings.authority is None:
        _require_loopback(settings.listen)
        if settings.enrolment is not None or settings.hosts:
            raise ConfigError("enrolment and hosts belong to TLS: give the folder of an authority, with --authority")
    for address in (settings.listen, settings.enrolment):
        if address is not None:
            parts(address)
    if settings.metrics is not None and not is_loopback(parts(settings.metrics)[0]):
        raise ConfigError(f"{settings.metrics}: metrics are served without TLS, so on loopback only")


def _roster(path: Path) -> Chain:
    chain = Chain.load(path)
    chain.check()
    if len(chain.to_json()) > _ROSTER_BYTES:
        raise ConfigError(f"{path}: {_ROSTER_BYTES >> 20} MiB of roster can be sent to agents, and this one is larger")
    return chain


class Coordinator:
    """Everything a coordinator is made of; `start` opens its port, `stop` leaves its runs to the next one."""

    def __init__(self, settings: CoordinatorSettings, tasks: Mapping[str, Task]) -> None:
        _require_safe(settings)
        self._settings = settings
        self._trust: Trust | None = None
        if settings.authority is not None:
            self._trust = Trust(Authority(settings.authority), settings.listen, settings.hosts)
        self.metrics = Metrics()
        self.database = Database(settings.state / "coordinator.db")
        self.attendance = Attendance(settings.rejoin_s, None if settings.roster is None else _roster(settings.roster))
        for client in self.database.clients():
            if client.state != "left":
                self.attendance.expect(client.name, frozenset(client.tasks))
        self.runs = Runs(settings.state, self.database, self.attendance, self.metrics, tasks)
        heartbeat_s, most = settings.heartbeat_s, settings.max_examples
        shared = self.attendance, self.database, self.metrics
        self._agents = AgentService(*shared, heartbeat_s=heartbeat_s, max_examples=most)
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._watching: set[asyncio.Task[None]] = set()
        self._closing = contextlib.ExitStack()

    async def start(self) -> int:
        """Listens, takes up open runs, and returns the port."""
        self._server.add_generic_rpc_handlers(tuple(self._services()))
        port = listen(self._server, self._settings.listen, None if self._trust is None else self._trust.credentials())
        self._serve_metrics()
        await self._server.start()
        self._keep_up(self._watch)
        if self._trust is not None:
            self._keep_up(self._trust.watch)
            if self._settings.enrolment is not None:
                await self._trust.open_enrolment(self._settings.enrolment)
        self.runs.resume()
        host = self._settings.listen.rpartition(":")[0]
        (self._settings.state / "address").write_text(f"{host}:{port}\n")
        tls = self._trust is not None
        log.info("listening", address=f"{host}:{port}", tls=tls, state=str(self._settings.state))
        return port

    def _services(self) -> Iterator[grpc.GenericRpcHandler[Any, Any]]:
        operators, described = OperatorService(self.runs), DescribingService(self.runs)
        served = (agents_pb2, "Agents", self._agents), (agents_pb2, "Runs", described)
        for module, name, servicer in (*served, (operators_pb2, "Operators", operators)):
            service = module.DESCRIPTOR.services_by_name[name]
            yield handlers(service, servicer if self._trust is None else self._trust.guard.around(service, servicer))
        if self._trust is not None:
            yield self._trust.renewal()

    def _keep_up(self, watch: Callable[[], Awaitable[None]], pause_s: float = 0.0) -> None:
        """Runs what must never end. Where it does all the same, that is on record, and it begins again."""

        async def after_pause() -> None:
            await asyncio.sleep(pause_s)
            await watch()

        def ended(task: asyncio.Task[None]) -> None:
            self._watching.discard(task)
            if not task.cancelled():
                error = task.exception()
                about = {} if error is None else {"error": type(error).__name__, "where": where(error)[-3:]}
                log.error("watch ended", what=watch.__qualname__, **about)
                self._keep_up(watch, _AGAIN_S)

        task = asyncio.create_task(after_pause())
        self._watching.add(task)
        task.add_done_callback(ended)

    async def _watch(self) -> None:
        """Notices silent agents in time, and keeps the gauges fresh."""
        while True:
            self._agents.end_silent()
            self.metrics.show(self.attendance.states(), self.runs.states())
            await asyncio.sleep(self._settings.heartbeat_s / 4)

    def _serve_metrics(self) -> None:
        if self._settings.metrics is not None:
            host, port = parts(self._settings.metrics)
            key = page_key(self._settings.state)
            pages = Pages(self.runs, key, asyncio.get_running_loop())
            try:
                listener = Listener(host, port, pages.beside(make_wsgi_app(self.metrics.registry)))
            except OSError:
                text = f"{self._settings.metrics} is in use by another process, or not to be had here (for metrics)"
                raise ConfigError(text) from None
            self._closing.callback(listener.close)
            say_where(self._settings.state, key, listener.address)

    async def stop(self) -> None:
        """Says goodbye to agents, ends calls, closes files."""
        self._agents.say_stopping()
        await self.runs.close()
        await self._server.stop(_GRACE_S)
        for watching in self._watching:
            watching.cancel()
        if self._trust is not None:
            await self._trust.close()
        self._closing.close()
        self.database.close()


def coordinate(settings: CoordinatorSettings, tasks: Mapping[str, Task], *, tethered: bool = False) -> None:
    """Runs a coordinator until it is told to end, or, `tethered`, until standard input does; raises `ConfigError`."""
    tune_malloc()
    open_many_files()
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        runner.run(_coordinate(settings, tasks, tethered))


async def _coordinate(settings: CoordinatorSettings, tasks: Mapping[str, Task], tethered: bool) -> None:
    coordinator = Coordinator(settings, tasks)  # it holds the folder from here on
    keep(AuditLog(settings.state / "audit.log"))
    stopping = asyncio.Event()
    on_stop(stopping.set, tethered=tethered)
    await coordinator.start()
    await stopping.wait()
    await coordinator.stop()
