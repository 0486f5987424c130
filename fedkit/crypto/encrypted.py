"""Encrypted sums, whichever the scheme: the run's secret key, encrypting, adding without a key, decrypting.

Vectors are cut into chunks of 8,192 values (CKKS: 4,096), and each chunk is encrypted, sent, added and decrypted by
itself, so that nobody holds more than it must. All of it runs in native code at some point: `fedkit.crypto.seal` says
where to call it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkit.crypto.chunks import Full, Numbers, Scheme, Seeded, numbers_from, numbers_to
from fedkit.crypto.masks import digest_of
from fedkit.crypto.seal import Engine
from fedkit.errors import ConfigError, PayloadError, SumSpoiled

__all__ = ["Adder", "SecretKey", "decrypt", "encrypt", "noise_budget"]


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A run's secret key for one scheme, `scheme.key_bytes` of them. Whoever has it reads every ciphertext of the run.

    Raises `PayloadError` for bytes that are none.
    """

    scheme: Scheme
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Checks the length and every coefficient."""
        if len(self.data) != self.scheme.key_bytes:
            raise PayloadError(f"a secret key has {self.scheme.key_bytes} bytes, not {len(self.data)}")
        if not self.numbers.any():
            raise PayloadError("a secret key is not 0")

    @classmethod
    def make(cls, scheme: Scheme) -> SecretKey:
        """A fresh key, from the operating system's randomness; raises `ConfigError` where TenSEAL is missing."""
        with Engine(scheme) as engine:
            return cls(scheme, numbers_to(engine.make_key(), scheme.number_bytes))

    @property
    def numbers(self) -> Numbers:
        """uint64[4096 * primes]: one polynomial for each of the scheme's `key_primes`."""
        return numbers_from(self.data, self.scheme.key_primes, self.scheme.number_bytes)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the scheme and the key, 32 bytes: tells keys apart, and says nothing else about them."""
        return digest_of(b"fedkit-run-key-1", self.scheme.digest, self.data)

    @property
    def tag(self) -> bytes:
        """What every chunk under this key begins with."""
        return self.scheme.tag(self.fingerprint)


def encrypt(key: SecretKey, values: npt.NDArray[Any]) -> Iterator[bytes]:
    """The chunks of one vector, `scheme.seeded_bytes` each: uint32 residues for BFV, float64 for CKKS.

    One by one, so that memory stays at a chunk. Raises `ConfigError` where TenSEAL is missing.
    """
    with Engine(key.scheme) as engine:
        engine.use_key(key.numbers)
        tag = key.tag
        for block in _blocks(values, key.scheme.values):
            yield engine.encrypt(block).to_bytes(key.scheme, tag)


def _blocks(values: npt.NDArray[Any], size: int) -> Iterator[npt.NDArray[Any]]:
    for start in range(0, max(values.size, 1), size):
        block = values[start : start + size]
        yield block if block.size == size else np.concatenate([block, np.zeros(size - block.size, block.dtype)])


class Adder:
    """Sums of ciphertexts, chunk by chunk, in any order; it needs no key and learns nothing.

    Sums are exact modulo a prime: the order in which chunks arrive makes no difference to any bit of them. Holds one
    sum of 8 bytes a residue for each chunk that has arrived at all, nothing of those that were added. Not for threads.

    Guarantee: no more than `scheme.cohort` ciphertexts go into a sum, so that the noise stays within its budget; what
    is malformed, or of another key or scheme, never reaches native code.

    Does not protect against: a client that encrypts what it likes, which spoils the sum; a coordinator that adds up
    others than it says.

    To be closed, or used in a `with`.
    """

    def __init__(self, scheme: Scheme, fingerprint: bytes, values: int) -> None:
        self._engine, self._scheme, self._tag = Engine(scheme), scheme, scheme.tag(fingerprint)
        self._sums: list[Any] = [None] * scheme.chunks_for(values)
        self._counts = [0] * len(self._sums)

    def __enter__(self) -> Adder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def upload_bytes(self) -> int:
        """How many bytes each client sends."""
        return len(self._sums) * self._scheme.seeded_bytes

    def add(self, index: int, chunk: bytes) -> None:
        """Adds one client's chunk `index` to the sum of those; raises `PayloadError` for what cannot be one."""
        if not 0 <= index < len(self._sums):
            raise PayloadError(f"chunk {index} of {len(self._sums)}")
        if self._counts[index] == self._scheme.cohort:
            raise PayloadError(f"chunk {index} holds those of {self._scheme.cohort} clients already")
        ciphertext = self._engine.ciphertext(Seeded.from_bytes(chunk, self._scheme, self._tag))
        if self._sums[index] is None:
            self._sums[index] = ciphertext
        else:
            self._engine.add(self._sums[index], ciphertext)
        self._counts[index] += 1

    def sums(self, clients: int) -> Iterator[bytes]:
        """The chunks of the sum over so many clients; raises `SumSpoiled` unless each holds as many."""
        if clients < 1 or set(self._counts) != {clients}:
            raise SumSpoiled(f"chunks hold {min(self._counts)} to {max(self._counts)} of {clients} clients")
        return (self._engine.full(one).to_bytes(self._scheme, self._tag) for one in self._sums)

    def close(self) -> None:
        """Gives up the sums."""
        self._sums.clear()
        self._engine.close()


def decrypt(key: SecretKey, chunks: Iterable[bytes], values: int) -> npt.NDArray[Any]:
    """The sum of the vectors of so many values: uint32 for BFV, float64 for CKKS.

    Raises `PayloadError` for what are no chunks of a sum under this key; for BFV `SumSpoiled` where they decrypt to
    what is no sum, as ciphertexts of another key do, and where what stands behind the last value is not 0.
    """
    scheme, count, tag, done = key.scheme, key.scheme.chunks_for(values), key.tag, 0
    found = np.zeros((count, scheme.values), dtype=np.uint32 if scheme.name == "bfv" else np.float64)
    with Engine(scheme) as engine:
        engine.use_key(key.numbers)
        for done, chunk in enumerate(chunks, 1):
            if done > count:
                break
            found[done - 1] = engine.decrypt(engine.ciphertext(Full.from_bytes(chunk, scheme, tag)))
    if done != count:
        raise PayloadError(f"a sum of {values} values has {count} chunks, not {'more' if done > count else done}")
    flat = found.reshape(-1)
    if scheme.name == "bfv" and flat[values:].any():
        raise SumSpoiled("there is something behind the last value of an encrypted sum")
    return flat[:values]


def noise_budget(key: SecretKey, chunk: bytes) -> int:
    """How many bits of a BFV sum's noise budget are left; raises `ConfigError` for another scheme."""
    if key.scheme.name != "bfv":
        raise ConfigError(f"{key.scheme.name} has no noise budget")
    with Engine(key.scheme) as engine:
        engine.use_key(key.numbers)
        return engine.noise_budget(engine.ciphertext(Full.from_bytes(chunk, key.scheme, key.tag)))
