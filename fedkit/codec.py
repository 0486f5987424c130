"""Weights as bytes: a header that is checked first, then little-endian float32 in chunks of 1 MiB.

Nothing in the bytes can name code. A header is refused before memory is taken for what it announces; the payload is
held against the announced length and BLAKE3 digest as it goes by.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from fedkit.errors import PayloadError
from fedkit.weights import Manifest, Weights

__all__ = [
    "CHUNK_BYTES",
    "Decoder",
    "Header",
    "Limits",
    "encode",
    "flush_folder",
    "load",
    "pieces",
    "save",
    "write_atomically",
]

CHUNK_BYTES = 1 << 20
_MAGIC = b"FEDKIT1\n"
_LITTLE = sys.byteorder == "little"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver is willing to hold: the largest header and payload, in bytes."""

    header_bytes: int = 16 << 20
    payload_bytes: int = 8 << 30


@dataclass(frozen=True, slots=True)
class Header:
    """What is announced before a payload: the manifest, the length in bytes, the payload's BLAKE3 digest (hex)."""

    manifest: Manifest
    payload_bytes: int
    digest: str

    def __post_init__(self) -> None:
        """Refuses a length that is not the manifest's, and a digest that is not one."""
        if type(self.payload_bytes) is not int or self.payload_bytes != 4 * self.manifest.size:
            expected = 4 * self.manifest.size
            raise PayloadError(f"the manifest needs {expected} bytes, the header announces {self.payload_bytes!r:.40}")
        if not isinstance(self.digest, str) or len(self.digest) != 64 or set(self.digest) - set("0123456789abcdef"):
            raise PayloadError("the digest is not 64 hexadecimal characters")

    def to_bytes(self) -> bytes:
        """The header as canonical JSON."""
        fields = {"manifest": self.manifest.to_json(), "payload_bytes": self.payload_bytes, "digest": self.digest}
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, raw: bytes, limits: Limits = Limits()) -> Header:
        """The header that `to_bytes` wrote; raises `PayloadError` for anything else or beyond `limits`."""
        if len(raw) > limits.header_bytes:
            raise PayloadError(f"the header has {len(raw)} bytes, at most {limits.header_bytes} are taken")
        try:
            fields = json.loads(raw)
            manifest, payload_bytes, digest = (fields.pop(key) for key in ("manifest", "payload_bytes", "digest"))
            if fields or not isinstance(manifest, str):
                raise PayloadError("the header has fields that no header has")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PayloadError(f"not a header: {type(error).__name__}") from None
        header = cls(Manifest.from_json(manifest), payload_bytes, digest)
        if header.to_bytes() != raw:
            raise PayloadError("not a header: other bytes than those that are written")
        if header.payload_bytes > limits.payload_bytes:
            raise PayloadError(f"{header.payload_bytes} bytes are announced, at most {limits.payload_bytes} are taken")
        return header


def encode(weights: Weights) -> tuple[Header, Iterator[memoryview]]:
    """The header, and the payload in chunks of `CHUNK_BYTES` that are views of the vector, not copies."""
    vector = weights.vector if _LITTLE else weights.vector.astype("<f4")
    payload = vector.view(np.uint8).data
    header = Header(weights.manifest, len(payload), weights.digest)
    return header, (payload[start : start + CHUNK_BYTES] for start in range(0, len(payload), CHUNK_BYTES))


def _digest(manifest: Manifest) -> blake3:
    """The beginning of a payload's digest, which covers the manifest too: it is the digest of the weights."""
    return blake3(manifest.digest.encode())


class Decoder:
    """Takes chunks in order and gives back the weights they announce.

    `expected`, where the receiver knows it, is held against the header first. Memory grows with what arrives, never
    with what is announced. Every refusal is a `PayloadError`.
    """

    def __init__(self, header: Header, expected: Manifest | None = None) -> None:
        if expected is not None and header.manifest.digest != expected.digest:
            raise PayloadError("the payload is announced for another model than the one expected")
        self.header = header
        self._received = bytearray()
        self._hash = _digest(header.manifest)

    @property
    def offset(self) -> int:
        """The number of bytes taken; the next chunk must begin here."""
        return len(self._received)

    def feed(self, offset: int, chunk: bytes | memoryview) -> None:
        """Takes one chunk that begins at `offset`."""
        chunk = memoryview(chunk).cast("B")
        if offset != self.offset:
            raise PayloadError(f"the next chunk begins at byte {self.offset}, got one at {offset}")
        if self.offset + len(chunk) > self.header.payload_bytes:
            raise PayloadError(f"more than the announced {self.header.payload_bytes} bytes arrived")
        self._hash.update(chunk)
        self._received += chunk

    def finish(self) -> Weights:
        """The weights, once all bytes are there and their digest is the announced one."""
        if self.offset != self.header.payload_bytes:
            raise PayloadError(f"{self.offset} of {self.header.payload_bytes} bytes arrived")
        if self._hash.hexdigest() != self.header.digest:
            raise PayloadError("the payload's digest is not the announced one; the bytes were changed on the way")
        weights = Weights(self.header.manifest, np.frombuffer(self._received, dtype="<f4"))
        weights.digest = self.header.digest  # has just been checked, and need not be worked out again
        return weights


def save(path: Path | str, weights: Weights) -> None:
    """Writes `weights` to a file that is either complete or not there."""
    write_atomically(Path(path), pieces(weights))


def pieces(weights: Weights) -> Iterator[bytes | memoryview]:
    """What `save` writes, in order."""
    header, chunks = encode(weights)
    raw = header.to_bytes()
    return itertools.chain([_MAGIC, struct.pack("<I", len(raw)), raw], chunks)


def load(path: Path | str, limits: Limits = Limits()) -> Weights:
    """Reads what `save` wrote; raises `PayloadError` for any other file."""
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise PayloadError(f"{path} is not a fedkit model file")
        size = int.from_bytes(file.read(4), "little")
        if size > limits.header_bytes:
            raise PayloadError(f"the header has {size} bytes, at most {limits.header_bytes} are taken")
        if size > os.fstat(file.fileno()).st_size:
            raise PayloadError(f"the header is announced with {size} bytes, which is more than the file has")
        decoder = Decoder(Header.from_bytes(file.read(size), limits))
        while chunk := file.read(CHUNK_BYTES):
            decoder.feed(decoder.offset, chunk)
    return decoder.finish()


def write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview], *, mode: int = 0o666) -> None:
    """Replaces `path` by `content`, or by its pieces in order: written beside it, flushed to disk, renamed.

    `mode` says who may read it, less what the umask takes: 0o600 is for secrets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flushes the names of a folder to disk, so that a rename in it outlives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
