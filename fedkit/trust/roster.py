"""The roster: the members' own list of each other's signing keys, which no coordinator can add to.

A roster is a chain of versions. Each names the federation's members with their Ed25519 keys (RFC 8032) and how many of
them must sign the next version. The first version is signed by everybody it names; each later one by that many members
of the version before, and by everybody it adds, who thereby show that they hold their key. A member keeps the version
it knows and accepts only what follows from it.

Signed is: `fedkit-roster-1`, a zero byte, and the version without its signatures as JSON with sorted keys and no
spaces. The digest of a version is BLAKE3 of the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedkit.config import NAME
from fedkit.errors import TrustError
from fedkit.trust.files import write
from fedkit.trust.signing import make_signing_key, public_of

__all__ = ["Chain", "Version", "agree", "fingerprint_of", "verifies"]

_DOMAIN = b"fedkit-roster-1\0"
_KEY, _SIGNATURE, _DIGEST = (re.compile(rf"[0-9a-f]{{{size}}}") for size in (64, 128, 64))
_MOST_MEMBERS = 10_000
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Version:
    """One version: `members` by name with their public keys, 64 hexadecimal characters each.

    `threshold` of them must sign the next version; `previous` is the digest of the one before, empty for the first.
    `signatures` are by name, 128 hexadecimal characters each. Raises `TrustError` for what cannot be a version.
    """

    federation: str
    version: int
    threshold: int
    previous: str
    members: Mapping[str, str]
    signatures: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.federation) or not all(NAME.fullmatch(name) for name in self.members):
            raise TrustError("a roster's names are 1 to 100 of A-Z a-z 0-9 _ . - and begin with a letter or digit")
        if not 0 < len(self.members) <= _MOST_MEMBERS:
            raise TrustError(f"a roster has 1 to {_MOST_MEMBERS} members")
        if not 1 <= self.threshold <= len(self.members):
            raise TrustError(f"threshold: 1 to {len(self.members)} members can be asked to sign, not {self.threshold}")
        if not all(_KEY.fullmatch(key) for key in self.members.values()):
            raise TrustError("a member's key is 64 hexadecimal characters")
        if len(set(self.members.values())) < len(self.members):
            raise TrustError("two members have the same key: each site makes its own")
        if (
            self.version < 1
            or (self.version == 1) != (not self.previous)
            or not _DIGEST.fullmatch(self.previous or "0" * 64)
        ):
            raise TrustError("versions count from 1, and each but the first names the one before by its digest")

    @cached_property
    def body(self) -> bytes:
        """What is signed."""
        values = {name: getattr(self, name) for name in ("federation", "version", "threshold", "previous")}
        values["members"] = dict(self.members)
        return _DOMAIN + json.dumps(values, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def digest(self) -> str:
        """BLAKE3 (hex) of what is signed."""
        return blake3(self.body).hexdigest()

    def signed(self, name: str, key: Ed25519PrivateKey) -> Version:
        """With one more signature."""
        return dataclasses.replace(self, signatures=dict(self.signatures) | {name: key.sign(self.body).hex()})

    def following(
        self, add: Mapping[str, str], remove: frozenset[str] | set[str] = frozenset(), threshold: int | None = None
    ) -> Version:
        """The next version, signed by nobody yet; raises `TrustError` for changes that make no sense."""
        unknown, known = set(remove) - set(self.members), set(add) & (set(self.members) - set(remove))
        if unknown or known:
            text = (
                f"{', '.join(sorted(unknown))} is no member"
                if unknown
                else f"{', '.join(sorted(known))} is one already"
            )
            raise TrustError(text)
        members = {name: key for name, key in self.members.items() if name not in remove} | dict(add)
        least = threshold if threshold is not None else min(self.threshold, max(len(members), 1))
        if (members, least) == (dict(self.members), self.threshold):
            raise TrustError("nothing is changed by this")
        return Version(self.federation, self.version + 1, least, self.digest, members)

    def signers(self, before: Version | None) -> set[str]:
        """Whose signature is good, under the key they have here or had `before`."""
        keys = [self.members, *([] if before is None else [before.members])]
        return {name for name in self.signatures if any(self._is_signed_by(name, known) for known in keys)}

    def missing(self, before: Version | None) -> str:
        """Who has yet to sign, in words; empty where the version is complete. `before` is the one it follows."""
        fresh = [name for name, key in self.members.items() if before is None or before.members.get(name) != key]
        absent = sorted(name for name in fresh if not self._is_signed_by(name, self.members))
        if absent:
            return f"the new member{'s' if len(absent) > 1 else ''} {', '.join(absent[:10])}"
        if before is None:
            return ""
        silent = sorted(name for name in before.members if not self._is_signed_by(name, before.members))
        old = len(before.members) - len(silent)
        return "" if old >= before.threshold else f"{before.threshold - old} of {', '.join(silent[:10])}"

    def _is_signed_by(self, name: str, keys: Mapping[str, str]) -> bool:
        key, signature = keys.get(name), self.signatures.get(name)
        return key is not None and signature is not None and verifies(key, signature, self.body)


def verifies(key: str, signature: str, body: bytes) -> bool:
    """Whether a member's key (hexadecimal) has signed `body`; False for what is no signature at all."""
    if not _SIGNATURE.fullmatch(signature):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), body)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Chain:
    """All versions of a roster, the first one first. Each names the one before; signatures are `check`'s business."""

    versions: tuple[Version, ...]

    def __post_init__(self) -> None:
        if not self.versions:
            raise TrustError("a roster has a first version")
        for i, version in enumerate(self.versions):
            before = self.versions[i - 1] if i else None
            if version.version != i + 1 or version.previous != ("" if before is None else before.digest):
                raise TrustError(f"version {i + 1} of the roster does not follow from the one before")
            if before is not None and version.federation != before.federation:
                raise TrustError("a roster stays with its federation")

    @classmethod
    def begin(cls, federation: str, members: Mapping[str, str], threshold: int | None = None) -> Chain:
        """A first version, signed by nobody yet; `threshold` None: more than half of the members."""
        least = len(members) // 2 + 1 if threshold is None else threshold
        return cls((Version(federation, 1, least, "", dict(members)),))

    @property
    def last(self) -> Version:
        """The newest version, complete or not."""
        return self.versions[-1]

    def propose(self, **changes: Any) -> Chain:
        """With one more version, as `Version.following` makes it; the one before must be complete."""
        self.check()
        return Chain((*self.versions, self.last.following(**changes)))

    def sign(self, name: str, key: Ed25519PrivateKey) -> Chain:
        """With one more signature under the newest version; raises `TrustError` for whoever has no say in it."""
        before = self.versions[-2] if len(self.versions) > 1 else None
        public = key.public_key().public_bytes_raw().hex()
        if public not in (self.last.members.get(name), None if before is None else before.members.get(name)):
            raise TrustError(f"{name} with this key is no member, and cannot sign")
        return Chain((*self.versions[:-1], self.last.signed(name, key)))

    def check(self, known: Version | None = None) -> Version:
        """The newest version, if each one has the signatures it needs; raises `TrustError`, naming what is missing.

        With a `known` version, that one must be in the chain: versions up to it were accepted before, and an older
        chain is a step back.
        """
        start = 0
        if known is not None:
            start = known.version
            if len(self.versions) < start or self.versions[start - 1].digest != known.digest:
                raise TrustError(
                    f"this roster does not follow from version {known.version} ({known.digest[:16]}), which is known "
                    "here: ask the other members which one is right"
                )
        for i in range(start, len(self.versions)):
            missing = self.versions[i].missing(self.versions[i - 1] if i else None)
            if missing:
                raise TrustError(f"version {i + 1} of the roster still needs signatures: {missing}")
        return self.last

    # -- files ---------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The chain as text."""
        versions = [
            {
                "federation": one.federation,
                "version": one.version,
                "threshold": one.threshold,
                "previous": one.previous,
                "members": dict(one.members),
                "signatures": dict(one.signatures),
            }
            for one in self.versions
        ]
        return json.dumps({"fedkit-roster": 1, "versions": versions}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Chain:
        """What `to_json` wrote; raises `TrustError` for anything else. Signatures are not checked by this."""
        try:
            if len(text) > _MOST_BYTES:
                raise ValueError
            tree = json.loads(text)
            if tree["fedkit-roster"] != 1 or set(tree) != {"fedkit-roster", "versions"}:
                raise ValueError
            return cls(tuple(_version(one) for one in tree["versions"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise TrustError("this is not a roster") from None

    @classmethod
    def load(cls, path: Path) -> Chain:
        """The roster at `path`; raises `TrustError`."""
        try:
            return cls.from_json(path.read_bytes())
        except OSError as error:
            raise TrustError(f"{path}: {error.strerror or error}; fedkit roster init makes a roster") from None
        except TrustError as error:
            raise TrustError(f"{path}: {error}") from None

    def save(self, path: Path) -> None:
        """Writes the file whole; raises `StorageError`."""
        write(path, self.to_json().encode())


def _version(tree: Any) -> Version:
    kinds = {"federation": str, "version": int, "threshold": int, "previous": str, "members": dict, "signatures": dict}
    if set(tree) != set(kinds) or not all(type(tree[name]) is kind for name, kind in kinds.items()):
        raise ValueError
    for texts in (tree["members"], tree["signatures"]):
        if len(texts) > 2 * _MOST_MEMBERS or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError
    return Version(**tree)


def agree(path: Path, federation: str, folders: Mapping[str, Path]) -> None:
    """Writes a roster that all members have signed, whose identities lie in `folders` of this one machine.

    What they do by hand elsewhere: each makes a key, and all sign the list of them.
    """
    keys = {name: make_signing_key(folder) for name, folder in folders.items()}
    chain = Chain.begin(federation, {name: public_of(key) for name, key in keys.items()})
    for name, key in keys.items():
        chain = chain.sign(name, key)
    chain.save(path)


def fingerprint_of(key: str) -> str:
    """What people compare of a member's key: 128 bits of its BLAKE3, in fours."""
    digest = blake3(bytes.fromhex(key)).hexdigest()[:32]
    return " ".join(digest[i : i + 4] for i in range(0, 32, 4))
