"""The bare program: a round is the model to every client and back over one stream each, and a running sum.

    echo 5 | python -m bench.bare.coordinator --bytes 25000000 --clients 10

For each number on its input it plays as many rounds and prints one line of JSON: the seconds of each round, and the
processor seconds of coordinator and clients together. Serializers are the identity, chunks have 1 MiB, the sum is
float32; there is no digest, no check and no file.
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

from bench.bare import CHUNK_BYTES, METHOD, process


class Coordinator:
    """A server that keeps every client's stream, and the rounds it plays on them."""

    def __init__(self, size: int, clients: int) -> None:
        self.model = (np.arange(size // 4) % 1000).astype("<f4")
        self.total = np.empty_like(self.model)
        self.clients = clients
        self._streams: list[Any] = []
        self._complete, self._over = asyncio.Event(), asyncio.Event()

    async def serve(self) -> str:
        """Listens on a free port of the loopback interface; returns the address."""
        self._server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(self._attend)
        service, method = METHOD.strip("/").split("/")
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def _attend(self, _: Any, stream: Any) -> None:
        self._streams.append(stream)
        if len(self._streams) == self.clients:
            self._complete.set()
        await self._over.wait()

    async def rounds(self, count: int) -> list[float]:
        """The wall-clock seconds of each of `count` rounds, once all clients are there."""
        await self._complete.wait()
        seconds = [await self._round() for _ in range(count)]
        self._check()
        return seconds

    async def _round(self) -> float:
        began = time.perf_counter()
        payload, step = self.model.view(np.uint8).data, CHUNK_BYTES // 4
        chunks = [bytes(payload[start : start + CHUNK_BYTES]) for start in range(0, len(payload), CHUNK_BYTES)]
        self.total.fill(0)
        blocks = [self.total[start : start + step] for start in range(0, len(self.total), step)]
        await asyncio.gather(*(_exchange(stream, chunks, blocks) for stream in self._streams))
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


async def _exchange(stream: Any, chunks: list[bytes], blocks: list[np.ndarray]) -> None:
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
    arguments = parser.parse_args()
    process["tune_malloc"]()
    with asyncio.Runner(loop_factory=process["fast_loop"]()) as runner:
        coordinator = Coordinator(arguments.bytes, arguments.clients)
        address = runner.run(coordinator.serve())
        command = [sys.executable, "-m", "bench.bare.client", address, str(arguments.bytes)]
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
