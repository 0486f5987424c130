"""Noise that the clients of one masked mean share: how much there is of it, and what each of them must add."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedkit.crypto.graph import COMPLETE_UP_TO, Assumptions
from fedkit.errors import ConfigError, PayloadError

__all__ = ["LEAST_RATE", "SharedNoise", "most_left_out"]

LEAST_RATE = 16  # of the Poisson numbers that parts are made of: a grid for which it is less is coarser than the noise


def most_left_out(cohort: int, dropouts: int, colluders: int) -> str:
    """Why the parts of so many of a cohort cannot be done without; empty where they can.

    Survivors open a sum once n - d of them have signed who they are. A coordinator that lies has c signatures under any
    list, and those of n - c honest members under one list each: no two lists get n - d where 2 (n - d) > n + c.
    """
    if cohort <= 2 * dropouts + colluders:
        return (
            f"{dropouts} dropouts and {colluders} colluders of {cohort} clients: twice the dropouts and the colluders "
            "must be fewer than the clients"
        )
    assumed = Assumptions()
    if cohort > COMPLETE_UP_TO and (colluders > assumed.corrupt * cohort or dropouts > assumed.dropouts * cohort):
        return f"{dropouts} dropouts and {colluders} colluders are more than the masks of {cohort} clients are made for"
    return ""


@dataclass(frozen=True, slots=True)
class SharedNoise:
    """Noise of `multiplier` clips of length `norm`, in a sum that up to `dropouts` clients have no part in.

    It holds though up to `colluders` of the others tell their own parts. Of the data, each row takes part with the
    probability `rate`. Raises `PayloadError` for numbers that mean nothing.
    """

    dropouts: int
    colluders: int
    multiplier: float
    norm: float
    rate: float = 1.0

    def __post_init__(self) -> None:
        """Checks each number by itself."""
        is_count = all(type(count) is int and count >= 0 for count in (self.dropouts, self.colluders))
        sizes = (self.multiplier, self.norm, self.rate)
        if not is_count or not all(math.isfinite(size) and size > 0.0 for size in sizes) or self.rate > 1.0:
            raise PayloadError("noise in parts has a multiplier, a norm and a rate above 0, and counts from 0")

    def require(self, cohort: int) -> None:
        """Raises `ConfigError` where so many clients cannot do without those who may be missing."""
        why = most_left_out(cohort, self.dropouts, self.colluders)
        if why:
            raise ConfigError(why)

    @classmethod
    def from_dict(cls, fields: Any) -> SharedNoise | None:
        """What a layout's JSON holds of it; raises `PayloadError` for anything else."""
        if fields is None:
            return None
        if not isinstance(fields, Mapping) or set(fields) != set(cls.__slots__):
            raise PayloadError("not the noise of a layout")
        try:
            sizes = (float(fields[name]) for name in ("multiplier", "norm", "rate"))
            return cls(fields["dropouts"], fields["colluders"], *sizes)
        except (TypeError, ValueError):
            raise PayloadError("not the noise of a layout") from None
