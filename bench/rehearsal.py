"""A whole masked sum in one process, for tests and figures: every message is made, and nothing is sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fedkit.crypto.masked_sum import Step, Sum
from fedkit.crypto.member import Member
from fedkit.crypto.ring import Words

__all__ = ["rehearse"]

_NOBODY: Mapping[str, Step] = {}


def rehearse(
    masked: Sum,
    members: Mapping[str, Member],
    vectors: Mapping[str, Words],
    gone: Mapping[str, Step] = _NOBODY,
) -> Words:
    """The sum of the vectors of all who deliver theirs (`masked.survivors`); the vectors stay as they are.

    `gone` names members with the first step in which they are silent. Raises what `masked` and the members raise.
    """

    def here(step: Step) -> Iterator[Member]:
        return (member for name, member in members.items() if gone.get(name, Step.DONE) > step)

    for member in here(Step.ADVERTS):
        masked.advertise(member.advertise())
    cohort = masked.close_adverts()
    for member in here(Step.SHARES):
        masked.share(member.name, member.share(cohort))
    sharers = masked.close_shares()
    total = np.zeros_like(next(iter(vectors.values())))
    for member in here(Step.VECTORS):
        words = vectors[member.name].copy()
        member.mask(sharers, masked.inbox(member.name), masked.told, words)
        masked.deliver(member.name, words.size)
        total += words
    survivors = masked.close_vectors()
    for member in here(Step.SIGNATURES):
        masked.confirm(member.name, member.confirm(survivors))
    signatures = masked.close_signatures()
    for member in here(Step.UNMASKINGS):
        masked.unmask(member.name, member.unmask(signatures))
    masked.open(total)
    return total
