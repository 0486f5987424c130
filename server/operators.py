"""The operators' service: what a caller sends is checked here, and what the coordinator says is put into messages."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import structlog
from google.protobuf.message import DecodeError

from fedkit import __version__
from fedkit.codec import CHUNK_BYTES, Decoder, Limits, encode
from fedkit.config import NAME
from fedkit.errors import ConfigError, NoSuchRun, PayloadError, RunError
from fedkit.protos import agents_pb2, tensors_pb2
from fedkit.protos import convert_operators as convert
from fedkit.protos import operators_pb2 as pb
from fedkit.protos.failures import answering
from fedkit.protos.wire import frame, unframe
from fedkit.runfile import RunFile
from fedkit.server.runbook import RunBook, RunStatus
from fedkit.weights import Weights

__all__ = ["DescribingService", "InitialModels", "OperatorService"]

log = structlog.get_logger("fedkit.server")

_REPLY_BYTES = 3 << 20  # a message of 4 MiB is refused by whoever receives it
_MODELS = ("final", "best", "state")


class InitialModels:
    """Initial weights that wait for a run: few, none for longer than an hour, together no more than one may have.

    The oldest makes room. At most two arrive at a time, each within ten minutes. `clock` gives seconds.
    """

    KEEP_S = 3600.0
    ARRIVE_S = 600.0
    MOST = 4
    ARRIVING = 2

    def __init__(self, limits: Limits = Limits(), clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._waiting: dict[str, tuple[float, Weights]] = {}
        self._arriving = 0

    async def take(self, pieces: AsyncIterator[bytes]) -> bytes:
        """Takes a header and its data, and returns the digest; raises `PayloadError`, `TimeoutError`, `RunError`."""
        if self._arriving == self.ARRIVING:
            raise RunError(f"{self.ARRIVING} initial models are arriving already; try again in a moment")
        self._arriving += 1
        try:
            async with asyncio.timeout(self.ARRIVE_S):
                weights = await self._received(pieces)
        finally:
            self._arriving -= 1
        self._keep(weights)
        return bytes.fromhex(weights.digest)

    def find(self, digest: bytes) -> Weights:
        """The model of that digest; raises `RunError` where it is not here any more."""
        self._forget()
        found = self._waiting.get(digest.hex())
        if found is None:
            raise RunError("the initial weights are not here, or not any more: send them again")
        return found[1]

    async def _received(self, pieces: AsyncIterator[bytes]) -> Weights:
        decoder: Decoder | None = None
        async for raw in pieces:
            if decoder is None:
                decoder = await asyncio.to_thread(self._announced, raw)
                continue
            chunk = unframe(raw)
            if not chunk or len(chunk) > CHUNK_BYTES:
                raise PayloadError("after the header come pieces of data, each of 1 byte to 1 MiB")
            decoder.feed(decoder.offset, chunk)
        if decoder is None:
            raise PayloadError("no header came")
        return await asyncio.to_thread(_finished, decoder)

    def _announced(self, raw: bytes) -> Decoder:
        try:
            piece = tensors_pb2.Piece.FromString(raw)
        except DecodeError:
            raise PayloadError("not a piece of a model") from None
        if not piece.HasField("header"):
            raise PayloadError("the first piece must be a header")
        return Decoder(convert.model_header_from_proto(piece.header, self._limits))

    def _keep(self, weights: Weights) -> None:
        self._forget()
        self._waiting.pop(weights.digest, None)
        self._waiting[weights.digest] = (self._clock(), weights)
        while len(self._waiting) > self.MOST or self._bytes() > self._limits.payload_bytes:
            del self._waiting[next(iter(self._waiting))]

    def _bytes(self) -> int:
        return sum(weights.vector.nbytes for _, weights in self._waiting.values())

    def _forget(self) -> None:
        oldest = self._clock() - self.KEEP_S
        self._waiting = {digest: found for digest, found in self._waiting.items() if found[0] > oldest}


def _finished(decoder: Decoder) -> Weights:
    weights = decoder.finish()
    if not weights.is_finite():
        raise PayloadError("the initial weights hold NaN or infinity")
    return weights


class OperatorService:
    """Implements `service Operators` of operators.proto for a grpc.aio server, over the runs of `book`."""

    def __init__(self, book: RunBook, initial: InitialModels | None = None) -> None:
        self._book = book
        self._initial = initial or InitialModels()

    async def submit(self, request: pb.SubmitRequest, context: Any) -> pb.Run:
        """Begins a run."""
        async with answering(context):
            file = RunFile.from_json(request.run_file)
            init = self._initial.find(request.init_digest) if request.init_digest else None
            status = self._book.submit(file, init)
            log.info("submitted", run=status.name, task=status.task, strategy=status.strategy)
            return convert.run_to_proto(status)

    async def cancel_run(self, request: pb.RunRequest, context: Any) -> pb.Run:
        """Ends a run."""
        async with answering(context):
            status = self._book.cancel(_named(request.run))
            log.info("cancelled", run=status.name, state=status.state)
            return convert.run_to_proto(status)

    async def status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        """Clients and runs, as many of the newest runs as a message holds."""
        async with answering(context):
            reply = pb.StatusReply(software=f"fedkit {__version__}")
            reply.clients.extend(convert.client_to_proto(client) for client in self._book.clients())
            if request.run:
                reply.runs.append(convert.run_to_proto(self._run(request.run)))
                return reply
            reply.runs.extend(_line(status) for status in self._book.runs())
            while reply.ByteSize() > _REPLY_BYTES and reply.runs:
                del reply.runs[len(reply.runs) // 2 :]
            return reply

    async def watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.RunEvent]:
        """How the run stands now, then every later round, then its end."""
        async with answering(context):
            status = self._run(request.run)
            if not status.is_over:
                yield pb.RunEvent(state=convert.run_to_proto(status))
            async for event in self._book.watch(status.name, request.after_round):
                if isinstance(event, RunStatus):
                    yield pb.RunEvent(state=convert.run_to_proto(event))
                    if event.is_over:
                        return
                else:
                    yield pb.RunEvent(round=convert.record_to_proto(event))

    async def fetch_outcome(self, request: pb.RunRequest, context: Any) -> pb.Outcome:
        """What a run ended with; a history too long for one message is left to `watch`."""
        async with answering(context):
            name = _named(request.run)
            message = convert.outcome_to_proto(self._book.outcome(name), self._book.file(name).to_json())
            if message.ByteSize() > _REPLY_BYTES:
                del message.history[:]
            return message

    async def fetch_model(self, request: pb.ModelRequest, context: Any) -> AsyncIterator[bytes]:
        """A model or state: its header, then the bytes from the offset on."""
        async with answering(context):
            name = _named(request.run)
            if request.which not in _MODELS:
                raise ConfigError(f"which must be one of {', '.join(_MODELS)}")
            found = self._book.model(name, request.which)
            header, chunks = await asyncio.to_thread(_payload, found)
            if request.offset > header.payload_bytes:
                raise ConfigError(f"offset {request.offset} is beyond the {header.payload_bytes} bytes there are")
            yield tensors_pb2.Piece(header=header).SerializeToString()
            for chunk in _from(request.offset, chunks):
                yield frame(chunk)

    async def store_model(self, requests: AsyncIterator[bytes], context: Any) -> pb.StoredModel:
        """Takes initial weights for a run to come."""
        async with answering(context):
            return pb.StoredModel(digest=await self._initial.take(requests))

    def _run(self, name: str) -> RunStatus:
        found = self._book.runs(_named(name))
        if not found:
            raise NoSuchRun(f"there is no run {name!r}")
        return found[0]


class DescribingService:
    """Implements `service Runs` of agents.proto: what sites may know of a run before they take part."""

    def __init__(self, book: RunBook) -> None:
        self._book = book

    async def describe(self, request: agents_pb2.DescribeRequest, context: Any) -> agents_pb2.RunDescription:
        """The run's file, and how it stands."""
        async with answering(context):
            name = _named(request.run)
            file, [status] = self._book.file(name), self._book.runs(name)
            here = [client for client in self._book.clients() if client.state in ("ready", "working")]
            return agents_pb2.RunDescription(
                run_file=file.to_json(),
                aggregation=file.privacy.aggregation or "plain",
                state=status.state,
                clients=sum(status.task in client.tasks for client in here),
            )


def _named(name: str) -> str:
    """`name`, which has the form of a run's; nothing else reaches the book."""
    if not NAME.fullmatch(name):
        raise NoSuchRun(f"there is no run {name!r:.110}")
    return name


def _line(status: RunStatus) -> pb.Run:
    """A run for a list: without what its last round says of single clients."""
    last = status.last
    brief = None if last is None else dataclasses.replace(last, per_client={}, refusals=(), epsilon={})
    return convert.run_to_proto(dataclasses.replace(status, last=brief))


def _payload(found: Weights | bytes) -> tuple[tensors_pb2.Header, Iterator[memoryview]]:
    if isinstance(found, Weights):
        header, chunks = encode(found)
        return convert.model_header_to_proto(header), chunks
    raw = memoryview(found)
    return convert.packed_header(found), (raw[at : at + CHUNK_BYTES] for at in range(0, len(raw), CHUNK_BYTES))


def _from(offset: int, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    """What is left of `chunks` after the first `offset` bytes."""
    start = 0
    for chunk in chunks:
        if start + len(chunk) > offset:
            yield chunk[max(offset - start, 0) :]
        start += len(chunk)
