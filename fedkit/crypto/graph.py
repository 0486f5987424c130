"""Who masks with whom, and how many shares open a secret: everybody up to 200 clients, a sparse graph above.

In a cohort of up to 200 every two members share a mask (Bonawitz et al. 2017). Above that each member does so with
`degree` others (Bell et al. 2020): the members stand in a circle, in an order that a hash of their signed keys gives,
and each is a neighbour of the degree / 2 next to it on either side (a Harary graph). Degree and threshold are the least
for which what must not happen has a probability of at most 2^-bits, computed exactly from the cohort's size and the
assumed shares of clients that collude with the coordinator and that drop out.

Guarantee: for a circle in random order and dropouts that do not depend on it.
Does not protect against: a coordinator that chooses among many lists of keys, or chooses who drops out. Each list that
it can try adds one more chance of 2^-bits; and a member that sees enough of its neighbours survive still can be cut off
from the rest together with those neighbours. In the complete graph there is nothing to choose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

from fedkit.crypto.masks import digest_of
from fedkit.errors import ConfigError

__all__ = ["COMPLETE_UP_TO", "Assumptions", "Plan", "neighbours", "plan"]

COMPLETE_UP_TO = 200


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What shares of a cohort may collude with the coordinator and drop out, and how unlikely failing must be.

    Raises `ConfigError` unless less than a third of the cohort colludes, and at most a third drops out.
    """

    corrupt: float = 0.2
    dropouts: float = 0.3
    bits: int = 40

    def __post_init__(self) -> None:
        """Shares beyond a third leave no threshold that is safe and can be reached."""
        if not 0 <= self.corrupt < 1 / 3 or not 0 <= self.dropouts <= 1 / 3:
            text = f"corrupt and dropouts: less than a third, and at most one, not {self.corrupt} and {self.dropouts}"
            raise ConfigError(text)
        if not 1 <= self.bits <= 256:
            raise ConfigError(f"bits: 1 to 256, not {self.bits}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers of one cohort of `size` members.

    `degree` is the number of neighbours of each; `threshold` shares, of those held by a member and its neighbours, open
    its secrets; `quorum` members of the whole cohort must stay to the end, and sign that they agree on who did.
    `collusion` is the probability that the `corrupt` members read more than the sum, `failure` that it cannot be opened
    though no more than `dropouts` drop out.
    """

    size: int
    degree: int
    threshold: int
    quorum: int
    corrupt: int
    dropouts: int
    collusion: Fraction
    failure: Fraction

    @property
    def is_complete(self) -> bool:
        """Whether every two members are neighbours."""
        return self.degree == self.size - 1

    def __str__(self) -> str:
        return (
            f"{self.size} members, each with {self.degree} neighbours, of which {self.threshold} open a secret; "
            f"{self.quorum} must stay. With {self.corrupt} colluding, more than the sum is read with a probability of "
            f"{_power(self.collusion)}; with {self.dropouts} dropping out, it stays closed with {_power(self.failure)}"
        )


def _power(probability: Fraction) -> str:
    if not probability:
        return "0"
    return f"2^{math.log2(probability.numerator) - math.log2(probability.denominator):.1f}"


@functools.lru_cache(maxsize=256)
def plan(size: int, assumptions: Assumptions = Assumptions(), quorum: int | None = None) -> Plan:
    """The numbers for a cohort of `size`; `quorum` None: two thirds of it, rounded up, and at least 2.

    The quorum must be more than half. Else a coordinator could tell one half of the members that the other half has
    dropped out, and the other half the opposite, and have both kinds of shares of the same member from different ones.
    With 3 members it is 2: one may drop out, and no single one opens anything. A coordinator that lies and has c of n
    members on its side fails as long as 2 quorum > n + c, which two thirds are for almost a third; one that follows the
    protocol, for c < quorum. Raises `ConfigError` for numbers that cannot be kept.
    """
    least = max(-(-2 * size // 3), 2) if quorum is None else quorum
    if not 2 <= size < 2 * least <= 2 * size:
        raise ConfigError(f"a quorum of {least} is not more than half of a cohort of {size}, which has at least 2")
    corrupt, dropouts = math.floor(assumptions.corrupt * size), math.floor(assumptions.dropouts * size)
    if size - dropouts < least or corrupt >= 2 * least - size:
        raise ConfigError(f"quorum: {least} of {size} cannot be with {corrupt} colluding and {dropouts} dropping out")
    complete = Plan(size, size - 1, least, least, corrupt, dropouts, Fraction(0), Fraction(0))
    if size <= COMPLETE_UP_TO:
        return complete
    return _sparse(complete, Fraction(1, 1 << assumptions.bits)) or complete


def _sparse(complete: Plan, limit: Fraction) -> Plan | None:
    """The plan of the least even degree that keeps to `limit`; None where only the complete graph does."""
    plans = (_with_degree(complete, degree, limit) for degree in range(2, complete.size - 1, 2))
    return next((found for found in plans if found is not None), None)


def _with_degree(complete: Plan, degree: int, limit: Fraction) -> Plan | None:
    """The plan of that degree with the least safe threshold, or None where it cannot keep to `limit`.

    Each probability is bounded by the sum over all members (Boole), so that they need not be independent.
    """
    size, cut = complete.size, _cut(complete.size, complete.corrupt + complete.dropouts, degree // 2)
    if cut > limit:
        return None
    read = [cut + size * tail for tail in _tails(size - 1, complete.corrupt, degree)]
    threshold = next((t for t in range(1, degree + 1) if read[t] <= limit), None)
    if threshold is None:
        return None
    failure = size * (1 - _tails(size - 1, size - complete.dropouts, degree)[threshold])
    if failure > limit:
        return None
    return replace(complete, degree=degree, threshold=threshold, collusion=read[threshold], failure=failure)


def _tails(of: int, marked: int, drawn: int) -> list[Fraction]:
    """By count from 0 to `drawn`: the probability of so many marked ones or more among those that are drawn."""
    ways = (math.comb(marked, i) * math.comb(of - marked, drawn - i) for i in range(drawn, -1, -1))
    every = math.comb(of, drawn)
    return [Fraction(more, every) for more in accumulate(ways)][::-1]


def _cut(size: int, gone: int, length: int) -> Fraction:
    """At most the probability that those who are gone cut the circle: somewhere `length` of them stand in a row."""
    return size * Fraction(math.comb(gone, length), math.comb(size, length))


def neighbours(names: Iterable[str], degree: int, seed: bytes) -> dict[str, tuple[str, ...]]:
    """Each member's neighbours, sorted; an even `degree`, or that of the complete graph.

    The members stand in the order of SHA-256 of `seed` and their names.
    """
    circle = sorted(names, key=lambda name: digest_of(b"fedkit-circle-1", seed, name.encode()))
    size = len(circle)
    if degree == size - 1:
        every = sorted(circle)
        return {name: tuple(other for other in every if other != name) for name in circle}
    steps = [*range(-(degree // 2), 0), *range(1, degree // 2 + 1)]
    return {name: tuple(sorted(circle[(i + step) % size] for step in steps)) for i, name in enumerate(circle)}
