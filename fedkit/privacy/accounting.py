"""What a history of noisy steps has cost.

Add/remove neighbours and Poisson sampling only: each of N rows takes part in a step with probability q, and the sum
of clipped contributions gets noise of `noise_multiplier` times the clip, Gaussian, or Skellam where clients share it.
Epsilon is enforced by Rényi differential privacy (Mironov 2017; of the sampled Gaussian: Mironov, Talwar and Zhang
2019) and reported as the smaller of that and, for Gaussian noise, a bound by privacy loss distributions (Koskela et al.
2020), which `dp_accounting` computes.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedkit.errors import ConfigError
from fedkit.privacy.skellam import divergence
from fedkit.work import Parts, Steps

__all__ = ["ORDERS", "Spent", "Tally", "epsilon_of", "noise_for", "rdp_of", "spent"]

ORDERS: tuple[int, ...] = (*range(2, 65), *range(68, 129, 4), *range(144, 257, 16), 320, 384, 512)
_PLD_KINDS = 8  # different (noise, q) pairs of which a privacy loss distribution is made; each takes about a second
_PLD_MOST_EPSILON = 100.0  # beyond which nobody needs a tighter bound
_MOST_NOISE = 1e6

Kind: TypeAlias = tuple[float, float, Parts | None]  # noise multiplier, q, and who adds the noise


@dataclass(frozen=True, slots=True)
class Spent:
    """Epsilon at `delta`: by RDP, and by privacy loss distributions where that was computed."""

    delta: float
    rdp: float
    pld: float | None

    @property
    def epsilon(self) -> float:
        """The smaller of the two: both are upper bounds."""
        return self.rdp if self.pld is None else min(self.rdp, self.pld)


@dataclass(frozen=True, slots=True)
class Tally:
    """Steps counted by kind, which is all that their cost depends on, and their divergence so far."""

    counts: Mapping[Kind, int] = field(default_factory=dict)
    rdp: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(ORDERS)), compare=False, repr=False)

    @classmethod
    def of(cls, history: Iterable[Steps]) -> Tally:
        """All these steps."""
        counts: Counter[Kind] = Counter()
        for one in history:
            counts[_kind(one)] += one.count
        rdp = np.zeros(len(ORDERS))
        for kind, count in counts.items():
            if count:
                rdp += count * _rdp_of_step(*kind)
        return cls(counts, rdp)

    def plus(self, steps: Steps) -> Tally:
        """With these steps too."""
        kind = _kind(steps)
        rdp = self.rdp + steps.count * _rdp_of_step(*kind) if steps.count else self.rdp
        return Tally({**self.counts, kind: self.counts.get(kind, 0) + steps.count}, rdp)

    def __iter__(self) -> Iterator[Steps]:
        """The steps of each kind."""
        return (Steps(noise, q, count, parts) for (noise, q, parts), count in self.counts.items())


def _kind(steps: Steps) -> Kind:
    return steps.noise_multiplier, steps.q, steps.parts


def rdp_of(history: Iterable[Steps]) -> npt.NDArray[np.float64]:
    """The Rényi divergence at each of `ORDERS` of all steps together: it adds up."""
    return history.rdp if isinstance(history, Tally) else Tally.of(history).rdp


@functools.lru_cache(maxsize=4096)
def _rdp_of_step(sigma: float, q: float, parts: Parts | None = None) -> npt.NDArray[np.float64]:
    """Of one step, for whole orders a: log(sum_k C(a, k) (1-q)^(a-k) q^k exp((k - 1) D(k))) / (a - 1).

    D(k) is what the step diverges by where all rows take part: k / 2 sigma² for Gaussian noise, infinite for none, and
    `fedkit.privacy.skellam.divergence` for noise in parts. Mironov, Talwar and Zhang 2019, sections 3.1 and 3.3: the
    sum bounds both directions where some isometry swaps the two distributions, as x -> b - x does for noise that is
    symmetric, moved by b or not.
    """
    orders = np.array(ORDERS, dtype=np.float64)
    from scipy.special import logsumexp  # a quarter of a second, which no process without privacy spends

    if q == 0.0:
        return np.zeros(len(ORDERS))
    if sigma == 0.0:
        return np.full(len(ORDERS), math.inf)
    if q == 1.0:
        return _whole(orders, sigma, parts)
    k, binomials = _binomials()
    whole = (k - 1.0) * np.where(k < 2.0, 0.0, _whole(k, sigma, parts))
    terms = binomials + (orders[:, None] - k) * math.log1p(-q) + k * math.log(q) + whole
    found: npt.NDArray[np.float64] = logsumexp(terms, axis=1) / (orders - 1.0)
    return np.maximum(found, 0.0)


def _whole(orders: npt.NDArray[np.float64], sigma: float, parts: Parts | None) -> npt.NDArray[np.float64]:
    """The divergence of a step in which all rows take part."""
    return orders / (2.0 * sigma**2) if parts is None else divergence(orders, sigma, parts)


@functools.lru_cache(maxsize=1)
def _binomials() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """0 .. the largest order, and the logarithms of the binomial coefficients of each order, -inf beyond it."""
    from scipy.special import gammaln

    orders, k = np.array(ORDERS, dtype=np.float64)[:, None], np.arange(max(ORDERS) + 1, dtype=np.float64)
    within = k <= orders
    found = gammaln(orders + 1) - gammaln(k + 1) - gammaln(np.where(within, orders - k, 0) + 1)
    return k, np.where(within, found, -np.inf)


def epsilon_of(rdp: npt.NDArray[np.float64], delta: float) -> float:
    """The epsilon that a divergence at each of `ORDERS` means at `delta`.

    By Canonne, Kamath and Steinke 2020, proposition 12; none where delta bounds the total variation distance
    (Bretagnolle-Huber).
    """
    if not np.isfinite(rdp).any():
        return math.inf
    if not rdp.any() or bool((delta**2 + np.expm1(-rdp) > 0.0).any()):
        return 0.0
    return max(float((rdp + _fixed_terms(delta)).min()), 0.0)


@functools.lru_cache(maxsize=64)
def _fixed_terms(delta: float) -> npt.NDArray[np.float64]:
    """What of the bounds does not depend on the divergence."""
    orders = np.array(ORDERS, dtype=np.float64)
    terms: npt.NDArray[np.float64] = np.log1p(-1.0 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1.0)
    return terms


def spent(history: Iterable[Steps], delta: float, *, tight: bool = True) -> Spent:
    """What all steps together have cost; `tight` asks for privacy loss distributions too, which takes a second a kind.

    Those are left out where there are many different kinds of steps, or next to no privacy.
    """
    tally = history if isinstance(history, Tally) else Tally.of(history)
    rdp = epsilon_of(tally.rdp, delta)
    if not tight:
        return Spent(delta, rdp, None)
    steps = [one for one in tally if one.count]
    kinds = tuple(sorted(((one.noise_multiplier, one.q), one.count) for one in steps))
    in_parts = any(one.parts is not None for one in steps)  # for which nobody has computed such distributions
    if in_parts or not kinds or len(kinds) > _PLD_KINDS or rdp > _PLD_MOST_EPSILON:
        return Spent(delta, rdp, None)
    return Spent(delta, rdp, _pld_epsilon(kinds, delta))


@functools.lru_cache(maxsize=64)
def _pld_epsilon(merged: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()  # of add/remove neighbours, unless told otherwise
    for (sigma, q), count in merged:
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), count)
    return float(accountant.get_epsilon(delta))


def noise_for(
    epsilon: float, delta: float, q: float, count: int, before: Iterable[Steps] = (), parts: Parts | None = None
) -> float:
    """The least noise multiplier with which `count` steps at rate `q`, after `before`, stay within epsilon by RDP.

    To three digits, rounded up. Raises `ConfigError` where `before` has spent epsilon already, or no noise will do.
    """
    spent_before = rdp_of(before)
    if epsilon_of(spent_before, delta) >= epsilon:
        raise ConfigError(f"epsilon {epsilon:g} at delta {delta:g} is spent already: nothing is left for new steps")

    def cost(sigma: float) -> float:
        return epsilon_of(spent_before + count * _rdp_of_step(sigma, q, parts), delta)

    low, high = 0.0, 1.0
    while cost(high) > epsilon:
        low, high = high, 2.0 * high
        if high > _MOST_NOISE:
            raise ConfigError(
                f"epsilon {epsilon:g} at delta {delta:g} cannot be kept over {count} steps at a sampling rate "
                f"of {q:g}: ask for fewer rounds or steps, smaller batches, or allow more"
            )
    while high - low > 1e-4 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if cost(middle) > epsilon else (low, middle)
    digits = 3 - math.ceil(math.log10(high))
    return float(math.ceil(high * 10.0**digits) / 10.0**digits)
