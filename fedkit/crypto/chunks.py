"""The bytes of encrypted vectors: chunks of one size each, that hold numbers below a known prime and nothing else.

An element of a ciphertext is a polynomial of 4,096 coefficients modulo a prime of 54 bits, 7 bytes each. What a client
sends is one of the two polynomials and the seed of the other (64 bytes), so that an upload is about half as large as a
sum. Nothing in a chunk says how long it is, which library reads it, or what comes next: every sequence of bytes of the
right length is a ciphertext, or refused here, before any native code sees it.

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

__all__ = [
    "DEGREE",
    "FULL_BYTES",
    "KEY_BYTES",
    "PRIMES",
    "SEEDED_BYTES",
    "TAG_BYTES",
    "Full",
    "Numbers",
    "Scheme",
    "Seeded",
    "chunks_for",
    "numbers_from",
    "numbers_to",
    "words_of_sum",
    "words_of_upload",
]

Numbers: TypeAlias = npt.NDArray[np.uint64]

DEGREE = 4096
PRIMES = (18014398509293569, 18014398509309953)  # 54 bits; ciphertexts are modulo the first, keys hold both
TAG_BYTES = 16
_SEED_BYTES = 64
_NUMBER_BYTES = 7
_WORD_BYTES = 4
_POLYNOMIAL_BYTES = DEGREE * _NUMBER_BYTES
SEEDED_BYTES = TAG_BYTES + _SEED_BYTES + _POLYNOMIAL_BYTES
FULL_BYTES = TAG_BYTES + 2 * _POLYNOMIAL_BYTES
KEY_BYTES = len(PRIMES) * _POLYNOMIAL_BYTES


def chunks_for(values: int) -> int:
    """How many chunks hold so many values, 4,096 each; at least one."""
    return max(-(-values // DEGREE), 1)


def words_of_sum(values: int) -> int:
    """How many words of 32 bits the chunks of a sum of so many values have."""
    return chunks_for(values) * FULL_BYTES // _WORD_BYTES


def words_of_upload(values: int) -> int:
    """How many words of 32 bits one client's chunks of so many values have."""
    return chunks_for(values) * SEEDED_BYTES // _WORD_BYTES


def numbers_to(numbers: Numbers) -> bytes:
    """Numbers below 2^56 as 7 little-endian bytes each."""
    return numbers.astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)[:, :_NUMBER_BYTES].tobytes()


def numbers_from(data: bytes, prime: int) -> Numbers:
    """One polynomial's coefficients, as `numbers_to` wrote them; raises `PayloadError` unless all are below `prime`."""
    if len(data) != _POLYNOMIAL_BYTES:
        raise PayloadError(f"a polynomial has {_POLYNOMIAL_BYTES} bytes, not {len(data)}")
    wide = np.zeros((DEGREE, 8), dtype=np.uint8)
    wide[:, :_NUMBER_BYTES] = np.frombuffer(data, dtype=np.uint8).reshape(DEGREE, _NUMBER_BYTES)
    numbers: Numbers = wide.reshape(-1).view("<u8")
    if int(numbers.max()) >= prime:
        raise PayloadError("a coefficient is not below its modulus")
    return numbers


@dataclass(frozen=True, slots=True)
class Scheme:
    """What all who encrypt, add and decrypt agree on, beside the ring that `DEGREE` and `PRIMES` fix.

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
    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        own = (self.name, str(self.cohort), str(self.modulus), self.scale.hex())
        return digest_of(b"fedkit-scheme-1", *(one.encode() for one in (*own, str(DEGREE), *map(str, PRIMES))))

    def tag(self, fingerprint: bytes) -> bytes:
        """What every chunk under the key of this fingerprint begins with, 16 bytes."""
        return digest_of(b"fedkit-chunk-1", self.digest, fingerprint)[:TAG_BYTES]


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

    def to_bytes(self, tag: bytes) -> bytes:
        """The chunk, 28,752 bytes."""
        return tag + self.seed + numbers_to(self.first)

    @classmethod
    def from_bytes(cls, data: bytes, tag: bytes) -> Seeded:
        """What `to_bytes` wrote; raises `PayloadError` for anything else."""
        rest = _untagged(data, tag, SEEDED_BYTES, "an encrypted chunk")
        return cls(rest[:_SEED_BYTES], numbers_from(rest[_SEED_BYTES:], PRIMES[0]))


@dataclass(frozen=True, slots=True, eq=False)
class Full:
    """A sum of ciphertexts: both polynomials."""

    first: Numbers = field(repr=False)
    second: Numbers = field(repr=False)

    def to_bytes(self, tag: bytes) -> bytes:
        """The chunk, 57,360 bytes."""
        return tag + numbers_to(self.first) + numbers_to(self.second)

    @classmethod
    def from_bytes(cls, data: bytes, tag: bytes) -> Full:
        """What `to_bytes` wrote; raises `PayloadError` for anything else, and where nothing is encrypted."""
        rest = _untagged(data, tag, FULL_BYTES, "a chunk of a sum")
        first, second = (numbers_from(rest[i:][:_POLYNOMIAL_BYTES], PRIMES[0]) for i in (0, _POLYNOMIAL_BYTES))
        if not second.any():
            raise PayloadError("a chunk of a sum is not encrypted")
        return cls(first, second)
