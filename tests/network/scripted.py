"""Agents that speak the protocol by hand: honest ones that answer without training, and what a test makes of them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import numpy as np
from blake3 import blake3

from fedkit.protos import agents_pb2 as pb
from fedkit.protos import tensors_pb2
from fedkit.protos.channels import aio_channel
from fedkit.protos.wire import CHANNEL_OPTIONS, PROTOCOL, SESSION_KEY, Calls, Laden, frame, load, unframe
from fedkit.rng import generator
from fedkit.spool import payload_digest
from fedkit.trust.identity import Identity

SERVICE = pb.DESCRIPTOR.services_by_name["Agents"]
OPTIONS = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
PATIENCE_S = 20.0
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


@dataclass
class Hand:
    """A result as it is handed in: what is announced, and the bytes that follow. Change either as you please."""

    announcement: pb.Announcement
    payload: bytes
    manifest: str  # digest
    pieces: list[bytes] | None = None  # instead of the payload, where given

    def sign(self) -> Hand:
        """Announces the bytes as they are now."""
        self.announcement.payload_bytes = len(self.payload)
        self.announcement.digest = payload_digest(self.manifest).update(self.payload).digest()
        return self

    def messages(self) -> list[bytes]:
        """What is sent, message by message."""
        first = pb.UploadPiece(announcement=self.announcement).SerializeToString()
        return [first, *([frame(self.payload)] if self.pieces is None else self.pieces)]


class Talk:
    """One connection to the coordinator, from hello to its end. With `raw`, bytes may be written to `stream` too."""

    def __init__(
        self, address: str, name: str, *, raw: bool = False, identity: Identity | None = None, **hello: Any
    ) -> None:
        self.name = name
        self._said = {"protocol": PROTOCOL, "client": name, "instance": secrets.token_bytes(16), "software": "by hand"}
        self._said |= {"tasks": ["plain"], "max_examples": 1000, **hello}
        self.channel = aio_channel(address, identity, OPTIONS)
        self.calls = Calls(self.channel, SERVICE)
        self.stream = _raw_attend(self.channel)() if raw else self.calls.attend()
        self.welcome = pb.Welcome()
        self.accepted: set[str] = set()
        self.dropped: set[str] = set()
        self.refused: dict[str, str] = {}  # why, by assignment, of what was posted
        self.goodbye: pb.Goodbye | None = None
        self.payloads: dict[str, bytes] = {}  # that came along with assignments

    async def begin(self) -> pb.ToAgent:
        """Says hello; the coordinator's answer."""
        await self.say(hello=pb.Hello(**self._said))
        answer = await self.hear()
        self.welcome = answer.welcome
        return answer

    async def say(self, **message: Any) -> None:
        """Sends one message over the stream of attendance."""
        await self.stream.write(Laden(pb.FromAgent(**message)))

    async def hear(self) -> pb.ToAgent:
        """The next message but heartbeats; an empty one at the end of the stream."""
        while True:
            async with asyncio.timeout(PATIENCE_S):
                message = await self.stream.read()
            if message is EOF:
                return pb.ToAgent()
            message, payload = message
            self.payloads[message.assignment.id] = bytes(payload)
            if message.HasField("refused"):
                self.refused[message.refused.assignment_id] = message.refused.reason
            if message.HasField("goodbye"):
                self.goodbye = message.goodbye
            for news in (message.settlement, message.assignment.settlement, message.welcome.settlement):
                self.accepted.update(news.accepted)
                self.dropped.update(news.dropped)
            if message.WhichOneof("what") != "heartbeat":
                return message

    async def messages(self) -> AsyncIterator[pb.ToAgent]:
        """All messages to the end of the stream."""
        while (message := await self.hear()).WhichOneof("what") is not None:
            yield message

    async def leave(self) -> None:
        """Ends on purpose; the coordinator has heard it when this returns."""
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self.say(leaving=pb.Leaving())
            async for _ in self.messages():
                continue
        await self.channel.close()

    async def vanish(self) -> None:
        """Ends as if the process had died."""
        await self.channel.close()

    @property
    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """What goes with tensor calls."""
        return ((SESSION_KEY, self.welcome.session),)

    # -- tensors -------------------------------------------------------------------------------------------------------

    async def ask_model(self, key: str, offset: int = 0, **more: Any) -> tuple[pb.Header, bytes]:
        """The header and payload of an assignment's model from `offset` on; raises `grpc.RpcError`, `LookupError`."""
        call = self.calls.download(metadata=more.pop("metadata", self.metadata))
        await call.write(pb.DownloadRequest(assignment_id=key, offset=offset, header=True, **more))
        piece = tensors_pb2.Piece.FromString(await _read(call))
        if piece.WhichOneof("part") == "gone":
            raise LookupError(key)
        data = b""
        while len(data) < piece.header.payload_bytes - offset:
            chunk = unframe(await _read(call))
            assert chunk is not None
            data += chunk
        call.cancel()
        return piece.header, data

    async def post(self, hand: Hand) -> None:
        """Sends a result whole, over the stream of attendance."""
        await self.stream.write(Laden(pb.FromAgent(update=hand.announcement), load(hand.payload)))

    async def hand_in(self, messages: Iterable[bytes], *, stop: bool = True) -> list[pb.UploadReply]:
        """Sends these messages over one upload call, and gives all replies to its end; raises `grpc.RpcError`."""
        call = self.calls.upload(metadata=self.metadata)
        with contextlib.suppress(asyncio.InvalidStateError):  # the coordinator has hung up: its replies say why
            for message in messages:
                await call.write(message)
            if stop:
                await call.done_writing()
        replies = []
        while (reply := await _read(call)) is not EOF:
            replies.append(reply)
        return replies


def _raw_attend(channel: grpc.aio.Channel) -> Any:
    return channel.stream_stream(
        f"/{SERVICE.full_name}/Attend",
        request_serializer=lambda message: (
            message if isinstance(message, bytes) else message.message.SerializeToString()
        ),
        response_deserializer=lambda raw: Laden(pb.ToAgent.FromString(raw)),
    )


async def _read(call: Any) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        return await call.read()


def offset_of(name: str, size: int) -> np.ndarray:
    """What this client adds to half of the model."""
    return generator(0, "scripted", name).standard_normal(size).astype("<f4")


async def update(talk: Talk, asked: pb.Assignment) -> Hand:
    """The honest update: half of the model, and a vector of the client's own."""
    header, payload = await talk.ask_model(asked.id)
    model = np.frombuffer(payload, dtype="<f4")
    changed = np.float32(0.5) * model + offset_of(talk.name, model.size)
    examples = 10 + len(talk.name)
    announcement = pb.Announcement(assignment_id=asked.id, examples=examples, loss=0.5, at_once=True)
    return Hand(announcement, changed.astype("<f4").tobytes(), blake3(header.manifest.encode()).hexdigest()).sign()


Answer: TypeAlias = Callable[[Talk, pb.Assignment], Awaitable[None]]


async def honest(talk: Talk, asked: pb.Assignment) -> None:
    """Does what is asked."""
    if asked.WhichOneof("work") == "evaluate":
        sums = pb.Reals(values=[float(sum(talk.name.encode())), 4.0])  # loss times rows, rows
        await talk.say(sums=pb.Sums(assignment_id=asked.id, reals=sums, examples=4))
        return
    replies = await talk.hand_in((await update(talk, asked)).messages())
    assert [reply.WhichOneof("what") for reply in replies] == ["taken"], replies


class Agent:
    """One agent in a task of its own: attends, and gives `answer` whatever it is asked to do."""

    def __init__(self, address: str, name: str, answer: Answer = honest, **talk: Any) -> None:
        self.talk = Talk(address, name, **talk)
        self.failure: BaseException | None = None
        self._answer = answer
        self._task: asyncio.Task[None] | None = None
        self._errands: set[asyncio.Task[None]] = set()

    async def start(self) -> Agent:
        """Attends from now on."""
        answer = await self.talk.begin()
        assert answer.WhichOneof("what") == "welcome", answer
        self._task = asyncio.create_task(self._attend())
        return self

    async def _attend(self) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
            async for message in self.talk.messages():
                if message.WhichOneof("what") == "assignment":
                    errand = asyncio.create_task(self._answer(self.talk, message.assignment))
                    errand.add_done_callback(self._done)
                    self._errands.add(errand)

    def _done(self, errand: asyncio.Task[None]) -> None:
        self._errands.discard(errand)
        if not errand.cancelled() and errand.exception() is not None:
            self.failure = errand.exception()

    async def stop(self) -> None:
        """Leaves on purpose; raises what went wrong in an answer."""
        assert self._task is not None
        for errand in list(self._errands):
            errand.cancel()
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self.talk.say(leaving=pb.Leaving())
        await asyncio.wait({self._task}, timeout=PATIENCE_S)
        await self.talk.channel.close()
        if self.failure is not None:
            raise self.failure
