"""What two passports say differently: the facts of each by dotted names, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedkit.deploy.passport import Passport

__all__ = ["Difference", "Value", "differences"]

Value: TypeAlias = str | int | float | bool | None

_UNTOLD = frozenset({"created", "why", "cpu_s", "sha256", "latency_s"})  # different each time, and no news
_COUNTED = "clients"  # pseudonyms are others in each run: only what they come to can be compared


@dataclass(frozen=True, slots=True)
class Difference:
    """One fact that is not the same: by its name, such as "examined.pooled.accuracy"; None where it is not told."""

    fact: str
    one: Value
    other: Value

    @property
    def change(self) -> float | None:
        """By how much a number is more in the other."""
        if isinstance(self.one, int | float) and isinstance(self.other, int | float):
            return self.other - self.one
        return None


def differences(one: Passport, other: Passport) -> list[Difference]:
    """The facts that differ, in the order of their names; times and digests of files, which always do, are left out."""
    facts = [_facts(passport) for passport in (one, other)]
    return [
        Difference(fact, *values)
        for fact in sorted(facts[0].keys() | facts[1].keys())
        if (values := (facts[0].get(fact), facts[1].get(fact)))[0] != values[1]
    ]


def _facts(passport: Passport) -> dict[str, Value]:
    values = passport.to_dict()
    values["gate"] = {one["variant"]: one for one in values["gate"]}
    values["files"] = {name: one for name, one in values["files"].items() if name.endswith(".onnx")}
    values[_COUNTED] = _counted(passport)
    return dict(_flat(values, ""))


def _counted(passport: Passport) -> dict[str, Any]:
    """How many clients there are, the most that it cost one, and the worst and best of their scores."""
    costs = [client.epsilon for client in passport.clients if client.epsilon is not None]
    found: dict[str, Any] = {"count": len(passport.clients), "epsilon": max(costs, default=None)}
    tests = [client.test for client in passport.clients if client.test is not None]
    for metric in sorted({metric for test in tests for metric in test}):
        scores = [score for test in tests if (score := test.get(metric)) is not None]
        found[metric] = {"least": min(scores, default=None), "most": max(scores, default=None)}
    return found


def _flat(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, Value]]:
    for name, value in values.items():
        if name in _UNTOLD:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", json.dumps(value) if isinstance(value, list) else value
