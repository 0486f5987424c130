"""Models an agent has fetched: the last few, by digest, so that the same model is not fetched twice."""

from __future__ import annotations

from pathlib import Path

from fedkit.errors import PayloadError
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import convert, tensors_pb2
from fedkit.spool import Spares, Spool
from fedkit.weights import Manifest

__all__ = ["Inbox"]

_MANIFESTS = 64


class Inbox:
    """A folder of the `keep` payloads used last. A broken-off download goes on where it stopped."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder = folder
        self._keep = keep
        self._used: list[str] = []
        self._manifests: dict[bytes, Manifest] = {}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in folder.iterdir():
            if path.suffix != ".part":
                path.unlink()
        self._spares = Spares(folder, 1)

    def find(self, message: pb.Assignment) -> tuple[Path, Manifest] | None:
        """The assignment's payload and what is in it, if both are here."""
        name, manifest = message.model_digest.hex(), self._manifests.get(message.manifest_digest)
        if name not in self._used or manifest is None:
            return None
        self._touch(name)
        return self._folder / name, manifest

    def knows(self, message: pb.Assignment) -> bool:
        """Whether the manifest of the assignment's model is here."""
        return message.manifest_digest in self._manifests

    def learn(self, message: pb.Assignment, header: tensors_pb2.Header) -> None:
        """Keeps the manifest a header brings; raises `PayloadError` unless it is the assignment's."""
        self._learn(message, convert.header_from_proto(header)[0])

    def _learn(self, message: pb.Assignment, manifest: Manifest) -> None:
        if bytes.fromhex(manifest.digest) != message.manifest_digest:
            raise PayloadError("the manifest that is sent is not the one that was announced")
        while len(self._manifests) >= _MANIFESTS:
            del self._manifests[next(iter(self._manifests))]
        self._manifests[message.manifest_digest] = manifest

    def keep(self, message: pb.Assignment, payload: memoryview) -> None:
        """Takes a payload that came with its assignment; raises `PayloadError` for one that does not belong to it."""
        if message.manifest:
            self._learn(message, Manifest.from_json(message.manifest))
        if not self.knows(message) or self.find(message) is not None:
            return
        spool = self._open(message, afresh=True)
        try:
            spool.feed(payload)
            self.finish(message, spool)
        except PayloadError:
            spool.discard()
            raise

    def have(self, message: pb.Assignment) -> int:
        """How many bytes of the payload an earlier, broken-off download left."""
        part = self._folder / f"{message.model_digest.hex()}.part"
        size = part.stat().st_size // 4 * 4 if part.exists() else 0
        return min(size, message.model_bytes)

    def begin(self, message: pb.Assignment) -> Spool:
        """Where the payload goes, once its manifest is known; raises `PayloadError` where the lengths differ."""
        self._forget_old(message.model_digest.hex())
        return self._open(message)

    def _open(self, message: pb.Assignment, *, afresh: bool = False) -> Spool:
        manifest = self._manifests[message.manifest_digest]
        due = 4 * (manifest.size + sum(convert.extras_from_proto(message.extras, manifest.size).values()))
        if message.model_bytes != due or len(message.model_digest) != 32:
            raise PayloadError(f"{message.model_bytes} bytes are announced, the model needs {due}")
        path = self._folder / message.model_digest.hex()
        if afresh:
            Spool.forget(path)
        return Spool(path, manifest.digest, due, message.model_digest, spares=self._spares)

    def finish(self, message: pb.Assignment, spool: Spool) -> tuple[Path, Manifest]:
        """The payload is whole; those used longest ago go."""
        path = spool.finish().path
        self._touch(path.name)
        while len(self._used) > self._keep:
            self._spares.give(self._folder / self._used.pop(0))
        return path, self._manifests[message.manifest_digest]

    def _forget_old(self, name: str) -> None:
        """Of the downloads that broke off, the last `keep` may go on."""
        parts = sorted(self._folder.glob("*.part"), key=lambda part: part.stat().st_mtime_ns)
        for part in parts[: -self._keep]:
            if part.stem != name:
                part.unlink(missing_ok=True)

    def _touch(self, name: str) -> None:
        self._used = [*(used for used in self._used if used != name), name]
