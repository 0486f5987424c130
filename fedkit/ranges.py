"""The ranges of a network's activations, asked of clients' data as sums: what int8 is calibrated by.

A row's extremes are the least and largest value of each tensor that the row makes. Each tensor has a public bound,
which is a part of the question; values beyond it count as the bound.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedkit.config import PositiveFloat, Settings

__all__ = ["RANGES", "SCALE", "Extremes", "Ranges", "Rows", "noised"]

Rows = Annotated[int, Field(ge=64, strict=True)]  # of each client: fewer would tell of single ones
Extremes: TypeAlias = npt.NDArray[np.float64]  # (rows, tensors, 2): the least and the largest value

RANGES = "ranges"  # the extra vector of (low, high) pairs that goes with a model to be quantised
SCALE = 1 << 20  # fixed-point steps of the interval between two bounds
BUCKETS = 64  # of magnitudes, each 2^(1/4) times the next: from the bound down to a 65,536th of it
_WIDER = 1.5  # than the mean of rows' extremes, where noise hides single rows
_LEFT_OUT = 1000  # one row in so many, and at least one, may lie beyond a clipped range


class Ranges(Settings):
    """The range of each of the tensors that `graph` names, over up to `rows` training rows of each client.

    Does not protect against: whoever picks the model, and makes one whose activations tell of few rows. That is why the
    `method` is a matter of each site's policy.

    * `graph` is the digest of the converted network: who converts it otherwise cannot answer.
    * `method` "mean": each client's least and largest values, of which the mean over clients is taken. "clipped":
      counts of rows by the magnitude of their extremes, from which the range follows that all but a thousandth of the
      rows, and at least one, keep to.
    * `per_row`: sums of each row's extremes over all rows, instead of a client's: one row moves them by a bounded
      amount, so that noise can hide it. The range is one and a half times the mean, as means are within extremes.
    """

    kind: Literal["ranges"] = "ranges"
    graph: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bounds: Annotated[list[PositiveFloat], Field(min_length=1)]
    rows: Rows = 512
    method: Literal["mean", "clipped"] = "mean"
    per_row: bool = False

    def __post_init__(self) -> None:
        """Noise hides rows in sums of their extremes, not in counts."""
        if self.per_row and self.method != "mean":
            raise ValueError('with differential privacy, ranges are calibrated by method "mean"')

    @property
    def size(self) -> int:
        """The number of sums."""
        return 1 + 2 * len(self.bounds) * (1 if self.method == "mean" else BUCKETS)

    @property
    def sensitivity(self) -> float:
        """How far one row moves the answer `per_row` (Euclidean), in units of the intervals: sqrt(1 + 2 tensors)."""
        return math.sqrt(1 + 2 * len(self.bounds))

    def answer(self, extremes: Extremes) -> npt.NDArray[np.int64]:
        """One client's sums; raises `ValueError` for NaN, and for other tensors than there are bounds.

        With `per_row`, NaN counts as 0 instead: who picks the model would learn from an error, without noise, that one
        of the rows makes it.
        """
        if extremes.shape[1] != len(self.bounds):
            raise ValueError(f"{len(self.bounds)} bounds are given for {extremes.shape[1]} tensors")
        if self.per_row:
            extremes = np.where(np.isnan(extremes), 0.0, extremes)
        elif np.isnan(extremes).any():
            raise ValueError("the network gives NaN on a training row")
        if self.method == "clipped":
            return self._counts(extremes)
        if not self.per_row:
            extremes = np.stack([extremes[:, :, 0].min(axis=0), extremes[:, :, 1].max(axis=0)], axis=1)[None]
        bounds = np.asarray(self.bounds)[:, None]
        share = np.clip((extremes / bounds + 1.0) / 2.0, 0.0, 1.0)
        return np.concatenate([[len(extremes)], np.rint(share * SCALE).sum(axis=0).ravel()]).astype(np.int64)

    def _counts(self, extremes: Extremes) -> npt.NDArray[np.int64]:
        """How many rows fall into each bucket of each side of each tensor; the last one also holds what is smaller."""
        reach = np.maximum(np.stack([-extremes[:, :, 0], extremes[:, :, 1]], axis=2), 0.0)
        share = np.maximum(reach / np.asarray(self.bounds)[:, None], 2.0**-BUCKETS)
        bucket = np.clip(np.floor(-4.0 * np.log2(share)), 0, BUCKETS - 1).astype(np.int64)
        sides = bucket.reshape(len(bucket), -1)
        counts = np.stack([np.bincount(side, minlength=BUCKETS) for side in sides.T])
        return np.concatenate([[len(extremes)], counts.ravel()]).astype(np.int64)

    def finish(self, total: npt.NDArray[Any], *, noised: bool = False) -> npt.NDArray[np.float64]:
        """The ranges, shape (tensors, 2), each with 0 in it, from the sum over clients."""
        count = max(int(total[0]), 1)
        bounds = np.asarray(self.bounds)[:, None]
        if self.method == "clipped":
            found = self._clipped(total[1:].reshape(-1, 2, BUCKETS), count) * bounds
        else:
            share = np.clip(total[1:].reshape(-1, 2) / count / SCALE, 0.0, 1.0)
            found = (2.0 * share - 1.0) * bounds
        found = found * _WIDER if self.per_row or noised else found
        return np.stack([np.minimum(found[:, 0], 0.0), np.maximum(found[:, 1], 0.0)], axis=1)

    def _clipped(self, counts: npt.NDArray[Any], rows: int) -> npt.NDArray[np.float64]:
        """The upper edges of the buckets beyond which no more rows lie than may be left out."""
        beyond = np.cumsum(counts, axis=2)
        bucket = (beyond <= max(rows // _LEFT_OUT, 1)).sum(axis=2)
        edge = 2.0 ** (-np.minimum(bucket, BUCKETS - 1) / 4)
        return np.stack([-edge[:, 0], edge[:, 1]], axis=1)


def noised(answer: npt.NDArray[Any], noise: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """A count and sums of shares with `noise` added, which is in units of the interval; whole numbers again."""
    units = np.concatenate([[1.0], np.full(len(answer) - 1, float(SCALE))])
    whole: npt.NDArray[np.int64] = np.rint(answer + noise * units).astype(np.int64)
    return whole
