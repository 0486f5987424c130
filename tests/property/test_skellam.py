"""Noise in parts: what the parts come to, what they cost, and that the bounds hold, each against brute force."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedkit.config import DP, Privacy
from fedkit.crypto.ring import FixedPoint, Ring
from fedkit.errors import ConfigError, PayloadError
from fedkit.privacy.accounting import ORDERS, Tally, epsilon_of, noise_for, rdp_of, spent
from fedkit.privacy.randomness import Randomness
from fedkit.privacy.shared import Sharing, part_of
from fedkit.privacy.skellam import divergence, sensitivities, skellam
from fedkit.rounds.layout import Layout
from fedkit.rounds.noise import LEAST_RATE, SharedNoise, most_left_out
from fedkit.weights import Entry, Manifest, Weights
from fedkit.work import Parts, Steps, Update

NOISE = SharedNoise(dropouts=1, colluders=2, multiplier=3.0, norm=1.0)
LAYOUT = Layout("mean", 20_000, 8, clip=2.0, bits=16, noise=NOISE)


def zeros(size: int) -> Update:
    return Update(Weights.zeros(Manifest((Entry("w", (size,)),))), 10)


# -- what the parts come to --------------------------------------------------------------------------------------------


def within(variance: float, planned: float, count: int) -> bool:
    """Whether a sample's variance is that of its distribution, by seven standard deviations of a chi-square."""
    return abs(variance / planned - 1.0) < 7.0 * math.sqrt(2.0 / count)


@pytest.mark.parametrize("survivors", [5, 7, 8])
def test_the_parts_of_all_that_can_be_counted_on_have_the_planned_variance(survivors: int) -> None:
    parts, ring = LAYOUT.parts, Ring(8)
    assert parts is not None
    assert parts.honest == 5
    words = [LAYOUT.encode(zeros(LAYOUT.size), part_of(LAYOUT)) for _ in range(survivors)]
    total = ring.integers(sum(words, start=np.zeros_like(words[0]))[: LAYOUT.size])
    planned = (NOISE.multiplier * parts.unit) ** 2
    assert within(float(total.var()), planned * survivors / parts.honest, LAYOUT.size)
    assert abs(float(total.mean())) < 7.0 * math.sqrt(planned * survivors / parts.honest / LAYOUT.size)


def test_noise_is_added_in_the_ring_to_what_the_words_would_have_been() -> None:
    update = zeros(LAYOUT.size)
    vector = np.linspace(-2.5, 2.5, LAYOUT.size, dtype=np.float32)
    update = replace(update, weights=update.weights.with_vector(vector))
    noise = part_of(LAYOUT)
    assert noise is not None
    noised, plain = LAYOUT.encode(update, noise), replace(LAYOUT, noise=None).encode(update)
    assert (noised[LAYOUT.size :] == plain[LAYOUT.size :]).all()
    apart = Ring(8).integers(noised[: LAYOUT.size] - plain[: LAYOUT.size])
    assert (apart == noise).all()
    for wrong in (None, noise[:-1]):
        with pytest.raises(ConfigError, match="one number an element"):
            LAYOUT.encode(update, wrong)


@pytest.mark.parametrize("rate", [LEAST_RATE, 40, 1000, 10**6, 10**12, 1 << 53])
def test_the_numbers_are_differences_of_poisson_numbers(rate: int) -> None:
    found = skellam(60_000, rate, Randomness())
    assert within(float(found.var()), 2.0 * rate, len(found))
    if rate > 1000:
        assert stats.kstest(found / math.sqrt(2.0 * rate), "norm").pvalue > 1e-9
        return
    values = np.arange(-int(4 * math.sqrt(2 * rate)), int(4 * math.sqrt(2 * rate)) + 1)
    expected = stats.skellam.pmf(values, rate, rate) * len(found)
    values, expected = values[expected > 10], expected[expected > 10]
    seen = np.array([(found == value).sum() for value in values])
    assert ((seen - expected) ** 2 / expected).sum() < stats.chi2.isf(1e-9, len(values))


def test_a_rate_for_which_the_sampler_does_not_hold_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        skellam(1, LEAST_RATE - 1, Randomness())
    with pytest.raises(ConfigError, match="finer than 8 bits tell"):
        Layout("mean", 10, 8, clip=100.0, bits=8, noise=replace(NOISE, multiplier=0.01))


# -- how far one row moves a sum ---------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 32), st.integers(1, 40), st.floats(0.01, 3.0), st.integers(4, 20))
def test_one_row_moves_the_rounded_sum_by_no_more_than_the_bound(seed: int, size: int, scale: float, bits: int) -> None:
    random = np.random.default_rng(seed)
    point, row = FixedPoint(Ring(4), 1.0, bits), random.normal(size=size)
    others = random.normal(size=size) * scale
    row /= np.linalg.norm(row)  # as long as the clip, which is all of the grid's range
    whole = [
        Ring(4).integers(point.encode(vector.astype(np.float32), 1 << 12)[:-1]) for vector in (others, others + row)
    ]
    apart = np.abs(whole[1] - whole[0]).astype(np.float64)
    longest, absolute = sensitivities(Parts(4, 0, 0, 1.0 / point.step, size))
    slack = 1.0 + 2.0**-20
    assert np.linalg.norm(apart) <= longest * slack
    assert apart.sum() <= absolute * slack


# -- what it costs -----------------------------------------------------------------------------------------------------


def exact(order: int, moved: int, rate: float, q: float = 1.0, *, back: bool = False) -> float:
    """The Rényi divergence of one noised number with and without a row that moves it, from the probabilities."""
    spread = int(30 * math.sqrt(2 * rate)) + 2 * abs(moved)
    values = np.arange(-spread, spread + 1)
    without: npt.NDArray[np.float64] = stats.skellam.logpmf(values, rate, rate)
    moves = stats.skellam.logpmf(values - moved, rate, rate)
    keep = np.isfinite(without) & np.isfinite(moves)
    without, moves = without[keep], moves[keep]
    with_row = np.logaddexp(np.log1p(-q) + without, np.log(q) + moves) if q < 1.0 else moves
    one, other = (without, with_row) if back else (with_row, without)
    return float(np.logaddexp.reduce(order * one - (order - 1) * other) / (order - 1))


@pytest.mark.parametrize("rate", [16, 50, 400])
@pytest.mark.parametrize("moved", [1, 3, 10])
def test_the_divergence_bounds_the_exact_one_of_a_single_number(rate: int, moved: int) -> None:
    parts = Parts(3, 0, 0, moved - 1.0 if moved > 1 else 1e-9, 1)  # D2 = unit + 1
    longest, _ = sensitivities(parts)
    assert longest == pytest.approx(moved)
    multiplier = math.sqrt(2.0 * rate) / parts.unit
    for order in (2, 3, 8, 20):
        bound = float(divergence(np.array([order], dtype=np.float64), multiplier, parts)[0])
        found = exact(order, moved, rate)
        assert found <= bound * (1 + 1e-9)
        assert bound < 1.2 * found or rate < 400


@pytest.mark.parametrize("q", [0.05, 0.3])
@pytest.mark.parametrize("back", [False, True])
def test_the_cost_of_a_sampled_step_bounds_both_directions(q: float, back: bool) -> None:
    rate, moved = 60, 4
    parts = Parts(3, 0, 0, moved - 1.0, 1)
    cost = rdp_of([Steps(math.sqrt(2.0 * rate) / parts.unit, q, 1, parts)])
    for order in (2, 3, 5, 10, 25):
        assert exact(order, moved, rate, q, back=back) <= cost[ORDERS.index(order)] * (1 + 1e-9)


def test_on_a_fine_grid_it_costs_what_gaussian_noise_does_and_on_a_coarse_one_more() -> None:
    def epsilon(unit: float | None) -> float:
        parts = None if unit is None else Parts(10, 1, 1, unit, 40_000)
        return epsilon_of(rdp_of([Steps(6.0, 0.25, 200, parts)]), 1e-5)

    plain, fine, coarse = epsilon(None), epsilon(2.0**20), epsilon(2.0**8)
    assert plain < fine < 1.001 * plain
    assert coarse > 1.5 * plain


def test_noise_is_planned_for_the_cost_that_is_counted() -> None:
    parts = Parts(10, 1, 1, 5000.0, 40_000)
    for epsilon in (1.0, 8.0):
        noise = noise_for(epsilon, 1e-5, 0.25, 100, [Steps(30.0, 1.0, 1)], parts)
        history = [Steps(30.0, 1.0, 1), Steps(noise, 0.25, 100, parts)]
        assert 0.98 * epsilon < epsilon_of(rdp_of(history), 1e-5) <= epsilon
        assert spent(Tally.of(history), 1e-5).pld is None  # which is of Gaussian noise alone


def test_steps_come_back_from_what_is_written_of_them() -> None:
    for steps in (Steps(1.5, 0.25, 7), Steps(1.5, 0.25, 7, Parts(10, 1, 2, 99.5, 3))):
        assert Steps.from_dict(steps.to_dict()) == steps


# -- layouts -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(3, 200), st.integers(1, 1_000_000), st.floats(0.001, 1.0), st.sampled_from([1.0, 8.0]))
def test_a_plan_fits_the_ring_and_keeps_to_epsilon(cohort: int, size: int, rate: float, epsilon: float) -> None:
    dp = DP(epsilon=epsilon, delta=1e-5, noise="shared", dropouts=(cohort - 2) // 4, colluders=min(cohort // 10, 5))
    layout = Sharing(Privacy(dp=dp, aggregation="masked"), 1, 0).of_rows(size, cohort, rate, 2000.0)
    assert layout.parts is not None
    assert layout.noise is not None
    spread = math.sqrt(2.0 * layout.noise_rate * cohort)
    assert cohort * 2 ** (layout.bits - 1) + 11 * spread < 2**31
    assert 2 * layout.noise_rate * layout.parts.honest >= (layout.noise.multiplier * layout.parts.unit) ** 2
    assert epsilon_of(rdp_of([Steps(layout.noise.multiplier, rate, 1, layout.parts)]), 1e-5) <= epsilon
    assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize("rate", [LEAST_RATE, 1000, 10**6, 10**12])
@pytest.mark.parametrize("cohort", [3, 1000])
def test_noise_leaves_the_room_that_the_ring_has_for_it_with_a_probability_below_2_to_the_78(
    rate: int, cohort: int
) -> None:
    """Chernoff's bound of a Skellam number of variance v beyond t: exp(sqrt(t² + v²) - v - t asinh(t / v))."""
    variance = 2.0 * rate * cohort
    room = 11.0 * math.sqrt(variance)
    ratio = room / variance
    exponent = room * math.asinh(ratio) - variance * (math.sqrt(1.0 + ratio**2) - 1.0)
    assert exponent > 78 * math.log(2)


@pytest.mark.parametrize(
    ("cohort", "dropouts", "colluders", "is_fine"),
    [(3, 0, 1, True), (3, 1, 1, False), (3, 1, 0, True), (10, 4, 1, True), (10, 4, 2, False), (500, 0, 101, False)],
)
def test_so_many_may_be_left_out_that_no_two_lists_are_signed(
    cohort: int, dropouts: int, colluders: int, is_fine: bool
) -> None:
    assert (most_left_out(cohort, dropouts, colluders) == "") == is_fine
    signed = 2 * (cohort - dropouts) > cohort + colluders
    assert signed or not is_fine


@pytest.mark.parametrize(
    "change",
    [
        {"multiplier": 1e300},
        {"multiplier": 0.0},
        {"norm": -1.0},
        {"rate": 1.5},
        {"dropouts": -1},
        {"dropouts": 4},
        {"colluders": True},
        {"norm": "x"},
        {"more": 1},
    ],
)
def test_noise_that_makes_no_sense_is_refused_as_it_arrives(change: dict[str, object]) -> None:
    fields = json.loads(LAYOUT.to_json())
    fields["noise"] |= change
    with pytest.raises((PayloadError, ConfigError)):
        Layout.from_json(json.dumps(fields))
