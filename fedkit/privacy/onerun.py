"""What one run shows of epsilon at least: guesses of who took part, right more often than privacy allows.

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run" (arXiv:2305.08846). A coin decides of
each of m canaries whether it takes part. Whoever sees what came out says of some of them "in" or "out". Under (epsilon,
delta) only so many of these guesses can be right, however they are made.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from fedkit.errors import ConfigError

__all__ = ["LEVEL", "Bound", "bound_of", "lower_bound", "p_value"]

LEVEL = 0.05  # how often a bound may be wrong: confidence 95 %
_FEWEST_GUESSES = 20  # fewer show next to nothing
_PRECISION = 1e-6  # of epsilon


@dataclass(frozen=True, slots=True)
class Bound:
    """Epsilon is `epsilon` or more at `delta`, with 95 % confidence: so much follows from the best of several tries.

    `correct` of `guesses` guesses about `canaries` canaries were right in it; no guesses where no try shows anything.
    """

    epsilon: float
    delta: float
    canaries: int
    guesses: int
    correct: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely so many correct guesses are at most, if the run is (epsilon, delta) differentially private.

    Theorem 5.2: P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i, where W is binomial over r guesses that are right
    with probability e^epsilon / (e^epsilon + 1) each; m `canaries`, r `guesses`, v `correct`. Neighbours are those of
    `fedkit.privacy.accounting`: adding or removing one row.

    Raises `ConfigError` unless 0 <= correct <= guesses <= canaries, epsilon >= 0 and 0 <= delta <= 1.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ConfigError(f"of {canaries} canaries, {correct} of {guesses} guesses cannot be right")
    if not (epsilon >= 0.0 and 0.0 <= delta <= 1.0):
        raise ConfigError(f"epsilon must be from 0 and delta from 0 to 1, got {epsilon!r} and {delta!r}")
    accuracy = 1.0 / (1.0 + math.exp(-epsilon))
    likely = float(binom.sf(correct - 1, guesses, accuracy))
    if delta == 0.0 or correct == 0:
        return likely
    just_missed = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
    steepest = float(np.max(just_missed / np.arange(1, correct + 1)))
    return min(likely + 2.0 * canaries * delta * steepest, 1.0)


@functools.lru_cache(maxsize=4096)
def lower_bound(canaries: int, guesses: int, correct: int, delta: float, level: float = LEVEL) -> float:
    """The epsilon that so many correct guesses rule out, and all below it: where `p_value` is still under `level`.

    What is (epsilon, delta) private is so for every larger epsilon, so one that is ruled out rules out all below it.
    0 where nothing is. Raises `ConfigError` as `p_value` does.
    """

    def is_ruled_out(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < level

    if not is_ruled_out(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while is_ruled_out(high):
        low, high = high, 2.0 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2.0
        low, high = (middle, high) if is_ruled_out(middle) else (low, middle)
    return low


def bound_of(scores: npt.ArrayLike, included: npt.ArrayLike, delta: float, level: float = LEVEL) -> Bound:
    """What `scores` [canaries] tell of `included` [canaries, bool]: the highest are guessed in, the lowest out.

    About all canaries is guessed, about the half of them at both ends, about a quarter, and so on down to twenty. Each
    of these tries has an equal part of `level`, so that the best of them may be taken (Bonferroni). Which tries there
    are depends on the number of canaries alone.

    Raises `ConfigError` where the two are not of one length.
    """
    ranked, coins = np.asarray(scores, dtype=np.float64), np.asarray(included, dtype=bool)
    if ranked.shape != coins.shape or ranked.ndim != 1:
        raise ConfigError(f"each canary has one score and one coin, got {ranked.shape} and {coins.shape}")
    order, count = np.argsort(ranked, kind="stable"), len(coins)
    tries = _halved(count)
    best = Bound(0.0, delta, count, 0, 0)
    for ends in tries:
        correct = int(coins[order[count - ends :]].sum() + (~coins[order[:ends]]).sum())
        epsilon = lower_bound(count, 2 * ends, correct, delta, level / len(tries))
        if epsilon > best.epsilon:
            best = Bound(epsilon, delta, count, 2 * ends, correct)
    return best


def _halved(count: int) -> list[int]:
    """How many are guessed at each end."""
    ends = [count // 2]
    while ends[-1] // 2 * 2 >= _FEWEST_GUESSES:
        ends.append(ends[-1] // 2)
    return ends
