"""The table of hostile input: one file a case under `tests/hostile`, read into values that a test can act out.

`tests/hostile/README.md` says what may stand in a file. A file that says anything else is an error.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from blake3 import blake3
from google.protobuf import json_format

from fedkit.protos import agents_pb2 as pb
from fedkit.protos import tensors_pb2
from fedkit.protos.wire import frame
from tests.network.scripted import Hand

__all__ = ["BadAnswer", "BadHello", "BadMessage", "BadRequest", "BadUpdate", "cases"]

T = TypeVar("T")

FOLDER = Path(__file__).parents[1] / "hostile"
_WORD = 1 << 64


def cases(kind: type[T], folder: str) -> list[Any]:
    """Every case of a folder, for `pytest.mark.parametrize`."""
    found = [pytest.param(_read(kind, path), id=path.stem) for path in sorted((FOLDER / folder).glob("*.toml"))]
    assert found, f"{FOLDER / folder} holds no case"
    return found


def _read(kind: type[T], path: Path) -> T:
    try:
        return kind(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _meant(value: Any) -> Any:
    """A value as a message takes it: negative numbers as they are written in 64 bits, `{times, of}` written out."""
    if isinstance(value, Mapping) and value.keys() == {"times", "of"}:
        return value["of"] * value["times"]
    return value % _WORD if type(value) is int else value


def _raw(value: Any) -> bytes:
    return bytes.fromhex(_meant(value))


@dataclass(frozen=True, kw_only=True)
class BadUpdate:
    """An update, how it is bad, when it comes, what is said to it at once (`told`) and in history (`reason`)."""

    why: str
    reason: str
    told: str = ""
    when: str = "at once"
    ways: Sequence[str] = ("upload", "post")
    assignment: Any = "its own"
    hello: Mapping[str, Any] = field(default_factory=dict)
    participation: Mapping[str, Any] = field(default_factory=dict)
    payload: Sequence[Mapping[str, Any]] = ()
    signed: bool = True
    extras: Sequence[Sequence[Any]] = ()
    grown: bool = True
    announce: Mapping[str, Any] = field(default_factory=dict)
    pieces: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if not self.told:
            object.__setattr__(self, "told", self.reason)
        if not {"upload", "post"}.issuperset(self.ways) or self.when not in WHEN:
            raise ValueError("there is no such way, or no such time")

    @property
    def is_another_clients(self) -> bool:
        """Whether it answers what another client was asked."""
        return bool(self.assignment == "another client's")

    def spoil(self, hand: Hand, asked_of_another: str = "") -> Hand:
        """Makes an honest update into this one."""
        for edit in self.payload:
            hand.payload = _EDITS[next(iter(edit))](hand.payload, edit)
        for name, length in self.extras:
            hand.announcement.extras.append(tensors_pb2.Extra(name=name, length=length))
            hand.payload += bytes(4 * length if self.grown else 0)
        if self.signed:
            hand.sign()
        for name, value in self.announce.items():
            setattr(hand.announcement, name, _digest(value, hand) if name == "digest" else _meant(value))
        if self.assignment != "its own":
            hand.announcement.assignment_id = asked_of_another or _meant(self.assignment)
        hand.pieces = None if self.pieces is None else [_piece(piece, hand.payload) for piece in self.pieces]
        return hand


WHEN = {
    "honestly": "never",
    "at once": "in place of the honest update, in each round",
    "again": "after the honest update, in each round",
    "after a bad one": "the honest update, after this one",
    "in the next round": "in round 2, the update of round 1; then the honest one",
    "in the next run": "the updates of a run that is over; then the honest ones",
    "after a restart": "the same, and the coordinator has begun again meanwhile",
    "late": "after its round was closed without it",
    "a round late": "in round 2, the update of round 1; that of round 2 never",
}


def _values(payload: bytes, edit: Mapping[str, Any]) -> bytes:
    vector = np.frombuffer(payload, dtype="<f4").copy()
    vector[edit.get("at", slice(None))] = edit["value"]
    return vector.tobytes()


def _flipped(payload: bytes, edit: Mapping[str, Any]) -> bytes:
    changed = bytearray(payload)
    changed[edit["flip"]] ^= 1
    return bytes(changed)


_EDITS = {
    "value": _values,
    "flip": _flipped,
    "times": lambda payload, edit: payload * edit["times"],
    "keep": lambda payload, edit: payload[slice(*edit["keep"])],
    "again": lambda payload, edit: payload + payload[slice(*edit["again"])],
    "zeros": lambda _, edit: bytes(edit["zeros"]),
    "zeros_behind": lambda payload, edit: payload + bytes(edit["zeros_behind"]),
    "dtype": lambda payload, edit: np.frombuffer(payload, dtype="<f4").astype(edit["dtype"]).tobytes(),
}


def _digest(value: Any, hand: Hand) -> bytes:
    if value == "blake3":
        return blake3(hand.payload).digest()
    return bytes(value) if isinstance(value, int) else bytes.fromhex(value)


def _piece(piece: Mapping[str, Any], payload: bytes) -> bytes:
    if "raw" in piece:
        return _raw(piece["raw"])
    return frame(payload[slice(*piece["part"])]) + _raw(piece.get("behind", ""))


@dataclass(frozen=True, kw_only=True)
class BadAnswer:
    """What a client says in answer `to` an assignment; "$id" stands for the assignment's id."""

    why: str
    to: str
    reason: str
    say: Mapping[str, Any]

    def message(self, key: str) -> pb.FromAgent:
        """The message."""
        return json_format.ParseDict(_with_id(self.say, key), pb.FromAgent())


def _with_id(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_id(inner, key) for name, inner in value.items()}
    return key if value == "$id" else value


@dataclass(frozen=True, kw_only=True)
class BadHello:
    """What is wrong in a hello, and the reason that the goodbye gives."""

    why: str
    goodbye: str
    hello: Mapping[str, Any]

    def fields(self) -> dict[str, Any]:
        """What the hello says in place of what an honest one does."""
        return {name: self._field(name, value) for name, value in self.hello.items()}

    def _field(self, name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return [f"{value['of']}{i}" for i in range(value["times"])]
        return bytes.fromhex(value) if name == "instance" else _meant(value)


@dataclass(frozen=True, kw_only=True)
class BadMessage:
    """A message on the stream of attendance: hexadecimal bytes, or one that is said, with `padding` behind it."""

    why: str
    raw: Any = None
    say: Mapping[str, Any] = field(default_factory=dict)
    padding: int = 0

    def message(self) -> bytes:
        """The bytes."""
        if self.raw is not None:
            return _raw(self.raw)
        said = json_format.ParseDict(self.say, pb.FromAgent()).SerializeToString()
        return said + frame(bytes(self.padding)) if self.padding else said


@dataclass(frozen=True, kw_only=True)
class BadRequest:
    """A call, and the gRPC code it ends with: one `message`, or `raw` ones, each hexadecimal or `{times, of}`."""

    why: str
    rpc: str
    code: str
    message: Mapping[str, Any] = field(default_factory=dict)
    raw: Any = None

    def messages(self, kind: type[Any]) -> list[bytes]:
        """What is sent."""
        if self.raw is not None:
            return [_raw(one) for one in (self.raw if isinstance(self.raw, list) else [self.raw])]
        return [json_format.ParseDict({k: _meant(v) for k, v in self.message.items()}, kind()).SerializeToString()]
