"""gRPC methods made from the service descriptors, so that no method can be forgotten on either side.

Tensors in messages pass as bytes and are framed by hand: protobuf's own copy of a 1 MiB field would cost as much as
sending it. What is framed here is what any protobuf library reads and writes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError

__all__ = [
    "CHANNEL_OPTIONS",
    "PROTOCOL",
    "RESUMED_BYTES",
    "SERVER_OPTIONS",
    "SESSION_KEY",
    "STRANGERS_OPTIONS",
    "Calls",
    "Laden",
    "Undecodable",
    "frame",
    "handlers",
    "load",
    "shown",
    "unframe",
]

PROTOCOL = 1
RESUMED_BYTES = 1 << 18  # of a piece where a line has broken before: what the next break costs
SESSION_KEY = "fedkit-session-bin"

# In frames of 16 KiB a round of 100 MB costs some 5 to 10 % more processor time; larger ones hold heartbeats up.
_FRAME = ("grpc.http2.max_frame_size", 1 << 18)
SERVER_OPTIONS = [
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # the name that grpc 1.85 heeds on servers too
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.bdp_probe", 0),  # else each stream's window grows to 20 MB, of the coordinator's memory
    ("grpc.http2.lookahead_bytes", 2 << 20),
    _FRAME,
    ("grpc.so_reuseport", 0),  # a second coordinator on the same port is an error, not a lottery
    ("grpc.server_handshake_timeout_ms", 10_000),  # for which somebody who says nothing more costs 45 KB
]
STRANGERS_OPTIONS = [  # of a port that takes calls without a certificate, and one short one from each
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_connection_age_grace_ms", 10_000),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.max_receive_message_length", 1 << 16),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 16),
]
CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    _FRAME,
    ("grpc.enable_retries", 0),  # reconnecting and resuming are ours
]

_FRAMED = frozenset({"fedkit.v1.Piece", "fedkit.v1.UploadPiece"})
_DATA = 0x12  # field 2 of both, length-delimited
_LADEN = frozenset({"fedkit.v1.ToAgent", "fedkit.v1.FromAgent"})
_PAYLOAD = 0x7A  # field 15 of both, length-delimited
_SMALL = 1 << 16  # bytes of a message beside its payload
_KIND, _LENGTH_DELIMITED = 0x87, 2  # of a tag: the wire type, and whether it goes on in another byte


class Undecodable(Exception):
    """Bytes that are not the message that is due. A call that ends with it ends with INVALID_ARGUMENT."""


class Laden(NamedTuple):
    """A message with its `payload` beside it: as it was received, or serialised by `load`."""

    message: Any
    payload: memoryview | bytes = b""


def load(payload: memoryview | bytes) -> bytes:
    """The field `payload` of a message, serialised, for up to 2 MiB.

    It goes first, behind four bytes (the length is a varint of three, whatever it is), so that its values are aligned
    where they arrive.
    """
    size = len(payload)
    return b"".join((bytes((_PAYLOAD, size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14)), payload))


def frame(chunk: memoryview | bytes) -> bytes:
    """A `Piece` or `UploadPiece` whose `data` is `chunk`, serialised."""
    head, length = bytearray((_DATA,)), len(chunk)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return b"".join((head, chunk))


def unframe(raw: bytes) -> memoryview | None:
    """The `data` of a serialised `Piece` or `UploadPiece` without a copy; None where it holds something else."""
    if not raw or raw[0] != _DATA:
        return None
    start, end = _extent(raw, 1)
    return memoryview(raw)[start:] if start and end == len(raw) else None


def _extent(raw: bytes, at: int) -> tuple[int, int]:
    """Where a field lies whose length is written at `at`; (0, 0) where that is no length."""
    length, shift = 0, 0
    while at < len(raw) and shift < 35:
        byte = raw[at]
        length |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return at, at + length
    return 0, 0


def _unload(raw: bytes) -> tuple[bytes, memoryview | bytes]:
    """A serialised message without its `payload`, and that payload without a copy; empty where there is none."""
    at = 0
    while at < len(raw) and raw[at] & _KIND == _LENGTH_DELIMITED:
        start, end = _extent(raw, at + 1)
        if not start or end > len(raw):
            break
        if raw[at] == _PAYLOAD:
            small, payload = raw[:at] + raw[end:], memoryview(raw)[start:end]
            # A kept payload keeps its message: one that is padded with something else must not take uncounted memory.
            return small, payload if len(small) <= _SMALL else memoryview(bytes(payload))
        at = end
    return raw, b""


def _unladen(message: Descriptor) -> Callable[[bytes], Laden]:
    parse = message_factory.GetMessageClass(message).FromString

    def parsed(raw: bytes) -> Laden:
        small, payload = _unload(raw)
        return Laden(parse(small), payload)

    return parsed


def _written(laden: Laden) -> bytes:
    raw: bytes = laden.message.SerializeToString()
    return b"".join((laden.payload, raw)) if laden.payload else raw


def _parser(message: Descriptor) -> Callable[[bytes], Any] | None:
    if message.full_name in _LADEN:
        return _unladen(message)
    return None if message.full_name in _FRAMED else message_factory.GetMessageClass(message).FromString


def _serializer(message: Descriptor) -> Callable[[Any], bytes] | None:
    if message.full_name in _LADEN:
        return _written
    return None if message.full_name in _FRAMED else message_factory.GetMessageClass(message).SerializeToString


def _shape(method: MethodDescriptor) -> str:
    sides = (method.client_streaming, method.server_streaming)
    return "_".join("stream" if many else "unary" for many in sides)


def handlers(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler[Any, Any]:
    """What serves every method of `service` by the servicer's method of the same name in snake_case."""
    found = {}
    for method in service.methods:
        make = getattr(grpc, f"{_shape(method)}_rpc_method_handler")
        behaviour = _reading(getattr(servicer, _snake(method.name)), method)
        found[method.name] = make(behaviour, None, _serializer(method.output_type))
    return grpc.method_handlers_generic_handler(service.full_name, found)


def _reading(behaviour: Callable[..., Any], method: MethodDescriptor) -> Callable[..., Any]:
    """The behaviour, given messages for bytes: where gRPC parses, it answers UNKNOWN and logs where it failed."""
    parse = _parser(method.input_type)

    def read(raw: Any) -> Any:
        if parse is None:
            return raw
        return _each(parse, raw) if method.client_streaming else _parsed(parse, raw)

    async def stream(raw: Any, context: Any) -> AsyncIterator[Any]:
        async with _telling(context), contextlib.aclosing(behaviour(read(raw), context)) as messages:
            async for message in messages:
                yield message

    async def call(raw: Any, context: Any) -> Any:
        async with _telling(context):
            return await behaviour(read(raw), context)

    return stream if inspect.isasyncgenfunction(behaviour) else call


async def _each(parse: Callable[[bytes], Any], raw: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for one in raw:
        yield _parsed(parse, one)


def _parsed(parse: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return parse(raw)
    except DecodeError:
        raise Undecodable("these bytes are not the message that is due here") from None


@contextlib.asynccontextmanager
async def _telling(context: Any) -> AsyncIterator[None]:
    try:
        yield
    except Undecodable as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


def shown(text: str) -> str:
    """Text that came over the wire as one line, without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


class Calls:
    """Every method of a service as an attribute in snake_case, over a plain or an aio channel."""

    def __init__(self, channel: Any, service: ServiceDescriptor) -> None:
        for method in service.methods:
            make = getattr(channel, _shape(method))
            path = f"/{service.full_name}/{method.name}"
            call = make(
                path,
                request_serializer=_serializer(method.input_type),
                response_deserializer=_parser(method.output_type),
            )
            setattr(self, _snake(method.name), call)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the service has no method {name!r}")


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
