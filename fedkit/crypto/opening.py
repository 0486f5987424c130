"""Which encrypted sums a client opens: one for each question of a round, over enough members, and never another.

A key holder cannot see from a ciphertext whose updates are in it. What it can see is what was opened before, and what
the members have signed: that each of them uploaded something for this round. So a coordinator that wants to open other
sums than it says needs a second answer, which no honest client gives, or members on its side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from blake3 import blake3

from fedkit.crypto.masks import digest_of, packed
from fedkit.crypto.messages import (
    DIGEST_BYTES,
    Signed,
    require_names,
    require_size,
    unpacked,
)
from fedkit.errors import ConfigError, PayloadError, Reason, Refused

__all__ = ["Announced", "DecryptOnce", "Question", "Uploaded", "digest_of_chunks"]

_LABEL = b"fedkit-decrypt-once-1"
_MOST_TEXT = 512
_LEAST = 2


def digest_of_chunks(chunks: Iterable[bytes]) -> bytes:
    """BLAKE3 of the chunks of an upload or a sum, one after the other, 32 bytes."""
    digest = blake3()
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()


@dataclass(frozen=True)
class Question:
    """What is added up: `what` (mean, scores or statistics) of one round of a run, under the key of this fingerprint.

    Abandoned attempts of a round are the same question: it is answered once.
    """

    run: str
    round: int
    what: str
    fingerprint: bytes

    def __post_init__(self) -> None:
        """Refuses what no run has."""
        require_size("a fingerprint", DIGEST_BYTES, self.fingerprint)
        if max(len(self.run), len(self.what)) > _MOST_TEXT or not 0 <= self.round < 1 << 63:
            raise PayloadError(f"run and question have at most {_MOST_TEXT} characters, and rounds count from 0")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        parts = (self.run.encode(), str(self.round).encode(), self.what.encode(), self.fingerprint)
        return digest_of(b"fedkit-question-1", *parts)


class Uploaded(Signed):
    """A member's word that it has uploaded chunks of this digest; what it is about is a question's digest."""

    __slots__ = ()
    label = b"fedkit-uploaded-1"


@dataclass(frozen=True)
class Announced:
    """What the coordinator asks a client to open: the sum of this digest, of what these members have uploaded."""

    question: Question
    uploads: tuple[Uploaded, ...]
    digest: bytes

    def __post_init__(self) -> None:
        """Checks order and uniqueness."""
        require_size("a digest", DIGEST_BYTES, self.digest)
        require_names(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Whose uploads are in the sum, sorted."""
        return tuple(one.name for one in self.uploads)

    @cached_property
    def statement(self) -> bytes:
        """SHA-256 of all of it."""
        return digest_of(b"fedkit-announced-1", self.question.digest, self.to_bytes())

    def facts(self) -> dict[str, str | int]:
        """What the audit log of each client that opens the sum says of it."""
        question = self.question
        return {
            "run": question.run,
            "round": question.round,
            "what": question.what,
            "key": question.fingerprint.hex()[:16],
            "clients": len(self.uploads),
            "names": " ".join(self.names),
            "sum": self.digest.hex(),
        }

    def to_bytes(self) -> bytes:
        """The compact form of all but the question."""
        return packed(self.digest, *(one.to_bytes() for one in self.uploads))

    @classmethod
    def from_bytes(cls, question: Question, data: bytes) -> Announced:
        """What `to_bytes` wrote; raises `PayloadError`."""
        digest, *uploads = unpacked(data) or [b""]
        return cls(question, tuple(Uploaded.from_bytes(one) for one in uploads), digest)


@dataclass(frozen=True, slots=True)
class DecryptOnce:
    """What a client has opened so far: by question, which statement. One value follows from another; nothing is lost.

    Guarantee: over all values that follow from each other, at most one sum is allowed for each question, and only over
    `least` or more members of the roster that have signed for it.

    Does not protect against: a sum that holds other ciphertexts than it says, which a key holder cannot see.

    Durable before it is decrypted: `to_bytes()` of what `allow` returns, and a line of the audit log with
    `Announced.facts`. Raises `ConfigError` for a `least` below 2.
    """

    least: int
    opened: Mapping[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the least cohort."""
        if self.least < _LEAST:
            raise ConfigError(f"a sum over fewer than {_LEAST} members is no sum: least is {self.least}")

    def allow(
        self, announced: Announced, digest: bytes, *, cohort: Collection[str], members: Mapping[str, str]
    ) -> DecryptOnce:
        """The next value, in which this sum is opened; the same sum again is allowed again.

        `digest` is that of the sum's chunks as they are here, `cohort` whom the round was announced to, `members` this
        site's own roster. Raises `Refused` (encryption), saying why.
        """
        if digest != announced.digest:
            raise _refused("this is not the sum that was announced")
        if len(announced.names) < self.least:
            raise _refused(f"a sum over {len(announced.names)} clients, and the least is {self.least}")
        strangers = sorted(set(announced.names) - (set(cohort) & set(members)))
        if strangers:
            raise _refused(f"not of this round's cohort, or not on this site's roster: {', '.join(strangers[:10])}")
        unsigned = [one.name for one in announced.uploads if not one.is_signed(announced.question.digest, members)]
        if unsigned:
            raise _refused(f"uploads that their owners have not signed: {', '.join(unsigned[:10])}")
        before = self.opened.get(announced.question.digest, announced.statement)
        if before != announced.statement:
            raise _refused(f"another sum of round {announced.question.round} was opened before")
        return replace(self, opened={**self.opened, announced.question.digest: announced.statement})

    def to_bytes(self) -> bytes:
        """All that was opened."""
        return packed(_LABEL, *(part for pair in sorted(self.opened.items()) for part in pair))

    @classmethod
    def from_bytes(cls, data: bytes, least: int) -> DecryptOnce:
        """What `to_bytes` wrote; raises `PayloadError` for anything else."""
        label, *parts = unpacked(data) or [b""]
        if label != _LABEL or len(parts) % 2:
            raise PayloadError("this is not a record of opened sums")
        require_size("a digest", DIGEST_BYTES, *parts)
        return cls(least, dict(zip(parts[::2], parts[1::2], strict=True)))


def _refused(detail: str) -> Refused:
    return Refused(Reason.ENCRYPTION, detail)
