"""The lower bound of one run: published values, exact arithmetic, and mechanisms of which epsilon is known."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom

from fedkit.errors import ConfigError
from fedkit.privacy.onerun import LEVEL, bound_of, lower_bound, p_value

CHANCE = 1e-9  # of a false alarm, each test


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_bound_is_that_of_the_papers_own_program(canaries, guesses, correct, delta, published) -> None:
    """Steinke, Nasr and Jagielski 2023, appendix D and section 7; they print three digits, cut or rounded."""
    assert abs(lower_bound(canaries, guesses, correct, delta) - published) < 1e-3


@pytest.mark.parametrize(("canaries", "guesses", "correct"), [(12, 9, 8), (30, 30, 22), (40, 10, 10), (8, 8, 1)])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 1000)])
def test_p_values_are_those_of_exact_arithmetic(canaries: int, guesses: int, correct: int, delta: Fraction) -> None:
    """At epsilon log 3, where a guess is right in three of four cases."""

    def right(count: int) -> Fraction:
        return math.comb(guesses, count) * Fraction(3, 4) ** count * Fraction(1, 4) ** (guesses - count)

    missed = [sum(right(k) for k in range(max(correct - i, 0), correct)) / i for i in range(1, canaries + 1)]
    exact = sum(right(k) for k in range(correct, guesses + 1)) + 2 * canaries * delta * max(missed)
    found = p_value(canaries, guesses, correct, math.log(3), float(delta))
    assert found == pytest.approx(min(float(exact), 1.0), rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("count", [40, 300, 1000])
def test_coins_told_with_epsilon_are_overrated_in_one_run_of_twenty_at_most(count: int, epsilon: float) -> None:
    """Randomised response tells each coin rightly with odds of e^epsilon: no mechanism gives more away."""
    accuracy = 1.0 / (1.0 + math.exp(-epsilon))
    correct = np.arange(count + 1)
    likely = correct[binom.pmf(correct, count, accuracy) > 1e-12]
    over = [k for k in likely if lower_bound(count, count, int(k), 0.0) > epsilon]
    share = binom.pmf(over, count, accuracy).sum()
    assert 0.3 * LEVEL < share <= LEVEL  # and not much less often: the bound is as good as it can be


@pytest.mark.parametrize("delta", [1e-3, 1e-2])
def test_what_delta_allows_is_allowed(delta: float) -> None:
    """Two mechanisms of epsilon 0: one gives each row away with probability delta, one all rows at once."""
    count = 200
    for correct in range(count // 2, count + 1):
        bound = p_value(count, count, correct, 0.0, delta)
        each = float(binom.sf(correct - 1, count, (1.0 + delta) / 2.0))
        at_once = delta + (1.0 - delta) * float(binom.sf(correct - 1, count, 0.5))
        assert max(each, at_once) <= bound * (1 + 1e-12)


def test_the_best_of_several_tries_is_right_as_often() -> None:
    """Scores that order the coins by randomised response; ties fall at random."""
    runs, count, epsilon = 600, 160, 1.0
    source = np.random.default_rng()
    accuracy = 1.0 / (1.0 + math.exp(-epsilon))
    over = 0
    for _ in range(runs):
        coins = source.random(count) < 0.5
        told = np.where(source.random(count) < accuracy, coins, ~coins)
        over += bound_of(told + 0.5 * source.random(count), coins, 0.0).epsilon > epsilon
    assert over <= binom.isf(CHANCE, runs, LEVEL)


def test_scores_that_tell_nothing_show_nothing_and_scores_that_tell_all_show_much() -> None:
    coins = np.arange(1000) % 2 == 0
    nothing = bound_of(np.zeros(1000), coins, 1e-5)
    assert (nothing.epsilon, nothing.guesses, nothing.correct) == (0.0, 0, 0)
    everything = bound_of(coins, coins, 1e-5)
    assert (everything.canaries, everything.guesses, everything.correct) == (1000, 1000, 1000)
    assert everything.epsilon == lower_bound(1000, 1000, 1000, 1e-5, LEVEL / 6) > 5.0
    assert bound_of(~coins, coins, 1e-5).epsilon == 0.0
    assert bound_of([], [], 1e-5).epsilon == 0.0


def test_the_bound_grows_with_right_guesses_and_shrinks_with_delta_confidence_and_idle_canaries() -> None:
    by_correct = [lower_bound(500, 100, correct, 1e-5) for correct in range(50, 101, 5)]
    assert by_correct == sorted(by_correct)
    assert by_correct[0] == 0.0 < by_correct[-1]
    best = lower_bound(500, 100, 90, 1e-5)
    assert best > lower_bound(500, 100, 90, 1e-4) > lower_bound(500, 100, 90, 1e-3)
    assert best > lower_bound(500, 100, 90, 1e-5, 0.01)
    assert best > lower_bound(5000, 100, 90, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((10, 11, 5, 1.0, 0.0), "of 10 canaries, 5 of 11 guesses"),
        ((10, 5, 6, 1.0, 0.0), "6 of 5"),
        ((10, 5, -1, 1.0, 0.0), "-1 of 5"),
        ((10, 5, 5, -1.0, 0.0), "epsilon must be from 0"),
        ((10, 5, 5, math.nan, 0.0), "epsilon must be from 0"),
        ((10, 5, 5, 1.0, 1.5), "delta from 0 to 1"),
    ],
)
def test_counts_that_cannot_be_are_refused(arguments: tuple[int, int, int, float, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        p_value(*arguments)


def test_each_score_needs_its_coin() -> None:
    with pytest.raises(ConfigError, match="one score and one coin"):
        bound_of([1.0, 2.0], [True], 0.0)
