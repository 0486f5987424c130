"""A client's part in sums that nobody may see into: what it answers in each step, and what it keeps before it does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto import bfv, ckks
from fedkit.crypto.ceremony import BoxKey, Ceremony, Handed
from fedkit.crypto.encrypted import SecretKey
from fedkit.crypto.holder import Announced, Holder
from fedkit.crypto.masks import apply_masks, packed
from fedkit.crypto.member import LEAST_COHORT, Member
from fedkit.crypto.messages import Cohort, Shares, Told, mapping_from, names_from, unpacked
from fedkit.crypto.ring import Words
from fedkit.errors import ConfigError, PayloadError, Reason, Refused, SumSpoiled
from fedkit.rounds.assignment import Assignment, Masking
from fedkit.rounds.layout import Layout, words_manifest
from fedkit.weights import Weights
from fedkit.work import Answer, Fit, Gradient, Reply, Update

__all__ = ["Cover", "Key", "Masks", "Seat", "cover_from", "letter"]

Part: TypeAlias = npt.NDArray[np.int64]  # of noise that clients share


@dataclass(frozen=True, slots=True)
class Masks:
    """The keys of the masks that go on one vector, and of those that come off."""

    plus: tuple[bytes, ...] = field(repr=False)
    minus: tuple[bytes, ...] = field(repr=False)

    @property
    def secrets(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Both."""
        return self.plus, self.minus

    def cover(self, layout: Layout, answer: Answer, noise: Part | None = None) -> Update:
        """The answer as it may leave: masked words, with this client's part of the noise where the layout has any.

        Raises `Refused` where it does not fit the layout.
        """
        words = layout.encode(answer, noise)
        apply_masks(words, self.plus, self.minus)
        return _update(words, answer)


@dataclass(frozen=True, slots=True)
class Key:
    """The key of an encrypted sum, to encrypt one answer with, or to open the sum. Both run in native code."""

    secret: SecretKey = field(repr=False)

    @property
    def secrets(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """As those of masks."""
        return (self.secret.data,), ()

    def cover(self, layout: Layout, answer: Answer, noise: Part | None = None) -> Update:
        """The answer as it may leave: chunks of ciphertext. Raises `Refused` where it does not fit the layout."""
        if layout.scheme == "bfv":
            chunks = bfv.encrypt(self.secret, layout.encode(answer, noise))
        else:
            chunks = ckks.encrypt(self.secret, layout.floats(answer))
        words, start = np.empty(layout.sent, dtype="<u4"), 0
        try:
            for chunk in chunks:
                end = start + len(chunk) // words.itemsize
                words[start:end] = np.frombuffer(chunk, dtype="<u4")
                start = end
        except ConfigError as error:  # TenSEAL is missing here
            raise Refused(Reason.ENCRYPTION, str(error)) from None
        return _update(words, answer)

    def opened(self, layout: Layout, total: Weights) -> Update:
        """The sum's words; raises `Refused` for what is no sum under this key."""
        data, size = np.ascontiguousarray(total.vector).view(np.uint8).data, self.secret.scheme.full_bytes
        chunks = (bytes(data[start : start + size]) for start in range(0, len(data), size))
        decrypt = bfv.decrypt if layout.scheme == "bfv" else ckks.decrypt
        try:
            found = decrypt(self.secret, chunks, layout.words)
        except (ConfigError, PayloadError, SumSpoiled) as error:
            raise Refused(Reason.ENCRYPTION, str(error)) from None
        return _update(np.ascontiguousarray(found).view(np.uint32), Reply(b""))


Cover: TypeAlias = Masks | Key


def cover_from(layout: Layout, plus: tuple[bytes, ...], minus: tuple[bytes, ...]) -> Cover:
    """What has these secrets."""
    return Masks(plus, minus) if layout.scheme == "masked" else Key(SecretKey(layout.encryption, plus[0]))


def _update(words: Words, answer: Answer) -> Update:
    epsilon = answer.epsilon if isinstance(answer, Update) else None
    return Update(Weights(words_manifest(words.size), words.view(np.float32)), 0, epsilon=epsilon)


def letter(sharers: tuple[str, ...], inbox: Shares) -> bytes:
    """What a client is told with the work: who shared, and the shares that are for it."""
    return packed(packed(*(name.encode() for name in sharers)), inbox.to_bytes())


class Seat:
    """`name`'s seat in such sums: its roster key, the members its own roster names, and the least it adds up with.

    Raises `Refused` (masking, encryption) for whatever the protocol does not allow. What each step leaves (bytes) must
    be durable before its answer is sent, and is given to the next step.
    """

    def __init__(
        self, name: str, key: Ed25519PrivateKey, members: Callable[[], Mapping[str, str]], least: int = LEAST_COHORT
    ) -> None:
        self._name = name
        self._key = key
        self._members = members
        self._least = max(least, LEAST_COHORT)

    def reply(self, assignment: Assignment, left: bytes | None, secret: SecretKey | None = None) -> tuple[Reply, bytes]:
        """The answer to a step that works nothing out, and what that leaves; `secret` is for the step "deliver"."""
        masking = _masking_of(assignment)
        member = self._member(assignment, masking, left)
        with _refusing(masking):
            if isinstance(member, Member):
                answer = _answered(member, masking)
            else:
                answer = _answered_by_holder(member, masking, secret)
        return Reply(answer), member.to_bytes()

    def cover(self, assignment: Assignment, payload_digest: bytes, left: bytes | None) -> tuple[Cover, bytes]:
        """What goes on an answer to what has that digest, or opens it in the step "open"; and what that leaves."""
        masking = _masking_of(assignment)
        member = self._member(assignment, masking, left)
        with _refusing(masking):
            told = assignment.told(payload_digest)
            if isinstance(member, Holder):
                return _key_of(member, assignment, told, payload_digest), member.to_bytes()
            sharers, inbox = unpacked(masking.message, 2)
            about = (names_from(sharers), Shares.from_bytes(inbox), told)
            _require_planned(about[0], masking.layout)
            plus, minus = member.mask_keys(*about, masking.layout.words, masking.layout.least)
        return Masks(tuple(plus), tuple(minus)), member.to_bytes()

    def vow(self, assignment: Assignment, left: bytes) -> tuple[bytes, bytes] | None:
        """What is kept for ever once the step "attest" is answered (`Holder.vow`); None for all others."""
        masking = _masking_of(assignment)
        if masking.step != "attest":
            return None
        member = self._member(assignment, masking, left)
        assert isinstance(member, Holder)  # nobody else attests
        return member.vow

    def facts(self, assignment: Assignment, left: bytes) -> dict[str, str | int]:
        """What the audit log says of the sum that is about to be opened."""
        member = self._member(assignment, _masking_of(assignment), left)
        assert isinstance(member, Holder)  # nobody else opens
        return member.facts()

    def _member(self, assignment: Assignment, masking: Masking, left: bytes | None) -> Member | Holder:
        session = masking.session(assignment.run, assignment.round)
        is_masked = masking.layout.scheme == "masked"
        if left is None and masking.step not in ("advertise", "offer"):
            raise Refused(_reason(masking), "this site knows nothing of that sum, or not any more")
        kind: Any = Member if is_masked else Holder
        about = session if is_masked else Ceremony(session, masking.layout.encryption)
        given = (about, self._name, self._key, self._members())
        with _refusing(masking):
            member: Member | Holder = (
                kind(*given, least=self._least) if left is None else kind.restore(left, *given, least=self._least)
            )
            return member


@contextlib.contextmanager
def _refusing(masking: Masking) -> Iterator[None]:
    """What a coordinator says that makes no sense is a refusal."""
    try:
        yield
    except PayloadError as error:
        raise Refused(_reason(masking), str(error)) from None


def _reason(masking: Masking) -> Reason:
    return Reason.MASKING if masking.layout.scheme == "masked" else Reason.ENCRYPTION


def _require_planned(sharers: tuple[str, ...], layout: Layout) -> None:
    """Raises `Refused` where more are added up than there is room, and noise, planned for."""
    if len(sharers) > layout.cohort:
        raise Refused(Reason.MASKING, f"{len(sharers)} members in a sum that is planned for {layout.cohort}")


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


def _answered_by_holder(holder: Holder, masking: Masking, secret: SecretKey | None) -> bytes:
    if masking.step == "offer":
        return holder.offer().to_bytes()
    if masking.step == "deliver" and secret is not None:
        return holder.deliver([BoxKey.from_bytes(one) for one in unpacked(masking.message)], secret).to_bytes()
    if masking.step == "receive":
        return holder.receive(Handed.from_bytes(masking.message))
    if masking.step == "attest":
        return holder.attest(Announced.from_bytes(masking.message))
    raise Refused(Reason.ENCRYPTION, f"the step {masking.step} has no such answer")


def _key_of(holder: Holder, assignment: Assignment, told: Told, payload_digest: bytes) -> Key:
    masking = _masking_of(assignment)
    signatures = mapping_from(masking.message)
    if masking.step == "encrypt":
        return Key(holder.encrypting(signatures, told, is_update=isinstance(assignment.work, Fit | Gradient)))
    if masking.step == "open":
        return Key(holder.opening(signatures, payload_digest))
    raise Refused(Reason.ENCRYPTION, f"the step {masking.step} brings no vector")
