"""Questions about data that are answered by sums: federated analytics.

Each query turns one client's feature rows into a vector that adds up over clients, and the sum into what was asked.
Bounded queries add whole numbers, so that the sum is exact in any order and fits secure aggregation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedkit.config import PositiveInt, Settings
from fedkit.ranges import SCALE, Ranges

__all__ = ["Bounds", "Histogram", "LabelCounts", "Moments", "MomentsResult", "Query", "Ranges", "RowCount"]

Bounds: TypeAlias = list[tuple[float, float]]
Rows: TypeAlias = Iterable[
    tuple[npt.NDArray[Any], npt.NDArray[Any]]
]  # (features (n, f), targets (n, ...)) batch by batch

_LEAST_SPREAD = 0.05  # of the interval, where noise leaves it open
_FLOAT = 1e-13  # of E[x²]: what float64 sums may lose, and less than float32 features can tell apart


@dataclass(frozen=True, slots=True)
class MomentsResult:
    """Mean and population standard deviation per feature, over `examples` rows."""

    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    examples: int


class Moments(Settings):
    """(n, sum, sum of squares) per feature. With `bounds`, rows are clipped to them and the sums are integers.

    The bounds must be public knowledge, such as a physical range: they are part of the question. A value is rounded to
    1/2^20 of its interval.
    """

    kind: Literal["moments"] = "moments"
    bounds: Bounds | None = None

    def __post_init__(self) -> None:
        """Each lower bound lies below its upper one."""
        for index, (low, high) in enumerate(self.bounds or []):
            if not low < high:
                raise ValueError(f"bounds[{index}]: the lower bound {low} is not below the upper bound {high}")
            if not math.isfinite(high - low):
                raise ValueError(f"bounds[{index}]: the interval from {low} to {high} is not finite")

    @property
    def size(self) -> int | None:
        """The number of sums; None without bounds, where only the data says how many features there are."""
        return None if self.bounds is None else 1 + 2 * len(self.bounds)

    def answer(self, rows: Rows) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
        """One client's sums, length 1 + 2 f."""
        parts = [self._sums(np.asarray(features, dtype=np.float64)) for features, _ in rows]
        total: npt.NDArray[Any] = np.sum(parts, axis=0, dtype=parts[0].dtype)
        return total

    def _sums(self, features: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
        if self.bounds is None:
            return np.concatenate([[len(features)], features.sum(axis=0), (features**2).sum(axis=0)])
        low, high = self._limits(features.shape[1])
        _require_numbers(features)
        share = np.clip((features - low) / (high - low), 0.0, 1.0)
        first, second = np.rint(share * SCALE).sum(axis=0), np.rint(share**2 * SCALE).sum(axis=0)
        return np.concatenate([[len(features)], first, second]).astype(np.int64)

    def _limits(self, features: int) -> npt.NDArray[np.float64]:
        bounds = np.asarray(self.bounds, dtype=np.float64)
        if len(bounds) != features:
            raise ValueError(f"{len(bounds)} bounds are declared for {features} features")
        return bounds.T

    @property
    def sensitivity(self) -> float:
        """How far one row moves `answer` at most (Euclidean), each sum in units of its interval; needs bounds.

        A row adds 1 to the count, and at most 1 to each of the 2 f sums: sqrt(1 + 2 f).
        """
        return math.sqrt(1 + 2 * len(self.bounds or []))

    def finish(self, total: npt.NDArray[Any], *, noised: bool = False) -> MomentsResult:
        """Mean and standard deviation from the sum over clients.

        Sums that were `noised` may be those of no data at all: means are kept within the bounds, deviations between a
        twentieth and a half of the interval.
        """
        examples, features = max(int(total[0]), 1) if noised else int(total[0]), (len(total) - 1) // 2
        first, second = total[1 : 1 + features] / examples, total[1 + features :] / examples
        if self.bounds is None:
            return MomentsResult(first, _deviation(second - first**2, _FLOAT * second), examples)
        low, high = self._limits(features)
        mean, square = first / SCALE, second / SCALE
        if noised:
            mean = np.clip(mean, 0.0, 1.0)
            std = np.sqrt(np.clip(square - mean**2, _LEAST_SPREAD**2, 0.25))
        else:
            std = _deviation(square - mean**2, 3 / 2 / SCALE)
        return MomentsResult(low + (high - low) * mean, (high - low) * std, examples)


class Histogram(Settings):
    """How many rows fall into each bin of one feature; rows outside the edges count in the first or last bin."""

    kind: Literal["histogram"] = "histogram"
    feature: Annotated[int, Field(ge=0)] = 0
    edges: Annotated[list[float], Field(min_length=2)]

    def __post_init__(self) -> None:
        """Edges rise."""
        if not all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError("edges must rise from the first to the last")

    @property
    def size(self) -> int:
        """The number of bins."""
        return len(self.edges) - 1

    def answer(self, rows: Rows) -> npt.NDArray[np.int64]:
        """One client's counts, length len(edges) - 1."""
        column = np.concatenate([np.asarray(features)[:, self.feature] for features, _ in rows])
        _require_numbers(column)
        edges = np.asarray(self.edges)
        inside = np.clip(column, edges[0], np.nextafter(edges[-1], edges[0]))
        return np.histogram(inside, edges)[0].astype(np.int64)

    def finish(self, total: npt.NDArray[Any], *, noised: bool = False) -> npt.NDArray[np.int64]:  # noqa: ARG002
        """The counts over all clients."""
        return total.astype(np.int64)


class LabelCounts(Settings):
    """How many training rows carry each label 0 .. classes - 1."""

    kind: Literal["label_counts"] = "label_counts"
    classes: PositiveInt

    @property
    def size(self) -> int:
        """The number of counts."""
        return self.classes

    def answer(self, rows: Rows) -> npt.NDArray[np.int64]:
        """One client's counts, length `classes`."""
        given = np.concatenate([np.asarray(targets).reshape(-1) for _, targets in rows])
        if not np.array_equal(given, np.trunc(given)):
            raise ValueError("a label is not a whole number")
        labels = given.astype(np.int64)
        if labels.size and not 0 <= labels.min() <= labels.max() < self.classes:
            raise ValueError(f"a label lies outside 0 .. {self.classes - 1}")
        return np.bincount(labels, minlength=self.classes).astype(np.int64)

    def finish(self, total: npt.NDArray[Any], *, noised: bool = False) -> npt.NDArray[np.int64]:  # noqa: ARG002
        """The counts over all clients."""
        return total.astype(np.int64)


class RowCount(Settings):
    """How many training rows there are, which every mean over clients tells anyway."""

    kind: Literal["row_count"] = "row_count"

    @property
    def size(self) -> int:
        """One number."""
        return 1

    def answer(self, rows: Rows) -> npt.NDArray[np.int64]:
        """One client's count, length 1."""
        return np.array([sum(len(features) for features, _ in rows)], dtype=np.int64)

    def finish(self, total: npt.NDArray[Any], *, noised: bool = False) -> int:  # noqa: ARG002
        """The count over all clients."""
        return int(total[0])


def _require_numbers(values: npt.NDArray[Any]) -> None:
    if np.isnan(values).any():
        raise ValueError("a feature holds NaN; fill in missing values before")


def _deviation(variance: npt.NDArray[np.float64], rounding: Any) -> npt.NDArray[np.float64]:
    """The square root, with 0 for what rounding alone may leave of a feature that never varies."""
    return np.sqrt(np.where(variance <= rounding, 0.0, variance))


Query: TypeAlias = Annotated[Moments | Histogram | LabelCounts | RowCount | Ranges, Field(discriminator="kind")]
