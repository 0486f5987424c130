"""Models an agent has fetched: the last few, by digest, so that the same model is not fetched twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedkit.errors import PayloadError
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import convert, tensors_pb2
from fedkit.spool import Spool

__all__ = ["Fetched", "Inbox"]

_KEPT = 2


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model that is here: the payload's file, and the file with the header that says what is in it."""

    payload: Path
    header: Path


class Inbox:
    """A folder of fetched payloads. A broken-off download goes on where it stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._used: list[str] = []
        for path in folder.iterdir():
            if path.suffix != ".part":
                path.unlink()

    def find(self, digest: bytes) -> Fetched | None:
        """The payload with this digest, if it is here."""
        found = self._files(digest)
        if digest.hex() not in self._used:
            return None
        self._touch(digest.hex())
        return found

    def have(self, digest: bytes) -> int:
        """How many bytes of it an earlier, broken-off download left."""
        part = self._folder / f"{digest.hex()}.part"
        return part.stat().st_size // 4 * 4 if part.exists() else 0

    def begin(self, message: pb.Assignment, header: tensors_pb2.Header) -> Spool:
        """Where the announced payload goes; raises `PayloadError` unless it is the assignment's."""
        manifest, _ = convert.header_from_proto(header)
        if header.digest != message.model_digest or header.payload_bytes != message.model_bytes:
            raise PayloadError("the model that is sent is not the one that was announced")
        files = self._files(message.model_digest)
        files.header.write_bytes(header.SerializeToString())
        return Spool(files.payload, manifest.digest, header.payload_bytes, header.digest)

    def finish(self, spool: Spool, digest: bytes) -> Fetched:
        """The payload is whole; the oldest ones go."""
        spool.finish()
        self._touch(digest.hex())
        while len(self._used) > _KEPT:
            old = self._files(bytes.fromhex(self._used.pop(0)))
            old.payload.unlink(missing_ok=True)
            old.header.unlink(missing_ok=True)
        return self._files(digest)

    def _touch(self, name: str) -> None:
        self._used = [*(used for used in self._used if used != name), name]

    def _files(self, digest: bytes) -> Fetched:
        name = digest.hex()
        return Fetched(self._folder / name, self._folder / f"{name}.header")
