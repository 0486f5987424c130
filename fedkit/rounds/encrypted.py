"""An encrypted sum over one group, from the coordinator's side: six calls, of which the fourth brings the vectors.

As in `fedkit.rounds.masked`, each step is a call like any other, with ids and a journaled end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from typing import TypeAlias

import numpy as np

from fedkit.config import Participation
from fedkit.crypto.ceremony import BoxKey, Ceremony, Delivery, Handover, refused
from fedkit.crypto.chunks import Scheme
from fedkit.crypto.holder import Announced, attestation, enough
from fedkit.crypto.masks import packed
from fedkit.crypto.member import LEAST_COHORT
from fedkit.crypto.messages import Told, to_mapping, verifies
from fedkit.crypto.ring import Words
from fedkit.errors import BelowThreshold, Reason, RoundLost
from fedkit.rounds.assignment import MaskStep, Parcel
from fedkit.rounds.call import Refusal
from fedkit.rounds.layout import words_manifest
from fedkit.rounds.masked import Ask, Asked, Refuse, RepliesFold, Take, VectorsFold, ask_each
from fedkit.weights import Weights

__all__ = ["Add", "EncryptedSum"]

_KEYHOLDERS = 3  # that are tried
_OPENERS = 2  # who must say the same
_MOST_OPENERS = 5  # that are asked

Add: TypeAlias = Callable[[Scheme, bytes, int, Mapping[str, Weights]], Awaitable[tuple[Words, dict[str, str]]]]


class EncryptedSum:
    """Asks step after step. `members` are the roster's keys; what they have not signed is turned away here.

    `turn` says whose turn it is to make the key, and to open the sum: another one's each round and attempt, so that no
    member can keep a round from its end by itself. `add` is the transport's; `refuse` puts on record what costs a
    client its part. Raises `BelowThreshold` where too few are left, which abandons the round; `RoundLost` where members
    have signed a sum that cannot be opened: they sign no other one in this round.
    """

    def __init__(
        self,
        ceremony: Ceremony,
        told: Told,
        members: Mapping[str, str],
        values: int,
        turn: int,
        ask: Ask,
        add: Add,
        refuse: Refuse,
    ) -> None:
        self._ceremony, self._told, self._members, self._values = ceremony, told, members, values
        self._turn, self._ask, self._add, self._refuse = turn, ask, add, refuse
        self._deadline_s: float | None = None

    async def opened(self, cohort: Collection[str], rule: Participation) -> tuple[Words, tuple[str, ...]]:
        """The sum of all whose vectors came under `rule`, and who they are."""
        self._deadline_s = rule.deadline_s
        handover, holders = await self._holders(cohort)
        uploads = VectorsFold(holders)
        await self._ask(Asked("encrypt", dict.fromkeys(holders, to_mapping(holders)), uploads, rule))
        total, bad = await self._add(self._ceremony.scheme, handover.fingerprint, self._values, uploads.vectors)
        for name, why in bad.items():
            self._refuse(Refusal(name, Reason.ENCRYPTION, why))
        names = tuple(sorted(uploads.kept.keys() - bad))
        _require(len(names), max(LEAST_COHORT, rule.quorum or 0), "have encrypted")
        parcel = Parcel(Weights(words_manifest(total.size), total.view(np.float32)))
        attested = await self._attested(Announced(names, parcel.payload_digest), handover)
        return await self._open(parcel, attested), names

    async def _holders(self, cohort: Collection[str]) -> tuple[Handover, dict[str, bytes]]:
        """Which key it is, and the signatures of all who got it."""
        boxes: dict[str, BoxKey] = {}

        def offer(name: str, reply: bytes) -> None:
            box = BoxKey.from_bytes(reply)
            if box.name != name or not box.is_signed(self._ceremony.digest, self._members):
                raise refused(f"{name} has not signed its key, or is not on the roster")
            boxes[name] = box

        await self._each("offer", dict.fromkeys(cohort, b""), offer)
        _require(len(boxes), LEAST_COHORT, "sent keys")
        delivery = await self._delivered([boxes[name] for name in sorted(boxes)])
        signed: dict[str, bytes] = {}

        def receive(name: str, reply: bytes) -> None:
            if not delivery.handover.is_confirmed(self._ceremony, name, reply, self._members):
                raise refused(f"{name} has not signed that it got the key")
            signed[name] = reply

        await self._each("receive", {name: delivery.to(name).to_bytes() for name in delivery.handover.names}, receive)
        _require(len(signed), LEAST_COHORT, "got the key")
        return delivery.handover, signed

    async def _delivered(self, boxes: list[BoxKey]) -> Delivery:
        """The key of the first member that makes one as it should."""
        found: list[Delivery] = []

        def deliver(name: str, reply: bytes) -> None:
            delivery = Delivery.from_bytes(reply)
            if delivery.handover.keyholder != name or list(delivery.handover.boxes) != boxes:
                raise refused(f"{name} gives the key to others than those who asked, or in another name")
            delivery.handover.check(self._ceremony, self._members, LEAST_COHORT)
            found.append(delivery)

        for name in self._turns([box.name for box in boxes])[:_KEYHOLDERS]:
            await self._each("deliver", {name: packed(*(box.to_bytes() for box in boxes))}, deliver)
            if found:
                return found[0]
        raise BelowThreshold("no member made the key of the sum")

    async def _attested(self, announced: Announced, handover: Handover) -> dict[str, bytes]:
        """The signatures under the sum, of enough members for it to be opened."""
        statement = announced.statement(self._ceremony, handover, self._told)
        signed: dict[str, bytes] = {}

        def attest(name: str, reply: bytes) -> None:
            if not verifies(self._members[name], reply, attestation(statement, name)):
                raise refused(f"{name} has not signed the sum")
            signed[name] = reply

        await self._each("attest", dict.fromkeys(announced.names, announced.to_bytes()), attest)
        needed = max(enough(len(handover.names)), LEAST_COHORT)
        if len(signed) < needed:
            raise RoundLost(f"{len(signed)} members signed the encrypted sum, and {needed} are needed to open it")
        return signed

    async def _open(self, total: Parcel, attested: Mapping[str, bytes]) -> Words:
        """What two members say that the sum is, bit for bit."""
        said: list[Words] = []
        for group in self._groups(sorted(attested)):
            fold = VectorsFold(group)
            rule = Participation(quorum=1, deadline_s=self._deadline_s)
            await self._ask(Asked("open", dict.fromkeys(group, to_mapping(attested)), fold, rule, total))
            for name in sorted(fold.kept):
                words = fold.vectors[name].vector.view(np.uint32)
                if any(np.array_equal(words, other) for other in said):
                    return words
                said.append(words)
        raise RoundLost(f"no {_OPENERS} of the members asked say the same of the encrypted sum")

    def _groups(self, names: list[str]) -> Iterator[list[str]]:
        """Who is asked to open the sum: two first, then others one by one."""
        turns = self._turns(names)[:_MOST_OPENERS]
        yield turns[:_OPENERS]
        yield from ([name] for name in turns[_OPENERS:])

    def _turns(self, names: list[str]) -> list[str]:
        """The names, beginning with the one whose turn it is."""
        start = self._turn % len(names)
        return [*names[start:], *names[:start]]

    async def _each(self, step: MaskStep, messages: Mapping[str, bytes], take: Take) -> None:
        rule = Participation(quorum=1, deadline_s=self._deadline_s)
        await ask_each(self._ask, self._refuse, Asked(step, messages, RepliesFold(messages), rule), take)


def _require(members: int, least: int, what: str) -> None:
    if members < least:
        raise BelowThreshold(f"{members} members {what}, and {least} are needed")
