"""A member's box: the key under which models are sealed for it, and what it does with them.

The box key of a run is derived from the member's roster key and the run's name, so it need not be kept anywhere: a site
that was started again has the same one. That is also its price: whoever steals a roster key opens every model that was
ever sealed for its owner and recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto.ceremony import BoxKey, refused
from fedkit.crypto.masks import PrivateKey, derive, digest_of
from fedkit.crypto.messages import require_names
from fedkit.crypto.sealing import Header, Stamp, Subject, header_of, unseal
from fedkit.errors import ConfigError, PayloadError
from fedkit.trust.identity import Identity
from fedkit.trust.roster import Chain
from fedkit.trust.signing import load_signing_key, public_of
from fedkit.weights import Weights

__all__ = ["Box", "Owner", "about_run", "require_boxes"]

_INSTANCE = re.compile(r"\.[0-9a-f]{8}$")  # what a coordinator tells runs of one name apart by


def _name_of(run: str) -> str:
    return _INSTANCE.sub("", run)


def about_run(run: str) -> bytes:
    """What box keys of a run are signed about: its name, which is known before it begins."""
    return digest_of(b"fedkit-sealed-hops-1", _name_of(run).encode())


def require_boxes(run: str, boxes: Iterable[BoxKey], members: Mapping[str, str]) -> None:
    """Raises `Refused` (encryption) unless these are members, each once, whose keys they have signed for this run."""
    try:
        names = require_names(one.name for one in boxes)
    except PayloadError as error:
        raise refused(str(error)) from None
    strangers = [name for name in names if name not in members]
    if strangers:
        raise refused(f"to be sealed for who is not on the roster: {', '.join(strangers[:10])}")
    unsigned = [one.name for one in boxes if not one.is_signed(about_run(run), members)]
    if unsigned:
        raise refused(f"box keys that are not signed for this run: {', '.join(unsigned[:10])}")


class Box:
    """`name`'s box, by its roster key and the members that its own roster names."""

    def __init__(self, name: str, key: Ed25519PrivateKey, members: Callable[[], Mapping[str, str]]) -> None:
        self.name = name
        self._key = key
        self._members = members

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def offer(self, run: str) -> BoxKey:
        """Its key for a run, signed."""
        return BoxKey.sign(about_run(run), self.name, self._private(run).public, self._key)

    def _private(self, run: str) -> PrivateKey:
        return PrivateKey(derive(self._key.private_bytes_raw(), b"fedkit-box-1", _name_of(run).encode()))

    def address(self, subject: Subject, boxes: Sequence[BoxKey]) -> tuple[Header, Stamp]:
        """What it seals one model of its own with, for members alone; raises `Refused` (encryption)."""
        require_boxes(subject.run, boxes, self._members())
        stamp = Stamp.fresh()
        return Header.make(subject, stamp, boxes, self._key), stamp

    def content_key(self, weights: Weights, run: str, round: int) -> bytes:
        """What a sealed model of this run opens under; raises `Refused` (encryption)."""
        try:
            header = header_of(weights)
        except PayloadError as error:
            raise refused(str(error)) from None
        header.check(run, round, self._members())
        return header.content_key(self.name, self._private(run))

    def open(self, weights: Weights) -> Weights:
        """The model inside of one of whatever run; a plain one as it is. Raises `Refused` (encryption)."""
        if not weights.manifest.is_sealed:
            return weights
        try:
            run = header_of(weights).subject.run
        except PayloadError as error:
            raise refused(str(error)) from None
        return unseal(weights, self.content_key(weights, run, -1))


class Owner(Box):
    """Whom a sealed run's model is for: a member of the roster, with its key in hand."""

    @classmethod
    def load(cls, folder: Path | str, roster: Path | str) -> Self:
        """By the identity with its signing key in `folder`, and the roster's file; raises `TrustError`, `ConfigError`.

        What `fedkit enroll`, `fedkit roster key` and `fedkit roster init` wrote.
        """
        name, key = Identity.load(Path(folder)).holder.name, load_signing_key(Path(folder))
        members = Chain.load(Path(roster)).check().members
        if members.get(name) != public_of(key):
            raise ConfigError(f"{name} with the key in {folder} is not on the roster {roster}: fedkit roster propose")
        return cls(name, key, lambda: members)
