"""The roster of a simulation: every name is a member, and everybody knows its key, as all are the same process."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.config import Privacy
from fedkit.crypto.box import Box
from fedkit.rounds.hops import readers
from fedkit.rounds.seat import Seat
from fedkit.trust.signing import public_of
from fedkit.weights import Weights

__all__ = ["SimulatedRoster", "open_any", "owned", "simulated_box", "simulated_seat"]


class SimulatedRoster(Mapping[str, str]):
    """The keys (hex) by name, of whoever is asked for."""

    def __getitem__(self, name: str) -> str:
        return _public(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str)


def simulated_seat(name: str) -> Seat:
    """A simulated client's seat in masked sums."""
    return Seat(name, _key(name), SimulatedRoster)


def simulated_box(name: str) -> Box:
    """A simulated client's box, or an owner's."""
    return Box(name, _key(name), SimulatedRoster)


def owned(privacy: Privacy, run: str) -> Privacy:
    """With the owner's box key, where there is an owner."""
    if privacy.owner is None:
        return privacy
    return privacy.replace(owner_box=simulated_box(privacy.owner).offer(run).to_bytes().hex())


def open_any(weights: Weights) -> Weights:
    """A model as it was before it was sealed: this process is all of those who can open it."""
    names = readers(weights)
    return weights if names is None else simulated_box(min(names)).open(weights)


def _key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(blake3(f"fedkit simulated {name}".encode()).digest())


@functools.lru_cache(maxsize=1 << 14)
def _public(name: str) -> str:
    return public_of(_key(name))
