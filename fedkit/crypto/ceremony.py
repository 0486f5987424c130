"""How the key of an encrypted sum comes to the clients that use it, past a coordinator that must not have it.

Values; `fedkit.crypto.holder` is what a member does with them. Each sum has a key of its own, which its members forget
when the round is over.

1. Every member offers a box: an X25519 key for one letter, signed with its roster key.
2. The keyholder, one of them, makes the sum's key and signs who gets it (by its fingerprint) in which boxes. The key
   travels once, sealed under a fresh one, and that one in a letter to each of them.
3. A member checks all of that against its own roster, opens its letter, and signs what it got. Nobody encrypts for
   those who have not signed the same.

Letters are sealed with ChaCha20-Poly1305 under a key from X25519 with a fresh key of the sender's (HKDF with SHA-256),
bound to the ceremony, the keyholder, the recipient and the fingerprint.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto.chunks import KEY_SIZES, Scheme
from fedkit.crypto.encrypted import SecretKey
from fedkit.crypto.masks import KEY_BYTES, TAG_BYTES, PrivateKey, derive, digest_of, opened, packed, sealed
from fedkit.crypto.messages import (
    DIGEST_BYTES,
    SIGNATURE_BYTES,
    Session,
    Signed,
    mapping_from,
    require_names,
    require_size,
    to_mapping,
    unpacked,
    verifies,
)
from fedkit.errors import PayloadError, Reason, Refused

__all__ = [
    "LETTER_BYTES",
    "BoxKey",
    "Ceremony",
    "Delivery",
    "Handed",
    "Handover",
    "agreed",
    "check_boxes",
    "deliver",
    "read",
    "refused",
]

LETTER_BYTES = KEY_BYTES + KEY_BYTES + TAG_BYTES


@dataclass(frozen=True)
class Ceremony:
    """Which key this is about: that of one sum, for one scheme."""

    session: Session
    scheme: Scheme

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        return digest_of(b"fedkit-ceremony-2", self.session.digest, self.scheme.digest)


class BoxKey(Signed):
    """A member's X25519 key for one letter, signed with its roster key; what it is about is a ceremony's digest."""

    __slots__ = ()
    label = b"fedkit-box-key-1"


@dataclass(frozen=True)
class Handover:
    """What the keyholder signs: the key's fingerprint (32 bytes), and who gets it, in which boxes."""

    keyholder: str
    fingerprint: bytes
    boxes: tuple[BoxKey, ...]
    signature: bytes

    def __post_init__(self) -> None:
        """Checks lengths, order and uniqueness."""
        require_names([self.keyholder])
        require_size("a fingerprint", DIGEST_BYTES, self.fingerprint)
        require_size("a signature", SIGNATURE_BYTES, self.signature)
        require_names(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Who gets the key, sorted."""
        return tuple(one.name for one in self.boxes)

    def digest(self, ceremony: Ceremony) -> bytes:
        """SHA-256 of what the keyholder signs."""
        return digest_of(self.body(ceremony))

    def body(self, ceremony: Ceremony) -> bytes:
        """What the keyholder signs."""
        boxes = packed(*(one.to_bytes() for one in self.boxes))
        return packed(b"fedkit-handover-2", ceremony.digest, self.keyholder.encode(), self.fingerprint, boxes)

    def confirmation(self, ceremony: Ceremony, name: str) -> bytes:
        """What a member signs that has the key: its own name, and all that the keyholder has signed."""
        return packed(b"fedkit-key-received-1", self.digest(ceremony), name.encode())

    def bound(self, ceremony: Ceremony, name: str, sender_key: bytes = b"") -> bytes:
        """What a letter to a member is bound to, and under the name "" the key that all of them get."""
        box = next((one.value for one in self.boxes if one.name == name), b"")
        parts = (self.keyholder.encode(), name.encode(), box, sender_key, self.fingerprint)
        return packed(b"fedkit-letter-2", ceremony.digest, *parts)

    def to_bytes(self) -> bytes:
        """The compact form."""
        about = (self.keyholder.encode(), self.fingerprint, self.signature)
        return packed(*about, *(one.to_bytes() for one in self.boxes))

    @classmethod
    def from_bytes(cls, data: bytes) -> Handover:
        """What `to_bytes` wrote; raises `PayloadError`."""
        parts = unpacked(data)
        if len(parts) < 3:
            raise PayloadError("a handover has a keyholder, a fingerprint and a signature")
        try:
            keyholder = parts[0].decode("ascii")
        except UnicodeDecodeError:
            raise PayloadError("a keyholder's name is none") from None
        return cls(keyholder, parts[1], tuple(BoxKey.from_bytes(part) for part in parts[3:]), parts[2])

    # -- what anybody can check, who knows the roster ------------------------------------------------------------------

    def check(self, ceremony: Ceremony, members: Mapping[str, str], least: int) -> None:
        """Raises `Refused` (encryption) unless the keyholder has signed it, and all in it are members."""
        check_boxes(ceremony, self.keyholder, self.boxes, members, least)
        if not verifies(members[self.keyholder], self.signature, self.body(ceremony)):
            raise refused(f"{self.keyholder} has not signed this handover")

    def is_confirmed(self, ceremony: Ceremony, name: str, signature: bytes, members: Mapping[str, str]) -> bool:
        """Whether a member that is in it has signed that it got this key, with this list."""
        key = members.get(name) if name in self.names else None
        return key is not None and verifies(key, signature, self.confirmation(ceremony, name))


@dataclass(frozen=True)
class Handed:
    """What one member gets: the handover, the sealed key, and the letter (80 bytes) that opens it."""

    handover: Handover
    parcel: bytes = field(repr=False)
    letter: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Checks the lengths."""
        _require_parcel(self.parcel)
        require_size("a letter", LETTER_BYTES, self.letter)

    def to_bytes(self) -> bytes:
        """The compact form."""
        return packed(self.handover.to_bytes(), self.parcel, self.letter)

    @classmethod
    def from_bytes(cls, data: bytes) -> Handed:
        """What `to_bytes` wrote; raises `PayloadError`."""
        handover, parcel, letter = unpacked(data, 3)
        return cls(Handover.from_bytes(handover), parcel, letter)


@dataclass(frozen=True)
class Delivery:
    """What a keyholder gives to the coordinator, for all of them: letters by name."""

    handover: Handover
    parcel: bytes = field(repr=False)
    letters: Mapping[str, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        """Checks the lengths, and that there is a letter for each."""
        _require_parcel(self.parcel)
        require_size("a letter", LETTER_BYTES, *self.letters.values())
        if tuple(sorted(self.letters)) != self.handover.names:
            raise PayloadError("a delivery has one letter for each who gets the key")

    def to(self, name: str) -> Handed:
        """What one member gets."""
        return Handed(self.handover, self.parcel, self.letters[name])

    def to_bytes(self) -> bytes:
        """The compact form."""
        return packed(self.handover.to_bytes(), self.parcel, to_mapping(self.letters))

    @classmethod
    def from_bytes(cls, data: bytes) -> Delivery:
        """What `to_bytes` wrote; raises `PayloadError`."""
        handover, parcel, letters = unpacked(data, 3)
        return cls(Handover.from_bytes(handover), parcel, mapping_from(letters))


def deliver(
    ceremony: Ceremony,
    keyholder: str,
    secret: SecretKey,
    boxes: Iterable[BoxKey],
    *,
    key: Ed25519PrivateKey,
    members: Mapping[str, str],
    least: int,
) -> Delivery:
    """The keyholder's part. `key` and `members` are its roster key and its own roster's keys by name.

    To be done for one secret key in a ceremony. Raises `Refused` (encryption) for members it does not know, keys that
    their owners have not signed, and fewer than `least`.
    """
    if secret.scheme != ceremony.scheme:
        raise refused("the key is for other parameters than the ceremony")
    given = tuple(sorted(boxes, key=lambda one: one.name))
    check_boxes(ceremony, keyholder, given, members, least)
    unsigned = Handover(keyholder, secret.fingerprint, given, bytes(SIGNATURE_BYTES))
    handover = replace(unsigned, signature=key.sign(unsigned.body(ceremony)))
    content = secrets.token_bytes(KEY_BYTES)
    parcel = sealed(content, secret.data, handover.bound(ceremony, ""))
    return Delivery(handover, parcel, {box.name: _letter(ceremony, handover, content, box) for box in given})


def check_boxes(
    ceremony: Ceremony, keyholder: str, boxes: tuple[BoxKey, ...], members: Mapping[str, str], least: int
) -> None:
    """Raises `Refused` unless all are signed by members, `least` or more, the keyholder among them."""
    names = require_names(one.name for one in boxes)
    unknown = [name for name in names if name not in members]
    if unknown:
        raise refused(f"not on this site's roster: {', '.join(unknown[:10])}")
    unsigned = [one.name for one in boxes if not one.is_signed(ceremony.digest, members)]
    if unsigned:
        raise refused(f"keys that their owners have not signed: {', '.join(unsigned[:10])}")
    if len(names) < least:
        raise refused(f"{len(names)} members get the key, and the least is {least}")
    if keyholder not in names:
        raise refused(f"the keyholder {keyholder} is not among those who get the key")


def _letter(ceremony: Ceremony, handover: Handover, content: bytes, box: BoxKey) -> bytes:
    fresh = PrivateKey(secrets.token_bytes(KEY_BYTES))
    bound = handover.bound(ceremony, box.name, fresh.public)
    return fresh.public + sealed(derive(agreed(fresh, box.value, box.name), bound), content, bound)


def read(ceremony: Ceremony, private: PrivateKey, name: str, handed: Handed) -> SecretKey:
    """The key in what a member was handed, `private` that of its box; raises `Refused` for what is none."""
    handover, sender_key = handed.handover, handed.letter[:KEY_BYTES]
    bound = handover.bound(ceremony, name, sender_key)
    content = opened(derive(agreed(private, sender_key, "the sender"), bound), handed.letter[KEY_BYTES:], bound)
    text = None if content is None else opened(content, handed.parcel, handover.bound(ceremony, ""))
    if text is None:
        raise refused("the letter with the key does not open: it is not this one, or not for this site")
    try:
        found = SecretKey(ceremony.scheme, text)
    except PayloadError as error:
        raise refused(str(error)) from None
    if found.fingerprint != handover.fingerprint:
        raise refused("the key in the letter has another fingerprint than the keyholder signed")
    return found


def _require_parcel(parcel: bytes) -> None:
    if not isinstance(parcel, bytes) or len(parcel) - TAG_BYTES not in KEY_SIZES:
        raise PayloadError("a sealed key has another length")


def agreed(private: PrivateKey, public: bytes, peer: str) -> bytes:
    """The secret between two keys; raises `Refused` where one of them is none."""
    try:
        return private.agree(public)
    except PayloadError:
        raise refused(f"nobody can agree with a key of {peer}") from None


def refused(detail: str) -> Refused:
    """What the protocol does not allow."""
    return Refused(Reason.ENCRYPTION, detail)
