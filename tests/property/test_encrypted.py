"""Encrypted sums are the masked ones, bit for bit, and no bytes are anything but a ciphertext or refused."""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkit.crypto import bfv
from fedkit.crypto.chunks import DEGREE, Scheme, Seeded, numbers_from, numbers_to
from fedkit.crypto.encrypted import Adder, SecretKey
from fedkit.crypto.ring import FULL_WEIGHT, FixedPoint, Ring
from fedkit.errors import PayloadError

TAG = b"0123456789abcdef"
SCHEME = Scheme("bfv", 3, modulus=5)
PRIME = min(SCHEME.primes)
VECTORS = hnp.arrays(np.float32, st.just(5), elements=st.floats(-2, 2, width=32) | st.floats(width=32, allow_nan=False))


@cache
def key_for(parameters: bfv.Parameters) -> SecretKey:
    return SecretKey.make(parameters.scheme)


@settings(max_examples=25)
@given(st.data(), st.integers(1, 8), st.sampled_from([2, 12, 20, 24]), st.sampled_from([1e-9, 0.3, 2.0**40]))
def test_the_mean_of_any_cohort_is_the_masked_one(data: st.DataObject, cohort: int, bits: int, clip: float) -> None:
    vectors = [np.clip(data.draw(VECTORS), -1e30, 1e30) for _ in range(cohort)]
    weights = [data.draw(st.integers(1, FULL_WEIGHT)) for _ in range(cohort)]
    parameters = bfv.Parameters(cohort, bits)
    key, masked = key_for(parameters), FixedPoint(Ring(cohort), clip, bits)
    ours = FixedPoint(parameters.ring, clip, bits)
    with Adder(key.scheme, key.fingerprint, 6) as adder:
        for vector, weight in zip(vectors, weights, strict=True):
            for index, chunk in enumerate(bfv.encrypt(key, ours.encode(vector, weight))):
                adder.add(index, chunk)
        words = bfv.decrypt(key, adder.sums(cohort), 6)
    pairs = zip(vectors, weights, strict=True)
    total = np.sum([masked.encode(*pair) for pair in pairs], axis=0, dtype=np.uint32)
    assert ours.decode(words, cohort).tobytes() == masked.decode(total, cohort).tobytes()


@given(hnp.arrays(np.uint64, 2 * DEGREE, elements=st.integers(0, PRIME - 1), fill=st.integers(0, PRIME - 1)))
def test_coefficients_come_back_from_their_bytes(numbers: np.ndarray) -> None:
    assert np.array_equal(numbers_from(numbers_to(numbers, 5), SCHEME.primes, 5), numbers)


@given(
    st.integers(-3, 3),
    st.lists(st.tuples(st.integers(0, SCHEME.seeded_bytes - 1), st.integers(0, 255)), max_size=4),
)
def test_bytes_are_one_ciphertext_or_refused(longer: int, changes: list[tuple[int, int]]) -> None:
    good = Seeded(bytes(64), np.arange(2 * DEGREE, dtype=np.uint64)).to_bytes(SCHEME, TAG)
    data = bytearray(good[: SCHEME.seeded_bytes + min(longer, 0)] + bytes(max(longer, 0)))
    for place, value in changes:
        data[min(place, len(data) - 1)] = value
    try:
        found = Seeded.from_bytes(bytes(data), SCHEME, TAG)
    except PayloadError:
        assert longer or data[:16] != TAG or any(value == 0xFF for _, value in changes)
    else:
        assert found.to_bytes(SCHEME, TAG) == data
