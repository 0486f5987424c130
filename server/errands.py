"""Assignments under way: the model as it goes out, and the answer as it comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from fedkit.codec import CHUNK_BYTES
from fedkit.errors import PayloadError, Reason, Refused
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import convert, tensors_pb2
from fedkit.protos.wire import RESUMED_BYTES, frame, load
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.spool import Intake, Room, Spares, Spool, Spooled, SpooledExtras, Stash
from fedkit.weights import Manifest, Vector
from fedkit.work import Answer, Update

__all__ = ["Errand", "Published", "feed", "require_examples"]


_FRAMES = 16  # that are kept for clients who are about as far as the others
_STASHED_BYTES = 32 << 20  # of the largest answer that may stay in memory


class Published:
    """A parcel as it goes out. Its frames are made once, when the first client fetches them, and shared by all."""

    def __init__(self, parcel: Parcel) -> None:
        self.parcel = parcel
        self.digest = parcel.payload_digest
        self.payload_bytes = parcel.payload_bytes
        header = convert.header_to_proto(parcel, self.digest)
        self.header: bytes = tensors_pb2.Piece(header=header).SerializeToString()
        self._chunks = list(_chunks(parcel.vectors))
        self._frames: dict[int, bytes] = {}

    @cached_property
    def whole(self) -> bytes:
        """The payload as it goes along with an assignment; empty where it is too large for that."""
        if not 0 < self.payload_bytes <= CHUNK_BYTES:
            return b""
        return load(b"".join(chunk for _, chunk in self._chunks))

    def pieces(self, offset: int, *, small: bool = False) -> Iterator[bytes]:
        """Serialised pieces with the payload from byte `offset` on; `small` ones behind an offset or for bad lines."""
        for i, (start, chunk) in enumerate(self._chunks):
            if not (offset or small):
                yield self._frame(i, chunk)
            elif start + len(chunk) > offset:
                left = chunk[max(offset - start, 0) :]
                yield from (frame(left[at : at + RESUMED_BYTES]) for at in range(0, len(left), RESUMED_BYTES))

    def _frame(self, i: int, chunk: memoryview) -> bytes:
        found = self._frames.get(i)
        if found is None:
            if len(self._frames) == _FRAMES:
                del self._frames[next(iter(self._frames))]
            found = self._frames[i] = frame(chunk)
        return found


def _chunks(vectors: list[Vector]) -> Iterator[tuple[int, memoryview]]:
    base = 0
    for vector in vectors:
        view = vector.view(np.uint8).data
        for start in range(0, len(view), CHUNK_BYTES):
            yield base + start, view[start : start + CHUNK_BYTES]
        base += len(view)


class Errand:
    """One assignment from its question to its checked answer.

    `answer` ends with the answer or with `Refused`. `done` of `total` steps is what the client last reported.
    """

    def __init__(
        self,
        assignment: Assignment,
        message: pb.Assignment,
        published: Published,
        folder: Path,
        spares: Spares,
        room: Room,
    ) -> None:
        self.assignment = assignment
        self.message = message
        self.published = published
        self.answer: asyncio.Future[Answer | Refused] = asyncio.get_running_loop().create_future()
        self.sendings = 0  # each over another session
        self.done = 0
        self.total = 0
        self._path = folder / assignment.id
        self._spares = spares
        self._room = room
        self._spool: Intake | None = None
        self._announced: pb.Announcement | None = None

    def receive(self, announced: pb.Announcement, max_examples: int) -> Intake:
        """Where the announced bytes go. Raises `Refused` before any of them is taken; an upload before is cut off."""
        if self.answer.done():  # its file may be read by now, and must not be written again
            raise Refused(self.why_over, "this assignment is answered")
        manifest = self._manifest
        self._require_kind(announced, max_examples)
        try:
            extras = convert.extras_from_proto(announced.extras, manifest.size)
        except PayloadError as error:
            raise Refused(Reason.SHAPE, str(error)) from None
        due = 4 * (manifest.size + sum(extras.values()))
        if announced.payload_bytes != due:
            raise Refused(Reason.SHAPE, f"the model has {due} bytes, {announced.payload_bytes} are announced")
        if len(announced.digest) != 32:
            raise Refused(Reason.PAYLOAD, "a digest has 32 bytes")
        self.cut_off()
        self._announced = announced
        if announced.at_once:
            Spool.forget(self._path)
        self._spool = self._intake(manifest.digest, due, announced.digest)
        return self._spool

    def _require_kind(self, announced: pb.Announcement, max_examples: int) -> None:
        """Raises `Refused` unless vectors are asked for, with a plausible count or, masked, with nothing beside."""
        returns = self.assignment.returns
        if returns in ("sums", "reply"):
            raise Refused(Reason.SHAPE, "this assignment is answered by sums")
        if returns != "words":
            require_examples(int(announced.examples), max_examples)
        elif announced.extras or announced.examples or announced.HasField("loss"):
            raise Refused(Reason.SHAPE, "a masked vector has nothing beside it")

    def _intake(self, manifest_digest: str, due: int, digest: bytes) -> Intake:
        """Small answers stay in memory as long as there is room, unless a file has a part of them."""
        is_opaque = self.assignment.returns == "words" or self._manifest.is_sealed
        plausible = not is_opaque  # of masked or sealed words, any is as good as any other
        if due <= _STASHED_BYTES and not Spool.is_begun(self._path) and self._room.take(due):
            return Stash(self._path, manifest_digest, due, digest, self._room, plausible=plausible)
        return Spool(self._path, manifest_digest, due, digest, plausible=plausible, spares=self._spares)

    @cached_property
    def _manifest(self) -> Manifest:
        """What the answer's vectors are announced as."""
        return self.assignment.answer_manifest(self.published.parcel.model.manifest)

    @property
    def why_over(self) -> Reason:
        """Why no answer is taken any more: there is one, or it has been closed without."""
        is_taken = self.answer.done() and not isinstance(self.answer.result(), Refused)
        return Reason.DUPLICATE if is_taken else Reason.LATE

    def expects(self, spool: Intake | None) -> bool:
        """Whether this upload is the one that counts, and not one that a newer upload has cut off."""
        return spool is self._spool

    def take_whole(self, announced: pb.Announcement, payload: memoryview, max_examples: int) -> Update:
        """The answer that lies all in `payload`; what an upload left of it does not count. Raises `Refused`."""
        announced.at_once = True
        spool = self.receive(announced, max_examples)
        if len(payload):
            feed(spool, payload)
        return self.take(spool)

    def take(self, spool: Intake) -> Update:
        """The whole answer, checked. Raises `Refused`."""
        assert self._announced is not None  # receive has set it
        try:
            payload = spool.finish()
        except PayloadError as error:
            raise Refused(Reason.PAYLOAD, str(error)) from None
        manifest = self._manifest
        extras = {extra.name: int(extra.length) for extra in self._announced.extras}
        loss = self._announced.loss if self._announced.HasField("loss") else None
        weights, vectors = Spooled(manifest, payload), SpooledExtras(payload, manifest.size, extras)
        epsilon = self._announced.epsilon if self._announced.HasField("epsilon") else None
        return Update(weights, int(self._announced.examples), loss, vectors, epsilon)

    def settle(self, outcome: Answer | Refused) -> None:
        """Ends the errand with an answer or a refusal; only the first one counts."""
        if not self.answer.done():  # a refusal is made anew, because its traceback would lead back here
            fresh = Refused(outcome.reason, outcome.detail) if isinstance(outcome, Refused) else outcome
            self.answer.set_result(fresh)

    def cut_off(self) -> None:
        """Ends the upload that is under way, if any; what has arrived of it stays."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def discard(self) -> None:
        """Nobody wants the answer any more."""
        if self._spool is not None:
            self._spool.discard()
            self._spool = None


def feed(spool: Intake, chunk: memoryview) -> None:
    """Takes the next chunk of an answer; raises `Refused` for one that is none."""
    try:
        spool.feed(chunk)
    except PayloadError as error:
        raise Refused(Reason.PAYLOAD, str(error)) from None


def require_examples(examples: int, most: int) -> None:
    """Raises `Refused` unless the count is from 1 to what the client has declared."""
    if not 0 < examples <= most:
        raise Refused(Reason.EXAMPLES, f"{examples} examples are claimed, 1 to {most} are declared and allowed")
