"""A client of the bare program: takes the model whole, changes one element of it, streams it back, for ever.

Run by the coordinator: python -m bench.bare.client ADDRESS BYTES [--kept]
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np

from bench.bare import ATTEND, CHUNK_BYTES, DOWNLOAD, EXCHANGE, UPLOAD, process


class Client:
    """The model lies in one piece, because nobody could train it otherwise."""

    def __init__(self, channel: Any, size: int) -> None:
        self._channel = channel
        self._model = np.empty(size // 4, "<f4")
        self._raw = self._model.view(np.uint8).data
        self._starts = range(0, size, CHUNK_BYTES)

    async def attend(self) -> None:
        """Answers rounds until the coordinator ends the stream: one call for the model, one for the answer."""
        download, upload = self._channel.unary_stream(DOWNLOAD), self._channel.stream_unary(UPLOAD)
        news = self._channel.stream_stream(ATTEND)()
        while await news.read() is not grpc.aio.EOF:
            at = 0
            async for chunk in download(b""):
                self._raw[at : at + len(chunk)] = chunk
                at += len(chunk)
            self._model[0] += 1
            await upload(self._chunks())

    async def _chunks(self) -> AsyncIterator[bytes]:
        for start in self._starts:
            yield bytes(self._raw[start : start + CHUNK_BYTES])

    async def exchange(self) -> None:
        """The same over one stream that is never closed."""
        stream = self._channel.stream_stream(EXCHANGE)()
        while (chunk := await stream.read()) is not grpc.aio.EOF:
            for start in self._starts:
                self._raw[start : start + CHUNK_BYTES] = chunk if start == 0 else await stream.read()
            self._model[0] += 1
            async for piece in self._chunks():
                await stream.write(piece)


async def run(address: str, size: int, *, kept: bool) -> None:
    """A client from its first call to its last."""
    async with grpc.aio.insecure_channel(address) as channel:
        client = Client(channel, size)
        await (client.exchange() if kept else client.attend())


if __name__ == "__main__":
    process["tune_malloc"]()
    with asyncio.Runner(loop_factory=process["fast_loop"]()) as runner:
        runner.run(run(sys.argv[1], int(sys.argv[2]), kept="--kept" in sys.argv))
