"""The roster of a simulation: every name is a member, and everybody knows its key, as all are the same process."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.rounds.seat import Seat
from fedkit.trust.signing import public_of

__all__ = ["SimulatedRoster", "simulated_seat"]


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


def _key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(blake3(f"fedkit simulated {name}".encode()).digest())


@functools.lru_cache(maxsize=1 << 14)
def _public(name: str) -> str:
    return public_of(_key(name))
