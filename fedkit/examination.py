"""Scores of an exported model at the clients, as one vector of sums: of all rows, of groups, and of who meets what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkit.exam import Bound, Exam
from fedkit.metrics import MetricSet

__all__ = ["ExamSums", "Examination"]

Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Examination:
    """What an exam has found over `sites` clients.

    `agreement` is the share of rows on which the exported model answers as PyTorch does; `passing` counts the clients
    that meet a criterion on their own rows; `groups` has the scores of groups of which there are any rows.
    """

    pooled: dict[str, float]
    agreement: float
    sites: int
    passing: dict[str, int] = field(default_factory=dict)
    groups: dict[str, dict[str, float]] = field(default_factory=dict)


class ExamSums:
    """The vector: the metrics' own sums, rows that agree, rows compared, clients, who passes each criterion, groups."""

    def __init__(self, metrics: MetricSet, exam: Exam) -> None:
        self._metrics = metrics
        self._exam = exam

    @property
    def size(self) -> int:
        """The length of the vector."""
        return self._metrics.size * (1 + len(self._exam.groups)) + 3 + len(self._exam.criteria)

    def pack(self, pooled: Sums, agreeing: int, rows: int, groups: Mapping[str, Sums]) -> Sums:
        """One client's vector; a group without rows there counts nothing."""
        scores = self._metrics.compute(pooled)
        passes = [float(Bound.parse(text).passes(scores)) for text in self._exam.criteria]
        none = np.zeros(self._metrics.size)
        return np.concatenate(
            [pooled, [agreeing, rows, 1.0], passes, *(groups.get(name, none) for name in self._exam.groups)]
        )

    def read(self, total: npt.NDArray[Any]) -> Examination:
        """What the sum over clients says."""
        size, criteria = self._metrics.size, self._exam.criteria
        agreeing, rows, sites = total[size : size + 3]
        start = size + 3 + len(criteria)
        passes = np.rint(total[size + 3 : start]).astype(int)
        parts = total[start:].reshape(len(self._exam.groups), size)
        groups = {
            name: self._metrics.compute(part) for name, part in zip(self._exam.groups, parts, strict=True) if part.any()
        }
        agreement = float(agreeing / rows) if rows else float("nan")
        passing = dict(zip(criteria, passes.tolist(), strict=True))
        return Examination(self._metrics.compute(total[:size]), agreement, round(float(sites)), passing, groups)
