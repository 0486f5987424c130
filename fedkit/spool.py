"""Payloads that live in files: written and checked as their bytes arrive, read again block by block.

A `Spool` takes chunks in order, survives the end of its process, and becomes a whole file only when its digest is the
announced one. `Spooled` weights read their values from such a file when they are needed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from blake3 import blake3

from fedkit.codec import CHUNK_BYTES
from fedkit.errors import PayloadError, Reason, Refused
from fedkit.weights import Manifest, Vector, Weights

__all__ = ["Spares", "Spool", "Spooled", "SpooledExtras", "Values", "payload_digest", "reopen"]

_ITEM = 4  # bytes of a float32


def payload_digest(manifest_digest: str) -> blake3:
    """The beginning of a payload's digest; the payload's bytes follow. Without extras it is the weights' digest."""
    return blake3(manifest_digest.encode())


class Spares:
    """Files of `folder` that nobody needs any more, at most `most`, to be written over.

    Giving a file's memory back and taking fresh one costs more than writing the payload. What an earlier process left
    is removed: only whole payloads and `.part` files mean anything after a crash.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = folder
        self._most = most
        self._free: list[Path] = []
        self._made = 0
        for path in folder.iterdir():
            if path.suffix in (".over", ".spare"):
                path.unlink()

    def give(self, path: Path) -> None:
        """The file at `path`, if there is one, is not needed any more."""
        spare = self._folder / f"{self._made}.spare"
        try:
            if len(self._free) >= self._most:
                path.unlink()
                return
            os.replace(path, spare)
        except FileNotFoundError:
            return
        self._free.append(spare)
        self._made += 1

    def take(self, path: Path) -> bool:
        """Puts a spare file at `path`; False where there is none."""
        if not self._free:
            return False
        os.replace(self._free.pop(), path)
        return True


class Spool:
    """One payload on its way into a file. `have` is the number of bytes taken; the next chunk continues there.

    What was left in `path` with the ending `.part` counts, once its bytes have been hashed again. With `finite`, NaN
    and infinity are refused as they go by. A file of `spares` is written over under the ending `.over`, which becomes
    `.part` when the spool is closed early. Raises `PayloadError`, or `Refused` for NaN and infinity.
    """

    def __init__(
        self,
        path: Path,
        manifest_digest: str,
        payload_bytes: int,
        digest: bytes,
        *,
        finite: bool = False,
        spares: Spares | None = None,
    ) -> None:
        self.path = path
        self.payload_bytes = payload_bytes
        self.have = 0
        self._digest = digest
        self._finite = finite
        self._hash = payload_digest(manifest_digest)
        self._part = path.with_name(path.name + ".part")
        over = path.with_name(path.name + ".over")
        self._is_over = not self._part.exists() and spares is not None and spares.take(over)
        self._at = over if self._is_over else self._part
        self._file = os.open(self._at, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._is_over:
            self._resume()

    @staticmethod
    def forget(path: Path) -> None:
        """What an earlier upload left of this payload does not count."""
        path.with_name(path.name + ".part").unlink(missing_ok=True)

    def _resume(self) -> None:
        left = min(os.fstat(self._file).st_size, self.payload_bytes) // _ITEM * _ITEM
        while self.have < left:
            chunk = memoryview(os.pread(self._file, min(CHUNK_BYTES, left - self.have), self.have))
            self._check(chunk)
            self._note(chunk)
        os.ftruncate(self._file, self.have)

    @property
    def is_complete(self) -> bool:
        """Whether every announced byte is there."""
        return self.have == self.payload_bytes

    def feed(self, chunk: memoryview) -> None:
        """Takes the next chunk: at most 1 MiB, and whole float32 values."""
        if self._file < 0:
            raise PayloadError("the payload is being taken over another connection")
        if len(chunk) > CHUNK_BYTES or len(chunk) % _ITEM or not len(chunk):
            raise PayloadError(f"a piece has 4 to {CHUNK_BYTES} bytes, a multiple of 4; got {len(chunk)}")
        if self.have + len(chunk) > self.payload_bytes:
            raise PayloadError(f"more than the announced {self.payload_bytes} bytes arrived")
        self._check(chunk)
        self._write(chunk)
        self._note(chunk)

    def _check(self, chunk: memoryview) -> None:
        if self._finite and not _is_finite(np.frombuffer(chunk, dtype="<f4")):
            raise Refused(Reason.NOT_FINITE, "NaN or infinity in the update: lower the learning rate or check the data")

    def _write(self, chunk: memoryview) -> None:
        done = 0
        while done < len(chunk):
            done += os.pwrite(self._file, chunk[done:], self.have + done)

    def _note(self, chunk: memoryview) -> None:
        """These bytes are checked and in the file."""
        self._hash.update(chunk)
        self.have += len(chunk)

    def finish(self) -> Path:
        """The whole file, under its own name; a payload with another digest than announced is thrown away."""
        if not self.is_complete:
            raise PayloadError(f"{self.have} of {self.payload_bytes} bytes arrived")
        if self._hash.digest() != self._digest:
            self.discard()
            raise PayloadError("the payload's digest is not the announced one; the bytes were changed on the way")
        if os.stat(self._at).st_size != self.payload_bytes:
            os.truncate(self._at, self.payload_bytes)
        os.replace(self._at, self.path)
        self._is_over = False
        self.close()
        return self.path

    def close(self) -> None:
        """Stops taking chunks; what is there stays for another process."""
        if self._file < 0:
            return
        if self._is_over:
            os.ftruncate(self._file, self.have)
            os.replace(self._at, self._part)
            self._at, self._is_over = self._part, False
        os.close(self._file)
        self._file = -1

    def discard(self) -> None:
        """Stops taking chunks and removes what is there."""
        self.close()
        self._at.unlink(missing_ok=True)


def _is_finite(values: Vector) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.dot(values, values)  # one fast pass; finite only if every element is
    return bool(np.isfinite(square)) or bool(np.isfinite(values).all())


class Values:
    """`size` float32 values in a checked file, from the one at `start` on.

    Raises `PayloadError` where the file ends too early.
    """

    def __init__(self, path: Path, start: int, size: int, file: int | None = None) -> None:
        self.path = path
        self.size = size
        self._start = start
        self._file = file

    @contextlib.contextmanager
    def opened(self) -> Iterator[Values]:
        """The same values with their file kept open, which many small reads want."""
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield Values(self.path, self._start, self.size, file)
        finally:
            os.close(file)

    def read(self, start: int, out: Vector) -> None:
        """Fills `out` with the values from the one at `start` on."""
        if self._file is None:
            with self.opened() as values:
                values.read(start, out)
            return
        view, at = out.view(np.uint8).data, _ITEM * (self._start + start)
        while len(view):
            count = os.preadv(self._file, [view], at)
            if count == 0:
                raise PayloadError(f"{self.path.name} ends before its last value")
            view, at = view[count:], at + count

    def all(self) -> Vector:
        """All values in memory."""
        out = np.empty(self.size, dtype=np.float32)
        self.read(0, out)
        return out


class Spooled(Weights):
    """Weights whose values lie at the beginning of a checked file; `vector` reads them all, `block` a part."""

    is_stored = True

    def __init__(self, manifest: Manifest, path: Path) -> None:
        self.manifest = manifest
        self.path = path
        self.values = Values(path, 0, manifest.size)

    @cached_property
    def vector(self) -> Vector:  # type: ignore[override]
        """All values, read at first use and kept."""
        return self.values.all()

    def block(self, start: int, out: Vector) -> Vector:
        """Fills `out` with the values from `start` on, without keeping them."""
        self.values.read(start, out)
        return out

    def is_finite(self) -> bool:
        """True: they were checked as they arrived."""
        return True


class SpooledExtras(Mapping[str, Vector]):
    """Named vectors that lie behind the weights in the same file; each is read when asked for, and not kept."""

    def __init__(self, path: Path, start: int, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self._values: dict[str, Values] = {}
        for name, size in self.sizes.items():
            self._values[name] = Values(path, start, size)
            start += size

    def values_of(self, name: str) -> Values:
        """Where the vector lies."""
        return self._values[name]

    def __getitem__(self, name: str) -> Vector:
        return self._values[name].all()

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def reopen(path: Path, manifest: Manifest, extras: Mapping[str, int]) -> tuple[Weights, Mapping[str, Vector]] | None:
    """The weights and extras of a checked file; None where it is gone or has another length."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    if size != _ITEM * (manifest.size + sum(extras.values())):
        return None
    return Spooled(manifest, path), SpooledExtras(path, manifest.size, extras)
