"""The agents' service: attendance, models out, answers in. What arrives is checked before anything is made of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, Protocol

import grpc
import structlog
from google.protobuf.message import DecodeError

from fedkit.errors import PayloadError, Reason, Refused
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import convert, tensors_pb2
from fedkit.protos.wire import PROTOCOL, SESSION_KEY, Laden, Undecodable, unframe
from fedkit.rounds.checks import MAX_EXAMPLES
from fedkit.server.attendance import Attendance, Session
from fedkit.server.errands import Errand, feed, require_examples
from fedkit.server.guard import caller
from fedkit.server.metrics import Metrics
from fedkit.spool import Intake
from fedkit.trust.certificates import Holder

__all__ = ["AgentService", "Register"]

log = structlog.get_logger("fedkit.server")

_HELLO_S = 10.0  # a stream that says nothing for so long is closed
_ON_WORK = ("progress", "update", "sums", "refusal")  # messages that name an assignment
_MAX_HELD = 10_000
_MAX_COHORT = 1000  # vouchers that travel with an assignment
_GONE = tensors_pb2.Piece(gone=True).SerializeToString()
_TAKEN = pb.UploadReply(taken=pb.Taken())


class Register(Protocol):
    """Where it is written down who attends and what became of results."""

    def saw(self, name: str, *, tasks: list[str], max_examples: int) -> None:
        """The client is here."""
        ...

    def mark(self, name: str, state: Literal["here", "away", "left"]) -> None:
        """The client is "away" or has "left"."""
        ...

    def fates(self, ids: list[str]) -> tuple[list[str], list[str]]:
        """Those of the ids that were accepted, and those that were dropped."""
        ...


class _Unwelcome(Exception):
    def __init__(self, reason: Any, detail: str) -> None:
        super().__init__(detail)
        self.goodbye = pb.ToAgent(goodbye=pb.Goodbye(reason=reason, detail=detail))


class _Short(Exception):
    """An upload ended before its end: the agent ended it, or its connection was cut and it may go on later."""

    def __init__(self, errand: Errand, detail: str) -> None:
        super().__init__(detail)
        self.errand = errand
        self.refused = Refused(Reason.PAYLOAD, detail)


class AgentService:
    """Implements `service Agents` of agents.proto for a grpc.aio server."""

    def __init__(
        self,
        attendance: Attendance,
        register: Register,
        metrics: Metrics,
        *,
        heartbeat_s: float,
        max_examples: int = MAX_EXAMPLES,
    ) -> None:
        self._attendance = attendance
        self._register = register
        self._metrics = metrics
        self._heartbeat_s = heartbeat_s
        self._max_examples = max_examples

    # -- attendance ----------------------------------------------------------------------------------------------------

    async def attend(self, requests: AsyncIterator[Laden], context: Any) -> AsyncIterator[Laden]:
        """One agent from its hello to the end of its stream."""
        try:
            session, held = await self._admit(requests, caller(context))
        except _Unwelcome as unwelcome:
            yield Laden(unwelcome.goodbye)
            return
        session.ended.add_done_callback(lambda _: self._depart(session))  # the last words may wait to be read for ever
        reading = asyncio.create_task(self._read(session, requests))
        try:
            yield Laden(self._welcome(session, held))
            while (message := await self._next(session)) is not None:
                yield message
        finally:
            reading.cancel()
            self._depart(session)

    async def _admit(self, requests: AsyncIterator[Laden], known: Holder | None) -> tuple[Session, list[str]]:
        try:
            first = await asyncio.wait_for(anext(requests), _HELLO_S)
        except (TimeoutError, StopAsyncIteration, Undecodable):
            raise _Unwelcome(pb.Goodbye.MALFORMED, "the first message must be Hello, at once") from None
        hello = _checked_hello(first.message)
        name = hello.client if known is None else known.name  # with TLS, the certificate's name alone counts
        most = min(int(hello.max_examples), self._max_examples)  # whoever lies about updates lies about this too
        session = Session(name, hello.instance, frozenset(hello.tasks), most, hello.min_cohort)
        before = self._attendance.sessions.get(session.name)
        if before is not None and before.instance != session.instance:
            detail = f"another process attends as {session.name}"
            before.end(pb.ToAgent(goodbye=pb.Goodbye(reason=pb.Goodbye.REPLACED, detail=detail)))
        self._register.saw(session.name, tasks=sorted(session.tasks), max_examples=session.max_examples)
        self._take_voucher(session, hello)
        self._attendance.arrive(session)
        software = "".join(c for c in hello.software[:100] if c.isprintable())
        log.info("client here", client=session.name, software=software, tasks=len(session.tasks))
        return session, [*hello.held, *hello.running]

    def _take_voucher(self, session: Session, message: pb.Hello | pb.Heartbeat) -> None:
        if not message.HasField("voucher"):
            return
        found = convert.vouchers_from_proto([message.voucher])
        if not found or not self._attendance.take_voucher(session, found[0]):
            log.warning("voucher refused", client=session.name)

    def _welcome(self, session: Session, held: list[str]) -> pb.ToAgent:
        accepted, dropped = self._register.fates(held)
        settlement = pb.Settlement(accepted=accepted, dropped=dropped)
        return pb.ToAgent(
            welcome=pb.Welcome(
                session=session.token,
                heartbeat_s=self._heartbeat_s,
                settlement=settlement,
                roster=self._attendance.roster_text,
            )
        )

    async def _next(self, session: Session) -> Laden | None:
        """The next message for the agent, a heartbeat where there is none, None at the end."""
        if not session.outgoing.empty():
            return session.outgoing.get_nowait()
        try:
            async with asyncio.timeout(self._heartbeat_s):
                return await session.outgoing.get()
        except TimeoutError:
            return Laden(pb.ToAgent(heartbeat=pb.Heartbeat()))

    def _depart(self, session: Session) -> None:
        if self._attendance.depart(session):
            state: Literal["left", "away"] = "left" if session.left else "away"
            self._register.mark(session.name, state)
            log.info("client gone", client=session.name, state=state, open=len(session.errands))

    def say_stopping(self) -> None:
        """Tells every agent that the coordinator ends, and that it is expected back."""
        goodbye = pb.ToAgent(goodbye=pb.Goodbye(reason=pb.Goodbye.STOPPING, detail="the coordinator ends"))
        for session in self._attendance.sessions.values():
            session.end(goodbye)

    def end_silent(self) -> None:
        """Ends sessions that have said nothing for two heartbeats."""
        limit = time.monotonic() - 2 * self._heartbeat_s
        for session in [one for one in self._attendance.sessions.values() if one.heard < limit]:
            log.warning("client silent", client=session.name, seconds=round(time.monotonic() - session.heard, 1))
            self._depart(session)

    # -- messages ------------------------------------------------------------------------------------------------------

    async def _read(self, session: Session, requests: AsyncIterator[Laden]) -> None:
        try:
            async for message, payload in requests:
                session.heard = time.monotonic()
                self._dispatch(session, message, payload)
                if session.ended.done():
                    return
        except grpc.RpcError:
            pass  # the stream broke; its end is the same as if the agent had closed it
        except Undecodable as error:
            session.end(pb.ToAgent(goodbye=pb.Goodbye(reason=pb.Goodbye.MALFORMED, detail=str(error))))
        finally:
            session.end()

    def _dispatch(self, session: Session, message: pb.FromAgent, payload: memoryview | bytes) -> None:
        kind = message.WhichOneof("what")
        if kind in _ON_WORK:
            _require_id(getattr(message, kind).assignment_id)
        if kind == "progress":
            _progressed(session, message.progress)
        elif kind == "update":
            self._updated(session, message.update, memoryview(payload))
        elif kind == "sums":
            self._summed(session, message.sums)
        elif kind == "refusal":
            self._settle(session, message.refusal.assignment_id, lambda _: convert.refusal_from_proto(message.refusal))
        elif kind == "leaving":
            session.left = True
            session.end()
        elif kind == "heartbeat":
            self._take_voucher(session, message.heartbeat)
        else:
            raise Undecodable("a message of no known kind: update the agent")

    def _updated(self, session: Session, announced: pb.Announcement, payload: memoryview) -> None:
        def answer(errand: Errand) -> Any:
            return errand.take_whole(announced, payload, session.max_examples)

        refused = self._settle(session, announced.assignment_id, answer)
        if refused is None:
            self._metrics.bytes.labels(direction="up").inc(len(payload))
        else:
            session.send(pb.ToAgent(refused=convert.refusal_to_proto(announced.assignment_id, refused)))

    def _summed(self, session: Session, sums: pb.Sums) -> None:
        def answer(errand: Errand) -> Any:
            returns = errand.assignment.returns
            if returns != "reply":
                require_examples(int(sums.examples), session.max_examples)
            return convert.sums_from_proto(sums, errand.assignment.work, returns)

        self._settle(session, sums.assignment_id, answer)

    def _settle(self, session: Session, key: str, outcome: Callable[[Errand], Any]) -> Refused | None:
        """Ends the errand by what `outcome` makes of it; why not, where the answer is refused or nobody takes it."""
        errand = session.errands.get(key)
        if errand is None:
            return Refused(self._unasked(session, key))
        try:
            errand.settle(outcome(errand))
        except Refused as refused:
            errand.settle(refused)
            return refused
        return None

    def _unasked(self, session: Session, key: str) -> Reason:
        """Why nobody takes this answer; on record, because nothing waits for it."""
        accepted, dropped = self._register.fates([key])
        reason = Reason.DUPLICATE if accepted else Reason.LATE if dropped else self._attendance.why_over(key, session)
        self._metrics.refusals.labels(reason=reason.value).inc()
        log.warning("unasked answer", client=session.name, reason=reason.value)
        return reason

    # -- tensors -------------------------------------------------------------------------------------------------------

    async def download(self, requests: AsyncIterator[pb.DownloadRequest], context: Any) -> None:
        """The models of assignments, one request after the other."""
        session = await self._holder(context)
        async for request in requests:
            errand = session.errands.get(request.assignment_id)
            if errand is None:
                await context.write(_GONE)
            else:
                await self._send_model(errand, request, session, context)

    async def _send_model(self, errand: Errand, request: pb.DownloadRequest, session: Session, context: Any) -> None:
        published = errand.published
        if request.offset > published.payload_bytes or request.offset % 4:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, f"the payload has {published.payload_bytes} bytes")
        if request.header:
            await context.write(published.header)
        sent = self._metrics.bytes.labels(direction="down")
        for piece in published.pieces(request.offset, small=errand.sendings > 1):
            await context.write(piece)
            sent.inc(len(piece))
            session.heard = time.monotonic()

    async def upload(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """The answers to assignments, one after the other, until one is refused."""
        session = await self._holder(context)
        async for raw in requests:
            announced = _announcement(raw)
            try:
                await self._receive(session, announced, requests, context)
            except _Short as short:
                await context.write(_refusal(announced, short.refused))  # raises where the connection was cut
                short.errand.settle(short.refused)
                return
            except Refused as refused:
                await context.write(_refusal(announced, refused))
                return
            await context.write(_TAKEN)

    async def _receive(
        self, session: Session, announced: pb.Announcement, requests: AsyncIterator[bytes], context: Any
    ) -> None:
        """One answer; raises `_Short`, or `Refused`, which the errand has then heard of too."""
        errand = session.errands.get(announced.assignment_id)
        if errand is None:
            raise Refused(self._unasked(session, announced.assignment_id))
        spool = None
        try:
            spool = errand.receive(announced, session.max_examples)
            if not announced.at_once:
                await context.write(pb.UploadReply(have=spool.have))
            if not await self._fill(spool, requests, session):
                raise _Short(errand, f"{spool.have} of {spool.payload_bytes} bytes arrived")
            errand.settle(errand.take(spool))
        except Refused as refused:
            if spool is None or errand.expects(spool):
                errand.settle(refused)
            raise

    async def _fill(self, spool: Intake, requests: AsyncIterator[bytes], session: Session) -> bool:
        """Takes pieces until the spool is complete; False where they end before. Raises `Refused` for strange ones."""
        received = self._metrics.bytes.labels(direction="up")
        while not spool.is_complete:
            raw = await anext(requests, None)
            if raw is None:
                return False
            chunk = unframe(raw)
            if chunk is None:
                raise Refused(Reason.PAYLOAD, "a piece is not data")
            feed(spool, chunk)
            received.inc(len(chunk))
            session.heard = time.monotonic()
        return True

    async def _holder(self, context: Any) -> Session:
        token = dict(context.invocation_metadata() or ()).get(SESSION_KEY, b"")
        session = self._attendance.holder(token) if isinstance(token, bytes) else None
        known = caller(context)
        if session is None or (known is not None and known.name != session.name):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "attend first; this session is over")
            raise AssertionError("abort raises")
        return session


def _progressed(session: Session, progress: pb.Progress) -> None:
    errand = session.errands.get(progress.assignment_id)
    if errand is not None:
        errand.done, errand.total = int(progress.done), int(progress.total)


def _checked_hello(first: pb.FromAgent) -> pb.Hello:
    hello = first.hello
    if first.WhichOneof("what") != "hello":
        raise _Unwelcome(pb.Goodbye.MALFORMED, "the first message must be Hello")
    if hello.protocol != PROTOCOL:
        detail = f"the agent speaks protocol {hello.protocol}, this coordinator {PROTOCOL}: update the older one"
        raise _Unwelcome(pb.Goodbye.PROTOCOL, detail)
    try:
        convert.require_name(hello.client, "a client's name")
        for task in hello.tasks:
            convert.require_name(task, "a task's name")
    except PayloadError as error:
        raise _Unwelcome(pb.Goodbye.MALFORMED, str(error)) from None
    if len(hello.instance) != 16 or not 0 < hello.max_examples < 1 << 40:
        raise _Unwelcome(pb.Goodbye.MALFORMED, "instance has 16 bytes, max_examples is 1 to 2^40")
    if hello.min_cohort > _MAX_COHORT:
        raise _Unwelcome(pb.Goodbye.MALFORMED, f"min_cohort is at most {_MAX_COHORT}")
    if len(hello.held) + len(hello.running) > _MAX_HELD or not 0 < len(hello.tasks) <= 1000:
        raise _Unwelcome(pb.Goodbye.MALFORMED, f"1 to 1000 tasks and at most {_MAX_HELD} held results")
    return hello


def _require_id(key: str) -> None:
    """What is no id is not looked up, and not repeated in an answer either."""
    try:
        convert.require_id(key)
    except PayloadError as error:
        raise Undecodable(str(error)) from None


def _announcement(raw: bytes) -> pb.Announcement:
    with contextlib.suppress(DecodeError):
        first = pb.UploadPiece.FromString(raw)
        if first.WhichOneof("part") == "announcement":
            _require_id(first.announcement.assignment_id)
            return first.announcement
    raise Undecodable("an upload begins with its announcement")


def _refusal(announced: pb.Announcement, refused: Refused) -> pb.UploadReply:
    return pb.UploadReply(refused=convert.refusal_to_proto(announced.assignment_id, refused))
