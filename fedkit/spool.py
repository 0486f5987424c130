"""Payloads that wait outside of arrays: checked as their bytes arrive, read again block by block.

A `Spool` takes chunks in order into a file, survives the end of its process, and becomes a whole file only when its
digest is the announced one. A `Stash` keeps small payloads in memory as they arrive. `Spooled` weights read their
values from either when they are needed.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from blake3 import blake3

from fedkit.codec import CHUNK_BYTES
from fedkit.errors import PayloadError, StorageError
from fedkit.weights import Manifest, Vector, Weights, require_plausible

__all__ = [
    "Intake",
    "Payload",
    "Room",
    "Spares",
    "Spool",
    "Spooled",
    "SpooledExtras",
    "Stash",
    "Values",
    "payload_digest",
    "reopen",
]

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
        self._free: list[str] = []
        self._made = 0
        for path in folder.iterdir():
            if path.suffix in (".over", ".spare"):
                path.unlink()

    def give(self, path: Path) -> None:
        """The file at `path`, if there is one, is not needed any more."""
        spare = f"{self._folder}/{self._made}.spare"
        try:
            if len(self._free) >= self._most:
                path.unlink()
                return
            os.replace(path, spare)
        except FileNotFoundError:
            return
        self._free.append(spare)
        self._made += 1

    def take(self, path: Path | str) -> bool:
        """Puts a spare file at `path`; False where there is none."""
        if not self._free:
            return False
        os.replace(self._free.pop(), path)
        return True


class Room:
    """Bytes of memory for payloads, `limit` in all."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def take(self, size: int) -> bool:
        """Whether there is room; if so, it is taken."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def give(self, size: int) -> None:
        """As much is free again."""
        self.left += size


class Payload:
    """The bytes of a whole, checked payload: in the file at `path`, or in memory until `save` puts them there.

    `pieces` hold 1 MiB each, but for the last one; with the payload they go from `room`, and give it back.
    """

    def __init__(
        self, path: Path, pieces: list[memoryview] | None = None, room: tuple[Room, int] | None = None
    ) -> None:
        self.path = path
        self.pieces = pieces
        self._release = None if room is None else weakref.finalize(self, room[0].give, room[1])

    def save(self) -> None:
        """Moves the bytes from memory to `path`, as durable as a spool file is; raises `StorageError`."""
        if self.pieces is None:
            return
        try:
            with open(self.path, "wb", opener=_private) as file:
                file.writelines(self.pieces)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise StorageError(f"{self.path.parent}: {error.strerror}; free space or mend the disk") from error
        self.pieces = None
        if self._release is not None:
            self._release()

    def read(self, at: int, view: memoryview, source: int | list[memoryview]) -> None:
        """Fills `view` with the bytes from `at` on of the open file or the pieces, which another thread may save."""
        while len(view):
            count = os.preadv(source, [view], at) if isinstance(source, int) else _copy(source, at, view)
            if count == 0:
                raise PayloadError(f"{self.path.name} ends before its last value")
            view, at = view[count:], at + count


def _copy(pieces: list[memoryview], at: int, view: memoryview) -> int:
    i, start = divmod(at, CHUNK_BYTES)
    part = pieces[i][start : start + len(view)] if i < len(pieces) else b""
    view[: len(part)] = part
    return len(part)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


class Intake:
    """One payload on its way. `have` is the number of bytes taken; the next chunk continues there."""

    def __init__(self, manifest_digest: str, payload_bytes: int, digest: bytes, *, plausible: bool) -> None:
        self.payload_bytes = payload_bytes
        self.have = 0
        self._digest = digest
        self._plausible = plausible
        self._hash = payload_digest(manifest_digest)
        self._is_open = True

    @property
    def is_complete(self) -> bool:
        """Whether every announced byte is there."""
        return self.have == self.payload_bytes

    def feed(self, chunk: memoryview) -> None:
        """Takes the next chunk: at most 1 MiB, and whole float32 values. Raises `PayloadError` or `Refused`."""
        if not self._is_open:
            raise PayloadError("the payload is being taken over another connection")
        if len(chunk) > CHUNK_BYTES or len(chunk) % _ITEM or not len(chunk):
            raise PayloadError(f"a piece has 4 to {CHUNK_BYTES} bytes, a multiple of 4; got {len(chunk)}")
        if self.have + len(chunk) > self.payload_bytes:
            raise PayloadError(f"more than the announced {self.payload_bytes} bytes arrived")
        self._check(chunk)
        self._write(chunk)
        self._note(chunk)

    def _check(self, chunk: memoryview) -> None:
        if self._plausible:
            require_plausible(np.frombuffer(chunk, dtype="<f4"))

    def _write(self, chunk: memoryview) -> None:
        raise NotImplementedError

    def _note(self, chunk: memoryview) -> None:
        """These bytes are checked and kept."""
        self._hash.update(chunk)
        self.have += len(chunk)

    def finish(self) -> Payload:
        """The whole payload; one with another digest than announced is thrown away. Raises `PayloadError`."""
        if not self.is_complete:
            raise PayloadError(f"{self.have} of {self.payload_bytes} bytes arrived")
        if self._hash.digest() != self._digest:
            self.discard()
            raise PayloadError("the payload's digest is not the announced one; the bytes were changed on the way")
        return self._finish()

    def _finish(self) -> Payload:
        raise NotImplementedError

    def close(self) -> None:
        """Stops taking chunks; what is there stays for another connection, or another process."""
        raise NotImplementedError

    def discard(self) -> None:
        """Stops taking chunks and removes what is there."""
        raise NotImplementedError


class Stash(Intake):
    """One payload on its way into memory, whose room was taken before; `path` is where it goes if it must.

    Chunks are kept as they come: so none may be copied, and a sender of tiny ones gets no more memory than others.
    """

    def __init__(
        self,
        path: Path,
        manifest_digest: str,
        payload_bytes: int,
        digest: bytes,
        room: Room,
        *,
        plausible: bool = False,
    ) -> None:
        super().__init__(manifest_digest, payload_bytes, digest, plausible=plausible)
        self._payload = Payload(path, [], (room, payload_bytes))
        self._tail = bytearray()

    def _write(self, chunk: memoryview) -> None:
        if not self._tail and (len(chunk) == CHUNK_BYTES or self.have + len(chunk) == self.payload_bytes):
            self._keep(chunk)
            return
        room = CHUNK_BYTES - len(self._tail)
        self._tail += chunk[:room]
        if len(self._tail) == CHUNK_BYTES:
            self._keep_tail()
            self._tail += chunk[room:]
        if self.have + len(chunk) == self.payload_bytes:
            self._keep_tail()

    def _keep_tail(self) -> None:
        if self._tail:
            self._keep(memoryview(self._tail))
            self._tail = bytearray()

    def _keep(self, piece: memoryview) -> None:
        assert self._payload.pieces is not None  # nobody has saved it before it is whole
        self._payload.pieces.append(piece)

    def _finish(self) -> Payload:
        self._is_open = False
        return self._payload

    def close(self) -> None:
        """Stops taking chunks. What is there goes into the file from which a `Spool` goes on."""
        if not self._is_open:
            return
        self._is_open = False
        self._keep_tail()
        self._payload.path = Path(_part(self._payload.path))
        self._payload.save()

    def discard(self) -> None:
        """Stops taking chunks and forgets what is there."""
        self._is_open = False
        self._payload = Payload(self._payload.path, [])


class Spool(Intake):
    """One payload on its way into a file.

    What was left in `path` with the ending `.part` counts, once its bytes have been hashed again. With `plausible`,
    values that no update may hold are refused as they go by. A file of `spares` is written over under the ending
    `.over`, which becomes `.part` when the spool is closed early. Raises `PayloadError`, or `Refused` for such values.
    """

    def __init__(
        self,
        path: Path,
        manifest_digest: str,
        payload_bytes: int,
        digest: bytes,
        *,
        plausible: bool = False,
        spares: Spares | None = None,
    ) -> None:
        super().__init__(manifest_digest, payload_bytes, digest, plausible=plausible)
        self.path = path
        self._part = _part(path)
        over = f"{path}.over"
        self._is_over = not os.path.exists(self._part) and spares is not None and spares.take(over)
        self._at = over if self._is_over else self._part
        self._file = os.open(self._at, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._is_over:
            self._resume()

    @staticmethod
    def forget(path: Path) -> None:
        """What an earlier upload left of this payload does not count."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_part(path))

    @staticmethod
    def is_begun(path: Path) -> bool:
        """Whether an earlier upload left something of this payload."""
        return os.path.exists(_part(path))

    def _resume(self) -> None:
        left = min(os.fstat(self._file).st_size, self.payload_bytes) // _ITEM * _ITEM
        while self.have < left:
            chunk = memoryview(os.pread(self._file, min(CHUNK_BYTES, left - self.have), self.have))
            self._check(chunk)
            self._note(chunk)
        os.ftruncate(self._file, self.have)

    def _write(self, chunk: memoryview) -> None:
        done = 0
        while done < len(chunk):
            done += os.pwrite(self._file, chunk[done:], self.have + done)

    def _finish(self) -> Payload:
        if os.stat(self._at).st_size != self.payload_bytes:
            os.truncate(self._at, self.payload_bytes)
        os.replace(self._at, self.path)
        self._is_over = False
        self.close()
        return Payload(self.path)

    def close(self) -> None:
        """Stops taking chunks; what is there stays for another process."""
        if not self._is_open:
            return
        if self._is_over:
            os.ftruncate(self._file, self.have)
            os.replace(self._at, self._part)
            self._at, self._is_over = self._part, False
        os.close(self._file)
        self._is_open = False

    def discard(self) -> None:
        """Stops taking chunks and removes what is there."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._at)


def _part(path: Path) -> str:  # as text, because paths are built for each answer, and those of `pathlib` slowly
    return f"{path}.part"


class Values:
    """`size` float32 values of a payload, from the one at `start` on. Raises `PayloadError` where it ends too early."""

    def __init__(self, payload: Payload, start: int, size: int, file: int | None = None) -> None:
        self.size = size
        self._payload = payload
        self._start = start
        self._file = file

    @property
    def is_at_hand(self) -> bool:
        """Whether they are in memory."""
        return self._payload.pieces is not None

    @contextlib.contextmanager
    def opened(self) -> Iterator[Values]:
        """The same values with their file kept open, which many small reads want."""
        if self._payload.pieces is not None or self._file is not None:
            yield self
            return
        file = os.open(self._payload.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield Values(self._payload, self._start, self.size, file)
        finally:
            os.close(file)

    def read(self, start: int, out: Vector) -> None:
        """Fills `out` with the values from the one at `start` on."""
        source = self._payload.pieces if self._file is None else self._file
        if source is None:
            with self.opened() as values:
                values.read(start, out)
            return
        self._payload.read(_ITEM * (self._start + start), out.view(np.uint8).data, source)

    def all(self) -> Vector:
        """All values as an array that is not written to: without a copy, where they are one piece in memory."""
        pieces, (i, at) = self._payload.pieces, divmod(_ITEM * self._start, CHUNK_BYTES)
        if pieces is not None and at + _ITEM * self.size <= CHUNK_BYTES and i < len(pieces):
            return np.frombuffer(pieces[i], dtype=np.float32, count=self.size, offset=at)
        out = np.empty(self.size, dtype=np.float32)
        self.read(0, out)
        return out


class Spooled(Weights):
    """Weights whose values lie at the beginning of a checked payload; `vector` reads them all, `block` a part."""

    is_stored = True

    def __init__(self, manifest: Manifest, payload: Payload) -> None:
        self.manifest = manifest
        self.payload = payload
        self.values = Values(payload, 0, manifest.size)

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
    """Named vectors that lie behind the weights in the same payload; each is read when asked for, and not kept."""

    def __init__(self, payload: Payload, start: int, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self._values: dict[str, Values] = {}
        for name, size in self.sizes.items():
            self._values[name] = Values(payload, start, size)
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
    payload = Payload(path)
    return Spooled(manifest, payload), SpooledExtras(payload, manifest.size, extras)
