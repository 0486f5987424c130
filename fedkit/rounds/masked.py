"""A masked sum over one group, from the coordinator's side: five calls, of which the third brings the vectors.

Each step is a call like any other: its assignments have ids, its accepted set is journaled before the next step is
asked, and a client that is asked again sends what it has. So a sum survives a coordinator that dies at any moment.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from fedkit.aggregation import Fold
from fedkit.config import Participation
from fedkit.crypto.masked_sum import Sum
from fedkit.crypto.masks import packed
from fedkit.crypto.messages import Advertised, Shares, Unmasking, to_mapping
from fedkit.crypto.ring import Words
from fedkit.errors import PayloadError, Reason, Refused
from fedkit.rounds.assignment import MASKED_STEPS, MaskStep, Parcel
from fedkit.rounds.call import Refusal
from fedkit.rounds.layout import Layout
from fedkit.rounds.seat import letter
from fedkit.spool import Spooled
from fedkit.weights import Vector, Weights
from fedkit.work import Answer, Reply, Update

__all__ = ["Ask", "Asked", "EachFold", "MaskedSum", "Refuse", "RepliesFold", "Take", "VectorsFold", "ask_each"]

A = TypeVar("A", bound=Answer)

_BLOCK = 1 << 18  # words that are read of one client at a time


class EachFold(Fold[A]):
    """Keeps what each client answers to one step, by name; vectors stay in files where they lie there."""

    def __init__(self, cohort: Collection[str]) -> None:
        super().__init__(cohort)
        self.kept: dict[str, A] = {}

    def _fold(self, client: str, answer: A | None) -> None:
        if answer is not None:
            self.kept[client] = answer
        super()._fold(client, answer)

    def accumulate(self, answer: A) -> None:
        """Nothing is added up."""


class RepliesFold(EachFold[Reply]):
    """Of a step that is answered by what members say."""

    @property
    def messages(self) -> dict[str, bytes]:
        """What they say, by name."""
        return {name: reply.message for name, reply in self.kept.items()}


class VectorsFold(EachFold[Update]):
    """Of a step that is answered by vectors."""

    @property
    def vectors(self) -> dict[str, Weights]:
        """The vectors, by name."""
        return {name: update.weights for name, update in self.kept.items()}

    def total(self, size: int) -> Words:
        """The exact sum modulo 2^32 of all that were kept, block by block; they have `size` words each."""
        total = np.zeros(size, dtype=np.uint32)
        scratch = np.empty(min(_BLOCK, size), dtype=np.float32)
        for weights in self.vectors.values():
            for start in range(0, size, _BLOCK):
                into = total[start : start + _BLOCK]
                np.add(into, _words(weights, start, scratch[: len(into)]), out=into)
        return total


def _words(weights: Weights, start: int, scratch: Vector) -> Words:
    if isinstance(weights, Spooled):
        weights.values.read(start, scratch)
        return scratch.view(np.uint32)
    return weights.vector[start : start + len(scratch)].view(np.uint32)


@dataclass(frozen=True, slots=True)
class Asked:
    """One step as it is asked: what each client is told, what takes the answers, and what is sent along.

    `parcel` is None where that is the model, or nothing in a step that works nothing out.
    """

    step: MaskStep
    messages: Mapping[str, bytes]
    fold: Fold[Reply] | Fold[Update]
    rule: Participation
    parcel: Parcel | None = None


Ask: TypeAlias = Callable[[Asked], Awaitable[None]]  # one step of all whom it has a message for, on record
Aside: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]  # what long work returns
Refuse: TypeAlias = Callable[[Refusal], None]  # puts a bad reply on record
Take: TypeAlias = Callable[[str, bytes], None]  # one member's reply, or raises why it is none


async def ask_each(ask: Ask, refuse: Refuse, asked: Asked, take: Take) -> None:
    """Asks one step, and takes the replies; a bad one costs its sender its part, on record."""
    await ask(asked)
    assert isinstance(asked.fold, RepliesFold)  # the step is answered by replies
    for name, message in asked.fold.messages.items():
        try:
            take(name, message)
        except Refused as refused:
            refuse(Refusal(name, refused.reason, refused.detail))
        except PayloadError as error:
            reason = Reason.MASKING if asked.step in MASKED_STEPS else Reason.ENCRYPTION
            refuse(Refusal(name, reason, str(error)))


class MaskedSum:
    """Drives a `Sum` by asking step after step; `refuse` puts a bad reply on record, which costs its sender its part.

    Raises `BelowThreshold` or `SumSpoiled`, which abandon the round, where it cannot be opened.
    """

    def __init__(self, masked: Sum, ask: Ask, aside: Aside, refuse: Refuse) -> None:
        self._sum = masked
        self._ask = ask
        self._aside = aside
        self._refuse = refuse

    async def opened(
        self, cohort: Collection[str], layout: Layout, rule: Participation
    ) -> tuple[Words, tuple[str, ...]]:
        """The sum of all whose vectors came under `rule`, and who they are."""
        found = self._sum
        await self._each("advertise", dict.fromkeys(cohort, b""), rule, self._advertise)
        known = found.close_adverts()
        told = dict.fromkeys(known.names, known.to_bytes())
        await self._each("share", told, rule, lambda name, reply: found.share(name, Shares.from_bytes(reply)))
        total = await self._vectors(layout, rule)
        survivors = found.close_vectors()
        told = dict.fromkeys(survivors, packed(*(name.encode() for name in survivors)))
        await self._each("confirm", told, rule, found.confirm)
        signed = found.close_signatures()
        told = dict.fromkeys(signed, to_mapping(signed))
        await self._each("unmask", told, rule, lambda name, reply: found.unmask(name, Unmasking.from_bytes(reply)))
        await self._aside(lambda: found.open(total))
        return total, survivors

    async def _vectors(self, layout: Layout, rule: Participation) -> Words:
        sharers = self._sum.close_shares()
        fold = VectorsFold(sharers)
        messages = {name: letter(sharers, self._sum.inbox(name)) for name in sharers}
        await self._ask(Asked("vector", messages, fold, rule))
        for name in fold.clients:
            self._sum.deliver(name, layout.words)
        total: Words = await self._aside(lambda: fold.total(layout.words))
        return total

    async def _each(self, step: MaskStep, messages: Mapping[str, bytes], rule: Participation, take: Take) -> None:
        """Asks one step, and takes the replies."""
        asked = Asked(step, messages, RepliesFold(messages), Participation(quorum=1, deadline_s=rule.deadline_s))
        await ask_each(self._ask, self._refuse, asked, take)

    def _advertise(self, name: str, reply: bytes) -> None:
        advert = Advertised.from_bytes(reply)
        if advert.name != name:
            raise Refused(Reason.MASKING, f"{name} speaks for {advert.name}")
        self._sum.advertise(advert)
