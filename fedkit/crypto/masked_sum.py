"""The coordinator's side of a masked sum: it passes messages on, adds vectors, and takes off the masks that are left.

Values in, values out, as in `fedkit.crypto.member`. The vectors stay with the caller, in memory or in files; what a
`Sum` keeps is small and follows from the members' messages: whoever has journaled those can make it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Any

from fedkit.crypto.masks import KEY_BYTES, PrivateKey, apply_masks
from fedkit.crypto.member import commitment_to, context_of, pair_key, self_key, survivors_body
from fedkit.crypto.messages import (
    Advertised,
    Cohort,
    Session,
    Shares,
    Told,
    Unmasking,
    verifies,
)
from fedkit.crypto.ring import Words
from fedkit.crypto.shamir import recover
from fedkit.errors import BelowThreshold, ConfigError, PayloadError, Reason, Refused, SumSpoiled

__all__ = ["Step", "Sum"]

_BLOCK = 1 << 16  # words that are added at a time, which stay in the cache of a processor's core
_PROBE = PrivateKey(bytes(range(KEY_BYTES)))  # of nobody, to try public keys with


class Step(IntEnum):
    """What a sum waits for."""

    ADVERTS = 0
    SHARES = 1
    VECTORS = 2
    SIGNATURES = 3
    UNMASKINGS = 4
    DONE = 5


class Sum:
    """One masked sum, from keys to the opened total. Messages of a step come in any order, and twice if need be.

    `members` are the roster's keys by name: what is not signed by them is turned away here, because one bad advert
    would make all honest members refuse the cohort. A message that is wrong raises `Refused` and costs its sender its
    part, nothing else. Each `close_` step goes on with those who are there, and raises `BelowThreshold` where they are
    too few: fewer than the quorum, or than `least`.
    """

    def __init__(self, session: Session, told: Told, members: Mapping[str, str] | None = None, least: int = 0) -> None:
        self.session, self.told = session, told
        self._least = least
        self.step = Step.ADVERTS
        self.suspects: set[str] = set()
        self._members = members
        self._adverts: dict[str, Advertised] = {}
        self._cohort: Cohort | None = None
        self._shares: dict[str, Shares] = {}
        self._delivered: set[str] = set()
        self._words = 0
        self._signatures: dict[str, bytes] = {}
        self._unmaskings: dict[str, Unmasking] = {}

    @property
    def cohort(self) -> Cohort:
        """U1: who advertised in time."""
        if self._cohort is None:
            raise Refused(Reason.MASKING, "the cohort is not known yet")
        return self._cohort

    @property
    def sharers(self) -> tuple[str, ...]:
        """U2: who shared in time."""
        return tuple(sorted(self._shares))

    @property
    def survivors(self) -> tuple[str, ...]:
        """U3: whose vector is in the sum."""
        return tuple(sorted(self._delivered))

    # -- 0: keys -------------------------------------------------------------------------------------------------------

    def advertise(self, advert: Advertised) -> None:
        """Takes a member's keys."""
        self._require(Step.ADVERTS)
        if self._members is not None and not advert.is_signed(self.session, self._members):
            raise Refused(Reason.MASKING, f"{advert.name} has not signed its keys, or is not on the roster")
        others = {key for name, one in self._adverts.items() if name != advert.name for key in one.keys}
        if len({*advert.keys, *others}) < len(advert.keys) + len(others):
            raise Refused(Reason.MASKING, f"{advert.name} has a key twice, or another member's")
        try:
            _PROBE.agree(advert.mask_key), _PROBE.agree(advert.share_key)
        except PayloadError as error:
            raise Refused(Reason.MASKING, f"{advert.name}: {error}") from None
        _put(self._adverts, advert.name, advert)

    def close_adverts(self) -> Cohort:
        """The cohort, to be told to all of it."""
        self._require(Step.ADVERTS)
        cohort = Cohort.of(self.session, self._adverts.values())
        try:
            _ = cohort.plan
        except ConfigError as error:
            why = "too few for any sum" if len(cohort.names) < 2 else str(error)
            raise BelowThreshold(f"{len(cohort.names)} members sent keys: {why}") from None
        self._cohort = cohort
        self._require_quorum(cohort.names, "sent keys")
        self.step = Step.SHARES
        return cohort

    # -- 1: shares -----------------------------------------------------------------------------------------------------

    def share(self, name: str, shares: Shares) -> None:
        """Takes the shares a member deals."""
        self._require(Step.SHARES, name, self.cohort.names)
        if set(shares.sealed) != set(self.cohort.neighbours(name)):
            raise Refused(Reason.MASKING, f"{name} deals to others than its neighbours")
        _put(self._shares, name, shares)

    def close_shares(self) -> tuple[str, ...]:
        """Who shared, to be told to them with their `inbox`."""
        self._require(Step.SHARES)
        self._require_quorum(self.sharers, "shared")
        self.step = Step.VECTORS
        return self.sharers

    def inbox(self, name: str) -> Shares:
        """What a member's neighbours deal to it, by sender."""
        senders = set(self.cohort.neighbours(name)) & set(self._shares)
        return Shares({sender: self._shares[sender].sealed[name] for sender in sorted(senders)})

    # -- 2: vectors ----------------------------------------------------------------------------------------------------

    def deliver(self, name: str, words: int) -> None:
        """Notes that a member's masked vector of so many words is here, and will be in the sum."""
        self._require(Step.VECTORS, name, self.sharers)
        if words < 1 or self._words not in (0, words):
            raise Refused(Reason.SHAPE, f"{name} delivers {words} words, and others {self._words}")
        self._words = words
        self._delivered.add(name)

    def close_vectors(self) -> tuple[str, ...]:
        """Who delivered, to be told to them; their vectors are those that are added up, and no other."""
        self._require(Step.VECTORS)
        self._require_quorum(self.survivors, "delivered")
        self.step = Step.SIGNATURES
        return self.survivors

    # -- 3: consistency ------------------------------------------------------------------------------------------------

    def confirm(self, name: str, signature: bytes) -> None:
        """Takes a survivor's signature under who delivered."""
        self._require(Step.SIGNATURES, name, self.survivors)
        key = None if self._members is None else self._members.get(name, "")
        if key is not None and not verifies(key, signature, survivors_body(self._context, self.survivors)):
            raise Refused(Reason.MASKING, f"{name} signed something else: it was told something else")
        _put(self._signatures, name, signature)

    def close_signatures(self) -> dict[str, bytes]:
        """The signatures by name, to be told to those who gave them."""
        self._require(Step.SIGNATURES)
        self._require_quorum(self._signatures, "signed who delivered")
        self.step = Step.UNMASKINGS
        return dict(self._signatures)

    # -- 4: opening ----------------------------------------------------------------------------------------------------

    def unmask(self, name: str, unmasking: Unmasking) -> None:
        """Takes a survivor's shares."""
        self._require(Step.UNMASKINGS, name, self.survivors)
        held, left = set(self.cohort.holders(name)), set(self.survivors)
        if not set(unmasking.seeds) <= held & left or not set(unmasking.keys) <= held & (set(self.sharers) - left):
            raise Refused(Reason.MASKING, f"{name} gives shares that it does not hold, or nobody asked for")
        _put(self._unmaskings, name, unmasking)

    def open(self, total: Words) -> None:
        """Takes all masks off the sum of the survivors' vectors, in place.

        Raises `BelowThreshold` for too few shares, and `SumSpoiled` where shares give a secret other than the one that
        was committed to, and leaving one out does not help: it names the member whose secret it is, who dealt false
        shares or got them back false. `suspects` are those whose shares did not fit the others'. `total` is then as it
        was.
        """
        self._require(Step.UNMASKINGS)
        if total.size != self._words:
            raise ConfigError(f"the sum has {total.size} words, and the vectors have {self._words}")
        self._require_quorum(self._unmaskings, "gave their shares")
        plus, minus = self._left_over()
        apply_masks(total, plus, minus)
        self.step = Step.DONE

    def _left_over(self) -> tuple[list[bytes], list[bytes]]:
        """The keys of masks to add, and of those to take off: of survivors' own, and between them and the dropped."""
        plus: list[bytes] = []
        minus = [self_key(self._seed_of(name), self._context, name) for name in self.survivors]
        for dropped in sorted(set(self.sharers) - self._delivered):
            private = PrivateKey(self._key_of(dropped))
            for peer in sorted(self._delivered & set(self.cohort.neighbours(dropped))):
                key = pair_key(private.agree(self.cohort.by_name[peer].mask_key), self._context, peer, dropped)
                (minus if peer < dropped else plus).append(key)
        return plus, minus

    def _seed_of(self, name: str) -> bytes:
        commitment = self.cohort.by_name[name].commitment
        given = {who: one.seeds[name] for who, one in self._unmaskings.items() if name in one.seeds}
        return self._secret(name, given, lambda seed: commitment_to(seed) == commitment)

    def _key_of(self, name: str) -> bytes:
        public = self.cohort.by_name[name].mask_key
        given = {who: one.keys[name] for who, one in self._unmaskings.items() if name in one.keys}
        return self._secret(name, given, lambda private: PrivateKey(private).public == public)

    def _secret(self, name: str, given: Mapping[str, bytes], fits: Callable[[bytes], bool]) -> bytes:
        """One member's secret from the shares of all or, if that fails, of all but one of those who gave any."""
        threshold, points = self.cohort.plan.threshold, self.cohort.points
        if len(given) < threshold:
            raise BelowThreshold(f"{len(given)} members gave shares of a secret of {name}, and it takes {threshold}")
        for left_out, chosen in _choices(sorted(given), threshold):
            found = _recovered({points[holder]: given[holder] for holder in chosen}, threshold)
            if found is not None and fits(found):
                self.suspects |= left_out
                return found
        raise SumSpoiled(f"the shares of a secret of {name} are false: no sum can be had with it", (name,))

    # -- what holds in every step --------------------------------------------------------------------------------------

    @property
    def _context(self) -> bytes:
        return context_of(self.cohort, self.sharers, self.told, self._words)

    def _require(self, step: Step, name: str | None = None, known: Iterable[str] = ()) -> None:
        if self.step != step:
            late = self.step > step
            raise Refused(Reason.LATE if late else Reason.MASKING, f"the sum waits for {self.step.name.lower()}")
        if name is not None and name not in known:
            raise Refused(Reason.UNKNOWN, f"{name} has no part in this step")

    def _require_quorum(self, names: Iterable[str], what: str) -> None:
        count, quorum = len(list(names)), max(self.cohort.plan.quorum, self._least)
        if count < quorum:
            raise BelowThreshold(f"{count} of {len(self.cohort.names)} members {what}, and it takes {quorum}")


def _put(known: dict[str, Any], name: str, value: object) -> None:
    """Keeps a message; the same one again is nothing new, and another one is refused."""
    if known.setdefault(name, value) != value:
        raise Refused(Reason.DUPLICATE, f"{name} said something else before")


def _choices(holders: list[str], threshold: int) -> Iterator[tuple[set[str], list[str]]]:
    """Sets of holders that may open a secret, each with whom it leaves out: nobody, then one after the other."""
    yield set(), holders[:threshold]
    for left_out in holders[:threshold]:
        others = [holder for holder in holders if holder != left_out]
        if len(others) >= threshold:
            yield {left_out}, others[:threshold]


def _recovered(shares: Mapping[int, bytes], threshold: int) -> bytes | None:
    try:
        return recover(shares, threshold)
    except (PayloadError, SumSpoiled):
        return None
