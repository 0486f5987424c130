"""The whole numbers that masked and encrypted sums are made of.

Whatever is added up in secret is a vector of whole numbers modulo a public number: 2^32 for masking, an odd one for
BFV. The same answers give the same whole numbers in either, so that both decode to the same bits, on every machine.
Nothing can overflow: a `Ring` knows how many clients may be added, and what does not fit is a `ConfigError`, raised
before anything is asked of anybody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedkit.errors import ConfigError, Reason, Refused, RoundAbandoned, SumSpoiled
from fedkit.weights import LARGEST, Vector

__all__ = ["FULL_WEIGHT", "FixedPoint", "Floats", "Integers", "Reals", "Ring", "Words", "weight_of"]

Words: TypeAlias = npt.NDArray[np.uint32]
Floats: TypeAlias = npt.NDArray[np.float64]

FULL_WEIGHT = 1 << 12  # the weight of a client with `cap` rows or more
_MASKING = 1 << 32
_BLOCK = 1 << 15  # elements that are converted at a time, which stay in the cache of a processor's core
_SMALLEST_CLIP = 1e-18
_INT64 = 64
_REAL = float(1 << 20)  # steps of 1 in a sum of floats


def weight_of(examples: int, cap: int) -> int:
    """A client's weight in 1/4096: min(examples, cap) / cap rounded, at least 1; 0 for a client without rows.

    Raises `ConfigError` for a cap below 1 or a negative number of rows.
    """
    if cap < 1 or examples < 0:
        raise ConfigError(f"a weight needs at least 0 examples and a cap of at least 1, got {examples} and {cap}")
    rounded = (2 * FULL_WEIGHT * min(examples, cap) + cap) // (2 * cap)
    return max(rounded, 1) if examples else 0


@dataclass(frozen=True, slots=True)
class Ring:
    """Whole numbers modulo `modulus`, of which those of at most `cohort` clients are added.

    `modulus` is 2^32, or an odd number up to 2^31. Raises `ConfigError` for any other, and for a cohort below 1.
    """

    cohort: int
    modulus: int = _MASKING

    def __post_init__(self) -> None:
        """Refuses moduli whose sums would need more than 32 bits on the way."""
        if self.cohort < 1:
            raise ConfigError(f"at least one client is added, not {self.cohort}")
        if self.modulus != _MASKING and (self.modulus % 2 == 0 or not 3 <= self.modulus <= 1 << 31):
            raise ConfigError(f"modulus: 2^32 or an odd number from 3 to 2^31, not {self.modulus}")

    @property
    def largest(self) -> int:
        """The largest magnitude that a sum of signed numbers may have."""
        return (self.modulus - 1) // 2

    def words(self, integers: npt.NDArray[np.int64]) -> Words:
        """Signed numbers as residues 0 .. modulus - 1, the same shape."""
        if self.modulus == _MASKING:
            return integers.astype(np.uint32)
        return np.remainder(integers, self.modulus).astype(np.uint32)

    def integers(self, words: Words) -> npt.NDArray[np.int64]:
        """Residues as the signed numbers of least magnitude, the same shape."""
        if self.modulus == _MASKING:
            return words.view(np.int32).astype(np.int64)
        found = words.astype(np.int64)
        return np.subtract(found, self.modulus, out=found, where=found > self.largest)

    def add(self, total: Words, words: Words) -> None:
        """Adds `words` to `total` in place; both hold residues and have the same length."""
        np.add(total, words, out=total)
        if self.modulus != _MASKING:
            np.subtract(total, np.uint32(self.modulus), out=total, where=total >= self.modulus)


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """Weighted vectors of floats: values beyond +-`clip` are clipped, then kept to `bits` bits, the sign included.

    A client's words are its rounded w u / step for each value u, and one more, its weight w in 1/4096. The mean of a
    sum over clients k is off by at most `error_bound`: half a step for each client, over the sum of the weights.

    `spare` of the ring's range stays free on either side, for what else is added. Raises `ConfigError` where the sum
    over the ring's cohort could leave the ring.
    """

    ring: Ring
    clip: float
    bits: int = 20
    spare: int = 0

    def __post_init__(self) -> None:
        """Checks that a whole cohort's largest values and weights fit."""
        if not _SMALLEST_CLIP <= self.clip <= LARGEST:
            raise ConfigError(f"clip: a number from {_SMALLEST_CLIP:g} to {LARGEST:g}, not {self.clip}")
        if not 2 <= self.bits <= 31:
            raise ConfigError(f"bits: 2 to 31, not {self.bits}")
        most = self.ring.cohort * max(self._steps, FULL_WEIGHT) + self.spare
        if most > self.ring.largest:
            raise ConfigError(
                f"{self.ring.cohort} clients of {self.bits} bits do not fit modulo {self.ring.modulus}: the sum may "
                f"reach {most}, and {self.ring.largest} is the most; take fewer bits or clients"
            )

    @property
    def step(self) -> float:
        """What one unit of the ring stands for."""
        return self.clip / self._steps

    @property
    def _steps(self) -> int:
        return 1 << (self.bits - 1)

    def error_bound(self, clients: int, weight: int) -> float:
        """How far a decoded mean may be off: clients 2^-bits clip / (weight / 4096), for values within the clip.

        That is for rounding to the ring, beside which float64's own rounding (2^-51 of the clip) is nothing, and with
        the weights as they are carried: rounding those to 12 bits moves the mean to one of slightly other weights.
        """
        return clients * 2.0**-self.bits * self.clip / (weight / FULL_WEIGHT)

    def encode(self, vector: Vector, weight: int, out: Words | None = None) -> Words:
        """One client's words: `len(vector)` values times `weight` / 4096, and the weight (see `weight_of`).

        `out`, where given, is filled and returned. Raises `Refused` for NaN and infinity.
        """
        if not 0 <= weight <= FULL_WEIGHT:
            raise ConfigError(f"a weight is 0 to {FULL_WEIGHT}, not {weight}")
        words = np.empty(vector.size + 1, dtype=np.uint32) if out is None else out
        scratch = np.empty(min(_BLOCK, vector.size), dtype=np.float64)
        for start in range(0, vector.size, _BLOCK):
            self._encode_block(vector[start : start + _BLOCK], weight, scratch, words[start : start + _BLOCK])
        words[-1] = weight
        return words

    def _encode_block(self, block: Vector, weight: int, scratch: Floats, out: Words) -> None:
        scaled, limit = scratch[: block.size], weight * self._steps / FULL_WEIGHT
        with np.errstate(invalid="ignore"):  # infinity minus infinity, or times 0, is NaN
            np.multiply(block, limit / self.clip, out=scaled, dtype=np.float64)
            finite = np.isfinite(scaled.sum())
        if not finite:
            raise Refused(Reason.NOT_FINITE, "the vector holds NaN or infinity")
        np.clip(scaled, -limit, limit, out=scaled)
        whole = np.rint(scaled, out=scaled).astype(np.int32)
        if self.ring.modulus != _MASKING:
            np.add(whole, self.ring.modulus, out=whole, where=whole < 0)
        out[: block.size] = whole.view(np.uint32)

    def weight(self, total: Words, clients: int) -> int:
        """The sum of the weights in 1/4096; raises `SumSpoiled` for one that `clients` of them cannot have.

        Raises `RoundAbandoned` where it is 0: nobody had any rows.
        """
        weight = int(total[-1])
        if weight > FULL_WEIGHT * clients:
            raise SumSpoiled(f"the weights of {clients} clients add up to {weight}, and {FULL_WEIGHT} is the most each")
        if not weight:
            raise RoundAbandoned("the clients' weights add up to 0: nobody had any rows")
        return weight

    def decode(self, total: Words, clients: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The weighted mean from the sum of `clients` clients' words, one shorter than `total`.

        float64 unless `out`, which is filled and returned, is float32. Raises `SumSpoiled` for what cannot be the sum
        of so many clients' words within the clip, such as noise.
        """
        weight, size = self.weight(total, clients), total.size - 1
        mean = np.empty(size, dtype=np.float64) if out is None else out
        most = weight * self._steps / FULL_WEIGHT
        for start in range(0, size, _BLOCK):
            block = self.ring.integers(total[start : min(start + _BLOCK, size)])
            if np.abs(block).max() > most + clients / 2 + self.spare:
                raise SumSpoiled(f"the values of {clients} clients add up to more than their clip allows")
            mean[start : start + _BLOCK] = block / most * self.clip
        return mean


@dataclass(frozen=True, slots=True)
class Integers:
    """Exact whole numbers of 64 bits: counts, histograms, sums of bounded values.

    A number is cut into limbs of `limb_bits` bits, few enough that the sum of the cohort's limbs stays below the
    modulus; sums are taken modulo 2^64 in two's complement. Raises `ConfigError` where not even one bit fits.
    """

    ring: Ring

    def __post_init__(self) -> None:
        """Checks that a limb has at least a bit."""
        if self.limb_bits < 1:
            raise ConfigError(f"whole numbers of {self.ring.cohort} clients do not fit modulo {self.ring.modulus}")

    @property
    def limb_bits(self) -> int:
        """How many bits of a number one word carries."""
        return ((self.ring.modulus - 1) // self.ring.cohort + 1).bit_length() - 1

    @property
    def limbs(self) -> int:
        """How many words one number takes."""
        return math.ceil(_INT64 / self.limb_bits)

    @property
    def largest(self) -> int:
        """The largest magnitude one client's number may have, so that the cohort's sum has 64 bits."""
        return ((1 << 63) - 1) // self.ring.cohort

    def encode(self, values: npt.NDArray[np.int64]) -> Words:
        """One client's words, `limbs` times as many as `values`: all lowest limbs first, then the next ones.

        Raises `Refused` for a number beyond `largest`.
        """
        if values.size and not -self.largest <= int(values.min()) <= int(values.max()) <= self.largest:
            raise Refused(Reason.NORM, f"a sum is larger than {self.largest}, the most that {self.ring.cohort} can add")
        bits = values.astype(np.int64).view(np.uint64)
        mask, shifts = np.uint64((1 << self.limb_bits) - 1), self._shifts
        return np.concatenate([(bits >> shift & mask).astype(np.uint32) for shift in shifts])

    def decode(self, total: Words, clients: int) -> npt.NDArray[np.int64]:
        """The exact sums from the sum of `clients` clients' words.

        Raises `SumSpoiled` for what cannot be the sum of so many.
        """
        limbs = total.reshape(self.limbs, -1).astype(np.uint64)
        if limbs.size and int(limbs.max()) > clients * ((1 << self.limb_bits) - 1):
            raise SumSpoiled(f"the numbers of {clients} clients add up to more than they can")
        found = np.zeros(limbs.shape[1], dtype=np.uint64)
        for shift, limb in zip(self._shifts, limbs, strict=True):
            found += limb << shift
        return found.view(np.int64)

    @property
    def _shifts(self) -> npt.NDArray[np.uint64]:
        return np.arange(self.limbs, dtype=np.uint64) * np.uint64(self.limb_bits)


@dataclass(frozen=True, slots=True)
class Reals:
    """Sums of any floats to a 2^20th, such as metric states: counts stay exact, and losses nearly so.

    The sum over n clients is off by at most n 2^-21. One client's number may reach 2^43 / cohort.
    """

    ring: Ring

    @property
    def _integers(self) -> Integers:
        return Integers(self.ring)

    def encode(self, values: Floats) -> Words:
        """One client's words; raises `Refused` for NaN, infinity and numbers that are too large."""
        if not np.isfinite(values).all():
            raise Refused(Reason.NOT_FINITE, "a sum is NaN or infinite")
        if values.size and float(np.abs(values).max()) * _REAL > self._integers.largest:
            raise Refused(Reason.NORM, f"a sum is larger than {self._integers.largest / _REAL:g}")
        return self._integers.encode(np.rint(values * _REAL).astype(np.int64))

    def decode(self, total: Words, clients: int) -> Floats:
        """The sums over `clients` clients; raises `SumSpoiled` as `Integers.decode` does."""
        return self._integers.decode(total, clients) / _REAL
