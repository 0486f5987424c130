"""A client's part in masked sums: what it answers in each step, and what it must keep before it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto.masks import apply_masks, packed
from fedkit.crypto.member import LEAST_COHORT, Member
from fedkit.crypto.messages import Cohort, Shares, mapping_from, names_from, unpacked
from fedkit.errors import PayloadError, Reason, Refused
from fedkit.rounds.assignment import Assignment, Masking
from fedkit.rounds.layout import Layout, words_manifest
from fedkit.weights import Weights
from fedkit.work import Answer, Reply, Update

__all__ = ["Masks", "Seat", "letter"]


@dataclass(frozen=True, slots=True)
class Masks:
    """The keys of the masks that go on one vector, and of those that come off."""

    plus: tuple[bytes, ...] = field(repr=False)
    minus: tuple[bytes, ...] = field(repr=False)

    @property
    def keys(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Both."""
        return self.plus, self.minus

    def mask(self, layout: Layout, answer: Answer) -> Update:
        """The answer as it may leave: masked words. Raises `Refused` where it does not fit the layout."""
        words = layout.encode(answer)
        apply_masks(words, self.plus, self.minus)
        epsilon = answer.epsilon if isinstance(answer, Update) else None
        return Update(Weights(words_manifest(words.size), words.view(np.float32)), 0, epsilon=epsilon)


def letter(sharers: tuple[str, ...], inbox: Shares) -> bytes:
    """What a client is told with the work: who shared, and the shares that are for it."""
    return packed(packed(*(name.encode() for name in sharers)), inbox.to_bytes())


class Seat:
    """`name`'s seat in masked sums: its roster key, the members its own roster names, and the least it adds up with.

    Raises `Refused` (masking) for whatever the protocol does not allow. What each step leaves (bytes) must be durable
    before its answer is sent, and is given to the next step.
    """

    def __init__(
        self, name: str, key: Ed25519PrivateKey, members: Callable[[], Mapping[str, str]], least: int = LEAST_COHORT
    ) -> None:
        self._name = name
        self._key = key
        self._members = members
        self._least = max(least, LEAST_COHORT)

    def reply(self, assignment: Assignment, left: bytes | None) -> tuple[Reply, bytes]:
        """The answer to any step but "vector", and what that leaves."""
        masking = _masking_of(assignment)
        member = self._member(assignment, masking, left)
        try:
            answer = _answered(member, masking)
        except PayloadError as error:
            raise Refused(Reason.MASKING, str(error)) from None
        return Reply(answer), member.to_bytes()

    def masks(self, assignment: Assignment, payload_digest: bytes, left: bytes | None) -> tuple[Masks, bytes]:
        """The masks of the step "vector" for an answer to what has that digest, and what that leaves."""
        masking = _masking_of(assignment)
        member = self._member(assignment, masking, left)
        try:
            sharers, inbox = unpacked(masking.message, 2)
            about = (names_from(sharers), Shares.from_bytes(inbox))
            plus, minus = member.mask_keys(*about, assignment.told(payload_digest), masking.layout.words)
        except PayloadError as error:
            raise Refused(Reason.MASKING, str(error)) from None
        return Masks(tuple(plus), tuple(minus)), member.to_bytes()

    def _member(self, assignment: Assignment, masking: Masking, left: bytes | None) -> Member:
        session = masking.session(assignment.run, assignment.round)
        given = (session, self._name, self._key, self._members())
        if left is None and masking.step != "advertise":
            raise Refused(Reason.MASKING, "this site knows nothing of that sum, or not any more")
        if left is None:
            return Member(*given, least=self._least)
        try:
            return Member.restore(left, *given, least=self._least)
        except PayloadError as error:
            raise Refused(Reason.MASKING, str(error)) from None


def _masking_of(assignment: Assignment) -> Masking:
    if assignment.masking is None:
        raise Refused(Reason.MASKING, "this is not asked for a masked sum")
    return assignment.masking


def _answered(member: Member, masking: Masking) -> bytes:
    if masking.step == "advertise":
        return member.advertise().to_bytes()
    if masking.step == "share":
        return member.share(Cohort.from_bytes(member.session, masking.message)).to_bytes()
    if masking.step == "confirm":
        return member.confirm(names_from(masking.message))
    if masking.step == "unmask":
        return member.unmask(mapping_from(masking.message)).to_bytes()
    raise Refused(Reason.MASKING, "a vector is not a reply")
