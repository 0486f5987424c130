"""The newest version of the roster that this site has accepted: kept across restarts, and never taken back."""

from __future__ import annotations

import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto.box import Box
from fedkit.errors import Reason, Refused
from fedkit.rounds.seat import Seat
from fedkit.trust.roster import Chain, Version
from fedkit.trust.signing import public_of
from fedkit.trust.vouchers import LIFETIME_S, Voucher

__all__ = ["KnownRoster"]


class KnownRoster:
    """The roster kept at `path`. The first one comes from the file its people `gave`, never from a coordinator.

    `name` and `key` are the site's own; with them it can vouch for itself where the roster has it as a member.
    Raises `TrustError` where what was given is not complete, or does not follow from what is known.
    """

    def __init__(self, path: Path, gave: Path | None, name: str = "", key: Ed25519PrivateKey | None = None) -> None:
        self.name = name
        self._key = key
        self._word: tuple[str, float] = ("", 0.0)  # the roster's digest, and until when the last voucher is fresh
        self._path = path
        self._chain = Chain.load(path) if path.exists() else None
        if gave is not None:
            self._accept(Chain.load(gave))

    @property
    def version(self) -> Version | None:
        """The version that counts here; None where this site keeps no roster."""
        return None if self._chain is None else self._chain.last

    def hear(self, text: str) -> Version | None:
        """Accepts what a coordinator passes on, if this site keeps a roster; the new version, if that was news.

        Raises `TrustError`.
        """
        return None if self._chain is None else self._accept(Chain.from_json(text))

    def _accept(self, chain: Chain) -> Version | None:
        mine = () if self._chain is None else self._chain.versions
        if chain.versions == mine[: len(chain.versions)]:
            return None  # known already, or an older copy of the same
        found = chain.check(self.version)
        if found.version == len(mine):
            return None
        longer = Chain((*mine, *chain.versions[len(mine) :]))  # with the signatures that were checked here
        longer.save(self._path)  # first: what counts here counts after a restart too
        self._chain = longer
        return found

    def seat(self, least: int) -> Seat | None:
        """This site's seat in masked sums over at least so many; None where it is no member, or has no key here."""
        known = self.version
        if known is None or self._key is None or known.members.get(self.name) != public_of(self._key):
            return None
        return Seat(self.name, self._key, lambda: known.members, least)

    def box(self) -> Box | None:
        """Where models are sealed for this site; None where it is no member, or has no key here."""
        known = self.version
        if known is None or self._key is None or known.members.get(self.name) != public_of(self._key):
            return None
        return Box(self.name, self._key, lambda: known.members)

    def voucher(self, *, fresh: bool = False) -> Voucher | None:
        """This site's word that it attends, where it is a member; None while half the last one's time is left.

        A `fresh` one is made in any case.
        """
        known = self.version
        if known is None or self._key is None or known.members.get(self.name) != public_of(self._key):
            return None
        if not fresh and self._word[0] == known.digest and time.time() < self._word[1]:
            return None
        self._word = (known.digest, time.time() + LIFETIME_S / 2)
        return Voucher.sign(self.name, self._key, known)

    def require(self, version: int, digest: bytes) -> None:
        """Raises `Refused` unless an assignment was made under the roster that counts here."""
        known = self.version
        if known is None or (version, digest.hex()) == (known.version, known.digest):
            return
        theirs = f"version {version} ({digest.hex()[:16]})" if digest else "no roster"
        text = (
            f"this site knows version {known.version} of the roster ({known.digest[:16]}), the coordinator has {theirs}"
        )
        raise Refused(Reason.POLICY, text)
