"""A client of the bare program: takes the model whole, changes one element, streams it back, for ever.

Run by the coordinator: python -m bench.bare.client ADDRESS BYTES
"""

from __future__ import annotations

import asyncio
import struct
import sys

import grpc

from bench.bare import CHUNK_BYTES, METHOD, process


def changed(chunk: bytes) -> bytes:
    """The chunk with one added to its first float32."""
    return struct.pack("<f", struct.unpack_from("<f", chunk)[0] + 1) + chunk[4:]


async def attend(address: str, size: int) -> None:
    """Answers rounds until the coordinator ends the stream."""
    count = -(-size // CHUNK_BYTES)
    async with grpc.aio.insecure_channel(address) as channel:
        stream = channel.stream_stream(METHOD)()
        while (first := await stream.read()) is not grpc.aio.EOF:
            chunks = [changed(first), *[await stream.read() for _ in range(count - 1)]]
            for chunk in chunks:
                await stream.write(chunk)


if __name__ == "__main__":
    process["tune_malloc"]()
    with asyncio.Runner(loop_factory=process["fast_loop"]()) as runner:
        runner.run(attend(sys.argv[1], int(sys.argv[2])))
