"""The bundles that a registry keeps: copied whole, named by the sha256 of their passport, checked when used."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from fedkit.codec import write_atomically
from fedkit.deploy.folders import new_folder, read_file
from fedkit.deploy.passport import Passport
from fedkit.errors import FedkitError, PayloadError, StorageError, TrustError

__all__ = ["Checked", "Shelf", "Shelved", "Verify"]

_PASSPORT = "passport.json"
_SIGNATURE = "SIGNATURE"
_PASSPORT_BYTES = 64 << 20
_SIGNATURE_BYTES = 64 << 10
_OURS = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.[0-9a-f.a-z]+")  # a bundle, or what a crash left of one


class Checked(Protocol):
    """What a check of a bundle finds: who signed it (public key, hex) and what it says of itself."""

    @property
    def signer(self) -> str:
        """The public key that signed it, hex."""

    @property
    def passport(self) -> Passport:
        """Its passport."""


Verify: TypeAlias = Callable[[Path, str | None], Checked]  # the folder and the signer it must have, None: any


@dataclass(frozen=True, slots=True)
class Shelved:
    """A bundle that is kept: the sha256 of its passport, who signed it, and the passport."""

    digest: str
    signer: str
    passport: Passport


class Shelf:
    """A folder of bundles, for one process at a time. Nothing is kept that `verify` has not passed where it lies.

    Raises what `verify` raises for a bundle that is none or was changed, `PayloadError` for one that holds other files
    than its passport names, `StorageError` where the disk does not do its part.
    """

    def __init__(self, folder: Path, verify: Verify) -> None:
        self._folder = folder
        self._verify = verify

    def path(self, digest: str) -> Path:
        """Where the bundle of that passport lies."""
        return self._folder / digest

    def take(self, source: Path, signer: str | None) -> Shelved:
        """Keeps a copy of the bundle at `source`, complete and on disk when this returns.

        It is the copy that is verified, so nothing that happens to `source` meanwhile can slip in.
        """
        raw = read_file(source / _PASSPORT, _PASSPORT_BYTES)
        digest = hashlib.sha256(raw).hexdigest()
        if self.path(digest).exists():
            return self.check(digest, signer)
        with new_folder(self.path(digest), lambda _: False) as beside:
            _copy(source, raw, beside)
            try:
                found = self._verify(beside, signer)
            except FedkitError as error:
                raise type(error)(str(error).replace(str(beside), str(source))) from None
        return Shelved(digest, found.signer, found.passport)

    def check(self, digest: str, signer: str | None) -> Shelved:
        """The bundle of that digest, verified as it lies there now."""
        self.passport(digest)
        found = self._verify(self.path(digest), signer)
        return Shelved(digest, found.signer, found.passport)

    def passport(self, digest: str) -> Passport:
        """The passport of that digest, without a look at the other files."""
        path = self.path(digest) / _PASSPORT
        if not path.exists():
            raise StorageError(f"{path.parent} is missing: put it back from a backup")
        raw = read_file(path, _PASSPORT_BYTES)
        if hashlib.sha256(raw).hexdigest() != digest:
            raise TrustError(f"{path} is not the passport that was added: put it back from a backup")
        return _parsed(raw, path)

    def keep_only(self, digests: Collection[str]) -> None:
        """Removes what a crash left behind: half a copy, or a bundle of which no version was made."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in sorted(os.listdir(self._folder)):
                if name not in digests and _OURS.fullmatch(name):
                    shutil.rmtree(self._folder / name)
        except OSError as error:
            raise StorageError(
                f"{self._folder}: {error.strerror or error}; it must be possible to write there"
            ) from error


def _copy(source: Path, passport: bytes, target: Path) -> None:
    """Copies the files that the passport names, and refuses a folder that holds others."""
    sizes = {name: facts.size_bytes for name, facts in _parsed(passport, source / _PASSPORT).files.items()}
    sizes |= {_SIGNATURE: _SIGNATURE_BYTES}
    try:
        strange = set(os.listdir(source)) - set(sizes) - {_PASSPORT}
    except OSError as error:
        raise PayloadError(f"{source} cannot be read: {error.strerror or error}") from None
    if strange:
        raise PayloadError(f"{source} holds {min(strange)!r}, of which its passport knows nothing: remove it")
    write_atomically(target / _PASSPORT, passport, mode=0o444)
    for name, most in sizes.items():
        write_atomically(target / name, read_file(source / name, most), mode=0o444)


def _parsed(raw: bytes, path: Path) -> Passport:
    try:
        return Passport.from_json(raw.decode())
    except (ValueError, PayloadError) as error:  # a ConfigError is one, and so is text that is not UTF-8
        raise PayloadError(f"{path}: {error}") from None
