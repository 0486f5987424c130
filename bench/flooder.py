"""Whoever has no certificate, and a lot of time: `python -m bench.flooder KIND --seconds S ADDRESS ...`.

Prints what it did as JSON. What it sends is made by hand, because no HTTP/2 library would send it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import random
import resource
import ssl
import struct
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable

__all__ = ["KINDS", "flood"]

BODY = 2_500_000_000
BOMB = 60 << 20  # as much as fits packed into the 64 KiB that a stranger may send
CONNECTIONS = 5_000
HANDSHAKES = 500
AT_ONCE = 100  # that are being opened

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _GOAWAY, _WINDOW = 0, 1, 3, 4, 7, 8
_PATH = "/fedkit.v1.Enrolment/Enroll"

Count = Counter[str]


def _frame(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _headers(stream: int, *more: tuple[str, str]) -> bytes:
    fields = [(":method", "POST"), (":scheme", "https"), (":path", _PATH), (":authority", "x"), *more]
    fields += [("content-type", "application/grpc"), ("te", "trailers")]
    block = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields
    )
    return _frame(_HEADERS, stream, block, flags=4)


class _Peer:
    """An HTTP/2 connection by hand, which keeps to the windows it is given."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.over: set[int] = set()  # streams that have been answered
        self.is_gone = False
        self._reader = reader
        self._window, self._initial = 65_535, 65_535
        self._windows: dict[int, int] = {}
        self._moved = asyncio.Event()
        writer.write(_PREFACE + _frame(_SETTINGS, 0))
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await self._reader.readexactly(9)
                size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
                self._hear(kind, flags, int.from_bytes(head[5:], "big"), await self._reader.readexactly(size))
                self._moved.set()
        self.is_gone = True
        self._moved.set()

    def _hear(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & 1:
            for at in range(0, len(payload), 6):
                key, value = struct.unpack_from(">HI", payload, at)
                self._initial = value if key == 4 else self._initial
            self.writer.write(_frame(_SETTINGS, 0, flags=1))
        elif kind == _WINDOW and stream == 0:
            self._window += int.from_bytes(payload, "big")
        elif kind == _WINDOW:
            self._windows[stream] = self._windows.get(stream, 0) + int.from_bytes(payload, "big")
        elif kind in (_HEADERS, _RESET):
            self.over.add(stream)
        elif kind == _GOAWAY:
            self.is_gone = True

    async def send(self, stream: int, size: int, content: Callable[[int], bytes]) -> int:
        """Sends `size` bytes on a stream until it is answered; how many went out."""
        sent = 0
        while sent < size and not self.is_gone and stream not in self.over:
            room = min(16_384, size - sent, self._window, self._initial + self._windows.get(stream, 0) - sent)
            if room <= 0:
                self._moved.clear()
                await asyncio.wait_for(self._moved.wait(), 10)
                continue
            self.writer.write(_frame(_DATA, stream, content(room)))
            self._window -= room
            sent += room
            await self.writer.drain()
        return sent

    def close(self) -> None:
        self._reading.cancel()
        self.writer.close()


async def _dialled(address: str) -> _Peer:
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return _Peer(*await asyncio.open_connection(host, int(port), ssl=context))


async def _calls(address: str, until: float, count: Count, body: Callable[[_Peer, int], Awaitable[int]]) -> None:
    """One call after the other, over connections that are opened anew when the other side has had enough."""
    while time.monotonic() < until:
        try:
            peer = await _dialled(address)
        except OSError:
            count["refused"] += 1
            await asyncio.sleep(0.05)
            continue
        with contextlib.suppress(OSError, TimeoutError):
            for stream in range(1, 200, 2):
                if peer.is_gone or time.monotonic() > until:
                    break
                count["bytes"] += await body(peer, stream)
                count["calls"] += 1
        peer.close()


async def bodies(addresses: list[str], until: float, count: Count) -> None:
    """Messages that claim to have 2.5 GB, as much of each as is taken, four at a time."""

    async def body(peer: _Peer, stream: int) -> int:
        peer.writer.write(_headers(stream) + _frame(_DATA, stream, struct.pack(">BI", 0, BODY)))
        sent = await peer.send(stream, BODY, bytes)
        peer.writer.write(_frame(_RESET, stream, struct.pack(">I", 8)))
        return sent

    await asyncio.gather(*(_calls(address, until, count, body) for address in addresses for _ in range(4)))


@functools.cache
def _bomb() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(BOMB >> 20)) + packer.flush()
    return struct.pack(">BI", 1, len(packed)) + packed


async def bombs(addresses: list[str], until: float, count: Count) -> None:
    """Messages of 64 KiB that become 60 MiB when they are unpacked, four at a time."""
    message = _bomb()

    async def body(peer: _Peer, stream: int) -> int:
        at = 0

        def next_part(size: int) -> bytes:
            nonlocal at
            at += size
            return message[at - size : at]

        peer.writer.write(_headers(stream, ("grpc-encoding", "gzip")))
        sent = await peer.send(stream, len(message), next_part)
        peer.writer.write(_frame(_DATA, stream, flags=1))
        for _ in range(200):
            if stream in peer.over or peer.is_gone:
                break
            await asyncio.sleep(0.01)
        return sent

    await asyncio.gather(*(_calls(address, until, count, body) for address in addresses for _ in range(4)))


async def connections(addresses: list[str], until: float, count: Count) -> None:
    """5,000 connections that send random bytes, and are kept as long as they are let."""
    await _held(addresses, until, count, CONNECTIONS, lambda: os.urandom(random.randint(1, 2000)))


async def handshakes(addresses: list[str], until: float, count: Count) -> None:
    """500 handshakes of TLS that stop after the first message; one that is ended is begun anew."""
    await _held(addresses, until, count, HANDSHAKES, _client_hello, renewed=True)


@functools.cache
def _client_hello() -> bytes:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2"])
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


async def _held(
    addresses: list[str], until: float, count: Count, most: int, first: Callable[[], bytes], *, renewed: bool = False
) -> None:
    """`most` connections in all that say `first` and then nothing."""
    opening = asyncio.Semaphore(AT_ONCE)

    async def hold(address: str) -> None:
        host, _, port = address.rpartition(":")
        while time.monotonic() < until:
            try:
                async with opening:
                    reader, writer = await asyncio.open_connection(host, int(port))
                    writer.write(first())
                    await writer.drain()
                count["connections"] += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(until - time.monotonic(), 0)):
                        while await reader.read(4096):
                            continue
                        count["ended"] += 1
                writer.close()
            except OSError:
                count["refused"] += 1
                await asyncio.sleep(0.05)
            if not renewed:
                return

    await asyncio.gather(*(hold(addresses[i % len(addresses)]) for i in range(most)))


KINDS = {"bodies": bodies, "bombs": bombs, "connections": connections, "handshakes": handshakes}


def flood(kind: str, addresses: list[str], seconds: float) -> Count:
    """Floods for so long; what was done."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    count: Count = Counter()
    if kind == "bombs":
        _bomb()
    print("ready", flush=True)
    asyncio.run(KINDS[kind](addresses, time.monotonic() + seconds, count))
    return count


def main() -> None:
    """Floods and prints what it did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    print(json.dumps(flood(given.kind, given.addresses, given.seconds)))


if __name__ == "__main__":
    main()
