"""How a run's secret key comes to the clients that encrypt with it, past a coordinator that must not have it.

Values in, values out, as in `fedkit.crypto.member`: whoever calls this moves the messages and keeps the state.

1. `Recipient.offer`: every member, the keyholder among them, makes a key for one letter, signed with its roster key.
2. `deliver`: the keyholder, who has made the run's key, signs who gets which key (by its fingerprint), and seals the
   key for each of them.
3. `Recipient.receive`: a member checks all of that against its own roster, opens its letter, and signs what it got.
4. `Recipient.conclude`: shown that everybody signed the same, it uses the key.

A letter is sealed with ChaCha20-Poly1305 under a key from X25519 with a fresh key of the sender's (HKDF with SHA-256),
bound to the ceremony, the keyholder, the recipient and the fingerprint.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto.chunks import KEY_BYTES as SECRET_KEY_BYTES
from fedkit.crypto.chunks import Scheme
from fedkit.crypto.encrypted import SecretKey
from fedkit.crypto.masks import KEY_BYTES, TAG_BYTES, PrivateKey, derive, digest_of, opened, packed, sealed
from fedkit.crypto.messages import (
    DIGEST_BYTES,
    SIGNATURE_BYTES,
    Signed,
    require_names,
    require_size,
    unpacked,
    verifies,
)
from fedkit.errors import PayloadError, Reason, Refused

__all__ = ["LETTER_BYTES", "BoxKey", "Ceremony", "Handover", "Recipient", "deliver"]

LETTER_BYTES = KEY_BYTES + SECRET_KEY_BYTES + TAG_BYTES
_LABEL = b"fedkit-recipient-1"
_MOST_TEXT = 512
_SEED_BYTES = 32


@dataclass(frozen=True)
class Ceremony:
    """Which key this is about: the run's, for one scheme, made by one of its members.

    `attempt` tells a ceremony from those before it that somebody did not finish. Raises `PayloadError` for what no run
    has.
    """

    run: str
    attempt: int
    keyholder: str
    scheme: Scheme

    def __post_init__(self) -> None:
        """Checks the names."""
        require_names([self.keyholder])
        if len(self.run) > _MOST_TEXT or not 0 <= self.attempt < 1 << 31:
            raise PayloadError(f"a run has at most {_MOST_TEXT} characters, and attempts count from 0")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        parts = (self.run.encode(), str(self.attempt).encode(), self.keyholder.encode(), self.scheme.digest)
        return digest_of(b"fedkit-ceremony-1", *parts)


class BoxKey(Signed):
    """A member's X25519 key for one letter, signed with its roster key; what it is about is a ceremony's digest."""

    __slots__ = ()
    label = b"fedkit-box-key-1"


@dataclass(frozen=True)
class Handover:
    """What the keyholder signs: the key's fingerprint (32 bytes), and who gets it, under which keys."""

    fingerprint: bytes
    boxes: tuple[BoxKey, ...]
    signature: bytes

    def __post_init__(self) -> None:
        """Checks lengths, order and uniqueness."""
        require_size("a fingerprint", DIGEST_BYTES, self.fingerprint)
        require_size("a signature", SIGNATURE_BYTES, self.signature)
        require_names(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Who gets the key, sorted."""
        return tuple(one.name for one in self.boxes)

    def body(self, ceremony: Ceremony) -> bytes:
        """What the keyholder signs."""
        boxes = packed(*(one.to_bytes() for one in self.boxes))
        return packed(b"fedkit-handover-1", ceremony.digest, self.fingerprint, boxes)

    def confirmation(self, ceremony: Ceremony, name: str) -> bytes:
        """What a member signs that has the key: its own name, and all that the keyholder has signed."""
        return packed(b"fedkit-key-received-1", digest_of(self.body(ceremony)), name.encode())

    def to_bytes(self) -> bytes:
        """The compact form."""
        return packed(self.fingerprint, self.signature, *(one.to_bytes() for one in self.boxes))

    @classmethod
    def from_bytes(cls, data: bytes) -> Handover:
        """What `to_bytes` wrote; raises `PayloadError`."""
        parts = unpacked(data)
        if len(parts) < 2:
            raise PayloadError("a handover has a fingerprint and a signature")
        return cls(parts[0], tuple(BoxKey.from_bytes(part) for part in parts[2:]), parts[1])


def deliver(
    ceremony: Ceremony,
    secret: SecretKey,
    boxes: Iterable[BoxKey],
    *,
    key: Ed25519PrivateKey,
    members: Mapping[str, str],
    least: int,
) -> tuple[Handover, dict[str, bytes]]:
    """The keyholder's part: what it signs, and the letters (57,392 bytes each) by recipient.

    `key` and `members` are the keyholder's roster key and its own roster's keys by name. To be done for one secret key
    in a ceremony: it is made and kept before. Raises `Refused` (encryption) for members it does not know, keys that
    their owners have not signed, and fewer than `least`.
    """
    if secret.scheme != ceremony.scheme:
        raise _refused("the key is for other parameters than the ceremony")
    given = tuple(sorted(boxes, key=lambda one: one.name))
    _check_boxes(ceremony, given, members, least)
    unsigned = Handover(secret.fingerprint, given, bytes(SIGNATURE_BYTES))
    handover = replace(unsigned, signature=key.sign(unsigned.body(ceremony)))
    return handover, {box.name: _letter(ceremony, secret, box) for box in given}


def _check_boxes(ceremony: Ceremony, boxes: tuple[BoxKey, ...], members: Mapping[str, str], least: int) -> None:
    names = require_names(one.name for one in boxes)
    unknown = [name for name in names if name not in members]
    if unknown:
        raise _refused(f"not on this site's roster: {', '.join(unknown[:10])}")
    unsigned = [one.name for one in boxes if not one.is_signed(ceremony.digest, members)]
    if unsigned:
        raise _refused(f"keys that their owners have not signed: {', '.join(unsigned[:10])}")
    if len(names) < least:
        raise _refused(f"{len(names)} members get the key, and the least is {least}")
    if ceremony.keyholder not in names:
        raise _refused(f"the keyholder {ceremony.keyholder} is not among those who get the key")


def _letter(ceremony: Ceremony, secret: SecretKey, box: BoxKey) -> bytes:
    fresh = PrivateKey(secrets.token_bytes(_SEED_BYTES))
    bound = _bound(ceremony, box, fresh.public, secret.fingerprint)
    return fresh.public + sealed(derive(_agreed(fresh, box.value, box.name), bound), secret.data, bound)


def _bound(ceremony: Ceremony, box: BoxKey, sender_key: bytes, fingerprint: bytes) -> bytes:
    """What a letter is bound to; the ceremony's digest holds the run and the keyholder."""
    return packed(b"fedkit-letter-1", ceremony.digest, box.name.encode(), box.value, sender_key, fingerprint)


def _agreed(private: PrivateKey, public: bytes, peer: str) -> bytes:
    try:
        return private.agree(public)
    except PayloadError:
        raise _refused(f"nobody can agree with a key of {peer}") from None


@dataclass(frozen=True, slots=True)
class _State:
    seed: bytes = field(repr=False)
    handover: Handover | None = None
    secret: SecretKey | None = field(default=None, repr=False)
    is_complete: bool = False


class Recipient:
    """One member's side of a ceremony; `members` are its own roster's keys by name, `key` belongs to its name there.

    Guarantee, whatever the coordinator says: the key it uses came from the keyholder that its roster knows, and every
    member that gets it, each one on its roster, has signed that it got the same key with the same list of members.

    Does not protect against: a keyholder or member that gives the key away, to the coordinator above all.

    Durable before it is sent: `to_bytes()` before the answers of `offer` and `receive`. Asked again for the same, it
    gives the same answer, and for others it refuses, with `Refused` (encryption).
    """

    def __init__(
        self, ceremony: Ceremony, name: str, key: Ed25519PrivateKey, members: Mapping[str, str], *, least: int
    ) -> None:
        self.ceremony, self.name = ceremony, name
        self._key, self._members, self._least = key, members, least
        self._state = _State(secrets.token_bytes(_SEED_BYTES))

    def __repr__(self) -> str:
        return f"<Recipient {self.name} of the key of {self.ceremony.run}>"

    def offer(self) -> BoxKey:
        """Its key for one letter, signed."""
        return BoxKey.sign(self.ceremony.digest, self.name, self._private.public, self._key)

    def receive(self, handover: Handover, letter: bytes) -> bytes:
        """Its signature (64 bytes) under what it got, once all is in order."""
        if self._state.handover is None:
            self._check(handover)
            self._state = replace(self._state, secret=self._opened(handover, letter), handover=handover)
        elif handover != self._state.handover:
            raise _refused("it was handed another key before, or told of other members")
        return self._key.sign(handover.confirmation(self.ceremony, self.name))

    def conclude(self, signatures: Mapping[str, bytes]) -> SecretKey:
        """The key, once everybody who gets it has signed the same; `signatures` by name."""
        handover = self._state.handover
        if handover is None:
            raise _refused("no key was handed over yet")
        differing = [name for name in handover.names if not self._has_signed(handover, name, signatures.get(name))]
        if differing:
            raise _refused(f"they have not signed that they got the same key: {', '.join(differing[:10])}")
        self._state = replace(self._state, is_complete=True)
        return self.secret

    @property
    def secret(self) -> SecretKey:
        """The run's key; raises `Refused` before everybody has signed for it."""
        if self._state.secret is None or not self._state.is_complete:
            raise _refused("the run's key is not confirmed by everybody yet")
        return self._state.secret

    # -- what it checks ------------------------------------------------------------------------------------------------

    def _check(self, handover: Handover) -> None:
        _check_boxes(self.ceremony, handover.boxes, self._members, self._least)
        if not verifies(self._members[self.ceremony.keyholder], handover.signature, handover.body(self.ceremony)):
            raise _refused(f"{self.ceremony.keyholder} has not signed this handover")
        if self.offer() not in handover.boxes:
            raise _refused("the handover leaves it out, or has another key under its name")

    def _opened(self, handover: Handover, letter: bytes) -> SecretKey:
        if len(letter) != LETTER_BYTES:
            raise _refused(f"a letter has {LETTER_BYTES} bytes, not {len(letter)}")
        sender_key = letter[:KEY_BYTES]
        bound = _bound(self.ceremony, self.offer(), sender_key, handover.fingerprint)
        text = opened(derive(_agreed(self._private, sender_key, "the sender"), bound), letter[KEY_BYTES:], bound)
        if text is None:
            raise _refused("the letter with the key does not open: it is not this one, or not for this site")
        try:
            found = SecretKey(self.ceremony.scheme, text)
        except PayloadError as error:
            raise _refused(str(error)) from None
        if found.fingerprint != handover.fingerprint:
            raise _refused("the key in the letter has another fingerprint than the keyholder signed")
        return found

    def _has_signed(self, handover: Handover, name: str, signature: bytes | None) -> bool:
        key = self._members.get(name)
        return (
            key is not None
            and signature is not None
            and verifies(key, signature, handover.confirmation(self.ceremony, name))
        )

    @property
    def _private(self) -> PrivateKey:
        return PrivateKey(derive(self._state.seed, b"fedkit-box-1", self.ceremony.digest))

    # -- durable state -------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All it must remember, the run's key included: to be kept like a private key."""
        state = self._state
        handover = b"" if state.handover is None else state.handover.to_bytes()
        secret = b"" if state.secret is None else state.secret.data
        known = (self.ceremony.digest, self.name.encode(), state.seed, handover, secret, bytes([state.is_complete]))
        return packed(_LABEL, *known)

    @classmethod
    def restore(
        cls,
        data: bytes,
        ceremony: Ceremony,
        name: str,
        key: Ed25519PrivateKey,
        members: Mapping[str, str],
        *,
        least: int,
    ) -> Recipient:
        """The member that `to_bytes` wrote; raises `PayloadError` for anything else, another ceremony or name."""
        label, digest, who, seed, handover, secret, complete = unpacked(data, 7)
        if (label, digest, who) != (_LABEL, ceremony.digest, name.encode()) or len(seed) != _SEED_BYTES:
            raise PayloadError("this is not the state of this member in this ceremony")
        if bool(handover) != bool(secret) or complete not in (b"\0", b"\1") or (complete == b"\1" and not secret):
            raise PayloadError("a recipient's state is damaged")
        found = cls(ceremony, name, key, members, least=least)
        known = Handover.from_bytes(handover) if handover else None
        got = SecretKey(ceremony.scheme, secret) if secret else None
        found._state = _State(seed, known, got, is_complete=complete == b"\1")
        return found


def _refused(detail: str) -> Refused:
    return Refused(Reason.ENCRYPTION, detail)
