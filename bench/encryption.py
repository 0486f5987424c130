"""What encrypted sums cost: CPU time, bytes up and down, the coordinator's memory, noise, and how far they are off."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from bench.table import Figure, show
from fedkit.crypto import bfv, ckks
from fedkit.crypto.chunks import Scheme
from fedkit.crypto.encrypted import Adder, SecretKey, noise_budget
from fedkit.crypto.ring import FULL_WEIGHT, FixedPoint, Floats, Ring

__all__ = ["encryption"]

MILLION = 1_000_000
MB = 1e6
CLIP = 0.5


def _cpu(work: Callable[[], object], times: int = 5) -> float:
    """CPU seconds of the fastest of some runs, after one to warm up."""
    work()
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def _used(chunks: Iterable[bytes]) -> None:
    for _ in chunks:
        pass


def cost(cohort: int = 10) -> list[Figure]:
    """A million parameters in a cohort of ten, at one client; each chunk is dropped as soon as it is made."""
    vector = np.random.default_rng(0).normal(size=MILLION).astype(np.float32)
    parameters = bfv.Parameters(cohort)
    exact, close = SecretKey.make(parameters.scheme), SecretKey.make(ckks.Parameters(cohort).scheme)
    point, clipped = FixedPoint(parameters.ring, CLIP), ckks.Clipped(CLIP)
    spent = {
        "BFV": _cpu(lambda: _used(bfv.encrypt(exact, point.encode(vector, FULL_WEIGHT)))),
        "CKKS": _cpu(lambda: _used(ckks.encrypt(close, clipped.encode(vector, FULL_WEIGHT)))),
    }
    note = "all of a million parameters, best of 5"
    return [Figure(f"{name}, CPU s a million, encode and encrypt", s, "<= 0.2", note) for name, s in spent.items()]


def sizes() -> list[Figure]:
    """Bytes of a million parameters and their weight, over those of float32."""
    found = []
    for scheme in (bfv.Parameters(10).scheme, ckks.Parameters(10).scheme):
        name, chunks = scheme.name.upper(), scheme.chunks_for(MILLION + 1)
        up, down = (chunks * size / (4 * MILLION) for size in (scheme.seeded_bytes, scheme.full_bytes))
        note = f"{{}} bytes for {scheme.values} values"
        found.append(Figure(f"{name}, upload over plain", up, "<= 1.95", note.format(scheme.seeded_bytes)))
        to = ", to who decrypts"
        found.append(Figure(f"{name}, sum over plain", down, "", note.format(scheme.full_bytes) + to))
    return found


def _summed(key: SecretKey, uploads: Iterable[Iterable[bytes]], values: int, clients: int) -> list[bytes]:
    with Adder(key.scheme, key.fingerprint, values) as adder:
        for upload in uploads:
            for index, chunk in enumerate(upload):
                adder.add(index, chunk)
        return list(adder.sums(clients))


def exactness(cohort: int = 100, size: int = 20_000) -> list[Figure]:
    """Means of a hundred clients: BFV's against the masked one, CKKS's against float64; BFV's noise."""
    draw = np.random.default_rng(1)
    vectors = [draw.uniform(-CLIP, CLIP, size).astype(np.float32) for _ in range(cohort)]
    weights = [int(weight) for weight in draw.integers(1, FULL_WEIGHT + 1, cohort)]
    parameters = bfv.Parameters(cohort)
    key, point, masked = SecretKey.make(parameters.scheme), FixedPoint(parameters.ring, CLIP), Ring(cohort)
    words = [point.encode(*one) for one in zip(vectors, weights, strict=True)]
    sums = _summed(key, (bfv.encrypt(key, one) for one in words), size + 1, cohort)
    mean = point.decode(bfv.decrypt(key, sums, size + 1), cohort)
    plain = FixedPoint(masked, CLIP)
    total = np.sum([plain.encode(*one) for one in zip(vectors, weights, strict=True)], axis=0, dtype=np.uint32)
    differing = int((mean.view(np.uint64) != plain.decode(total, cohort).view(np.uint64)).sum())
    budget = min(noise_budget(key, chunk) for chunk in sums)
    off = _ckks_error(vectors, weights)
    return [
        Figure(
            "BFV mean != masked mean", differing, "== 0", f"values that differ in any bit, of {size}, {cohort} clients"
        ),
        Figure("BFV, bits of noise budget left", budget, ">= 10", f"{cohort} clients; guaranteed {parameters.budget}"),
        Figure("CKKS, error of the mean over the clip", off, "<= 1e-6", f"largest of {size}, {cohort} clients"),
    ]


def _ckks_error(vectors: list[Floats], weights: list[int]) -> float:
    cohort, size, clipped = len(vectors), len(vectors[0]), ckks.Clipped(CLIP)
    key = SecretKey.make(ckks.Parameters(cohort).scheme)
    uploads = (ckks.encrypt(key, clipped.encode(*one)) for one in zip(vectors, weights, strict=True))
    sums = _summed(key, uploads, size + 1, cohort)
    mean = clipped.decode(ckks.decrypt(key, sums, size + 1), cohort)
    return float(np.abs(mean - np.average(vectors, axis=0, weights=weights)).max()) / CLIP


def noise() -> list[Figure]:
    """The largest cohort at 20 bits, with the noise of one ciphertext as often as there are clients."""
    largest = max(cohort for cohort in range(100, 300) if _fits(cohort))
    key = SecretKey.make(bfv.Parameters(largest).scheme)
    size, below = key.scheme.values, key.scheme.modulus // largest // 2
    [chunk] = bfv.encrypt(key, np.random.default_rng(2).integers(0, below, size, dtype=np.uint32))
    [total] = _summed(key, [[chunk]] * largest, size, largest)
    note = f"{largest} clients, 20 bits, all noise of one sign"
    return [Figure("BFV, budget left at the largest cohort", noise_budget(key, total), ">= 10", note)]


def _fits(cohort: int) -> bool:
    try:
        bfv.Parameters(cohort)
    except ValueError:
        return False
    return True


def _peak(scheme: Scheme, fingerprint: bytes, chunks: list[bytes], updates: int, values: int) -> tuple[float, float]:
    """MB that adding takes at its peak beyond what the process had before, and CPU seconds."""
    with Adder(scheme, fingerprint, 1) as adder:
        adder.add(0, chunks[0])
        _used(adder.sums(1))
    before, began = _memory("VmRSS"), time.process_time()
    with Adder(scheme, fingerprint, values) as adder:
        for update in range(updates):
            for index in range(scheme.chunks_for(values)):
                adder.add(index, chunks[(update + index) % len(chunks)])
        _used(adder.sums(updates))
    return _memory("VmHWM") - before, time.process_time() - began


def _memory(what: str) -> float:
    """MB that this process has (VmRSS), or has had at its peak (VmHWM); of Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024 / MB


def memory(updates: int, millions: int) -> list[Figure]:
    """A coordinator's process that adds up encrypted updates as they arrive, and writes out the sum."""
    key, values = SecretKey.make(bfv.Parameters(updates).scheme), millions * MILLION
    chunks = list(bfv.encrypt(key, np.arange(32 * key.scheme.values, dtype=np.uint32) % 4096))
    with get_context("spawn").Pool(1) as pool:
        peak, spent = pool.apply(_peak, (key.scheme, key.fingerprint, chunks, updates, values))
    model = key.scheme.chunks_for(values) * key.scheme.seeded_bytes / MB
    note = (
        f"an encrypted model of {millions} million is {model:.0f} MB; {spent / updates / millions:.2f} CPU s a million"
    )
    name = f"coordinator's MB, {updates} encrypted updates"
    return [Figure(name, peak, f"<= {3 * model + 128:.0f}", note)]


def encryption(updates: int = 100, millions: int = 10) -> list[Figure]:
    """All of it."""
    return [*cost(), *sizes(), *exactness(), *noise(), *memory(updates, millions)]


def main() -> None:
    """Measures and prints; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=100, help="encrypted updates that the coordinator adds")
    parser.add_argument("--millions", type=int, default=10, help="parameters of each, in millions")
    given = parser.parse_args()
    sys.exit(not show("Encrypted sums", encryption(given.updates, given.millions)))


if __name__ == "__main__":
    main()
