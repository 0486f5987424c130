"""Sums in the ring: exact, within their stated error, the same for every modulus, and never beyond it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkit.crypto.ring import FULL_WEIGHT, FixedPoint, Integers, Reals, Ring, weight_of
from fedkit.errors import ConfigError, Reason, Refused, RoundAbandoned, SumSpoiled

MASKING, BFV = 1 << 32, (1 << 27) + 29
MODULI = st.sampled_from([MASKING, BFV, (1 << 31) - 1])
FLOATS = st.floats(-(2.0**60), 2.0**60, width=32)
SIZE = 7


def summed(ring: Ring, parts: list[np.ndarray]) -> np.ndarray:
    total = np.zeros_like(parts[0])
    for part in parts:
        ring.add(total, part)
    return total


@st.composite
def cohorts(draw: st.DrawFn) -> list[tuple[np.ndarray, int]]:
    count = draw(st.integers(1, 12))
    vectors = hnp.arrays(np.float32, SIZE, elements=FLOATS | st.floats(-2, 2, width=32))
    return [(draw(vectors), draw(st.integers(1, FULL_WEIGHT))) for _ in range(count)]


@given(cohorts(), st.sampled_from([2, 8, 13, 20]), st.sampled_from([1.0, 0.3, 1e-9, 2.0**40]), MODULI)
def test_a_decoded_mean_is_within_its_bound_of_the_mean_of_clipped_values(
    cohort: list[tuple[np.ndarray, int]], bits: int, clip: float, modulus: int
) -> None:
    point = FixedPoint(Ring(len(cohort), modulus), clip, bits)
    total = summed(point.ring, [point.encode(vector, weight) for vector, weight in cohort])
    weights = [Fraction(weight, FULL_WEIGHT) for _, weight in cohort]
    mean = point.decode(total, len(cohort))
    bound = point.error_bound(len(cohort), point.weight(total, len(cohort))) + clip * 2.0**-50
    for i in range(SIZE):
        values = [max(-Fraction(clip), min(Fraction(clip), Fraction(float(vector[i])))) for vector, _ in cohort]
        exact = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert abs(Fraction(float(mean[i])) - exact) <= bound


@given(cohorts(), st.sampled_from([8, 20]))
def test_masked_and_encrypted_sums_decode_to_the_same_bits(cohort: list[tuple[np.ndarray, int]], bits: int) -> None:
    found = []
    for modulus in (MASKING, BFV):
        point = FixedPoint(Ring(len(cohort), modulus), 1.0, bits)
        total = summed(point.ring, [point.encode(vector, weight) for vector, weight in cohort])
        found.append((point.decode(total, len(cohort)).tobytes(), point.weight(total, len(cohort))))
    assert found[0] == found[1]


@given(st.integers(1, 4096), st.integers(2, 31), MODULI)
def test_the_largest_values_of_a_whole_cohort_fit_or_the_settings_are_refused(
    cohort: int, bits: int, modulus: int
) -> None:
    try:
        point = FixedPoint(Ring(cohort, modulus), 1.0, bits)
    except ConfigError:
        assert cohort * max(1 << (bits - 1), FULL_WEIGHT) > (modulus - 1) // 2
        return
    one = point.encode(np.array([1.0, -1.0, 5.0], dtype=np.float32), FULL_WEIGHT)
    total = np.array([int(word) * cohort % modulus for word in one], dtype=np.uint32)
    assert np.array_equal(point.decode(total, cohort), [1.0, -1.0, 1.0])


@settings(max_examples=50)
@given(st.data(), st.integers(1, 1000), MODULI)
def test_whole_numbers_add_up_exactly(data: st.DataObject, cohort: int, modulus: int) -> None:
    integers = Integers(Ring(cohort, modulus))
    numbers = st.integers(-integers.largest, integers.largest)
    parts = data.draw(st.lists(hnp.arrays(np.int64, 3, elements=numbers), min_size=1, max_size=min(cohort, 6)))
    total = summed(integers.ring, [integers.encode(part) for part in parts])
    assert total.size == 3 * integers.limbs
    expected = [sum(int(part[i]) for part in parts) for i in range(3)]
    assert integers.decode(total, len(parts)).tolist() == expected


@pytest.mark.parametrize("modulus", [MASKING, BFV])
@pytest.mark.parametrize("cohort", [1, 2, 3, 100, 1000])
def test_the_largest_whole_numbers_of_a_whole_cohort_fit(cohort: int, modulus: int) -> None:
    integers = Integers(Ring(cohort, modulus))
    for extreme in (integers.largest, -integers.largest):
        word = integers.encode(np.array([extreme], dtype=np.int64))
        total = summed(integers.ring, [word] * cohort)
        assert integers.decode(total, cohort).tolist() == [cohort * extreme]


@given(st.lists(hnp.arrays(np.float64, 3, elements=st.floats(-1e9, 1e9)), min_size=1, max_size=8), MODULI)
def test_sums_of_floats_are_within_a_two_millionth_for_each_client_and_counts_are_exact(
    parts: list[np.ndarray], modulus: int
) -> None:
    reals = Reals(Ring(len(parts), modulus))
    rows = [np.concatenate([part, np.rint(part)]) for part in parts]
    found = reals.decode(summed(reals.ring, [reals.encode(row) for row in rows]), len(parts))
    for i in range(3):
        exact = sum(Fraction(float(part[i])) for part in parts)
        assert abs(Fraction(float(found[i])) - exact) <= len(parts) * 2.0**-21 + 1e-6
        assert found[3 + i] == sum(int(row[3 + i]) for row in rows)


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_a_weight_is_the_share_of_the_cap_to_twelve_bits_and_nobody_with_rows_weighs_nothing(
    examples: int, cap: int
) -> None:
    weight, share = weight_of(examples, cap), Fraction(min(examples, cap), cap)
    assert 0 <= weight <= FULL_WEIGHT
    assert (weight == 0) == (examples == 0)
    assert abs(Fraction(weight, FULL_WEIGHT) - share) <= Fraction(1, 2 * FULL_WEIGHT) or (weight == 1 and share < 1)


@pytest.mark.parametrize("size", [0, 1, (1 << 15) - 1, 1 << 15, (1 << 16) + 3])
def test_blocks_make_no_difference(size: int) -> None:
    point = FixedPoint(Ring(10), 0.5)
    vector = np.random.default_rng(1).normal(size=size).astype(np.float32)
    words = point.encode(vector, 100)
    expected = np.clip(np.rint(vector.astype(np.float64) * (100 * 2**19 / 4096 / 0.5)), -12800, 12800)
    assert np.array_equal(point.ring.integers(words[:-1]), expected)
    assert words[-1] == 100
    out = np.empty(size, dtype=np.float32)
    assert point.decode(words, 1, out) is out
    assert np.allclose(out, np.clip(vector, -0.5, 0.5), atol=point.error_bound(1, 100))


def test_a_client_without_rows_adds_nothing() -> None:
    point = FixedPoint(Ring(2), 1.0)
    parts = [point.encode(np.ones(3, dtype=np.float32), weight) for weight in (0, 2048)]
    assert np.array_equal(point.decode(parts[0] + parts[1], 2), np.ones(3))
    with pytest.raises(RoundAbandoned, match="nobody had any rows"):
        point.decode(parts[0], 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weight", [0, 1, FULL_WEIGHT])
def test_what_is_not_finite_is_refused(bad: float, weight: int) -> None:
    vector = np.zeros(100_000, dtype=np.float32)
    vector[77_777] = bad
    with pytest.raises(Refused) as caught:
        FixedPoint(Ring(10), 1.0).encode(vector, weight)
    assert caught.value.reason == Reason.NOT_FINITE
    with pytest.raises(Refused) as caught:
        Reals(Ring(10)).encode(np.array([1.0, bad]))
    assert caught.value.reason == Reason.NOT_FINITE


def test_what_is_too_large_for_the_cohort_is_refused() -> None:
    integers, reals = Integers(Ring(10)), Reals(Ring(10))
    for bad in (integers.largest + 1, -integers.largest - 1, -(1 << 63)):
        with pytest.raises(Refused, match="the most that 10 can add"):
            integers.encode(np.array([bad], dtype=np.int64))
    with pytest.raises(Refused, match="larger than"):
        reals.encode(np.array([1e12]))


@pytest.mark.parametrize("modulus", [MASKING, BFV])
def test_noise_is_not_taken_for_a_sum(modulus: int) -> None:
    ring = Ring(10, modulus)
    noise = np.random.default_rng(2).integers(0, modulus, 1001, dtype=np.uint32)
    with pytest.raises(SumSpoiled):
        FixedPoint(ring, 1.0).decode(noise, 10)
    noise[-1] = 10 * FULL_WEIGHT
    with pytest.raises(SumSpoiled):
        FixedPoint(ring, 1.0, 12).decode(noise, 10)
    with pytest.raises(SumSpoiled):
        Integers(ring).decode(noise[: 8 * Integers(ring).limbs], 3)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"cohort": 0}, "at least one"),
        ({"cohort": 4096}, "4096 clients of 20 bits do not fit modulo 4294967296"),
        ({"cohort": 10, "modulus": 1 << 20}, "not 1048576"),
        ({"cohort": 10, "modulus": (1 << 32) + 1}, "odd number"),
        ({"cohort": 10, "modulus": 65537}, "5242880, and 32768 is the most"),
        ({"cohort": 10, "bits": 32}, "not 32"),
        ({"cohort": 10, "clip": 0.0}, "not 0.0"),
        ({"cohort": 10, "clip": float("nan")}, "not nan"),
        ({"cohort": 10, "clip": float("inf")}, "not inf"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_their_numbers(settings: dict[str, float], text: str) -> None:
    kept = dict(settings)
    with pytest.raises(ConfigError, match=text):
        FixedPoint(Ring(kept.pop("cohort"), kept.pop("modulus", MASKING)), kept.pop("clip", 1.0), **kept)


def test_weights_need_rows_and_a_cap_that_make_sense() -> None:
    for examples, cap in ((-1, 10), (10, 0)):
        with pytest.raises(ConfigError):
            weight_of(examples, cap)
    for weight in (-1, FULL_WEIGHT + 1):
        with pytest.raises(ConfigError):
            FixedPoint(Ring(2), 1.0).encode(np.zeros(1, dtype=np.float32), weight)
    with pytest.raises(ConfigError, match="do not fit"):
        Integers(Ring(100, 99))
