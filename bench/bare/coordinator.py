"""The bare program: a round is the model to every client and back, and a running sum.

    echo 5 | python -m bench.bare.coordinator --bytes 25000000 --clients 10

For each number on its input it plays as many rounds and prints one line of JSON: the seconds of each round, and the
processor seconds of coordinator and clients together. Serializers are the identity, chunks have 1 MiB, the sum is
float32; there is no digest, no check and no file. Each client fetches the model with one call and answers with another;
with --kept, it does both over one stream that is never closed: as little as grpc.aio can do at all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench.bare import ATTEND, CHUNK_BYTES, DOWNLOAD, EXCHANGE, UPLOAD, process


class Coordinator:
    """A server that keeps every client's stream, and the rounds it plays."""

    def __init__(self, size: int, clients: int) -> None:
        self.model = (np.arange(size // 4) % 1000).astype("<f4")
        self.total = np.empty_like(self.model)
        self.clients = clients
        self._attending: list[Any] = []
        self._kept: list[Any] = []
        self._complete, self._answered, self._over = asyncio.Event(), asyncio.Semaphore(0), asyncio.Event()

    async def serve(self) -> str:
        """Listens on a free port of the loopback interface; returns the address."""
        self._server = grpc.aio.server()
        behaviours = {
            ATTEND: grpc.stream_stream_rpc_method_handler(self._attend),
            DOWNLOAD: grpc.unary_stream_rpc_method_handler(self._download),
            UPLOAD: grpc.stream_unary_rpc_method_handler(self._upload),
            EXCHANGE: grpc.stream_stream_rpc_method_handler(self._exchange),
        }
        methods = {path.rpartition("/")[2]: handler for path, handler in behaviours.items()}
        service = ATTEND.strip("/").partition("/")[0]
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, methods)])
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def _attend(self, _: Any, stream: Any) -> None:
        await self._stay(self._attending, stream)

    async def _exchange(self, _: Any, stream: Any) -> None:
        await self._stay(self._kept, stream)

    async def _stay(self, streams: list[Any], stream: Any) -> None:
        streams.append(stream)
        if len(streams) == self.clients:
            self._complete.set()
        await self._over.wait()

    async def _download(self, _: bytes, stream: Any) -> None:
        for chunk in self._chunks:
            await stream.write(chunk)

    async def _upload(self, chunks: Any, _: Any) -> bytes:
        blocks = iter(self._blocks)
        async for chunk in chunks:
            block = next(blocks)
            block += np.frombuffer(chunk, "<f4")
        self._answered.release()
        return b""

    async def rounds(self, count: int) -> list[float]:
        """The wall-clock seconds of each of `count` rounds, once all clients are there."""
        await self._complete.wait()
        seconds = [await self._round() for _ in range(count)]
        self._check()
        return seconds

    async def _round(self) -> float:
        began = time.perf_counter()
        payload, step = self.model.view(np.uint8).data, CHUNK_BYTES // 4
        self._chunks = [bytes(payload[start : start + CHUNK_BYTES]) for start in range(0, len(payload), CHUNK_BYTES)]
        self.total.fill(0)
        self._blocks = [self.total[start : start + step] for start in range(0, len(self.total), step)]
        if self._kept:
            await asyncio.gather(*(_exchanged(stream, self._chunks, self._blocks) for stream in self._kept))
        else:
            await asyncio.gather(*(stream.write(b"") for stream in self._attending))
            for _ in self._attending:
                await self._answered.acquire()
        return time.perf_counter() - began

    def _check(self) -> None:
        expected = self.model * self.clients
        expected[0] += self.clients
        if not np.array_equal(self.total, expected):
            raise SystemExit("the sum is not that of the models the clients should have sent")

    async def stop(self) -> None:
        """Ends every stream, and with it every client."""
        self._over.set()
        await self._server.stop(5)


async def _exchanged(stream: Any, chunks: list[bytes], blocks: list[np.ndarray]) -> None:
    for chunk in chunks:
        await stream.write(chunk)
    for block in blocks:
        block += np.frombuffer(await stream.read(), "<f4")


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of processes, from /proc."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Starts the clients, and plays the rounds that the input asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--kept", action="store_true", help="one stream for each client, never closed")
    arguments = parser.parse_args()
    process["tune_malloc"]()
    with asyncio.Runner(loop_factory=process["fast_loop"]()) as runner:
        coordinator = Coordinator(arguments.bytes, arguments.clients)
        address = runner.run(coordinator.serve())
        kept = ["--kept"] if arguments.kept else []
        command = [sys.executable, "-m", "bench.bare.client", address, str(arguments.bytes), *kept]
        clients = [subprocess.Popen(command) for _ in range(arguments.clients)]
        pids = [os.getpid(), *(client.pid for client in clients)]
        runner.run(coordinator.rounds(1))
        for line in sys.stdin:
            before = cpu_seconds(pids)
            seconds = runner.run(coordinator.rounds(int(line)))
            print(json.dumps({"seconds": seconds, "cpu_s": cpu_seconds(pids) - before}), flush=True)
        runner.run(coordinator.stop())
        for client in clients:
            client.wait(timeout=30)


if __name__ == "__main__":
    main()
