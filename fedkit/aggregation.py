"""Weighted means and sums whose bits do not depend on the order of arrival.

A `Fold` adds in float64 and in the order of client names. What arrives early waits; what arrives in order is added and
forgotten, so memory is one model in float64 plus the answers that are ahead of their turn. Updates that lie in files
wait there, and are added block by block at the end, straight into the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from fedkit.errors import Reason, Refused
from fedkit.weights import BLOCK, Manifest, Vector, Weights
from fedkit.work import Answer, MetricSums, Summary, Update

__all__ = ["Fold", "KeepFold", "Mean", "MeanFold", "SumFold", "Total", "Weighting"]

Weighting: TypeAlias = Literal["examples", "uniform"]
_MAX_KINDS = 4  # different sets of extra vectors that are told apart in one mean

A = TypeVar("A", bound=Answer)


@dataclass(frozen=True, slots=True)
class Mean:
    """The weighted mean of a cohort's updates.

    `update` is the mean change (`gradient` the same vector under the name that fits a `Gradient`); `extra` the means of
    the strategy's own vectors, under the same weights; `loss` the mean training loss by examples, where reported.
    """

    update: Weights
    examples: int
    clients: tuple[str, ...]
    loss: float | None = None
    extra: Mapping[str, Vector] = field(default_factory=dict)

    @property
    def gradient(self) -> Weights:
        """The mean gradient, for a cohort that was asked for one."""
        return self.update


@dataclass(frozen=True, slots=True)
class Total:
    """The sum of a cohort's metric states or summaries, over `examples` rows."""

    vector: npt.NDArray[Any]
    examples: int
    clients: tuple[str, ...]


class Fold(Generic[A]):
    """Adds answers in the order of client names, whatever the order they come in."""

    def __init__(self, cohort: Iterable[str]) -> None:
        self._order = sorted(cohort)
        self._due = set(self._order)
        self._next = 0
        self._early: dict[str, A | None] = {}
        self.clients: list[str] = []
        self.rejected: dict[str, Refused] = {}
        self.examples = 0

    def add(self, client: str, answer: A | None) -> None:
        """Takes one client's answer, or None once it is sure that there will be none."""
        if client not in self._due:
            return
        self._due.discard(client)
        self._early[client] = answer
        while self._next < len(self._order) and self._order[self._next] in self._early:
            name = self._order[self._next]
            self._next += 1
            self._fold(name, self._early.pop(name))

    def close(self) -> None:
        """Folds what is left: those who have not answered by now are not part of it."""
        for client in self._order[self._next :]:
            self.add(client, self._early.get(client))

    def _fold(self, client: str, answer: A | None) -> None:
        if answer is None:
            return
        try:
            self.accumulate(answer)
        except Refused as refused:
            self.rejected[client] = refused
            return
        self.clients.append(client)
        self.examples += answer.examples

    def accumulate(self, answer: A) -> None:
        """Adds one answer to the sum, or raises `Refused` and adds nothing of it."""
        raise NotImplementedError


class _Part:
    """The sum of updates that carry the same extra vectors, as far as it has been added up."""

    def __init__(self, size: int, extra: Mapping[str, int]) -> None:
        self._size = size
        self._sum: npt.NDArray[np.float64] | None = None
        self._scratch: npt.NDArray[np.float64] | None = None
        self._stored: list[tuple[Weights, int]] = []
        self.extra = {name: np.zeros(length, dtype=np.float64) for name, length in extra.items()}
        self.weight = 0
        self.losses = np.zeros(2, dtype=np.float64)
        self.clients: list[str] = []
        self.examples = 0

    def add(self, client: str, answer: Update, weight: int) -> None:
        if answer.weights.is_stored or self._stored:
            self._stored.append((answer.weights, weight))
        else:
            self._add_now(answer.weights.vector, weight)
        for name, vector in answer.extra.items():
            self.extra[name] += vector * np.float64(weight)
        if answer.loss is not None:
            self.losses += (answer.loss * answer.examples, answer.examples)
        self.weight += weight
        self.clients.append(client)
        self.examples += answer.examples

    def _add_now(self, vector: Vector, weight: int) -> None:
        if self._sum is None or self._scratch is None:
            self._sum, self._scratch = np.zeros(self._size), np.empty(self._size)
        np.multiply(vector, np.float64(weight), out=self._scratch)
        self._sum += self._scratch

    def mean(self) -> Vector:
        """Sum / weight, rounded once to float32; of nothing, zeros."""
        self._scratch = None
        out = np.empty(self._size, dtype=np.float32)
        size = min(BLOCK, self._size)
        total, term, read = np.empty(size), np.empty(size), np.empty(size, dtype=np.float32)
        for start in range(0, self._size, BLOCK):
            part = slice(0, min(BLOCK, self._size - start))
            self._fold_block(start, total[part], term[part], read[part])
            np.divide(total[part], self.weight or 1, out=out[start : start + BLOCK], casting="same_kind")
        return out

    def _fold_block(
        self, start: int, total: npt.NDArray[np.float64], term: npt.NDArray[np.float64], read: Vector
    ) -> None:
        total[:] = 0.0 if self._sum is None else self._sum[start : start + len(total)]
        for weights, weight in self._stored:
            np.multiply(weights.block(start, read), np.float64(weight), out=term)
            total += term


class MeanFold(Fold[Update]):
    """sum(w_k u_k) / sum(w_k) in float64, with w_k the example count or 1, rounded once to float32.

    Updates must carry the same extra vectors; those that differ from what most clients sent are rejected.
    """

    def __init__(self, cohort: Iterable[str], manifest: Manifest, weighting: Weighting) -> None:
        super().__init__(cohort)
        self._manifest = manifest
        self._weighting = weighting
        self._parts: dict[tuple[tuple[str, int], ...], _Part] = {}

    def _fold(self, client: str, answer: Update | None) -> None:
        if answer is None:
            return
        sizes = answer.sizes
        kind = tuple(sorted(sizes.items()))
        if kind not in self._parts and len(self._parts) == _MAX_KINDS:
            self.rejected[client] = Refused(Reason.SHAPE, f"no other client sent the extra vectors {sizes}")
            return
        if kind not in self._parts:
            self._parts[kind] = _Part(self._manifest.size, sizes)
        part = self._parts[kind]
        part.add(client, answer, answer.examples if self._weighting == "examples" else 1)

    def close(self) -> None:
        """Folds what is left, and rejects those whose extra vectors are not what most clients sent."""
        super().close()
        if not self._parts:
            return
        kind, kept = max(self._parts.items(), key=lambda item: len(item[1].clients))
        for odd, part in self._parts.items():
            for client in part.clients if odd != kind else ():
                self.rejected[client] = Refused(Reason.SHAPE, f"expected extra vectors {dict(kind)}, got {dict(odd)}")
        self._parts = {kind: kept}
        self.clients, self.examples = kept.clients, kept.examples

    def result(self) -> Mean:
        """The mean of all that was added; of nothing, zeros."""
        self.close()
        part = next(iter(self._parts.values()), _Part(self._manifest.size, {}))
        weight = part.weight or 1
        update = Weights(self._manifest, part.mean())
        extra = {name: (total / weight).astype(np.float32) for name, total in part.extra.items()}
        loss = float(part.losses[0] / part.losses[1]) if part.losses[1] else None
        return Mean(update, self.examples, tuple(self.clients), loss, extra)


class KeepFold(Fold[Update]):
    """Keeps one client's answer as it is: a hop."""

    _kept: Update | None = None

    def accumulate(self, answer: Update) -> None:
        """Takes the answer."""
        self._kept = answer

    def result(self) -> Update | None:
        """The answer, or None where there was none."""
        return self._kept


class SumFold(Fold[Any]):
    """The plain sum of metric states or summaries. Vectors of another length than `size` are rejected.

    Where `size` is None, the first client by name says how long they are.
    """

    def __init__(self, cohort: Iterable[str], size: int | None = None) -> None:
        super().__init__(cohort)
        self._size = size
        self._sum: npt.NDArray[Any] | None = None

    def accumulate(self, answer: MetricSums | Summary) -> None:
        """Adds one vector; refuses one of another length or kind than expected."""
        expected = len(answer.vector) if self._size is None else self._size
        if self._sum is None and len(answer.vector) == expected:
            self._sum = np.zeros_like(answer.vector)
        if self._sum is None or (answer.vector.shape, answer.vector.dtype) != (self._sum.shape, self._sum.dtype):
            raise Refused(Reason.SHAPE, f"expected {expected} sums, got {len(answer.vector)} {answer.vector.dtype}")
        self._sum += answer.vector

    def result(self) -> Total | None:
        """The sum, or None where nobody answered."""
        self.close()
        return None if self._sum is None else Total(self._sum, self.examples, tuple(self.clients))
