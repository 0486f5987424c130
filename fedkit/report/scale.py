"""Numbers as a page shows them, and where they lie on an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Axis", "amount", "axis", "duration", "is_drawn", "number", "spans", "thinned"]

T = TypeVar("T")

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")
_TICKS = 5
_LARGEST = 1e300  # beyond which a number is not drawn


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`, which differ, with round numbers at `ticks`."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float, length: float) -> float:
        """How far along an axis of so many pixels a value lies."""
        return (value - self.low) / (self.high - self.low) * length


def is_drawn(value: float | None) -> bool:
    """Whether a value has a place on an axis: NaN, infinity and absurd numbers have none."""
    return value is not None and abs(value) < _LARGEST


def axis(values: Iterable[float], *, from_zero: bool = False) -> Axis:
    """An axis that holds all values that are drawn, with ticks at multiples of 1, 2 or 5 times a power of ten."""
    found = [value for value in values if is_drawn(value)] + [0.0] * from_zero or [0.0]
    low, high = min(found), max(found)
    reach = max(abs(low), abs(high))
    if high - low <= 1e-9 * reach or high == low:
        low, high = (low, low + (reach or 1.0)) if from_zero else (low - (reach or 1.0) / 2, high + (reach or 1.0) / 2)
    step = _step((high - low) / _TICKS)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = tuple(tick * step for tick in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(times * power for times in (1, 2, 5, 10, 20) if times * power >= least * (1 - 1e-9))


def thinned(items: Sequence[T], most: int) -> list[T]:
    """Every k-th item, counted from the last one, so that no more than `most` are left; all where they are fewer."""
    every = max(-(-len(items) // most), 1)
    return list(items[(len(items) - 1) % every :: every]) if items else []


def spans(numbers: Iterable[int]) -> str:
    """Sorted whole numbers in few characters, as in "1-4, 6"."""
    found: list[list[int]] = []
    for one in numbers:
        if found and one == found[-1][1] + 1:
            found[-1][1] = one
        else:
            found.append([one, one])
    return ", ".join(str(low) if low == high else f"{low}\N{EN DASH}{high}" for low, high in found)


def number(value: float | None) -> str:
    """A score with four digits; a dash where there is none."""
    if value is None:
        return "\N{EM DASH}"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def amount(count: float) -> str:
    """Bytes in decimal units."""
    size, unit = float(count), 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if not seconds >= 60:
        return f"{seconds:.3g} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
