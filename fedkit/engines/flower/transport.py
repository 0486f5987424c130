"""The way to clients over Flower's grid: one message out, one reply in, whatever lies between."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from fedkit.crypto.chunks import Scheme
from fedkit.crypto.ring import Words
from fedkit.engines.flower.library import flower
from fedkit.engines.flower.records import from_records, to_records
from fedkit.errors import ConfigError, PayloadError, Reason, Refused, RunError
from fedkit.protos import whole
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.weights import Weights
from fedkit.work import Answer, Evaluate, Summarize

__all__ = ["ATTEND", "GridTransport"]

T = TypeVar("T")

ATTEND = "attend"  # the action of the query by which a node says which client it is
_PAUSE_S = 0.05  # between two looks for replies
_AGAIN_S = 5.0  # between two looks for nodes
_DETAIL = 200

log = logging.getLogger("fedkit.engines.flower")


class GridTransport:
    """Implements `fedkit.rounds.assignment.Transport` over a `flwr.serverapp.Grid`.

    A client is a node that says so. It is asked one thing at a time, since Flower would give two messages at once the
    same state; what is asked of one that still works on something nobody waits for any more comes after that. With
    `engine_ended`, the engine is Flower's simulation: a node that cannot say who it is ends the run, since no other
    will come, and so does the event. Without, nodes may come later.
    """

    def __init__(
        self,
        grid: Any,
        clients: Sequence[str],
        *,
        task: str,
        strategy: str,
        holds_out_valid: bool,
        engine_ended: threading.Event | None = None,
    ) -> None:
        self._grid = grid
        self._clients = frozenset(clients)
        self._about: dict[str, Any] = {"task": task, "strategy": strategy, "holds_out_valid": holds_out_valid}
        self._ended = engine_ended
        self._line = ThreadPoolExecutor(max_workers=1)  # a grid is for one thread
        self._nodes: dict[str, int] = {}
        self._busy: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._asked: dict[str, str] = {}
        self._news: dict[str, whole.Settled] = defaultdict(whole.Settled)

    def close(self) -> None:
        """Ends the thread that speaks to the grid."""
        self._line.shutdown()

    # -- who is there ----------------------------------------------------------------------------------------------

    def present(self) -> list[str]:
        """The clients whose nodes were there when last looked for."""
        return sorted(self._nodes)

    def members(self) -> Mapping[str, str]:
        """Nobody: Flower has no roster."""
        return {}

    async def assemble(self, least: int) -> None:
        """Returns when `least` clients are there; raises `RunError` where a node has failed and none is to come."""
        while True:
            there = set(await self._on_line(lambda: list(self._grid.get_node_ids())))
            self._nodes = {name: node for name, node in self._nodes.items() if node in there}
            await asyncio.gather(*(self._meet(node) for node in sorted(there - set(self._nodes.values()))))
            if len(self._nodes) >= least:
                return
            log.info("%d of %d clients are there, %d are needed", len(self._nodes), len(self._clients), least)
            await self._pause(_AGAIN_S if self._ended is None else _PAUSE_S)

    async def _pause(self, seconds: float) -> None:
        """Sleeps; raises `RunError` where the engine has ended, so that nothing will ever come."""
        if self._ended is not None and self._ended.is_set():
            raise RunError("Flower's simulation engine has ended before the run; its log says why")
        await asyncio.sleep(seconds)

    async def _meet(self, node: int) -> None:
        """Learns which client a node is."""
        app = flower("app")
        try:
            reply = await (await self._sent(app.Message(app.RecordDict(), node, f"{app.MessageType.QUERY}.{ATTEND}")))
        except Refused:  # it has left already
            return
        name = None if reply.has_error() else reply.content.config_records.get("fedkit", {}).get("client")
        if name in self._clients and name not in self._nodes:
            self._nodes[name] = node
            return
        why = _reason(reply) if reply.has_error() else f"it says it is {name!r:.80}, which is unknown or here already"
        if self._ended is not None:
            raise RunError(f"a node of Flower's cannot take part: {why}")
        log.warning("node %d does not take part: %s", node, why)

    # -- questions -------------------------------------------------------------------------------------------------

    async def perform(self, assignment: Assignment, parcel: Parcel, *, race: bool) -> Answer:  # noqa: ARG002
        """The client's answer. Raises `Refused` where it gives none."""
        self._asked[assignment.id] = assignment.client
        busy = self._busy[assignment.client]
        await busy.acquire()
        told = copy.deepcopy(self._news[assignment.client])
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(busy.release)
            reply = await self._sent(self._message(assignment, parcel, told))
            on_failure.pop_all()
        reply.add_done_callback(lambda _: busy.release())
        found = await asyncio.shield(reply)
        if not found.has_error():
            self._told(assignment.client, told)
        return _answer(found, assignment, parcel)

    def _told(self, client: str, told: whole.Settled) -> None:
        """The client knows this news; until it has answered, it is told again."""
        news = self._news[client]
        news.accepted[:] = [key for key in news.accepted if key not in told.accepted]
        news.dropped[:] = [key for key in news.dropped if key not in told.dropped]

    def _message(self, assignment: Assignment, parcel: Parcel, news: whole.Settled) -> Any:
        node = self._nodes.get(assignment.client)
        if node is None:
            raise Refused(Reason.LOST, f"{assignment.client} went away")
        app = flower("app")
        kinds = {Evaluate: app.MessageType.EVALUATE, Summarize: app.MessageType.QUERY}
        kind = kinds.get(type(assignment.work), app.MessageType.TRAIN)
        content = to_records(*whole.asked_to(assignment, parcel, news, **self._about))
        return app.Message(content, node, kind, group_id=str(assignment.round))

    async def _sent(self, message: Any) -> asyncio.Future[Any]:
        """What will be the reply; raises `Refused` where the node has left."""
        keys = await self._on_line(lambda: list(self._grid.push_messages([message])))
        if not keys or not keys[0]:
            raise Refused(Reason.LOST, "its node is not there any more")
        reply = self._waiting[keys[0]] = asyncio.get_running_loop().create_future()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(self._looked)
        return reply

    async def _look(self) -> None:
        """Takes in replies for as long as somebody waits for one."""
        while self._waiting:
            for reply in await self._on_line(self._replies):
                waiting = self._waiting.pop(reply.metadata.reply_to_message_id, None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(reply)
            await self._pause(_PAUSE_S)

    def _replies(self) -> list[Any]:
        return list(self._grid.pull_messages(list(self._waiting)))

    def _looked(self, task: asyncio.Task[None]) -> None:
        """Where the grid itself has failed, everybody who waits learns of it."""
        error = None if task.cancelled() else task.exception()
        for waiting in self._waiting.values() if error is not None else ():
            if not waiting.done():
                waiting.set_exception(RunError(f"Flower's grid has failed: {type(error).__name__}: {error}"))
                waiting.exception()  # is looked at here, where nobody may wait any more

    async def _on_line(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._line, call)

    # -- the rest of a transport -----------------------------------------------------------------------------------

    async def add_up(
        self, scheme: Scheme, fingerprint: bytes, values: int, uploads: Mapping[str, Weights]
    ) -> tuple[Words, dict[str, str]]:
        """Never: what would be added up so is refused at submission."""
        del scheme, fingerprint, values, uploads
        raise ConfigError("there are no encrypted sums on Flower's engines")

    async def aside(self, phase: Literal["fold", "commit"], work: Callable[[], T]) -> T:  # noqa: ARG002
        """What `work()` returns, worked out in a thread while messages come and go."""
        return await asyncio.to_thread(work)

    def now(self) -> float:
        """Seconds on the machine's monotonic clock."""
        return time.monotonic()

    async def sleep_until(self, deadline: float) -> None:
        """Returns when the clock has reached `deadline`."""
        await asyncio.sleep(max(0.0, deadline - self.now()))

    def committed(self, accepted: list[str], dropped: list[str]) -> None:
        """Each client learns with its next message which of its results stand and which are undone."""
        for which, ids in (("accepted", accepted), ("dropped", dropped)):
            for key in ids:
                client = self._asked.pop(key, None)
                if client is not None:
                    getattr(self._news[client], which).append(key)


def _answer(reply: Any, assignment: Assignment, parcel: Parcel) -> Answer:
    """The checked answer; raises `Refused`."""
    if reply.has_error():
        failed = reply.error.code in _failures()
        raise Refused(Reason.FAILED if failed else Reason.LOST, _reason(reply))
    try:
        sent = assignment.answer_manifest(parcel.model.manifest)
        return whole.answer_from(*from_records(reply.content), assignment, sent)
    except PayloadError as error:
        raise Refused(Reason.PAYLOAD, str(error)) from None


def _failures() -> tuple[int, ...]:
    """The codes of errors that the app itself has raised; all others say that it was not reached."""
    codes = flower("common.constant").ErrorCode
    return (codes.CLIENT_APP_RAISED_EXCEPTION, codes.LOAD_CLIENT_APP_EXCEPTION, codes.MOD_FAILED_PRECONDITION)


def _reason(reply: Any) -> str:
    said = " ".join(str(reply.error.reason or f"error {reply.error.code}").split())
    return "".join(one for one in said if one.isprintable())[:_DETAIL]
