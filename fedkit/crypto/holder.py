"""One member's side of an encrypted sum: it gets the sum's key, encrypts once, and opens what most members have seen.

Values in, values out, as in `fedkit.crypto.member`: whoever calls this moves the messages and keeps the state.

0. `offer`: its box, for the letter with the key.
1. `deliver`, at the keyholder alone: the key it has made, for all who have sent a box.
2. `receive`: the key; it signs that it got it.
3. `encrypting`: who else has signed, and so whose values may be in the sum; the key to encrypt with.
4. `attest`: the coordinator names the sum, and whose values are in it; it signs that, once.
5. `opening`: shown that most of those who have the key signed the same sum, a member opens it.

Guarantee, whatever the coordinator says: the key came from a member that its roster knows, every member that encrypts
has signed that it got the same one, and a member signs one sum only. So as long as members keep to this, at most one
ciphertext of a sum is ever opened: what most of them have signed cannot be two things.

Does not protect against: a member that gives the key away, to the coordinator above all; a sum that holds other
ciphertexts than the coordinator says, which a key holder cannot see. Somebody's single one can be opened in its place.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto import ceremony as letters
from fedkit.crypto.ceremony import BoxKey, Ceremony, Delivery, Handed, Handover, refused
from fedkit.crypto.encrypted import SecretKey
from fedkit.crypto.masks import KEY_BYTES, PrivateKey, derive, digest_of, packed
from fedkit.crypto.member import LEAST_COHORT
from fedkit.crypto.messages import DIGEST_BYTES, Told, names_from, require_names, require_size, unpacked, verifies
from fedkit.errors import PayloadError

__all__ = ["Announced", "Holder", "attestation", "enough", "require_kept"]

_LABEL = b"fedkit-holder-1"


def enough(members: int) -> int:
    """How many of the members who get the key must have signed a sum, before anybody opens it: more than half."""
    return members // 2 + 1


@dataclass(frozen=True)
class Announced:
    """The sum that the coordinator wants opened: its digest (32 bytes), and whose values are in it."""

    names: tuple[str, ...]
    digest: bytes

    def __post_init__(self) -> None:
        """Checks order, uniqueness and length."""
        require_names(self.names)
        require_size("a digest", DIGEST_BYTES, self.digest)

    def statement(self, ceremony: Ceremony, handover: Handover, told: Told) -> bytes:
        """SHA-256 of what members sign: which sum of whom it is, under which key, and what was asked of them."""
        parts = (handover.digest(ceremony), told.model, told.work, self.to_bytes())
        return digest_of(b"fedkit-announced-2", *parts)

    def to_bytes(self) -> bytes:
        """The compact form."""
        return packed(self.digest, packed(*(name.encode() for name in self.names)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Announced:
        """What `to_bytes` wrote; raises `PayloadError`."""
        digest, names = unpacked(data, 2)
        return cls(names_from(names), digest)


def attestation(statement: bytes, name: str) -> bytes:
    """What a member signs that its values are in a sum, and that it knows of no other."""
    return packed(b"fedkit-attested-1", statement, name.encode())


def require_kept(statement: bytes, before: bytes | None) -> None:
    """Raises `Refused` where another sum of the same round was signed `before` (`Holder.vow`)."""
    if before is not None and before != statement:
        raise refused("another sum of that round was signed before")


@dataclass(frozen=True, slots=True)
class _State:
    seed: bytes = field(repr=False)
    delivered: bool = False
    handover: Handover | None = None
    secret: SecretKey | None = field(default=None, repr=False)
    signers: tuple[str, ...] = ()  # who has the same key, once it was shown
    told: Told | None = None  # once it has encrypted
    is_update: bool = False  # what it has encrypted
    announced: Announced | None = None  # once it has signed


class Holder:
    """A member of one encrypted sum; `members` are its own roster's keys by name, `key` belongs to its name there.

    Raises `Refused` (encryption) for whatever the protocol does not allow. Durable before it is sent: `to_bytes()`
    after each step and before its answer leaves.
    """

    def __init__(
        self,
        ceremony: Ceremony,
        name: str,
        key: Ed25519PrivateKey,
        members: Mapping[str, str],
        *,
        least: int = LEAST_COHORT,
    ) -> None:
        self.ceremony, self.name = ceremony, name
        self._key, self._members, self._least = key, members, max(least, LEAST_COHORT)
        self._state = _State(secrets.token_bytes(KEY_BYTES))

    def __repr__(self) -> str:
        return f"<Holder {self.name} in a sum of {self.ceremony.session.run}>"

    # -- 0 to 2: the key -----------------------------------------------------------------------------------------------

    def offer(self) -> BoxKey:
        """Its box, signed."""
        return BoxKey.sign(self.ceremony.digest, self.name, self._private.public, self._key)

    def deliver(self, boxes: Iterable[BoxKey], secret: SecretKey) -> Delivery:
        """The keyholder's part, once: the key that it has made, for all of them."""
        if self._state.delivered:
            raise refused("this site has handed out a key for that sum before")
        about = {"key": self._key, "members": self._members, "least": self._least}
        found = letters.deliver(self.ceremony, self.name, secret, boxes, **about)  # type: ignore[arg-type]
        self._state = replace(self._state, delivered=True)
        return found

    def receive(self, handed: Handed) -> bytes:
        """Its signature (64 bytes) under the key it got, once all is in order; the same key may come again."""
        handover, state = handed.handover, self._state
        if state.handover is None:
            handover.check(self.ceremony, self._members, self._least)
            if self.offer() not in handover.boxes:
                raise refused("the handover leaves it out, or has another box under its name")
            secret = letters.read(self.ceremony, self._private, self.name, handed)
            self._state = replace(state, handover=handover, secret=secret)
        elif handover != state.handover:
            raise refused("it was handed another key before, or told of other members")
        return self._key.sign(handover.confirmation(self.ceremony, self.name))

    # -- 3: encrypting -------------------------------------------------------------------------------------------------

    def encrypting(self, signatures: Mapping[str, bytes], told: Told, *, is_update: bool = False) -> SecretKey:
        """The key to encrypt one answer with; `signatures` by name are of all whose values may be in the sum.

        Each must be of a member that got the same key, and this one among them. `is_update`: see `vow`.
        """
        handover, secret = self._got()
        if self._state.told is not None:
            raise refused("an answer was encrypted for that sum before")
        names = require_names(sorted(signatures))
        known = (self.ceremony, self._members)
        differing = [n for n in names if not handover.is_confirmed(known[0], n, signatures[n], known[1])]
        if differing:
            raise refused(f"they have not signed that they got the same key: {', '.join(differing[:10])}")
        if self.name not in names or len(names) < self._least:
            raise refused(f"{len(names)} members have the key with this one, and the least is {self._least}")
        self._state = replace(self._state, signers=names, told=told, is_update=is_update)
        return secret

    # -- 4 and 5: opening ----------------------------------------------------------------------------------------------

    def attest(self, announced: Announced) -> bytes:
        """Its signature (64 bytes) under the one sum that it lets be opened."""
        state, names = self._state, announced.names
        if state.told is None:
            raise refused("nothing was encrypted for that sum here")
        if state.announced is not None and state.announced != announced:
            raise refused("another sum was announced before, or of other members")
        if self.name not in names or not set(names) <= set(state.signers):
            raise refused("the sum leaves this site out, or has members in it that have not got the same key")
        if len(names) < self._least:
            raise refused(f"a sum over {len(names)} members, and the least is {self._least}")
        self._state = replace(state, announced=announced)
        return self._key.sign(attestation(self.statement, self.name))

    @property
    def statement(self) -> bytes:
        """What it has signed; raises `Refused` where that is nothing."""
        state = self._state
        if state.announced is None or state.handover is None or state.told is None:
            raise refused("no sum was announced yet")
        return state.announced.statement(self.ceremony, state.handover, state.told)

    @property
    def vow(self) -> tuple[bytes, bytes] | None:
        """Of which round it has signed a sum of updates, and which one: to be kept for ever, and held against others.

        None where it has encrypted no update. Raises `Refused` where it has signed nothing.
        """
        session = self.ceremony.session
        question = digest_of(b"fedkit-vow-1", session.run.encode(), str(session.round).encode())
        return (question, self.statement) if self._state.is_update else None

    def opening(self, signatures: Mapping[str, bytes], digest: bytes) -> SecretKey:
        """The key to open the sum with, which has that digest, once enough have signed it; `signatures` by name."""
        handover, secret = self._got()
        statement, announced = self.statement, self._state.announced
        assert announced is not None  # there is a statement
        if digest != announced.digest:
            raise refused("this is not the sum that was announced")
        signed = [name for name in announced.names if self._has_signed(statement, name, signatures.get(name))]
        needed = max(enough(len(handover.names)), self._least)
        if len(signed) < needed:
            raise refused(f"{len(signed)} members have signed this sum, and {needed} are needed")
        return secret

    def facts(self) -> dict[str, str | int]:
        """What the audit log of a client that opens the sum says of it."""
        handover, _ = self._got()
        announced, session = self._state.announced, self.ceremony.session
        assert announced is not None  # `opening` came before
        return {
            "run": session.run,
            "round": session.round - 1,
            "call": session.call,
            "key": handover.fingerprint.hex()[:16],
            "clients": len(announced.names),
            "names": " ".join(announced.names),
            "sum": announced.digest.hex(),
        }

    def _has_signed(self, statement: bytes, name: str, signature: bytes | None) -> bool:
        key = self._members.get(name)
        return key is not None and signature is not None and verifies(key, signature, attestation(statement, name))

    def _got(self) -> tuple[Handover, SecretKey]:
        if self._state.handover is None or self._state.secret is None:
            raise refused("no key was handed over yet")
        return self._state.handover, self._state.secret

    @cached_property
    def _private(self) -> PrivateKey:
        return PrivateKey(derive(self._state.seed, b"fedkit-box-1", self.ceremony.digest))

    # -- durable state -------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All it must remember, the sum's key included: to be kept like a private key."""
        state = self._state
        told = b"" if state.told is None else state.told.model + state.told.work
        parts = (
            b"\1" if state.delivered else b"\0",
            b"" if state.handover is None else state.handover.to_bytes(),
            b"" if state.secret is None else state.secret.data,
            packed(*(name.encode() for name in state.signers)),
            told,
            b"\1" if state.is_update else b"\0",
            b"" if state.announced is None else state.announced.to_bytes(),
        )
        return packed(_LABEL, self.ceremony.digest, self.name.encode(), state.seed, *parts)

    @classmethod
    def restore(
        cls,
        data: bytes,
        ceremony: Ceremony,
        name: str,
        key: Ed25519PrivateKey,
        members: Mapping[str, str],
        *,
        least: int = LEAST_COHORT,
    ) -> Holder:
        """The member that `to_bytes` wrote; raises `PayloadError` for anything else, another sum or name."""
        label, digest, who, seed, *parts = unpacked(data, 11)
        if (label, digest, who) != (_LABEL, ceremony.digest, name.encode()) or len(seed) != KEY_BYTES:
            raise PayloadError("this is not the state of this member in this sum")
        delivered, handover, secret, signers, told, is_update, announced = parts
        is_flagged = {delivered, is_update} <= {b"\0", b"\1"}
        if bool(handover) != bool(secret) or not is_flagged or len(told) not in (0, 2 * DIGEST_BYTES):
            raise PayloadError("the state of an encrypted sum is damaged")
        found = cls(ceremony, name, key, members, least=least)
        found._state = _State(
            seed,
            delivered == b"\1",
            Handover.from_bytes(handover) if handover else None,
            SecretKey(ceremony.scheme, secret) if secret else None,
            names_from(signers),
            Told(told[:DIGEST_BYTES], told[DIGEST_BYTES:]) if told else None,
            is_update == b"\1",
            Announced.from_bytes(announced) if announced else None,
        )
        return found
