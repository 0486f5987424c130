"""A run's history, facts and assignments as JSON, and back: numbers come back bit by bit, NaN included."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedkit.config import DP, parse
from fedkit.errors import Reason
from fedkit.rounds.assignment import Assignment, Clip, Private
from fedkit.rounds.call import Refusal
from fedkit.rounds.journal import Entry, RoundRecord
from fedkit.work import Evaluate, Fit, Gradient, Summarize

__all__ = [
    "assignment_from_json",
    "assignment_to_json",
    "entry_from_json",
    "entry_to_json",
    "record_from_json",
    "record_to_json",
]

_WORK: dict[str, type[Fit | Gradient | Evaluate | Summarize]] = {
    kind.__name__: kind for kind in (Fit, Gradient, Evaluate, Summarize)
}


def record_to_json(record: RoundRecord) -> str:
    """One line of history as JSON."""
    return _dumped(_fields(record))


def record_from_json(text: str) -> RoundRecord:
    """What `record_to_json` wrote."""
    fields = json.loads(text)
    fields |= {name: tuple(fields.get(name, ())) for name in ("clients", "scored")}
    return RoundRecord(**_with_refusals(fields))


def entry_to_json(entry: Entry) -> str:
    """One fact of a round as JSON."""
    return _dumped(_fields(entry))


def entry_from_json(text: str) -> Entry:
    """What `entry_to_json` wrote."""
    fields = json.loads(text)
    fields["accepted"] = tuple((client, key) for client, key in fields["accepted"])
    return Entry(**_with_refusals(fields))


def assignment_to_json(assignment: Assignment) -> str:
    """An assignment as JSON, its work by the name of its kind."""
    work = [type(assignment.work).__name__, assignment.work.to_dict()]
    return _dumped(_fields(assignment) | {"work": work})


def assignment_from_json(text: str) -> Assignment:
    """What `assignment_to_json` wrote."""
    fields = json.loads(text)
    kind, settings = fields["work"]
    fields |= {"work": parse(_WORK[kind], settings, where=kind), "cohort": tuple(fields.get("cohort", ()))}
    private, clip = fields.get("private"), fields.get("clip")
    if private is not None:
        fields["private"] = Private(**(private | {"dp": parse(DP, private["dp"], where="dp")}))
    if clip is not None:
        fields["clip"] = Clip(**clip)
    return Assignment(**fields)


def _fields(value: RoundRecord | Entry | Assignment | Private | Clip) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _with_refusals(fields: dict[str, Any]) -> dict[str, Any]:
    refusals = tuple(Refusal(client, Reason(reason), detail) for client, reason, detail in fields["refusals"])
    return fields | {"refusals": refusals}


def _dumped(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"), default=_plain)


def _plain(value: object) -> Any:
    if isinstance(value, Refusal):
        return [value.client, value.reason.value, value.detail]
    if isinstance(value, Private | Clip):
        return _fields(value)
    if isinstance(value, DP):
        return value.to_dict()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not part of a run's history")
