"""A member's word that it attends: what lets the others count a cohort without believing the coordinator.

A site signs with its roster key that it attends, for an hour at most. The coordinator passes the vouchers of those it
asks together on with each assignment, and each site counts those that a member of its own roster has signed. Whoever
mints certificates mints no vouchers.

Signed is: `fedkit-voucher-1`, a zero byte, the digest of the roster's version (32 bytes), when the voucher ends
(seconds since 1970 UTC, 8 bytes, big-endian), and the member's name. The key is the one the roster names.

Guarantee: so many members of this version of the roster attended within the last hour.
Does not protect against: a coordinator that asks this site alone while others attend. Only an aggregation in which all
of them have a part, such as masking, makes the sum one of them all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.trust.roster import Version, verifies

__all__ = ["LIFETIME_S", "Voucher", "vouched"]

LIFETIME_S = 3600
_SLOW_CLOCKS_S = 600
_DOMAIN = b"fedkit-voucher-1\0"


@dataclass(frozen=True, slots=True)
class Voucher:
    """One member's word: `expires` in seconds since 1970, UTC; 64 bytes of signature."""

    name: str
    expires: int
    signature: bytes

    @classmethod
    def sign(cls, name: str, key: Ed25519PrivateKey, roster: Version) -> Voucher:
        """A voucher that begins now."""
        expires = int(time.time()) + LIFETIME_S
        return cls(name, expires, key.sign(_body(name, expires, roster)))

    def holds(self, roster: Version) -> bool:
        """Whether a member of this version has signed it, and it has neither ended nor been made to last."""
        key, left = roster.members.get(self.name), self.expires - time.time()
        if key is None or not -_SLOW_CLOCKS_S < left < LIFETIME_S + _SLOW_CLOCKS_S:
            return False
        return verifies(key, self.signature.hex(), _body(self.name, self.expires, roster))


def vouched(vouchers: Iterable[Voucher], roster: Version) -> frozenset[str]:
    """The members for whom one of the vouchers holds; each counts once."""
    return frozenset(voucher.name for voucher in vouchers if voucher.holds(roster))


def _body(name: str, expires: int, roster: Version) -> bytes:
    return _DOMAIN + bytes.fromhex(roster.digest) + expires.to_bytes(8, "big") + name.encode()
