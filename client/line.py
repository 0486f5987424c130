"""One connection to the coordinator: a stream of messages, and the tensor calls that belong to its session."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import grpc

from fedkit.client.inbox import Inbox
from fedkit.client.outbox import Stored
from fedkit.codec import CHUNK_BYTES
from fedkit.errors import PayloadError
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import convert, tensors_pb2
from fedkit.protos.wire import RESUMED_BYTES, SESSION_KEY, Calls, Laden, frame, load, unframe
from fedkit.spool import Spool
from fedkit.weights import Manifest

__all__ = ["Gone", "Line", "LineLost"]

T = TypeVar("T")

_STALL_S = 120.0  # for which a tensor call may stand still

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class LineLost(Exception):
    """The connection broke while tensors were on their way."""


class Gone(Exception):
    """The coordinator does not ask for this assignment any more."""


class Line:
    """A session with the coordinator, from hello to the end of the stream."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        hello: pb.Hello,
        heartbeat: Callable[[], pb.Heartbeat] = pb.Heartbeat,
    ) -> None:
        self.heartbeat_s = 10.0
        self._heartbeat = heartbeat
        self._calls = Calls(channel, pb.DESCRIPTOR.services_by_name["Agents"])
        self._queue: asyncio.Queue[Laden | None] = asyncio.Queue()
        self._session = b""
        self._download: Any = None  # the tensor calls stay open from one assignment to the next
        self._upload: Any = None
        self._downloading = asyncio.Lock()
        self._uploading = asyncio.Lock()
        self._silence: asyncio.Timeout | None = None  # that ends the session, unless something is heard before
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.send(pb.FromAgent(hello=hello))
        self._stream = self._calls.attend(self._outgoing())

    def send(self, message: pb.FromAgent) -> None:
        """Queues a message; one task writes them all."""
        self._queue.put_nowait(Laden(message))

    async def leave(self) -> None:
        """Says goodbye and closes the stream."""
        self.send(pb.FromAgent(leaving=pb.Leaving()))
        self._queue.put_nowait(None)

    def cancel(self) -> None:
        """Ends the stream and everything that belongs to it at once."""
        self._stream.cancel()
        if not self._ended.done():
            self._ended.set_result(None)

    def open(self, welcome: pb.Welcome) -> None:
        """The coordinator has let us in."""
        self._session = welcome.session
        self.heartbeat_s = min(max(welcome.heartbeat_s, 0.1), 60.0)
        self.send(pb.FromAgent(heartbeat=self._heartbeat()))  # or the next would come as late as was right before

    async def messages(self) -> AsyncIterator[Laden]:
        """What the coordinator says, to the end. Raises `TimeoutError` where it is silent for two heartbeats."""
        while True:
            async with asyncio.timeout(2 * self.heartbeat_s) as self._silence:
                message = await self._stream.read()
            self._silence = None
            if message is _EOF:
                return
            yield message

    def _heard(self) -> None:
        """A piece of a model is a sign of life too: on a slow line, heartbeats queue up behind it."""
        if self._silence is not None:
            self._silence.reschedule(asyncio.get_running_loop().time() + 2 * self.heartbeat_s)

    async def _outgoing(self) -> AsyncIterator[Laden]:
        while True:
            try:
                async with asyncio.timeout(self.heartbeat_s):
                    message = await self._queue.get()
            except TimeoutError:
                message = Laden(pb.FromAgent(heartbeat=self._heartbeat()))
            if message is None:
                return
            yield message

    @property
    def _metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ((SESSION_KEY, self._session),)

    async def _tied(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns; raises `LineLost` with the end of the line, of which a call may never hear."""
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._ended}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() or task.cancelled():
                raise LineLost
            return task.result()
        except (TimeoutError, grpc.aio.UsageError):
            raise LineLost from None
        finally:
            task.cancel()

    async def fetch(self, message: pb.Assignment, inbox: Inbox) -> tuple[Path, Manifest]:
        """The assignment's model, from where an earlier download stopped.

        Raises `Gone` where it is not to be had any more, `PayloadError`, `LineLost` or `grpc.RpcError`.
        """
        async with self._downloading:
            return await self._tied(self._fetch(message, inbox))

    async def deliver(self, stored: Stored, path: Path, *, at_once: bool) -> pb.UploadReply:
        """Uploads a stored update from where the coordinator misses bytes; its last word on it.

        `at_once` says that nothing of it was ever sent. Raises `PayloadError`, `LineLost` or `grpc.RpcError`.
        """
        async with self._uploading:
            return await self._tied(self._deliver(_announcement(stored, at_once), path))

    def post(self, stored: Stored, path: Path) -> None:
        """Queues a stored update of at most 1 MiB whole, like any other message."""
        update = pb.FromAgent(update=_announcement(stored, at_once=True))
        self._queue.put_nowait(Laden(update, load(path.read_bytes())))

    async def _fetch(self, message: pb.Assignment, inbox: Inbox) -> tuple[Path, Manifest]:
        call = self._download = self._download or self._calls.download(metadata=self._metadata)
        is_at_rest = False
        try:
            async with asyncio.timeout(_STALL_S) as patience:
                request = pb.DownloadRequest(
                    assignment_id=message.id, offset=inbox.have(message), header=not inbox.knows(message)
                )
                await call.write(request)
                if request.header:
                    inbox.learn(message, _header(await call.read()))
                spool = inbox.begin(message)
                await _fill(spool, request.offset, call, patience, self._heard)
            is_at_rest = True
            return inbox.finish(message, spool)
        except Gone:
            is_at_rest = True
            raise
        finally:
            if not is_at_rest:  # what is still on its way would be taken for the next model
                self._download = None
                call.cancel()

    async def _deliver(self, announcement: pb.Announcement, path: Path) -> pb.UploadReply:
        call = self._upload = self._upload or self._calls.upload(metadata=self._metadata)
        reply = None
        try:
            async with asyncio.timeout(_STALL_S) as patience:
                reply = await _hand_in(call, announcement, path, patience)
            return reply
        finally:
            if reply is None or reply.WhichOneof("what") != "taken":
                self._upload = None
                call.cancel()


def _announcement(stored: Stored, at_once: bool) -> pb.Announcement:
    return pb.Announcement(
        assignment_id=stored.id,
        examples=stored.examples,
        loss=stored.loss,
        epsilon=stored.epsilon,
        extras=convert.extras_to_proto(stored.extras),
        payload_bytes=stored.payload_bytes,
        digest=bytes.fromhex(stored.digest),
        at_once=at_once,
    )


def _header(raw: Any) -> tensors_pb2.Header:
    if raw is _EOF:
        raise LineLost
    piece = tensors_pb2.Piece.FromString(raw)
    if piece.WhichOneof("part") == "gone":
        raise Gone
    return piece.header


async def _fill(spool: Spool, offset: int, call: Any, patience: asyncio.Timeout, heard: Callable[[], None]) -> None:
    """Feeds the spool to its end; raises `PayloadError` for what does not belong there, `LineLost`, `Gone`."""
    try:
        if spool.have != offset:
            raise PayloadError("the bytes of an earlier download have changed")
        while not spool.is_complete:
            raw = await call.read()
            chunk = None if raw is _EOF else unframe(raw)
            if chunk is None:
                _header(raw)
                raise PayloadError("a piece is not data")
            spool.feed(chunk)
            _extend(patience)
            heard()
    except PayloadError:
        spool.discard()
        raise
    finally:
        if not spool.is_complete:
            spool.close()


async def _hand_in(call: Any, announcement: pb.Announcement, path: Path, patience: asyncio.Timeout) -> pb.UploadReply:
    reply: Any = None
    with contextlib.suppress(asyncio.InvalidStateError):  # the coordinator has said its last word before
        await call.write(pb.UploadPiece(announcement=announcement).SerializeToString())
        if announcement.at_once:
            await _stream_file(call, path, 0, CHUNK_BYTES, patience)
        else:
            reply = await call.read()
            if reply is not _EOF and reply.WhichOneof("what") == "have":
                await _stream_file(call, path, reply.have, RESUMED_BYTES, patience)
                reply = None
    reply = await call.read() if reply is None else reply
    if reply is _EOF:
        raise LineLost
    assert isinstance(reply, pb.UploadReply)  # the deserializer makes nothing else
    return reply


def _extend(patience: asyncio.Timeout) -> None:
    patience.reschedule(asyncio.get_running_loop().time() + _STALL_S)


async def _stream_file(call: Any, path: Path, offset: int, step: int, patience: asyncio.Timeout) -> None:
    with open(path, "rb") as file:
        size = path.stat().st_size
        if not offset <= size or offset % 4:
            raise PayloadError(f"the coordinator claims to have {offset} of {size} bytes")
        if size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                for start in range(offset, size, step):
                    with view[start : start + step] as chunk:
                        raw = frame(chunk)
                    await call.write(raw)
                    _extend(patience)
