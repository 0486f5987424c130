"""One connection to the coordinator: a stream of messages, and the tensor calls that belong to its session."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import grpc

from fedkit.client.inbox import Fetched, Inbox
from fedkit.client.outbox import Stored
from fedkit.codec import CHUNK_BYTES
from fedkit.errors import PayloadError
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import convert, tensors_pb2
from fedkit.protos.wire import SESSION_KEY, Calls, frame, unframe
from fedkit.spool import Spool

__all__ = ["Line", "LineLost"]

T = TypeVar("T")

_STALL_S = 120.0  # for which a tensor call may stand still

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class LineLost(Exception):
    """The connection broke while tensors were on their way."""


class Line:
    """A session with the coordinator, from hello to the end of the stream."""

    def __init__(self, channel: grpc.aio.Channel, hello: pb.Hello) -> None:
        self.heartbeat_s = 10.0
        self._calls = Calls(channel, pb.DESCRIPTOR.services_by_name["Agents"])
        self._queue: asyncio.Queue[pb.FromAgent | None] = asyncio.Queue()
        self._session = b""
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.send(pb.FromAgent(hello=hello))
        self._stream = self._calls.attend(self._outgoing())

    def send(self, message: pb.FromAgent) -> None:
        """Queues a message; one task writes them all."""
        self._queue.put_nowait(message)

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

    async def messages(self) -> AsyncIterator[pb.ToAgent]:
        """What the coordinator says, to the end. Raises `TimeoutError` where it is silent for two heartbeats."""
        while True:
            message = await asyncio.wait_for(self._stream.read(), 2 * self.heartbeat_s)
            if message is _EOF:
                return
            yield message

    async def _outgoing(self) -> AsyncIterator[pb.FromAgent]:
        while True:
            try:
                message = await asyncio.wait_for(self._queue.get(), self.heartbeat_s)
            except TimeoutError:
                message = pb.FromAgent(heartbeat=pb.Heartbeat())
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

    async def fetch(self, message: pb.Assignment, inbox: Inbox) -> Fetched:
        """The assignment's model, from where an earlier download stopped.

        Raises `PayloadError`, `LineLost` or `grpc.RpcError`.
        """
        return await self._tied(self._fetch(message, inbox))

    async def deliver(self, stored: Stored, path: Path) -> pb.UploadReply:
        """Uploads a stored update from where the coordinator misses bytes; its last word on it.

        Raises `PayloadError`, `LineLost` or `grpc.RpcError`.
        """
        return await self._tied(self._deliver(stored, path))

    async def _fetch(self, message: pb.Assignment, inbox: Inbox) -> Fetched:
        request = pb.DownloadRequest(assignment_id=message.id, offset=inbox.have(message.model_digest))
        pieces = self._calls.download(request, metadata=self._metadata)
        try:
            async with asyncio.timeout(_STALL_S):
                first = await pieces.read()
            if first is _EOF:
                raise LineLost
            spool = inbox.begin(message, tensors_pb2.Piece.FromString(first).header)
            if spool.have != request.offset:
                raise PayloadError("the bytes of an earlier download have changed")
            await _fill(spool, pieces)
            return inbox.finish(spool, message.model_digest)
        finally:
            pieces.cancel()

    async def _deliver(self, stored: Stored, path: Path) -> pb.UploadReply:
        call = self._calls.upload(metadata=self._metadata)
        announcement = pb.Announcement(
            assignment_id=stored.id,
            examples=stored.examples,
            loss=stored.loss,
            extras=convert.extras_to_proto(stored.extras),
            payload_bytes=stored.payload_bytes,
            digest=bytes.fromhex(stored.digest),
        )
        try:
            async with asyncio.timeout(_STALL_S) as patience:
                return await self._hand_in(call, announcement, path, patience)
        finally:
            call.cancel()

    async def _hand_in(
        self, call: Any, announcement: pb.Announcement, path: Path, patience: asyncio.Timeout
    ) -> pb.UploadReply:
        await call.write(pb.UploadPiece(announcement=announcement).SerializeToString())
        reply: Any = await call.read()
        if reply is not _EOF and reply.WhichOneof("what") == "have":
            with contextlib.suppress(asyncio.InvalidStateError):  # the coordinator has said its last word before
                await _stream_file(call, path, reply.have, patience)
            reply = await call.read()
        if reply is _EOF:
            raise PayloadError("the coordinator hung up without a word on the update")
        assert isinstance(reply, pb.UploadReply)  # the deserializer makes nothing else
        return reply


async def _fill(spool: Spool, pieces: Any) -> None:
    """Feeds the spool with what comes; raises `PayloadError` for what does not belong there, `LineLost` for an end."""
    try:
        async with asyncio.timeout(_STALL_S) as patience:
            while (raw := await pieces.read()) is not _EOF:
                chunk = unframe(raw)
                if chunk is None:
                    raise PayloadError("a piece is not data")
                spool.feed(chunk)
                _extend(patience)
        if not spool.is_complete:
            raise LineLost
    except PayloadError:
        spool.discard()
        raise
    finally:
        spool.close()


def _extend(patience: asyncio.Timeout) -> None:
    patience.reschedule(asyncio.get_running_loop().time() + _STALL_S)


async def _stream_file(call: Any, path: Path, offset: int, patience: asyncio.Timeout) -> None:
    with open(path, "rb") as file:
        size = path.stat().st_size
        if not offset <= size or offset % 4:
            raise PayloadError(f"the coordinator claims to have {offset} of {size} bytes")
        if size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                for start in range(offset, size, CHUNK_BYTES):
                    with view[start : start + CHUNK_BYTES] as chunk:
                        raw = frame(chunk)
                    await call.write(raw)
                    _extend(patience)
    await call.done_writing()
