"""One piece of work for one client, with an id that is the same whenever the same thing is asked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from blake3 import blake3

from fedkit.config import DP
from fedkit.crypto.ceremony import BoxKey
from fedkit.crypto.chunks import Scheme
from fedkit.crypto.messages import Session, Told
from fedkit.crypto.ring import Words
from fedkit.errors import PayloadError, Reason, Refused
from fedkit.rounds.layout import Layout, words_manifest
from fedkit.rounds.noise import SharedNoise
from fedkit.spool import payload_digest
from fedkit.weights import SEALED, Entry, Manifest, Vector, Weights
from fedkit.work import Answer, Update, Work

__all__ = [
    "MASKED_STEPS",
    "WITHIN",
    "WORDS_STEPS",
    "WORKED_STEPS",
    "Assignment",
    "Clip",
    "MaskStep",
    "Masking",
    "Parcel",
    "Private",
    "Returns",
    "Sealing",
    "Transport",
    "assignment_id",
    "question_digest",
]

T = TypeVar("T")

Returns: TypeAlias = Literal["update", "weights", "sums", "words", "reply"]  # a reply is a step of a protocol
MaskStep: TypeAlias = Literal[
    "advertise", "share", "vector", "confirm", "unmask", "offer", "deliver", "receive", "encrypt", "attest", "open"
]

MASKED_STEPS = ("advertise", "share", "vector", "confirm", "unmask")
WORKED_STEPS = ("vector", "encrypt")  # in which the work is done
WORDS_STEPS = (*WORKED_STEPS, "open")  # whose answers are vectors

WITHIN = "within_clip"  # the extra vector of one element by which a client says whether its update was


@dataclass(frozen=True, slots=True)
class Parcel:
    """What travels to a client with its assignments: the model and the strategy's own named vectors."""

    model: Weights
    extra: Mapping[str, Vector] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """BLAKE3 (hex) of the model's digest and of each extra vector by name."""
        total = blake3(self.model.digest.encode())
        for name in sorted(self.extra):
            vector = np.ascontiguousarray(self.extra[name], dtype=np.float32)
            total.update(f"{name}\x1f{vector.size}\x1f".encode()).update(vector.view(np.uint8).data)
        return total.hexdigest()

    @property
    def payload_bytes(self) -> int:
        """The size of the vectors."""
        return self.model.vector.nbytes + sum(vector.nbytes for vector in self.extra.values())

    @property
    def vectors(self) -> list[Vector]:
        """The vectors as they travel, little-endian: the model's, then the others by name."""
        extras = [np.ascontiguousarray(self.extra[name], dtype="<f4") for name in sorted(self.extra)]
        return [self.model.vector.astype("<f4", copy=False), *extras]

    @property
    def payload_digest(self) -> bytes:
        """BLAKE3 of the manifest and all vectors, as they travel."""
        if not self.extra:
            return bytes.fromhex(self.model.digest)
        total = payload_digest(self.model.manifest.digest)
        for vector in self.vectors:
            total.update(vector.view(np.uint8).data)
        return total.digest()


@dataclass(frozen=True, slots=True)
class Private:
    """That a run is differentially private for rows, planned for `visits` pieces of training at each client.

    `questions` about the data come before: 1 where the run's preprocessing asks for statistics.
    """

    dp: DP
    visits: int
    questions: int = 0


@dataclass(frozen=True, slots=True)
class Masking:
    """One step of a sum that nobody sees into; `call` tells it from all others.

    `fedkit.crypto.member` says what the steps of a masked sum are, `fedkit.crypto.holder` those of an encrypted one.
    `message` is what the coordinator passes on: in "share" the cohort, in "vector" who shared and the client's own
    letters, in "confirm" who delivered, in "unmask" the signatures. In "deliver" the boxes, in "receive" the key, in
    "encrypt" who has it, in "attest" which sum of whom it is, in "open" who has signed that.
    """

    call: str
    step: MaskStep
    layout: Layout
    message: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        """Raises `PayloadError` for a step that such a sum does not have."""
        if (self.step in MASKED_STEPS) != (self.layout.scheme == "masked"):
            raise PayloadError(f"aggregation {self.layout.scheme} has no step {self.step}")

    def session(self, run: str, round: int) -> Session:
        """Which sum it is."""
        return Session(run, round + 1, self.call)  # rounds count from -1


@dataclass(frozen=True, slots=True)
class Sealing:
    """That a hop's model is sealed for those whose box keys these are, and makes so many words then.

    Without any, of a reply: the client is asked for its own box key. `fedkit.rounds.sealing` says how.
    """

    boxes: tuple[BoxKey, ...] = ()
    words: int = 0

    @property
    def facts(self) -> list[object]:
        """What of it makes one assignment another than the next."""
        return [self.words, *(one.to_bytes().hex() for one in self.boxes)]


@dataclass(frozen=True, slots=True)
class Clip:
    """That an update is cut to a Euclidean norm before it leaves; `tells`: it says if it was within, as +-1/2."""

    norm: float
    tells: bool = False

    def cut(self, update: Update) -> Update:
        """The update as it may leave: no longer than the clip, without its loss; raises `Refused`."""
        if update.extra:
            raise Refused(Reason.SHAPE, f"no clip bounds the vectors {', '.join(sorted(update.extra))}")
        length = update.weights.norm()
        if not math.isfinite(length):
            raise Refused(Reason.FAILED, "an update that is not finite cannot be clipped")
        scale = min(1.0, self.norm * (1.0 - 1e-6) / length) if length else 1.0
        extra = {WITHIN: np.array([0.5 if length <= self.norm else -0.5], dtype=np.float32)} if self.tells else {}
        return replace(update, weights=scale * update.weights, loss=None, extra=extra)

    def length(self, update: Update) -> float:
        """The norm of an update that was cut; infinite for one that brings more, or less, than that."""
        bits = [update.extra[name].tolist() for name in update.sizes if name == WITHIN and update.sizes[name] == 1]
        as_agreed = len(update.sizes) == len(bits) == int(self.tells) and all(abs(bit) == 0.5 for [bit] in bits)
        return update.weights.norm() if as_agreed else math.inf


@dataclass(frozen=True, slots=True)
class Assignment:
    """Work for one client. `id` is a digest of everything that makes it this assignment and no other.

    Asked twice, it is the same assignment: the client sends what it has and trains nothing again. `cohort` names those
    who are asked together, this client among them.
    """

    id: str
    run: str
    seed: int
    round: int
    client: str
    work: Work
    returns: Returns
    cohort: tuple[str, ...] = ()
    private: Private | None = None
    clip: Clip | None = None
    masking: Masking | None = None
    sealing: Sealing | None = None

    @property
    def is_worked(self) -> bool:
        """Whether the work is done for it; else it is one step of a protocol that has that done in another."""
        return self.returns != "reply" and (self.masking is None or self.masking.step in WORKED_STEPS)

    def told(self, payload_digest: bytes) -> Told:
        """What a masked answer is bound to: the payload that was received, and all that is asked of it."""
        assert self.masking is not None  # only masked answers are
        parts = [type(self.work).__name__, self.work.to_dict(), self.seed, self.masking.layout.to_json()]
        if self.private is not None:
            parts += [self.private.dp.to_dict(), self.private.visits, self.private.questions]
        if self.clip is not None:
            parts += [self.clip.norm, self.clip.tells]
        return Told(payload_digest, blake3(json.dumps(parts, sort_keys=True).encode()).digest())

    @property
    def noise(self) -> SharedNoise | None:
        """The noise of which the answer takes this client's part."""
        return None if self.masking is None or self.returns != "words" else self.masking.layout.noise

    @property
    def is_noised(self) -> bool:
        """Whether its answer is drawn at random for the sake of privacy, and so only once."""
        return self.private is not None or self.noise is not None

    def answer_manifest(self, sent: Manifest) -> Manifest:
        """The manifest that an answer of vectors has, to a model of manifest `sent`."""
        if self.sealing is not None and self.returns == "weights":
            return Manifest((Entry(SEALED, (self.sealing.words,)),))
        if self.returns != "words" or self.masking is None:
            return sent
        layout = self.masking.layout
        return words_manifest(layout.opened if self.masking.step == "open" else layout.sent)


def question_digest(
    run: str,
    round: int,
    attempt: int,
    work: Work,
    returns: Returns,
    parcel: Parcel,
    private: Private | None = None,
    clip: Clip | None = None,
    masking: Masking | None = None,
    sealing: Sealing | None = None,
) -> str:
    """What all assignments of one call share: a digest of run, round, attempt, work and what is sent along."""
    parts = [run, round, attempt, type(work).__name__, work.to_dict(), returns, parcel.digest]
    if private is not None:
        parts += [private.dp.to_dict(), private.visits, private.questions]
    if clip is not None:
        parts += [clip.norm, clip.tells]
    if masking is not None:
        parts += [masking.call, masking.step, masking.layout.to_json(), blake3(masking.message).hexdigest()]
    if sealing is not None:
        parts += sealing.facts
    return blake3(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def assignment_id(question: str, client: str, occurrence: int) -> str:
    """The id of the `occurrence`-th time (from 0) that `client` is asked this question in one attempt."""
    return blake3(f"{question}\x1f{client}\x1f{occurrence}".encode()).hexdigest(length=16)


class Transport(Protocol):
    """The way to clients: one request in, one answer out. Simulation, a network and a fake all implement it."""

    def present(self) -> list[str]:
        """The clients that can be asked now."""
        ...

    def members(self) -> Mapping[str, str]:
        """The roster's keys (hex) by name, as they are known here; none where there is no roster."""
        ...

    async def assemble(self, least: int) -> None:
        """Returns when `least` clients are present and nobody is missing who may be back in a moment."""
        ...

    async def add_up(
        self, scheme: Scheme, fingerprint: bytes, values: int, uploads: Mapping[str, Weights]
    ) -> tuple[Words, dict[str, str]]:
        """The sum's chunks of such uploads, and why some of these are none, by client; raises `SumSpoiled`.

        Native code works on them, which may take its process along.
        """
        ...

    async def aside(self, phase: Literal["fold", "commit"], work: Callable[[], T]) -> T:
        """What `work()` returns; long work on large models must not keep others waiting."""
        ...

    def now(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    async def perform(self, assignment: Assignment, parcel: Parcel, *, race: bool) -> Answer:
        """The client's answer. Raises `Refused` where it gives none; cancelled when nobody waits for it any more.

        `race` says that the order of answers decides something, so that simulation must not answer in the order asked.
        """
        ...

    async def sleep_until(self, deadline: float) -> None:
        """Returns when `now()` has reached `deadline`."""
        ...

    def committed(self, accepted: list[str], dropped: list[str]) -> None:
        """A round is durable: clients may forget the results with these ids, and keep the ids."""
        ...
