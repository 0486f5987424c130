"""Noise of whole numbers that clients add in parts: the Skellam mechanism (Agarwal, Kairouz and Liu 2021).

A Skellam number is the difference of two independent Poisson numbers of one rate; its variance is twice that rate, and
sums of Skellam numbers are Skellam numbers with the sum of their variances. So the parts of any n - d - c clients add
up to what is planned, exactly, and whatever further parts are in a sum only add to it.

What a client contributes is S, a sum of real vectors of which one row (or the client itself) adds b with ||b||_2 <= C.
Each element is clamped to the range of the grid and rounded to it, C being `unit` steps long. Clamping moves no two
numbers apart, and |round(s + b) - round(s)| <= |b| + 1 for each element, so that over `size` elements
    D2 = unit + sqrt(size)    and    D1 = sqrt(size) D2
bound the Euclidean and the absolute length of the difference in whole numbers, whatever the other rows are.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedkit.privacy.randomness import Randomness
from fedkit.rounds.noise import LEAST_RATE
from fedkit.work import Parts

__all__ = ["divergence", "sensitivities", "skellam"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_SMALL = 64.0  # up to which the logarithm of a factorial is taken as such


def sensitivities(parts: Parts) -> tuple[float, float]:
    """(D2, D1): the most by which one row moves the rounded sum, in Euclidean and in absolute length."""
    longest = parts.unit + math.sqrt(parts.size)
    return longest, math.sqrt(parts.size) * longest


def divergence(orders: Floats, noise_multiplier: float, parts: Parts) -> Floats:
    """The Rényi divergence at whole orders a >= 2 between the noised sums with and without one row.

    a D2² / 2m + min(((2a - 1) D2² + 6 D1) / 4m², 3 D1 / 2m) for a variance m = (noise_multiplier * unit)² of the sum of
    the parts that count (Agarwal et al. 2021, corollary 3.6: the sum over elements of theorem 3.5, which bounds one).
    """
    m = (noise_multiplier * parts.unit) ** 2
    longest, absolute = sensitivities(parts)
    beyond = np.minimum(((2.0 * orders - 1.0) * longest**2 + 6.0 * absolute) / (4.0 * m**2), 3.0 * absolute / (2.0 * m))
    return orders * longest**2 / (2.0 * m) + beyond


def skellam(count: int, rate: int, random: Randomness) -> Integers:
    """`count` independent differences of two Poisson numbers of `rate`; their variance is 2 `rate`."""
    found = _poisson(2 * count, rate, random)
    return found[:count] - found[count:]


def _poisson(count: int, rate: int, random: Randomness) -> Integers:
    """Poisson numbers less their whole `rate`, by transformed rejection (Hörmann 1993, algorithm PTRS; rates from 10).

    Only ratios of probabilities are compared, in float64 to 1e-13.
    """
    if rate < LEAST_RATE:
        raise ValueError(f"a rate is at least {LEAST_RATE}, not {rate}")
    found = np.empty(count, dtype=np.int64)
    due = np.arange(count)
    while due.size:
        numbers, taken = _tried(due.size, rate, random)
        found[due[taken]] = numbers[taken]
        due = due[~taken]
    return found


def _tried(count: int, rate: int, random: Randomness) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """As many candidates, and which of them are to be taken: with the distribution's own probabilities."""
    b = 0.931 + 2.53 * math.sqrt(rate)
    a = -0.059 + 0.02483 * b
    u, v = random.uniform(count) - 0.5, random.uniform(count)
    near = 0.5 - np.abs(u)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        offset = np.floor((2.0 * a / near + b) * u + 0.43)
        taken = (near >= 0.07) & (v <= 0.9277 - 3.6224 / (b - 2.0))
        open_ = ~taken & (near > 0.0) & (offset >= -rate) & ~((near < 0.013) & (v > near))
        scale = math.log(1.1239 + 1.1328 / (b - 3.4))
        j = offset[open_]
        taken[open_] = np.log(v[open_]) + scale - np.log(a / near[open_] ** 2 + b) <= _log_probability(j, rate)
    return np.where(taken, offset, 0.0).astype(np.int64), taken


def _log_probability(j: Floats, rate: int) -> Floats:
    """Of rate + j for a Poisson number, without the cancellation of large terms (Loader 2000)."""
    from scipy.special import gammaln

    k, x = rate + j, j / rate
    small = k < _SMALL
    deviance = rate * ((1.0 + x) * np.log1p(np.where(small, 0.0, x)) - x)
    stirling = 1.0 / (12.0 * k) - 1.0 / (360.0 * k**3) + 1.0 / (1260.0 * k**5)
    direct = -rate + k * math.log(rate) - gammaln(k + 1.0)
    found: Floats = np.where(small, direct, -0.5 * np.log(2.0 * math.pi * k) - stirling - deviance)
    return found
