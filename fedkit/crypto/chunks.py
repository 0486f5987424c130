"""The bytes of encrypted vectors: chunks of one size each, that hold numbers below known primes and nothing else.

An element of a ciphertext is a polynomial of 4,096 coefficients modulo a product of primes, kept as its residues modulo
each: 5 bytes each for BFV's two primes of 40 bits, 7 bytes for CKKS's one of 54. What a client sends is one of the two
polynomials and the seed of the other (64 bytes), so that an upload is about half as large as a sum. Nothing in a chunk
says how long it is, which library reads it, or what comes next: every sequence of bytes of the right length is a
ciphertext, or refused here, before any native code sees it.

The first 16 bytes are a tag, by which chunks under other parameters or another key are told apart. It is no signature:
whoever lies can copy it, and gets a sum that decrypts to noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedkit.crypto.masks import digest_of
from fedkit.errors import ConfigError, PayloadError

__all__ = ["DEGREE", "KEY_SIZES", "TAG_BYTES", "Full", "Numbers", "Scheme", "Seeded", "numbers_from", "numbers_to"]

Numbers: TypeAlias = npt.NDArray[np.uint64]

DEGREE = 4096
TAG_BYTES = 16
_SEED_BYTES = 64
_WORD_BYTES = 4
_PRIMES = {"bfv": (1099511390209, 1099511480321), "ckks": (18014398509293569,)}
_ASIDE = {"bfv": 40961, "ckks": 18014398509309953}  # a prime that SEAL keeps for what is never done here
_PACKED = {"bfv": 2, "ckks": 1}  # values for each coefficient


def numbers_to(numbers: Numbers, size: int) -> bytes:
    """Numbers below 2^(8 `size`) as so many little-endian bytes each."""
    return numbers.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, :size].tobytes()


def numbers_from(data: bytes, primes: tuple[int, ...], size: int) -> Numbers:
    """One polynomial, as `numbers_to` wrote it: 4,096 residues modulo each prime in turn.

    Raises `PayloadError` for other lengths, and for a number that is not below its prime.
    """
    count = len(primes) * DEGREE
    if len(data) != count * size:
        raise PayloadError(f"a polynomial has {count * size} bytes, not {len(data)}")
    eight = np.ndarray(count, dtype="<u8", buffer=data + bytes(8 - size), strides=size)  # from each number's first byte
    numbers: Numbers = eight & np.uint64((1 << 8 * size) - 1)
    if any(int(rest.max()) >= prime for rest, prime in zip(numbers.reshape(-1, DEGREE), primes, strict=True)):
        raise PayloadError("a coefficient is not below its modulus")
    return numbers


@dataclass(frozen=True, slots=True)
class Scheme:
    """What all who encrypt, add and decrypt agree on.

    `modulus` is that of BFV's whole numbers, `scale` what CKKS multiplies floats by; the other one is 1. `cohort` is
    how many ciphertexts may be added.
    """

    name: Literal["bfv", "ckks"]
    cohort: int
    modulus: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuses an empty cohort."""
        if self.cohort < 1:
            raise ConfigError(f"at least one ciphertext is added, not {self.cohort}")

    @property
    def primes(self) -> tuple[int, ...]:
        """Those that ciphertexts are modulo."""
        return _PRIMES[self.name]

    @property
    def key_primes(self) -> tuple[int, ...]:
        """Those that keys are modulo: one more."""
        return (*self.primes, _ASIDE[self.name])

    @property
    def number_bytes(self) -> int:
        """How many bytes a residue takes."""
        return -(-self.primes[0].bit_length() // 8)

    @property
    def values(self) -> int:
        """How many values one chunk holds: 8,192 for BFV, two in each coefficient; 4,096 for CKKS."""
        return DEGREE * _PACKED[self.name]

    @property
    def base(self) -> int:
        """What BFV multiplies the second value of a coefficient by.

        A sum is either one of signed numbers, -modulus/2 .. modulus/2, or one of numbers from 0 on, below the modulus:
        three quarters of `base`. So neither value reaches the other, and chance is seen: it gives other quarters.
        """
        return 2 * self.modulus

    @property
    def plain_modulus(self) -> int:
        """That of BFV's plaintexts: room for two values, and odd."""
        return self.base**2 + 1

    @property
    def polynomial_bytes(self) -> int:
        """Of one polynomial of a ciphertext."""
        return len(self.primes) * DEGREE * self.number_bytes

    @property
    def seeded_bytes(self) -> int:
        """Of a chunk of an upload."""
        return TAG_BYTES + _SEED_BYTES + self.polynomial_bytes

    @property
    def full_bytes(self) -> int:
        """Of a chunk of a sum."""
        return TAG_BYTES + 2 * self.polynomial_bytes

    @property
    def key_bytes(self) -> int:
        """Of a secret key."""
        return len(self.key_primes) * DEGREE * self.number_bytes

    def chunks_for(self, values: int) -> int:
        """How many chunks hold so many values; at least one."""
        return max(-(-values // self.values), 1)

    def words_of_upload(self, values: int) -> int:
        """How many words of 32 bits one client's chunks of so many values have."""
        return self.chunks_for(values) * self.seeded_bytes // _WORD_BYTES

    def words_of_sum(self, values: int) -> int:
        """How many words of 32 bits the chunks of a sum of so many values have."""
        return self.chunks_for(values) * self.full_bytes // _WORD_BYTES

    @property
    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        own = (self.name, self.cohort, self.modulus, self.scale.hex(), DEGREE, *self.key_primes)
        return digest_of(b"fedkit-scheme-2", *(str(one).encode() for one in own))

    def tag(self, fingerprint: bytes) -> bytes:
        """What every chunk under the key of this fingerprint begins with, 16 bytes."""
        return digest_of(b"fedkit-chunk-1", self.digest, fingerprint)[:TAG_BYTES]

    def polynomial(self, data: bytes) -> Numbers:
        """One polynomial of a ciphertext; raises `PayloadError` for what is none."""
        return numbers_from(data, self.primes, self.number_bytes)


def _untagged(data: bytes, tag: bytes, size: int, what: str) -> bytes:
    if len(data) != size:
        raise PayloadError(f"{what} has {size} bytes, not {len(data)}")
    if data[:TAG_BYTES] != tag:
        raise PayloadError(f"{what} is not of this run: other parameters or another key")
    return data[TAG_BYTES:]


@dataclass(frozen=True, slots=True, eq=False)
class Seeded:
    """A fresh ciphertext: its first polynomial, and 64 bytes from which the second follows."""

    seed: bytes
    first: Numbers = field(repr=False)

    def to_bytes(self, scheme: Scheme, tag: bytes) -> bytes:
        """The chunk, `scheme.seeded_bytes` of them."""
        return tag + self.seed + numbers_to(self.first, scheme.number_bytes)

    @classmethod
    def from_bytes(cls, data: bytes, scheme: Scheme, tag: bytes) -> Seeded:
        """What `to_bytes` wrote; raises `PayloadError` for anything else."""
        rest = _untagged(data, tag, scheme.seeded_bytes, "an encrypted chunk")
        return cls(rest[:_SEED_BYTES], scheme.polynomial(rest[_SEED_BYTES:]))


@dataclass(frozen=True, slots=True, eq=False)
class Full:
    """A sum of ciphertexts: both polynomials."""

    first: Numbers = field(repr=False)
    second: Numbers = field(repr=False)

    def to_bytes(self, scheme: Scheme, tag: bytes) -> bytes:
        """The chunk, `scheme.full_bytes` of them."""
        return tag + numbers_to(self.first, scheme.number_bytes) + numbers_to(self.second, scheme.number_bytes)

    @classmethod
    def from_bytes(cls, data: bytes, scheme: Scheme, tag: bytes) -> Full:
        """What `to_bytes` wrote; raises `PayloadError` for anything else, and where nothing is encrypted."""
        rest, half = _untagged(data, tag, scheme.full_bytes, "a chunk of a sum"), scheme.polynomial_bytes
        first, second = scheme.polynomial(rest[:half]), scheme.polynomial(rest[half:])
        if not second.any():
            raise PayloadError("a chunk of a sum is not encrypted")
        return cls(first, second)


KEY_SIZES = frozenset(Scheme(name, 1).key_bytes for name in ("bfv", "ckks"))
