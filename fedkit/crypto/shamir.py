"""Secret sharing (Shamir 1979): a secret of 32 bytes in shares; any `threshold` give it back, fewer tell nothing of it.

The field is that of the whole numbers modulo 2^256 + 297, the smallest prime above all secrets. A share is the value at
its holder's point of a polynomial of degree `threshold` - 1 whose value at 0 is the secret.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from cryptography.hazmat.primitives.hashes import SHAKE256, Hash

from fedkit.errors import BelowThreshold, PayloadError, SumSpoiled

__all__ = ["SECRET_BYTES", "SHARE_BYTES", "recover", "split"]

PRIME = (1 << 256) + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, points: Sequence[int], seed: bytes) -> dict[int, bytes]:
    """Shares by point, 33 bytes each; `points` are different and from 1 on.

    The coefficients are those that SHAKE256 makes of `seed`, at least 32 secret bytes that serve this secret, threshold
    and set of points alone: the same arguments give the same shares. Raises `PayloadError` for arguments that make no
    sharing.
    """
    if len(secret) != SECRET_BYTES or len(seed) < SECRET_BYTES:
        raise PayloadError(f"a secret has {SECRET_BYTES} bytes, and so many at least its seed")
    if not 1 <= threshold <= len(points) or len(set(points)) < len(points) or not all(0 < p < PRIME for p in points):
        raise PayloadError(f"{len(points)} shares at different points from 1 on cannot have a threshold of {threshold}")
    polynomial = [*_coefficients(seed, threshold - 1), int.from_bytes(secret, "little")]
    return {point: _value(polynomial, point).to_bytes(SHARE_BYTES, "little") for point in points}


def _coefficients(seed: bytes, count: int) -> Iterator[int]:
    """Uniform but for 2^-128: 48 bytes each, modulo the prime."""
    size = 48
    if count:
        stream = Hash(SHAKE256(size * count))
        stream.update(seed)
        drawn = stream.finalize()
        yield from (int.from_bytes(drawn[i : i + size], "little") % PRIME for i in range(0, len(drawn), size))


def _value(polynomial: Sequence[int], point: int) -> int:
    """Horner's rule, the highest coefficient first."""
    found = 0
    for coefficient in polynomial:
        found = (found * point + coefficient) % PRIME
    return found


def recover(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret from shares by point, of which any beyond `threshold` must agree with the first ones.

    Raises `BelowThreshold` for too few, `PayloadError` for what is no share, and `SumSpoiled` where a share is seen to
    be false: false shares that nothing contradicts give another secret.
    """
    if threshold < 1 or len(shares) < threshold:
        raise BelowThreshold(f"{len(shares)} shares of a secret that takes {threshold}")
    values = {point: _share(point, share) for point, share in shares.items()}
    first, *others = sorted(values)[:threshold], *sorted(values)[threshold:]
    points = tuple(first)
    for other in others:
        if _interpolated(points, values, other) != values[other]:
            raise SumSpoiled("the shares of a secret contradict each other")
    found = _interpolated(points, values, 0)
    if found >> 8 * SECRET_BYTES:
        raise SumSpoiled("the shares of a secret give none")
    return found.to_bytes(SECRET_BYTES, "little")


def _share(point: int, share: bytes) -> int:
    value = int.from_bytes(share, "little")
    if len(share) != SHARE_BYTES or not 0 < point < PRIME or value >= PRIME:
        raise PayloadError("this is not a share of a secret")
    return value


def _interpolated(points: tuple[int, ...], values: Mapping[int, int], at: int) -> int:
    weights = _weights(points, at)
    return sum(weight * values[point] for weight, point in zip(weights, points, strict=True)) % PRIME


@functools.lru_cache(maxsize=1024)
def _weights(points: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Lagrange's: by how much the value at each of `points` counts for the one `at` another."""
    found = []
    for one in points:
        above = below = 1
        for other in points:
            if other != one:
                above = above * (at - other) % PRIME
                below = below * (one - other) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(found)
