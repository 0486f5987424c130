"""Adding up whole uploads of ciphertexts, of which any may be none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedkit.crypto.chunks import FULL_BYTES, SEEDED_BYTES, Scheme, chunks_for
from fedkit.crypto.encrypted import Adder, check_chunk
from fedkit.crypto.ring import Words
from fedkit.errors import PayloadError, SumSpoiled

__all__ = ["add_up"]


def add_up(scheme: Scheme, fingerprint: bytes, values: int, uploads: Mapping[str, Words], out: Words) -> dict[str, str]:
    """Fills `out` with the sum of all uploads that are some; why the others are none, by client.

    An upload is checked to its end before native code sees any of it. Raises `SumSpoiled` where nothing is left to add,
    or where what is well-formed cannot be added.
    """
    refused: dict[str, str] = {}
    with Adder(scheme, fingerprint, values) as adder:
        for name in sorted(uploads):
            chunks = _chunks(uploads[name], chunks_for(values))
            try:
                for part in chunks:
                    check_chunk(scheme, fingerprint, bytes(part))
            except PayloadError as error:
                refused[name] = str(error)
                continue
            _add(adder, chunks)
        taken = len(uploads) - len(refused)
        if not taken:
            raise SumSpoiled("none of the uploads is encrypted as it should be")
        for index, chunk in enumerate(adder.sums(taken)):
            start = index * FULL_BYTES // out.itemsize
            out[start : start + FULL_BYTES // out.itemsize] = np.frombuffer(chunk, dtype="<u4")
    return refused


def _chunks(upload: Words, count: int) -> list[memoryview]:
    data = upload.view(np.uint8).data
    if len(data) != count * SEEDED_BYTES:
        raise SumSpoiled(f"an upload of {count} chunks has {len(data)} bytes")  # whose length was checked on arrival
    return [data[start : start + SEEDED_BYTES] for start in range(0, len(data), SEEDED_BYTES)]


def _add(adder: Adder, chunks: list[memoryview]) -> None:
    try:
        for index, chunk in enumerate(chunks):
            adder.add(index, bytes(chunk))
    except PayloadError as error:
        raise SumSpoiled(f"ciphertexts that cannot be added: {error}") from None
