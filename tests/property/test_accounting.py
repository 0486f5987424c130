"""What noisy steps cost: against the reference implementation, a second one, and the closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedkit.errors import ConfigError
from fedkit.privacy.accounting import ORDERS, epsilon_of, noise_for, rdp_of, spent
from fedkit.work import Steps

DELTA = 1e-5
noises = st.floats(0.4, 20.0)
rates = st.one_of(st.floats(1e-4, 0.9), st.just(1.0))
counts = st.integers(1, 5000)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(noises, rates, counts), min_size=1, max_size=4), st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_renyi_accounting_agrees_with_the_reference(history: list[tuple[float, float, int]], delta: float) -> None:
    reference = RdpAccountant(orders=list(ORDERS))
    for sigma, q, count in history:
        reference.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), count)
    found = epsilon_of(rdp_of([Steps(*one) for one in history]), delta)
    assert found == pytest.approx(reference.get_epsilon(delta), rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(Steps, noises, rates, counts), max_size=5), st.randoms(use_true_random=False))
def test_the_order_and_the_pieces_of_a_history_do_not_matter(history: list[Steps], random: object) -> None:
    pieces = [Steps(one.noise_multiplier, one.q, 1) for one in history for _ in range(min(one.count, 3))]
    whole = [Steps(one.noise_multiplier, one.q, min(one.count, 3)) for one in history]
    random.shuffle(pieces)
    assert np.allclose(rdp_of(pieces), rdp_of(whole), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(noises, rates, counts)
def test_more_steps_less_noise_and_more_rows_cost_more(sigma: float, q: float, count: int) -> None:
    def cost(*steps: Steps) -> float:
        return epsilon_of(rdp_of(steps), DELTA)

    base = cost(Steps(sigma, q, count))
    assert cost(Steps(sigma, q, count + 1)) >= base
    assert cost(Steps(sigma * 1.1, q, count)) <= base
    assert cost(Steps(sigma, q / 2, count)) <= base
    assert cost(Steps(sigma, q, count), Steps(3.0, 0.5, 7)) >= base


def exact(sigma: float, steps: int, delta: float) -> float:
    """Epsilon of the Gaussian mechanism, composed, at q = 1 (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(steps) / sigma

    def gap(epsilon: float) -> float:
        left, right = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return float(norm.cdf(left) - math.exp(epsilon + norm.logcdf(right)) - delta)

    return float(brentq(gap, 0.0, 500.0)) if gap(0.0) > 0 else 0.0


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (2.0, 10), (5.0, 100), (0.7, 1), (20.0, 1000)])
def test_no_bound_is_below_the_closed_form(sigma: float, steps: int) -> None:
    truth, found = exact(sigma, steps, DELTA), spent([Steps(sigma, 1.0, steps)], DELTA)
    assert found.pld is not None
    assert found.rdp >= truth
    assert found.pld >= truth * (1 - 1e-6)
    assert found.epsilon == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.1, 0.01, 500), (0.8, 0.05, 50), (3.0, 0.2, 300)])
def test_what_is_reported_agrees_with_a_second_implementation(sigma: float, q: float, steps: int) -> None:
    second = PRVAccountant()
    second.history = [(sigma, q, steps)]
    expected = second.get_epsilon(DELTA, eps_error=0.01)
    found = spent([Steps(sigma, q, steps)], DELTA)
    assert found.epsilon == pytest.approx(expected, rel=0.015)
    assert found.rdp >= found.epsilon


def test_nothing_done_costs_nothing_and_no_noise_costs_everything() -> None:
    assert spent([], DELTA).epsilon == 0.0
    assert spent([Steps(1.0, 0.1, 0)], DELTA).epsilon == 0.0
    assert spent([Steps(1.0, 0.0, 5)], DELTA).rdp == 0.0
    assert spent([Steps(0.0, 0.1, 1)], DELTA).epsilon == math.inf


def test_a_history_of_many_kinds_is_bounded_by_renyi_accounting_alone() -> None:
    found = spent([Steps(1.0 + i / 100, 0.01, 10) for i in range(50)], DELTA)
    assert found.pld is None
    assert found.epsilon == found.rdp


# -- planning ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.floats(0.3, 20.0), rates, counts)
def test_the_planned_noise_is_enough_and_no_more_than_that(epsilon: float, q: float, count: int) -> None:
    sigma = noise_for(epsilon, DELTA, q, count)
    assert epsilon_of(rdp_of([Steps(sigma, q, count)]), DELTA) <= epsilon
    assert epsilon_of(rdp_of([Steps(sigma * 0.99, q, count)]), DELTA) > epsilon


def test_what_was_spent_before_leaves_less() -> None:
    before = [Steps(2.0, 0.1, 100)]
    alone, after = noise_for(3.0, DELTA, 0.1, 100), noise_for(3.0, DELTA, 0.1, 100, before)
    assert after > alone
    assert epsilon_of(rdp_of([*before, Steps(after, 0.1, 100)]), DELTA) <= 3.0
    with pytest.raises(ConfigError, match="spent already"):
        noise_for(0.5, DELTA, 0.1, 100, before)


def test_what_cannot_be_kept_is_said() -> None:
    with pytest.raises(ConfigError, match="fewer rounds or steps"):
        noise_for(1e-9, DELTA, 1.0, 10**9)
