"""Random numbers that nobody else can know: the Poisson sample and the noise.

They come from AES-256 in counter mode under a key of the operating system's randomness, and from nothing else. torch's
own generator will not do: on a CPU it keeps 32 bits of its seed, which can be tried out one by one, and its state can
be computed from a few hundred of its numbers. A coordinator that sends a model of which some gradients are zero sees
the noise on those as it was drawn, and could take it off the others.
"""

from __future__ import annotations

import math
import secrets

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

__all__ = ["Randomness"]

_BITS = 52  # of a float64's fraction
_FRACTION, _ONE = (1 << _BITS) - 1, 0x3FF << _BITS
_BLOCK_BYTES = 16
_ZEROS = memoryview(bytes(1 << 18))


class Randomness:
    """A stream of random numbers under a key of its own; make a fresh one for each piece of work.

    `key`: 32 bytes that nobody else knows and that nothing else is drawn under; None: the operating system's
    randomness, on which nothing that a run, a seed or a coordinator says has any influence.

    Guarantee: whoever sees some of its numbers learns nothing of the others, as far as AES-256 is a pseudorandom
    function.

    Does not protect against: somebody who reads the memory of this process.
    """

    def __init__(self, key: bytes | None = None) -> None:
        cipher = Cipher(algorithms.AES256(key or secrets.token_bytes(32)), modes.CTR(bytes(_BLOCK_BYTES)))
        self._stream = cipher.encryptor()

    def chosen(self, rows: int, q: float) -> torch.Tensor:
        """The numbers of the rows that take part, ascending: each of `rows` by itself, with probability `q`.

        The probability is a whole multiple of 2^-52, rounded down; all rows where `q` is 1.
        """
        if q >= 1.0:
            return torch.arange(rows)
        return torch.nonzero(self._unit(rows) < 1.0 + math.floor(q * 2.0**_BITS) * 2.0**-_BITS).reshape(-1)

    def normal(self, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """`count` independent standard normal numbers, float64 (up to 8.4 standard deviations), by Box and Muller 1958.

        The bits are drawn on the CPU whatever the device, and the numbers are computed on it where it knows float64.
        """
        where = torch.device(device)
        half = (count + 1) // 2
        unit = self._unit(2 * half)
        unit = unit.to(where) if where.type == "cuda" else unit
        radius = (2.0 - unit[:half]).log_().mul_(-2.0).sqrt_()  # of 1 - u, which is never zero
        angle = unit[half:].mul_(2.0 * math.pi)
        found = torch.empty(2, half, dtype=torch.float64, device=unit.device)
        torch.mul(radius, angle.cos(), out=found[0])
        torch.mul(radius, angle.sin_(), out=found[1])
        return found.view(-1)[:count]

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """`count` independent numbers from 0 up to 1, multiples of 2^-52."""
        found: npt.NDArray[np.float64] = self._unit(count).numpy()
        return found - 1.0

    def seed(self) -> int:
        """A seed for code that draws from torch's own generators, such as dropout: 63 bits, where it keeps them."""
        return int(self._words(1)) >> 1 & (1 << 63) - 1

    def _unit(self, count: int) -> torch.Tensor:
        """`count` numbers in [1, 2), uniform over all that float64 has there."""
        return self._words(count).bitwise_and_(_FRACTION).bitwise_or_(_ONE).view(torch.float64)

    def _words(self, count: int) -> torch.Tensor:
        if not count:
            return torch.empty(0, dtype=torch.int64)
        out = bytearray(8 * count + _BLOCK_BYTES - 1)
        for start in range(0, 8 * count, len(_ZEROS)):
            left = _ZEROS[: 8 * count - start]
            self._stream.update_into(left, memoryview(out)[start : start + len(left) + _BLOCK_BYTES - 1])
        return torch.frombuffer(out, dtype=torch.int64, count=count)
