"""Encrypted sums of floats: how far they are off, and who may not have them."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from fedkit.crypto import bfv, ckks
from fedkit.crypto.chunks import DEGREE, Scheme, numbers_to
from fedkit.crypto.encrypted import Adder, SecretKey, noise_budget
from fedkit.crypto.ring import FULL_WEIGHT
from fedkit.errors import ConfigError, PayloadError, Refused, RoundAbandoned, SumSpoiled

CLIP = 0.3
[PRIME] = Scheme("ckks", 3).primes
CLIPPED = ckks.Clipped(CLIP)


@cache
def key_for(cohort: int, which: int = 0) -> SecretKey:
    return SecretKey.make(ckks.Parameters(cohort).scheme)


def total_of(key: SecretKey, uploads: list[list[bytes]], values: int) -> np.ndarray:
    with Adder(key.scheme, key.fingerprint, values) as adder:
        for upload in uploads:
            for index, chunk in enumerate(upload):
                adder.add(index, chunk)
        return ckks.decrypt(key, adder.sums(len(uploads)), values)


@pytest.mark.parametrize(("cohort", "size"), [(1, 1), (3, 4097), (100, 4096)])
def test_a_mean_is_off_by_less_than_a_billionth_of_the_clip(cohort: int, size: int) -> None:
    key, draw = key_for(cohort), np.random.default_rng(cohort)
    vectors = [draw.uniform(-CLIP, CLIP, size).astype(np.float32) for _ in range(cohort)]
    weights = draw.integers(1, FULL_WEIGHT + 1, cohort)
    uploads = [list(ckks.encrypt(key, CLIPPED.encode(v, int(w)))) for v, w in zip(vectors, weights, strict=True)]
    mean = CLIPPED.decode(total_of(key, uploads, size + 1), cohort)
    assert np.abs(mean - np.average(vectors, axis=0, weights=weights)).max() <= 1e-9 * CLIP


@pytest.mark.parametrize("cohort", [2, 1000, 1 << 16])
def test_the_largest_values_of_a_whole_cohort_stay_in_the_ring(cohort: int) -> None:
    key = key_for(cohort)
    chunk = next(iter(ckks.encrypt(key, np.ones(DEGREE))))
    times = min(cohort, 1000)
    total = total_of(key, [[chunk]] * times, DEGREE)
    assert np.abs(total - times).max() <= 1e-6 * times
    assert ckks.Parameters(cohort).scale * cohort * 2**0.5 < PRIME / 2


def test_values_beyond_the_clip_are_clipped() -> None:
    values = CLIPPED.encode(np.array([9, -9, 0.15], dtype=np.float32), FULL_WEIGHT)
    assert values.tolist() == pytest.approx([1, -1, 0.5, 1])


def test_what_is_no_vector_or_weight_is_refused() -> None:
    for vector in (np.array([np.nan]), np.array([np.inf])):
        with pytest.raises(Refused, match="not_finite"):
            CLIPPED.encode(vector.astype(np.float32), 1)
    with pytest.raises(ConfigError, match="weight"):
        CLIPPED.encode(np.zeros(1, dtype=np.float32), FULL_WEIGHT + 1)
    for clip in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="clip"):
            ckks.Clipped(clip)
    for cohort in (0, (1 << 16) + 1):
        with pytest.raises(ConfigError, match="ckks"):
            ckks.Parameters(cohort)
    for values in (np.full(2, 1.5), np.full(2, np.nan), np.ones((1, 2)), np.ones(2, dtype=np.float32), np.ones(0)):
        with pytest.raises(ConfigError, match="within"):
            ckks.encrypt(key_for(3), values)


def test_noise_is_no_sum() -> None:
    key, draw = key_for(3), np.random.default_rng(0)
    noise = key.tag + draw.bytes(64) + numbers_to(draw.integers(0, PRIME, DEGREE, dtype=np.uint64), 7)
    with pytest.raises(SumSpoiled, match="clip"):
        CLIPPED.decode(total_of(key, [[noise]], DEGREE), 3)


@pytest.mark.parametrize("total", [[0.5, 4.0], [0.5, -1.0], [3.0, 1.0], [np.nan, 1.0], [0.0, np.nan]])
def test_sums_that_so_many_clients_cannot_have_are_no_sums(total: list[float]) -> None:
    with pytest.raises(SumSpoiled):
        CLIPPED.decode(np.array(total), 3)


def test_nobody_with_rows_is_no_mean() -> None:
    with pytest.raises(RoundAbandoned, match="rows"):
        CLIPPED.decode(np.array([1e-9, 1e-9]), 3)


def test_bfv_and_ckks_do_not_mix() -> None:
    floats, words = key_for(3), SecretKey.make(bfv.Parameters(3).scheme)
    chunk = next(iter(bfv.encrypt(words, np.ones(3, dtype=np.uint32))))
    with Adder(floats.scheme, floats.fingerprint, 3) as adder, pytest.raises(PayloadError, match="28752 bytes"):
        adder.add(0, chunk)
    for call in (
        lambda: ckks.encrypt(words, np.ones(3)),
        lambda: ckks.decrypt(words, [], 3),
        lambda: bfv.encrypt(floats, np.ones(3, dtype=np.uint32)),
        lambda: bfv.decrypt(floats, [], 3),
        lambda: noise_budget(floats, b""),
    ):
        with pytest.raises(ConfigError):
            call()


def test_a_run_that_gives_the_mean_to_the_coordinator_is_told_to_use_bfv() -> None:
    ckks.refuse_handing_back(to_coordinator=False)
    with pytest.raises(ConfigError, match="use bfv"):
        ckks.refuse_handing_back(to_coordinator=True)
