"""Adding up whole uploads of ciphertexts, of which any may be none.

The chunks of a sum have nothing to do with one another, so that several processes can each add some of them. Each is
checked before native code sees it. An upload of which one is none is in no part of the sum, which is then added anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fedkit.crypto.chunks import Scheme
from fedkit.crypto.encrypted import Adder
from fedkit.crypto.ring import Words
from fedkit.errors import PayloadError, SumSpoiled

__all__ = ["Adding", "add_up", "left"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Adding:
    """Sums of so many values under one key, and which of their chunks are added here: `first` to `end`, without it."""

    scheme: Scheme
    fingerprint: bytes
    values: int
    first: int
    end: int

    @classmethod
    def parts(cls, scheme: Scheme, fingerprint: bytes, values: int, most: int) -> list[Adding]:
        """All chunks, in at most so many parts of about the same length, none of them empty."""
        count = scheme.chunks_for(values)
        ends = np.linspace(0, count, min(most, count) + 1).astype(int).tolist()
        return [cls(scheme, fingerprint, values, *ends[i : i + 2]) for i in range(len(ends) - 1)]

    def add(self, uploads: Mapping[str, Words], out: Words) -> dict[str, str]:
        """Fills this part of `out` with the sum of these uploads.

        Unless some hold what is no ciphertext: then it returns which, and why, and the others are to be added anew.
        """
        refused: dict[str, str] = {}
        with Adder(self.scheme, self.fingerprint, (self.end - self.first) * self.scheme.values) as adder:
            for name in sorted(uploads):
                try:
                    for index, chunk in enumerate(self._chunks(uploads[name])):
                        adder.add(index, chunk)
                except PayloadError as error:
                    refused[name] = str(error)
            size = self.scheme.full_bytes // out.itemsize
            for index, chunk in enumerate(adder.sums(len(uploads)) if not refused else (), self.first):
                out[index * size : (index + 1) * size] = np.frombuffer(chunk, dtype="<u4")
        return refused

    def _chunks(self, upload: Words) -> Iterator[bytes]:
        data, size = upload.view(np.uint8).data, self.scheme.seeded_bytes
        whole = self.scheme.chunks_for(self.values)
        if len(data) != whole * size:  # which was checked on arrival
            raise SumSpoiled(f"an upload of {whole} chunks has {len(data)} bytes")
        return (bytes(data[index * size : (index + 1) * size]) for index in range(self.first, self.end))


def add_up(scheme: Scheme, fingerprint: bytes, values: int, uploads: Mapping[str, Words], out: Words) -> dict[str, str]:
    """Fills `out` with the sum of all uploads that are some; why the others are none, by client.

    Raises `SumSpoiled` where nothing is left to add.
    """
    [whole] = Adding.parts(scheme, fingerprint, values, 1)
    refused: dict[str, str] = {}
    while more := whole.add(left(uploads, refused), out):
        refused |= more
    return refused


def left(uploads: Mapping[str, T], refused: Mapping[str, str]) -> dict[str, T]:
    """Those that were not refused; raises `SumSpoiled` where there are none."""
    found = {name: upload for name, upload in uploads.items() if name not in refused}
    if not found:
        raise SumSpoiled("none of the uploads is encrypted as it should be")
    return found
