"""Shares: any `threshold` of them give the secret back, fewer are consistent with every other one."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.crypto.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, recover, split
from fedkit.errors import BelowThreshold, PayloadError, SumSpoiled

SECRETS = st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES) | st.sampled_from([bytes(32), b"\xff" * 32])
SEED = bytes(range(32))


@st.composite
def sharings(draw: st.DrawFn) -> tuple[bytes, int, dict[int, bytes]]:
    secret, points = draw(SECRETS), draw(st.lists(st.integers(1, 10_000), min_size=1, max_size=12, unique=True))
    threshold = draw(st.integers(1, len(points)))
    return secret, threshold, split(secret, threshold, points, draw(st.binary(min_size=32, max_size=40)))


@given(sharings(), st.data())
def test_any_threshold_of_shares_gives_the_secret_back(
    sharing: tuple[bytes, int, dict[int, bytes]], data: st.DataObject
) -> None:
    secret, threshold, shares = sharing
    count = data.draw(st.integers(threshold, len(shares)))
    chosen = data.draw(st.permutations(sorted(shares)))[:count]
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    assert recover({point: shares[point] for point in chosen}, threshold) == secret


@settings(max_examples=50)
@given(SECRETS, SECRETS, st.integers(2, 6), st.data())
def test_fewer_shares_fit_any_other_secret_as_well(
    secret: bytes, other: bytes, threshold: int, data: st.DataObject
) -> None:
    shares = split(secret, threshold, range(1, threshold + 3), SEED)
    known = data.draw(st.permutations(sorted(shares)))[: threshold - 1]
    left = {point: shares[point] for point in known}
    with pytest.raises(BelowThreshold):
        recover(left, threshold)
    # interpolate through the known shares and the other secret: one more share exists that gives it
    free = max(shares) + 1
    points = {0: int.from_bytes(other, "little")} | {p: int.from_bytes(left[p], "little") for p in known}
    value = 0
    for one, at_one in points.items():
        weight = at_one
        for two in points:
            if two != one:
                weight = weight * (free - two) * pow(one - two, -1, PRIME) % PRIME
        value = (value + weight) % PRIME
    assert recover(left | {free: value.to_bytes(SHARE_BYTES, "little")}, threshold) == other


@given(sharings(), st.data())
def test_a_false_share_among_more_than_needed_is_seen(
    sharing: tuple[bytes, int, dict[int, bytes]], data: st.DataObject
) -> None:
    secret, threshold, shares = sharing
    point = data.draw(st.sampled_from(sorted(shares)))
    false = data.draw(st.integers(0, PRIME - 1).filter(lambda v: v != int.from_bytes(shares[point], "little")))
    changed = shares | {point: false.to_bytes(SHARE_BYTES, "little")}
    if threshold < len(shares):
        with pytest.raises(SumSpoiled):
            recover(changed, threshold)
    else:
        with contextlib.suppress(SumSpoiled):
            assert recover(changed, threshold) != secret


def test_the_same_arguments_give_the_same_shares_and_another_seed_gives_others() -> None:
    one = split(bytes(32), 3, [1, 2, 3, 4], SEED)
    assert one == split(bytes(32), 3, [1, 2, 3, 4], SEED)
    other = split(bytes(32), 3, [1, 2, 3, 4], SEED + b"1")
    assert all(one[point] != other[point] for point in one)


def test_the_prime_is_one() -> None:
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        assert pow(base, PRIME - 1, PRIME) == 1


def test_what_is_no_share_is_refused_before_it_is_used() -> None:
    shares = split(bytes(32), 2, [1, 2, 3], SEED)
    for bad in ({1: shares[1], 2: shares[2][:-1]}, {1: shares[1], 0: shares[2]}, {1: shares[1], 2: b"\xff" * 33}):
        with pytest.raises(PayloadError):
            recover(bad, 2)
    with pytest.raises(BelowThreshold):
        recover({}, 0)


@pytest.mark.parametrize(
    ("secret", "threshold", "points", "seed"),
    [
        (bytes(31), 1, [1], SEED),
        (bytes(32), 1, [1], bytes(31)),
        (bytes(32), 0, [1], SEED),
        (bytes(32), 2, [1], SEED),
        (bytes(32), 2, [1, 1], SEED),
        (bytes(32), 1, [0], SEED),
        (bytes(32), 1, [PRIME], SEED),
    ],
)
def test_arguments_that_make_no_sharing_are_refused(
    secret: bytes, threshold: int, points: list[int], seed: bytes
) -> None:
    with pytest.raises(PayloadError):
        split(secret, threshold, points, seed)
