"""BFV (Brakerski 2012; Fan and Vercauteren 2012): exact sums of whole numbers under one key that the clients share.

Degree 4096 and two primes of 40 bits, which is more than 128 bits of security (homomorphicencryption.org's table, as
SEAL checks it: 109 bits in all). Each coefficient holds two numbers. Nothing is ever multiplied: the noise of a sum is
the sum of the noises, and its budget is known beforehand.

Guarantee: whoever lacks the secret key, the coordinator above all, learns nothing from ciphertexts and their sums.

Does not protect against: any one holder of the key together with the coordinator, who read every update; a key holder
cannot tell a sum from one client's ciphertext. Masking does not have this weakness, and is the default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedkit.crypto import encrypted
from fedkit.crypto.chunks import Scheme
from fedkit.crypto.encrypted import SecretKey
from fedkit.crypto.ring import FULL_WEIGHT, Ring, Words
from fedkit.errors import ConfigError

__all__ = ["LEAST_BUDGET", "Parameters", "decrypt", "encrypt"]

LEAST_BUDGET = 10
_MOST_BITS = 24  # as many as float32 holds
_MOST_PLAIN = 60  # bits of SEAL's plain modulus
_MOST_NOISE = 22  # of a coefficient: SEAL draws at most 21 and rounds by less than 1


@dataclass(frozen=True, slots=True)
class Parameters:
    """What BFV needs to add up to `cohort` clients' fixed-point numbers of `bits` bits.

    Raises `ConfigError` where the sum of a whole cohort would leave less than 10 bits of noise budget, or two such sums
    would need more than 60 bits: at 24 bits more than 28 clients, at 20 bits 182, at 16 bits 1,160.
    """

    cohort: int
    bits: int = 20

    def __post_init__(self) -> None:
        """Checks the noise of the whole cohort."""
        if self.cohort < 1 or not 2 <= self.bits <= _MOST_BITS:
            raise ConfigError(f"bfv: 1 client or more, and 2 to {_MOST_BITS} bits, not {self.cohort} and {self.bits}")
        if self.scheme.plain_modulus.bit_length() > _MOST_PLAIN or self.budget < LEAST_BUDGET:
            raise ConfigError(
                f"bfv: {self.cohort} clients of {self.bits} bits do not fit: the noise would leave too little room; "
                "take fewer bits or clients, or masked aggregation"
            )

    @classmethod
    def fitting(cls, cohort: int) -> Parameters:
        """The parameters with the most bits that a cohort can have; raises `ConfigError` where there are none."""
        for bits in range(_MOST_BITS, 2, -1):
            try:
                return cls(cohort, bits)
            except ConfigError:
                continue
        return cls(cohort, 2)

    @property
    def modulus(self) -> int:
        """The ring's: the least number below which all sums fit, signs included; it is odd."""
        return 2 * self.cohort * max(1 << (self.bits - 1), FULL_WEIGHT) + 1

    @property
    def budget(self) -> int:
        """How many bits of noise budget a sum over the cohort has left at least, whatever was drawn."""
        noise = self.scheme.plain_modulus * self.cohort * _MOST_NOISE
        return math.prod(self.scheme.primes).bit_length() - noise.bit_length() - 1

    @property
    def ring(self) -> Ring:
        """The ring in which `FixedPoint`, `Integers` and `Reals` put words for these parameters."""
        return Ring(self.cohort, self.modulus)

    @property
    def scheme(self) -> Scheme:
        """What keys and ciphertexts are bound to."""
        return Scheme("bfv", self.cohort, modulus=self.modulus)


def encrypt(key: SecretKey, words: Words) -> Iterator[bytes]:
    """One client's words, residues of `Parameters.ring`, as chunks of 41,040 bytes, 8,192 words each.

    Raises `ConfigError` for what are none, before the first chunk.
    """
    if key.scheme.name != "bfv":
        raise ConfigError(f"a key for {key.scheme.name} does not encrypt words")
    if words.dtype != "uint32" or words.ndim != 1 or not words.size or int(words.max()) >= key.scheme.modulus:
        raise ConfigError(f"words to be encrypted are one row of uint32 below {key.scheme.modulus}, and not empty")
    return encrypted.encrypt(key, words)


def decrypt(key: SecretKey, chunks: Iterable[bytes], words: int) -> Words:
    """The words of the sum: uint32, modulo the ring's modulus. Raises as `fedkit.crypto.encrypted.decrypt` does."""
    if key.scheme.name != "bfv":
        raise ConfigError(f"a key for {key.scheme.name} does not decrypt words")
    return encrypted.decrypt(key, chunks, words)
