"""A bad line: a TCP proxy on loopback that counts bytes, and cuts, delays or swallows them when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, TypeAlias

from fedkit.loopback import Loopback

__all__ = ["Lined", "Proxy", "Side"]

Side: TypeAlias = Literal["up", "down"]  # from the agent to the coordinator, and back

_PIECE = 1 << 16
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: what is on its way is lost, as where a line breaks


class Proxy:
    """Forwards every connection to `target` (host:port) from its entry to its exit.

    `count` holds the bytes forwarded so far, `cuts` how often all connections were cut, `swallowed` how many of them
    have become black holes. `delay_s` is waited before each piece of at most 64 KiB; with `silent`, nothing goes
    through and nobody is told.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.count: dict[Side, int] = {"up": 0, "down": 0}
        self.cuts = 0
        self.delay_s = 0.0
        self.swallowed = 0
        self._due: dict[Side, list[int]] = {"up": [], "down": []}
        self._holes: dict[Side, list[int]] = {"up": [], "down": []}
        self._open: dict[asyncio.Task[None], tuple[socket.socket, socket.socket]] = {}
        self._loop = asyncio.new_event_loop()
        self._audible = asyncio.Event()
        self._audible.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._accepting.cancel)
        self._thread.join()

    # -- what can be done to the line --------------------------------------------------------------------------------

    def cut(self) -> None:
        """Breaks all connections now; new ones are taken at once."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    def cut_at(self, side: Side, positions: Sequence[int]) -> None:
        """Breaks all connections when so many more bytes have gone that way, once for each of the rising positions."""
        start = self.count[side]
        self._due[side] = [start + position for position in positions]

    def swallow_at(self, side: Side, positions: Sequence[int]) -> None:
        """As `cut_at`, but the connection stays open and swallows both ways whatever is sent; new ones are good."""
        start = self.count[side]
        self._holes[side] = [start + position for position in positions]

    def silence(self, silent: bool) -> None:
        """Lets nothing through any more, or everything again."""
        self._loop.call_soon_threadsafe(self._audible.clear if silent else self._audible.set)

    # -- the line ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._accepting = self._loop.create_task(self._accept())
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._accepting)
        self._loop.close()

    async def _accept(self) -> None:
        try:
            while True:
                near, _ = await self._loop.sock_accept(self._listener)
                await self._connect(near)
        finally:
            self._listener.close()
            await self._cut()

    async def _connect(self, near: socket.socket) -> None:
        far = socket.socket()
        far.setblocking(False)
        try:
            await self._loop.sock_connect(far, self._target)
        except OSError:  # nobody listens there at the moment
            near.close()
            far.close()
            return
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._forward(near, far, asyncio.Event()))
        self._open[task] = near, far

    async def _forward(self, near: socket.socket, far: socket.socket, hole: asyncio.Event) -> None:
        pumps = [
            asyncio.ensure_future(self._pump(near, far, "up", hole)),
            asyncio.ensure_future(self._pump(far, near, "down", hole)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            task = asyncio.current_task()
            assert task is not None
            for end in self._open.pop(task):
                end.close()

    async def _pump(self, source: socket.socket, sink: socket.socket, side: Side, hole: asyncio.Event) -> None:
        while True:
            with contextlib.suppress(ConnectionError):
                piece = await self._loop.sock_recv(source, _PIECE)
                await asyncio.sleep(self.delay_s)
                await self._audible.wait()
                if piece and self._swallows(side, piece, hole):
                    continue
                piece, is_last = self._until_cut(side, piece)
                await self._loop.sock_sendall(sink, piece)
                self.count[side] += len(piece)
                if is_last:
                    self._loop.create_task(self._cut())
                if piece and not is_last:
                    continue
            return

    def _swallows(self, side: Side, piece: bytes, hole: asyncio.Event) -> bool:
        due = self._holes[side]
        if due and not hole.is_set() and self.count[side] + len(piece) > due[0]:
            due.pop(0)
            hole.set()
            self.swallowed += 1
        return hole.is_set()

    def _until_cut(self, side: Side, piece: bytes) -> tuple[bytes, bool]:
        due = self._due[side]
        if not due or self.count[side] + len(piece) < due[0]:
            return piece, False
        return piece[: due.pop(0) - self.count[side]], True

    async def _cut(self) -> None:
        self.cuts += bool(self._open)
        for task, ends in list(self._open.items()):
            for end in ends:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)


class Lined(Loopback):
    """A federation whose agents dial `line` instead of their coordinator. Mixed into any other kind of federation."""

    line: Proxy

    def start_client(self, name: str) -> None:
        """Starts the agent at the near end of the line."""
        port, self.port = self.port, int(self.line.address.rpartition(":")[2])
        super().start_client(name)
        self.port = port
