"""One member's side of a masked sum (Bonawitz et al. 2017, with the consistency check; graph by Bell et al. 2020).

Values in, values out: whoever calls this moves the messages and keeps the state. The five steps, in which U1 to U3 are
the paper's sets:

0. `advertise`: fresh keys, signed with the member's roster key.
1. `share`: told the cohort (U1), it checks everybody's signature, and deals shares of its two secrets to its
   neighbours: the seed of a mask of its own, and its mask key, from which the masks with its neighbours follow.
2. `mask`: told who shared (U2), it adds all masks to its vector.
3. `confirm`: told who delivered (U3), it signs that list.
4. `unmask`: shown that a quorum signed the same list, it gives its shares of the survivors' seeds, and of the mask keys
   of those who have dropped out since they shared.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto.masks import PrivateKey, apply_masks, derive, digest_of, opened, packed, sealed
from fedkit.crypto.messages import (
    DIGEST_BYTES,
    Advertised,
    Cohort,
    Session,
    Shares,
    Told,
    Unmasking,
    mapping_from,
    names_from,
    require_names,
    to_mapping,
    unpacked,
    verifies,
)
from fedkit.crypto.ring import Words
from fedkit.crypto.shamir import SECRET_BYTES, SHARE_BYTES, split
from fedkit.errors import ConfigError, PayloadError, Reason, Refused

__all__ = ["LEAST_COHORT", "Member", "commitment_to", "context_of", "pair_key", "self_key", "survivors_body"]

LEAST_COHORT = 3
_LABEL = b"fedkit-member-2"


def commitment_to(seed: bytes) -> bytes:
    """What a member says of its own mask's seed beforehand, so that a false one is told from it."""
    return digest_of(b"fedkit-commitment-1", seed)


def context_of(cohort: Cohort, sharers: Iterable[str], told: Told, words: int) -> bytes:
    """What every mask of a sum depends on (32 bytes): run, round, call, all keys, who shared, what was told, length.

    Members who differ in any of it make masks that do not cancel.
    """
    shared = digest_of(*(name.encode() for name in sharers))
    return digest_of(b"fedkit-context-1", cohort.digest, shared, told.model, told.work, words.to_bytes(8, "little"))


def pair_key(agreed: bytes, context: bytes, one: str, other: str) -> bytes:
    """The key of the mask that two members share, from the secret that their mask keys agree on."""
    return derive(agreed, b"fedkit-pair-mask-1", context, *(name.encode() for name in sorted((one, other))))


def self_key(seed: bytes, context: bytes, name: str) -> bytes:
    """The key of a member's own mask."""
    return derive(seed, b"fedkit-self-mask-1", context, name.encode())


def survivors_body(context: bytes, survivors: Iterable[str]) -> bytes:
    """What survivors sign: the context of their masks and who they are."""
    return packed(b"fedkit-survivors-1", context, *(name.encode() for name in survivors))


@dataclass(frozen=True, slots=True)
class _State:
    """What a member keeps: a secret from which all its others follow, and what it has been told so far."""

    seed: bytes = field(repr=False)
    cohort: Cohort | None = None
    sharers: tuple[str, ...] = ()
    inbox: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    context: bytes = b""
    survivors: tuple[str, ...] = ()
    least: int = 0  # vectors that a sum with its own in it must hold


class Member:
    """A member of one session; `members` are its own roster's keys by name, and `key` belongs to its own name there.

    Guarantee, whatever the coordinator says, as long as c of the cohort's n members are on its side and
    2 quorum > n + c: this member's vector leaves only under masks that come off a sum over at least `least` members of
    its roster, of whom all honest ones were told the same (in sparse graphs within the limits that
    `fedkit.crypto.graph` states). Every step is taken for one set of facts; asked again for the same, it gives the
    same answer, and for others it refuses. It never gives both kinds of shares of the same member.

    Does not protect against: what the sum itself tells, above all where all but one member are on the coordinator's
    side; members who add what they like; a state that is taken back to an older copy of itself.

    Durable before it is sent: `to_bytes()` before the answer of each of the first four steps; with the masked vector
    also that vector, because masking is done once: two vectors under the same masks would tell their difference. A
    member that has lost its state takes no further part in the session.

    Raises `Refused` (masking) for whatever the protocol does not allow, `PayloadError` for lists that are none.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        key: Ed25519PrivateKey,
        members: Mapping[str, str],
        *,
        least: int = LEAST_COHORT,
    ) -> None:
        if least < 2:
            raise ConfigError(f"a sum over fewer than 2 members is no sum: least is {least}")
        self.session, self.name = session, name
        self._key, self._members, self._least = key, members, least
        self._state = _State(secrets.token_bytes(SECRET_BYTES))
        self._agreed_with: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"<Member {self.name} of round {self.session.round} of {self.session.run}>"

    # -- the five steps ------------------------------------------------------------------------------------------------

    def advertise(self) -> Advertised:
        """Its fresh public keys, signed."""
        publics = (self._mask_key.public, self._share_key.public, commitment_to(self._own_seed))
        unsigned = Advertised(self.name, *publics, bytes(64))
        return replace(unsigned, signature=self._key.sign(unsigned.body(self.session)))

    def share(self, cohort: Cohort) -> Shares:
        """Its sealed shares by recipient, for a cohort in which all is in order."""
        if self._state.cohort is None:
            self._check_cohort(cohort)
            self._state = replace(self._state, cohort=cohort)
        elif cohort.digest != self._state.cohort.digest:
            raise _refused("it was told another cohort before")
        keys, seeds = self._dealt(cohort, b"key"), self._dealt(cohort, b"seed")
        return Shares({name: self._sealed(cohort, name, keys[name] + seeds[name]) for name in self._others(cohort)})

    def mask(self, sharers: Iterable[str], inbox: Shares, told: Told, vector: Words) -> None:
        """Adds all masks to `vector`, in place, once. `inbox` holds its neighbours' shares by sender.

        `vector` is contiguous, uint32. Shares that do not open are as if they had never been sent.
        """
        _check_vector(vector)
        apply_masks(vector, *self.mask_keys(sharers, inbox, told, vector.size))

    def mask_keys(
        self, sharers: Iterable[str], inbox: Shares, told: Told, words: int, least: int = 0
    ) -> tuple[list[bytes], list[bytes]]:
        """The keys of the masks to add to a vector of so many words, and of those to take off: for one vector.

        It gives no shares later but for a sum of `least` vectors and more, whose owners all agree on it.
        """
        cohort, shared = self._require_cohort(), require_names(sharers)
        if self._state.context:
            raise _refused("its vector was masked before")
        self._check_part(shared, cohort.names, "who shared", least)
        if set(inbox.sealed) != set(shared) & set(self._others(cohort)):
            raise _refused("it got other shares than those of its neighbours who shared")
        context = context_of(cohort, shared, told, words)
        keys = self._mask_keys(cohort, shared, context)
        self._state = replace(self._state, sharers=shared, inbox=dict(inbox.sealed), context=context, least=least)
        return keys

    def confirm(self, survivors: Iterable[str]) -> bytes:
        """Its signature under who delivered, of whom it is one."""
        if not self._state.context:
            raise _refused("nothing was masked yet")
        left = require_names(survivors)
        if self._state.survivors and left != self._state.survivors:
            raise _refused("it was told other survivors before")
        self._check_part(left, self._state.sharers, "who delivered", self._state.least)
        self._state = replace(self._state, survivors=left)
        return self._key.sign(survivors_body(self._state.context, left))

    def unmask(self, signatures: Mapping[str, bytes]) -> Unmasking:
        """Its shares, for a quorum of survivors who signed the list that it signed; `signatures` by name."""
        cohort, state = self._require_cohort(), self._state
        if not state.survivors:
            raise _refused("no survivors were named yet")
        body, quorum = survivors_body(state.context, state.survivors), max(cohort.plan.quorum, state.least)
        agreeing = [name for name in state.survivors if self._has_signed(name, signatures.get(name), body)]
        if len(agreeing) < quorum:
            raise _refused(f"{len(agreeing)} members agree with it on who delivered, and it takes {quorum}")
        shares = self._opened(cohort)
        seeds = {name: share[SHARE_BYTES:] for name, share in shares.items() if name in state.survivors}
        keys = {name: share[:SHARE_BYTES] for name, share in shares.items() if name not in state.survivors}
        return Unmasking(seeds, keys)

    # -- what it checks ------------------------------------------------------------------------------------------------

    def _check_cohort(self, cohort: Cohort) -> None:
        if cohort.session.digest != self.session.digest or cohort.by_name.get(self.name) != self.advertise():
            raise _refused("the cohort is of another session, or has other keys under its name")
        unknown = [one.name for one in cohort.adverts if one.name not in self._members]
        if unknown:
            raise _refused(f"not on this site's roster: {', '.join(unknown[:10])}")
        unsigned = [one.name for one in cohort.adverts if not one.is_signed(self.session, self._members)]
        if unsigned:
            raise _refused(f"keys that their owners have not signed: {', '.join(unsigned[:10])}")
        try:
            needed = max(self._least, cohort.plan.quorum)
        except ConfigError as error:
            raise _refused(str(error)) from None
        if len(cohort.names) < needed:
            raise _refused(f"a cohort of {len(cohort.names)}, and the least is {needed}")

    def _check_part(self, part: tuple[str, ...], whole: tuple[str, ...], what: str, least: int) -> None:
        """Of a list of those who are left: it is one of them, and they are enough of all and of its neighbours."""
        cohort = self._require_cohort()
        left = set(part)
        if self.name not in left or not left <= set(whole):
            raise _refused(f"{what}: the list leaves it out, or holds others than before")
        needed = max(self._least, least, cohort.plan.quorum)
        if len(part) < needed:
            raise _refused(f"{what}: {len(part)} members, and the least is {needed}")
        near = len(left & set(cohort.holders(self.name)))
        if near < cohort.plan.threshold:
            raise _refused(f"{what}: {near} of those who hold its shares, and it takes {cohort.plan.threshold}")

    def _has_signed(self, name: str, signature: bytes | None, body: bytes) -> bool:
        key = self._members.get(name)
        return key is not None and signature is not None and verifies(key, signature, body)

    def _require_cohort(self) -> Cohort:
        if self._state.cohort is None:
            raise _refused("no cohort was named yet")
        return self._state.cohort

    # -- secrets -------------------------------------------------------------------------------------------------------

    @property
    def _mask_private(self) -> bytes:
        return derive(self._state.seed, b"fedkit-mask-key-1")

    @functools.cached_property
    def _mask_key(self) -> PrivateKey:
        return PrivateKey(self._mask_private)

    @functools.cached_property
    def _share_key(self) -> PrivateKey:
        return PrivateKey(derive(self._state.seed, b"fedkit-share-key-1"))

    @property
    def _own_seed(self) -> bytes:
        return derive(self._state.seed, b"fedkit-own-seed-1")

    def _others(self, cohort: Cohort) -> tuple[str, ...]:
        return cohort.neighbours(self.name)

    def _dealt(self, cohort: Cohort, kind: bytes) -> dict[str, bytes]:
        """The shares of its mask key or of its own mask's seed by holder, itself among them."""
        secret = self._mask_private if kind == b"key" else self._own_seed
        seed = derive(self._state.seed, b"fedkit-shares-1", kind, cohort.digest)
        points = {name: cohort.points[name] for name in cohort.holders(self.name)}
        shares = split(secret, cohort.plan.threshold, list(points.values()), seed)
        return {name: shares[point] for name, point in points.items()}

    def _sealed(self, cohort: Cohort, to: str, shares: bytes) -> bytes:
        key, bound = self._channel(cohort, to, self.name, to)
        return sealed(key, shares, bound)

    def _channel(self, cohort: Cohort, peer: str, sender: str, recipient: str) -> tuple[bytes, bytes]:
        """The key of one message between it and a peer, and what the message is bound to."""
        bound = packed(b"fedkit-channel-1", cohort.digest, sender.encode(), recipient.encode())
        if peer not in self._agreed_with:
            self._agreed_with[peer] = self._agreed(self._share_key, cohort.by_name[peer].share_key, peer)
        return derive(self._agreed_with[peer], bound), bound

    @staticmethod
    def _agreed(private: PrivateKey, public: bytes, peer: str) -> bytes:
        try:
            return private.agree(public)
        except PayloadError:
            raise _refused(f"nobody can agree with a key of {peer}") from None

    def _mask_keys(self, cohort: Cohort, sharers: tuple[str, ...], context: bytes) -> tuple[list[bytes], list[bytes]]:
        """The keys of the masks that are added, and of those that are taken off: between two, the first one adds."""
        own = self_key(self._own_seed, context, self.name)
        keys = {
            peer: pair_key(self._agreed(self._mask_key, cohort.by_name[peer].mask_key, peer), context, self.name, peer)
            for peer in sorted(set(sharers) & set(self._others(cohort)))
        }
        plus = [key for peer, key in keys.items() if self.name < peer]
        return [own, *plus], [key for peer, key in keys.items() if peer < self.name]

    def _opened(self, cohort: Cohort) -> dict[str, bytes]:
        """Both shares (66 bytes) of each member it holds any of: of its mask key, and of its own mask's seed."""
        found = {self.name: self._dealt(cohort, b"key")[self.name] + self._dealt(cohort, b"seed")[self.name]}
        for sender, text in self._state.inbox.items():
            key, bound = self._channel(cohort, sender, sender, self.name)
            shares = opened(key, text, bound)
            if shares is not None:
                found[sender] = shares
        return found

    # -- durable state -------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All it must remember, secrets included: to be kept like a private key, until the session is over."""
        state = self._state
        cohort = b"" if state.cohort is None else state.cohort.to_bytes()
        names = (packed(*(name.encode() for name in part)) for part in (state.sharers, state.survivors))
        told = (self.session.digest, self.name.encode(), state.seed, cohort, to_mapping(state.inbox), state.context)
        return packed(_LABEL, *told, *names, state.least.to_bytes(8, "little"))

    @classmethod
    def restore(
        cls,
        data: bytes,
        session: Session,
        name: str,
        key: Ed25519PrivateKey,
        members: Mapping[str, str],
        *,
        least: int = LEAST_COHORT,
    ) -> Member:
        """The member that `to_bytes` wrote; raises `PayloadError` for anything else, another session or name."""
        label, digest, who, seed, cohort, inbox, context, sharers, survivors, held = unpacked(data, 10)
        if (label, digest, who) != (_LABEL, session.digest, name.encode()) or len(seed) != SECRET_BYTES:
            raise PayloadError("this is not the state of this member in this session")
        if len(context) not in (0, DIGEST_BYTES):
            raise PayloadError("a member's state is damaged")
        found = cls(session, name, key, members, least=least)
        known = Cohort.from_bytes(session, cohort) if cohort else None
        letters = Shares(mapping_from(inbox)).sealed
        least_held = int.from_bytes(held, "little")
        found._state = _State(seed, known, names_from(sharers), letters, context, names_from(survivors), least_held)
        return found


def _check_vector(vector: Words) -> None:
    if vector.dtype != np.uint32 or vector.ndim != 1 or not vector.size or not vector.flags.c_contiguous:
        raise ConfigError("a vector to be masked is one contiguous row of uint32, and not empty")


def _refused(detail: str) -> Refused:
    return Refused(Reason.MASKING, detail)
