"""What sealing a model costs: CPU time at both ends, and bytes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.table import Figure, show
from fedkit.crypto.box import Box
from fedkit.crypto.sealing import Subject, seal, unseal
from fedkit.trust.signing import public_of
from fedkit.weights import Entry, Manifest, Weights

__all__ = ["sealing"]

MILLIONS = 25
RECIPIENTS = 10


def sealing() -> list[Figure]:
    """A model of 25 million values, sealed for ten members."""
    keys = {f"site-{number}": Ed25519PrivateKey.generate() for number in range(RECIPIENTS)}
    members = {name: public_of(key) for name, key in keys.items()}
    boxes = [Box(name, key, lambda: members) for name, key in keys.items()]
    manifest = Manifest((Entry("w", (MILLIONS * 1_000_000,)),))
    model = Weights(manifest, np.random.default_rng(0).standard_normal(manifest.size, dtype=np.float32))
    subject = Subject("run", 1, "0" * 32, "site-0", manifest.to_json())
    header, stamp = boxes[0].address(subject, [box.offer("run") for box in boxes])
    sealed = seal(header, stamp, model.vector)
    content = boxes[1].content_key(sealed, "run", 1)
    spent = {"seal": _cpu(lambda: seal(header, stamp, model.vector)), "open": _cpu(lambda: unseal(sealed, content))}
    note = f"{MILLIONS} million, {RECIPIENTS} recipients, best of 3"
    times = [Figure(f"{what}, CPU s a million", seconds / MILLIONS, "", note) for what, seconds in spent.items()]
    return [*times, Figure("sealed model over plain", sealed.vector.nbytes / model.vector.nbytes, "<= 1.01", note)]


def _cpu(work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of three runs."""
    found = []
    for _ in range(3):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


if __name__ == "__main__":
    sys.exit(not show("Sealed models", sealing()))
