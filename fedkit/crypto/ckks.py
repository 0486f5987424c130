"""CKKS (Cheon, Kim, Kim and Song 2017): encrypted sums of floats, approximate, two values in each slot.

The same degree, primes and chunks as BFV (`fedkit.crypto.bfv`). A sum of n values within +-1 comes back off by less
than 1e-9 of n, so that a mean is off by less than 1e-9 of the clip.

Guarantee: as BFV's, as long as what is decrypted stays with those who hold the key.

Does not protect against: handing on decrypted values. Their last bits are the noise, from which the key follows (Li and
Micciancio 2021); noise enough to hide that costs an error of 2e-3. So a run whose coordinator gets the mean takes BFV.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkit.crypto import encrypted
from fedkit.crypto.chunks import Scheme
from fedkit.crypto.encrypted import SecretKey
from fedkit.crypto.ring import FULL_WEIGHT, Floats
from fedkit.errors import ConfigError, Reason, Refused, RoundAbandoned, SumSpoiled
from fedkit.weights import LARGEST, Vector

__all__ = ["Clipped", "Parameters", "decrypt", "encrypt", "refuse_handing_back"]

_MOST_COHORT = 1 << 16
_SLACK = 1e-6  # of one client's largest value: far above CKKS's error, far below what another key gives


def refuse_handing_back(to_coordinator: bool) -> None:
    """Raises `ConfigError` for a run in which decrypted values go back to the coordinator."""
    if to_coordinator:
        raise ConfigError(
            "aggregation: ckks shows its key to whoever gets decrypted values, and this run gives them to the "
            "coordinator: use bfv"
        )


@dataclass(frozen=True, slots=True)
class Parameters:
    """What CKKS needs to add up the values of `cohort` clients; raises `ConfigError` for 0 and above 65,536."""

    cohort: int

    def __post_init__(self) -> None:
        """Checks the cohort."""
        if not 1 <= self.cohort <= _MOST_COHORT:
            raise ConfigError(f"ckks: 1 to {_MOST_COHORT} clients, not {self.cohort}")

    @property
    def scale(self) -> float:
        """What values are multiplied by, a power of 2: the most at which the sum of a cohort stays in the ring.

        A coefficient is at most the mean size of the slots, sqrt(2) for two values within +-1.
        """
        room = math.prod(Scheme("ckks", self.cohort).primes).bit_length() - 2
        return 2.0 ** (room - math.ceil(math.log2(self.cohort)))

    @property
    def scheme(self) -> Scheme:
        """What keys and ciphertexts are bound to."""
        return Scheme("ckks", self.cohort, scale=self.scale)


@dataclass(frozen=True, slots=True)
class Clipped:
    """Weighted vectors of floats as values within +-1: clipped to +-`clip`, times the weight, and the weight itself.

    The counterpart of `fedkit.crypto.ring.FixedPoint`, without its rounding. Raises `ConfigError` for a clip that is
    not positive.
    """

    clip: float

    def __post_init__(self) -> None:
        """Checks the clip."""
        if not 0 < self.clip <= LARGEST:
            raise ConfigError(f"clip: a number above 0 and at most {LARGEST:g}, not {self.clip}")

    def encode(self, vector: Vector, weight: int) -> Floats:
        """One client's values: `len(vector)` of them times `weight` / 4096 over the clip, and `weight` / 4096.

        Raises `Refused` for NaN and infinity.
        """
        if not 0 <= weight <= FULL_WEIGHT:
            raise ConfigError(f"a weight is 0 to {FULL_WEIGHT}, not {weight}")
        if not np.isfinite(vector).all():
            raise Refused(Reason.NOT_FINITE, "the vector holds NaN or infinity")
        values = np.empty(vector.size + 1)
        np.divide(vector, self.clip, out=values[:-1], dtype=np.float64)
        np.clip(values[:-1], -1, 1, out=values[:-1])
        values[:-1] *= weight / FULL_WEIGHT
        values[-1] = weight / FULL_WEIGHT
        return values

    def decode(self, total: Floats, clients: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The weighted mean from the sum of `clients` clients' values, one shorter than `total`.

        Raises `SumSpoiled` for what cannot be the sum of so many, `RoundAbandoned` where nobody had any rows.
        """
        slack = clients * _SLACK
        weight = round(float(total[-1]) * FULL_WEIGHT) / FULL_WEIGHT if math.isfinite(total[-1]) else math.inf
        if not 0 <= weight <= clients or not np.abs(total[:-1]).max(initial=0) <= weight + slack:
            raise SumSpoiled(f"the values of {clients} clients add up to more than their clip allows")
        if not weight:
            raise RoundAbandoned("the clients' weights add up to 0: nobody had any rows")
        mean = np.empty(total.size - 1) if out is None else out
        return np.multiply(total[:-1], self.clip / weight, out=mean, casting="same_kind")


def encrypt(key: SecretKey, values: Floats) -> Iterator[bytes]:
    """One client's values within +-1 as chunks of 28,752 bytes, 4,096 values each.

    Raises `ConfigError` for other values, before the first chunk.
    """
    if key.scheme.name != "ckks":
        raise ConfigError(f"a key for {key.scheme.name} does not encrypt floats")
    if values.dtype != np.float64 or values.ndim != 1 or not values.size or not np.abs(values).max() <= 1:
        raise ConfigError("values to be encrypted are one row of float64 within +-1, and not empty")
    return encrypted.encrypt(key, values)


def decrypt(key: SecretKey, chunks: Iterable[bytes], values: int) -> Floats:
    """The values of the sum, for the key's holders only. Raises as `fedkit.crypto.encrypted.decrypt` does.

    What is no sum under this key comes back as values far beyond what a cohort adds up to: `Clipped.decode` sees it.
    """
    if key.scheme.name != "ckks":
        raise ConfigError(f"a key for {key.scheme.name} does not decrypt floats")
    return encrypted.decrypt(key, chunks, values)
