"""What the members of a masked sum and its coordinator tell each other: small values, checked when they are made.

Each has a compact form in bytes, in which every part stands behind its length. There is one form for each value, and
anything else is a `PayloadError`, raised before it is used.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.config import NAME
from fedkit.crypto.graph import Assumptions, Plan, neighbours, plan
from fedkit.crypto.masks import KEY_BYTES, TAG_BYTES, digest_of, packed
from fedkit.crypto.shamir import SHARE_BYTES
from fedkit.errors import PayloadError
from fedkit.trust import roster

__all__ = [
    "DIGEST_BYTES",
    "MOST_MEMBERS",
    "SEALED_BYTES",
    "SIGNATURE_BYTES",
    "Advertised",
    "Cohort",
    "Session",
    "Shares",
    "Signed",
    "Told",
    "Unmasking",
    "mapping_from",
    "names_from",
    "require_names",
    "require_size",
    "to_mapping",
    "unpacked",
    "verifies",
]

DIGEST_BYTES = 32
SIGNATURE_BYTES = 64
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
MOST_MEMBERS = 10_000
_MOST_TEXT = 512


def unpacked(data: bytes, count: int | None = None) -> list[bytes]:
    """The parts that `packed` put together, `count` of them; raises `PayloadError` for anything else."""
    parts, start = [], 0
    while start < len(data):
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        if start + 4 > len(data) or end > len(data):
            raise PayloadError("a message ends in the middle of a part")
        parts.append(data[start + 4 : end])
        start = end
    if count is not None and len(parts) != count:
        raise PayloadError(f"a message of {count} parts has {len(parts)}")
    return parts


def require_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names as they are; raises `PayloadError` unless they are names, sorted, and none is there twice."""
    given = tuple(names)
    if len(given) > MOST_MEMBERS or not all(isinstance(name, str) and NAME.fullmatch(name) for name in given):
        raise PayloadError(f"at most {MOST_MEMBERS} members have names of 1 to 100 of A-Z a-z 0-9 _ . -")
    if any(one >= other for one, other in itertools.pairwise(given)):
        raise PayloadError("a list of members is sorted, and holds each once")
    return given


def names_from(data: bytes) -> tuple[str, ...]:
    """The names that were packed one by one; raises `PayloadError`."""
    return require_names(_text(part) for part in unpacked(data))


def to_mapping(values: Mapping[str, bytes]) -> bytes:
    """Values by name, in the order of the names."""
    return packed(*(part for name in sorted(values) for part in (name.encode(), values[name])))


def mapping_from(data: bytes) -> dict[str, bytes]:
    """What `to_mapping` wrote; raises `PayloadError` for anything else."""
    parts = unpacked(data)
    if len(parts) % 2:
        raise PayloadError("a message names somebody and gives no value")
    return dict(zip(require_names(_text(part) for part in parts[::2]), parts[1::2], strict=True))


def _text(part: bytes) -> str:
    try:
        return part.decode("ascii")
    except UnicodeDecodeError:
        raise PayloadError("a name is not one") from None


def require_size(what: str, size: int, *values: bytes) -> None:
    """Raises `PayloadError` unless all values are bytes of that length."""
    if not all(isinstance(value, bytes) and len(value) == size for value in values):
        raise PayloadError(f"{what} has {size} bytes")


@functools.lru_cache(maxsize=1 << 14)
def verifies(key: str, signature: bytes, body: bytes) -> bool:
    """Whether a roster key has signed `body`; what was verified once in this process is not verified again."""
    return roster.verifies(key, signature.hex(), body)


@dataclass(frozen=True, slots=True)
class Signed:
    """A member's 32 bytes about one thing, signed with its roster key; `label` says what kind of statement it is."""

    label: ClassVar[bytes]

    name: str
    value: bytes
    signature: bytes

    def __post_init__(self) -> None:
        """Checks the lengths."""
        require_names([self.name])
        require_size("what is signed", DIGEST_BYTES, self.value)
        require_size("a signature", SIGNATURE_BYTES, self.signature)

    @classmethod
    def sign(cls, about: bytes, name: str, value: bytes, key: Ed25519PrivateKey) -> Self:
        """The member's own, about the thing of that digest."""
        unsigned = cls(name, value, bytes(SIGNATURE_BYTES))
        return replace(unsigned, signature=key.sign(unsigned.body(about)))

    def body(self, about: bytes) -> bytes:
        """What is signed."""
        return packed(self.label, about, self.name.encode(), self.value)

    def is_signed(self, about: bytes, members: Mapping[str, str]) -> bool:
        """Whether the member of that name has signed it; `members` as in a roster's version."""
        key = members.get(self.name)
        return key is not None and verifies(key, self.signature, self.body(about))

    def to_bytes(self) -> bytes:
        """The compact form."""
        return packed(self.name.encode(), self.value, self.signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` wrote; raises `PayloadError`."""
        name, value, signature = unpacked(data, 3)
        return cls(_text(name), value, signature)


@dataclass(frozen=True)
class Session:
    """Which sum this is: the run, the round and the call in it, and what its plan assumes.

    `call` tells this group of assignments from every other of the round, its attempts included. A member takes part in
    a session once.
    """

    run: str
    round: int
    call: str
    assumptions: Assumptions = field(default_factory=Assumptions)
    quorum: int | None = None

    def __post_init__(self) -> None:
        """Refuses what no run has."""
        if max(len(self.run), len(self.call)) > _MOST_TEXT or not 0 <= self.round < 1 << 63:
            raise PayloadError(f"run and call are at most {_MOST_TEXT} characters, and rounds count from 0")

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        assumed = (self.assumptions.corrupt, self.assumptions.dropouts, self.assumptions.bits, self.quorum)
        parts = (self.run, str(self.round), self.call, *(repr(value) for value in assumed))
        return digest_of(b"fedkit-masking-1", *(part.encode() for part in parts))

    def plan(self, size: int) -> Plan:
        """The plan of a cohort of `size`; raises `ConfigError` where there is none."""
        return plan(size, self.assumptions, self.quorum)


@dataclass(frozen=True, slots=True)
class Told:
    """What a member was told: the digests (32 bytes each) of the model it received and of the work asked of it.

    The work's includes all that says how an answer is put into words: layout, clip, bits, cap.
    """

    model: bytes
    work: bytes

    def __post_init__(self) -> None:
        """Checks the lengths."""
        require_size("a digest", DIGEST_BYTES, self.model, self.work)


@dataclass(frozen=True, slots=True)
class Advertised:
    """A member's fresh public keys for one session, signed with its roster key.

    `mask_key` and `share_key` are X25519, `commitment` is SHA-256 of the seed of its own mask.
    """

    name: str
    mask_key: bytes
    share_key: bytes
    commitment: bytes
    signature: bytes

    def __post_init__(self) -> None:
        """Checks the lengths."""
        require_names([self.name])
        require_size("a key", KEY_BYTES, self.mask_key, self.share_key)
        require_size("a commitment", DIGEST_BYTES, self.commitment)
        require_size("a signature", SIGNATURE_BYTES, self.signature)

    @property
    def keys(self) -> tuple[bytes, bytes]:
        """Both public keys."""
        return self.mask_key, self.share_key

    def body(self, session: Session) -> bytes:
        """What is signed."""
        keys = (*self.keys, self.commitment)
        return packed(b"fedkit-advertised-1", session.digest, self.name.encode(), *keys)

    def is_signed(self, session: Session, members: Mapping[str, str]) -> bool:
        """Whether the member of that name has signed it; `members` as in a roster's version."""
        key = members.get(self.name)
        return key is not None and verifies(key, self.signature, self.body(session))

    def to_bytes(self) -> bytes:
        """The compact form."""
        return packed(self.name.encode(), self.mask_key, self.share_key, self.commitment, self.signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> Advertised:
        """What `to_bytes` wrote; raises `PayloadError`."""
        name, *keys = unpacked(data, 5)
        return cls(_text(name), *keys)


@dataclass(frozen=True)
class Cohort:
    """All who advertised in one session, in the order of their names, and what follows from it: plan and graph.

    Raises `PayloadError` for a name or key that is there twice. Signatures are the members' business.
    """

    session: Session
    adverts: tuple[Advertised, ...]

    def __post_init__(self) -> None:
        """Checks order and uniqueness."""
        require_names(self.names)
        keys = [key for one in self.adverts for key in one.keys]
        if len(set(keys)) < len(keys):
            raise PayloadError("two members of a cohort have the same key")

    @classmethod
    def of(cls, session: Session, adverts: Iterable[Advertised]) -> Cohort:
        """A cohort of adverts in any order."""
        return cls(session, tuple(sorted(adverts, key=lambda one: one.name)))

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The members, sorted."""
        return tuple(one.name for one in self.adverts)

    @functools.cached_property
    def by_name(self) -> dict[str, Advertised]:
        """The adverts by name."""
        return {one.name: one for one in self.adverts}

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the session and all adverts."""
        return digest_of(b"fedkit-cohort-1", self.session.digest, self.to_bytes())

    @functools.cached_property
    def plan(self) -> Plan:
        """Its numbers; raises `ConfigError` where there can be none."""
        return self.session.plan(len(self.adverts))

    @functools.cached_property
    def points(self) -> dict[str, int]:
        """At which point of a polynomial each member's shares lie, from 1 on."""
        return {name: i for i, name in enumerate(self.names, 1)}

    def neighbours(self, name: str) -> tuple[str, ...]:
        """With whom a member shares masks, sorted."""
        return self._graph[name]

    def holders(self, name: str) -> tuple[str, ...]:
        """Who holds shares of a member's secrets: its neighbours and itself, sorted."""
        return tuple(sorted((*self._graph[name], name)))

    @functools.cached_property
    def _graph(self) -> dict[str, tuple[str, ...]]:
        return neighbours(self.names, self.plan.degree, self.digest)

    def to_bytes(self) -> bytes:
        """The compact form of the adverts."""
        return packed(*(one.to_bytes() for one in self.adverts))

    @classmethod
    def from_bytes(cls, session: Session, data: bytes) -> Cohort:
        """What `to_bytes` wrote; raises `PayloadError`."""
        return cls(session, tuple(Advertised.from_bytes(part) for part in unpacked(data)))


@dataclass(frozen=True, slots=True)
class Shares:
    """Sealed shares, 82 bytes each: by recipient as they leave a member, by sender as they reach one."""

    sealed: Mapping[str, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        """Checks names and lengths."""
        require_names(sorted(self.sealed))
        require_size("a sealed share", SEALED_BYTES, *self.sealed.values())

    def to_bytes(self) -> bytes:
        """The compact form."""
        return to_mapping(self.sealed)

    @classmethod
    def from_bytes(cls, data: bytes) -> Shares:
        """What `to_bytes` wrote; raises `PayloadError`."""
        return cls(mapping_from(data))


@dataclass(frozen=True, slots=True)
class Unmasking:
    """One member's shares that open the sum, 33 bytes each by whose secret it is.

    `seeds` are those of survivors' own masks, `keys` those of dropped members' mask keys. Nobody is in both.
    """

    seeds: Mapping[str, bytes] = field(repr=False)
    keys: Mapping[str, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        """Checks names and lengths, and that the two have nobody in common."""
        require_names(sorted([*self.seeds, *self.keys]))
        require_size("a share", SHARE_BYTES, *self.seeds.values(), *self.keys.values())

    def to_bytes(self) -> bytes:
        """The compact form."""
        return packed(to_mapping(self.seeds), to_mapping(self.keys))

    @classmethod
    def from_bytes(cls, data: bytes) -> Unmasking:
        """What `to_bytes` wrote; raises `PayloadError`."""
        seeds, keys = unpacked(data, 2)
        return cls(mapping_from(seeds), mapping_from(keys))
