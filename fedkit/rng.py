"""Random numbers that depend on names, not on luck.

Every seed is a BLAKE3 digest of the run's seed and the words that say what it is for, so the same run draws the same
numbers in any process, in any order, with any number of workers.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from blake3 import blake3

__all__ = ["generator", "kept", "seed_all", "seed_for", "seeded", "torch_generator"]


def seed_for(seed: int, *labels: str | int) -> int:
    """A 63-bit seed that is a function of `seed` and `labels` alone."""
    parts = (str(part).replace("\x1e", "\x1e\x1e").replace("\x1f", "\x1eu") for part in (seed, *labels))
    text = "\x1f".join(parts)
    return int.from_bytes(blake3(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *labels: str | int) -> np.random.Generator:
    """A numpy generator for one purpose; equal arguments give equal numbers."""
    return np.random.default_rng(seed_for(seed, *labels))


def torch_generator(seed: int, *labels: str | int) -> torch.Generator:
    """A torch CPU generator for one purpose; equal arguments give equal numbers."""
    return torch.Generator().manual_seed(seed_for(seed, *labels))


def seed_all(seed: int) -> None:
    """Seeds torch, numpy and `random`, for code that draws from their global generators."""
    seed %= 2**63
    torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a traceback a call where there is no GPU
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Puts the global generators of torch, numpy and `random` back to where they were before the block."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch, numpy and `random` inside the block and puts back what was there before."""
    with kept():
        seed_all(seed)
        yield
