"""Large values as files that are named by their digest: complete, durable, and checked when they are read."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from blake3 import blake3

from fedkit import codec
from fedkit.errors import PayloadError, StorageError
from fedkit.weights import MAX_ELEMENTS, Manifest, Vector, Weights

__all__ = ["Blobs", "StoredModel"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_OURS = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.[0-9a-f]{16}")  # a blob, or what a crash left of one being written
_SPARE = ".spare"
_LIMITS = codec.Limits(header_bytes=1 << 28, payload_bytes=4 * MAX_ELEMENTS)  # memory grows with what is there


class Blobs:
    """A folder of blobs, used by one process.

    A model that nobody needs any more becomes the spare file, into which the next one is written: its bytes are
    flushed, and the name that it gets then need not be, which saves half the time. After a power loss it may be there
    under an older name, and is found by its content.

    Raises `StorageError` where the disk does not do its part. Hold `lock` from a `put` until whatever refers to the
    blob is written down: `keep_only` takes it, so that nobody else removes the blob in between.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self._whole: set[str] = set()  # digests whose files this process has written or read
        with self._told():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for place in (folder.parent, folder):  # an earlier process may have died before it did
                _flush(place)

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        with self._told(), os.scandir(self.folder) as found:
            return sum(file.stat().st_size for file in found)

    def put(self, weights: Weights) -> str:
        """Stores a model and returns its digest; it is durable when this returns. Stored before, nothing is written."""
        digest = weights.digest
        with self.lock, self._told():
            if not self._holds(digest):
                self._write(self._path(digest), weights)
                self._whole.add(digest)
        return digest

    def _holds(self, digest: str) -> bool:
        """Whether the model is here; under a name that was never flushed there may be another."""
        if digest in self._whole or not self._path(digest).exists():
            return digest in self._whole
        with contextlib.suppress(PayloadError):
            self.get(digest)
        return digest in self._whole

    def _write(self, path: Path, weights: Weights) -> None:
        spare = self.folder / _SPARE
        try:
            file = open(spare, "r+b")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            codec.save(path, weights)
            return
        with contextlib.ExitStack() as undo:
            undo.callback(spare.unlink, missing_ok=True)
            with file:
                file.writelines(codec.pieces(weights))
                file.truncate()
                file.flush()
                os.fdatasync(file.fileno())
            os.replace(spare, path)
            undo.pop_all()

    def get(self, digest: str) -> Weights:
        """The model of that digest; raises `PayloadError` for a file that holds anything else."""
        path = self._path(digest)
        with self.lock, self._told():
            if not path.exists():
                self._find(digest)
            weights = codec.load(path, _LIMITS)
        if weights.digest != digest:
            raise PayloadError(f"{path} does not hold the model it is named after")
        self._whole.add(digest)
        return weights

    def _find(self, digest: str) -> None:
        """Looks for a model under the names that it may have after a power loss, and gives it its own."""
        for name in sorted(os.listdir(self.folder)):
            if name == _SPARE or _DIGEST.fullmatch(name):
                with contextlib.suppress(PayloadError):
                    if codec.load(self.folder / name, _LIMITS).digest == digest:
                        os.replace(self.folder / name, self._path(digest))
                        _flush(self.folder)
                        return

    def put_bytes(self, pieces: Sequence[bytes | memoryview]) -> str:
        """Stores other bytes as `put` stores a model, under their own BLAKE3 digest (hex)."""
        total = blake3()
        for piece in pieces:
            total.update(piece)
        digest = total.hexdigest()
        with self.lock, self._told():
            if not self._path(digest).exists():
                codec.write_atomically(self._path(digest), pieces)
        return digest

    def get_bytes(self, digest: str) -> bytes:
        """What `put_bytes` stored; raises `PayloadError` for a file that holds anything else."""
        path = self._path(digest)
        with self._told():
            raw = path.read_bytes()
        if blake3(raw).hexdigest() != digest:
            raise PayloadError(f"{path} does not hold the bytes it is named after")
        return raw

    def keep_only(self, digests: Collection[str]) -> None:
        """Removes all other blobs, and what a crash left of any that was being written."""
        keep = set(digests)
        with self.lock, self._told():
            for name in os.listdir(self.folder):
                if name not in keep and _OURS.fullmatch(name):
                    self._remove(name)

    def _remove(self, name: str) -> None:
        """Removes a file; a model that this process knows becomes the spare one, where there is none."""
        if name in self._whole and not (self.folder / _SPARE).exists():
            os.replace(self.folder / name, self.folder / _SPARE)
        else:
            (self.folder / name).unlink(missing_ok=True)
        self._whole.discard(name)

    def _path(self, digest: str) -> Path:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise PayloadError(f"a blob is named by 64 hexadecimal characters, not {digest!r:.80}")
        return self.folder / digest

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            text = f"{error.filename} is missing: put the folder back as it was, or begin anew in an empty one"
            raise StorageError(text) from error
        except OSError as error:
            text = f"{self.folder}: {error.strerror or error}; free space or mend the disk, then start again"
            raise StorageError(text) from error


class StoredModel(Weights):
    """A model in `blobs`, read when its values or its manifest are first asked for, and kept then."""

    def __init__(self, blobs: Blobs, digest: str) -> None:
        self._blobs = blobs
        self.__dict__["digest"] = digest  # where Weights.digest keeps it

    @cached_property
    def _read(self) -> Weights:
        return self._blobs.get(self.digest)

    @property
    def manifest(self) -> Manifest:  # type: ignore[override]
        """The tensors of the model."""
        return self._read.manifest

    @property
    def vector(self) -> Vector:  # type: ignore[override]
        """The values of the model."""
        return self._read.vector

    def __reduce__(self) -> tuple[type[Weights], tuple[Manifest, Vector]]:
        return Weights, (self.manifest, self.vector)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
