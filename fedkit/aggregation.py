"""Weighted means and sums whose bits do not depend on the order of arrival.

A `Fold` adds in float64 and in the order of client names. What arrives early waits; what arrives in order is added and
forgotten, so memory is one model in float64 plus the answers that are ahead of their turn. Updates that lie in files
wait there, and are added block by block at the end, straight into the mean.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from fedkit.errors import Reason, Refused
from fedkit.spool import Spooled, SpooledExtras, Values
from fedkit.weights import Manifest, Vector, Weights
from fedkit.work import Answer, MetricSums, Summary, Update

__all__ = ["Fold", "KeepFold", "Mean", "MeanFold", "SumFold", "Total", "Weighting"]

Weighting: TypeAlias = Literal["examples", "uniform"]
_PIECE = 1 << 18  # elements that are read from one file at a time
_BLOCK = 1 << 16  # elements that are added at a time, which stay in the cache of a processor's core
_SMALL = 1 << 18  # elements of values in memory that are added as they come, while the coordinator waits anyway
_MOST_OPEN = 256  # files that one fold keeps open
_THREADS = min(4, os.cpu_count() or 1)  # that add one piece each; which thread it is does not change a bit
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


class _Sum:
    """The sum of weighted vectors of `size` elements in float64, in the order in which they are added.

    What lies in files waits there, and so does all that comes after it. It is read once, a piece of each in turn.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._total: npt.NDArray[np.float64] | None = None
        self._waiting: list[tuple[Vector | Values, int]] = []

    def add(self, values: Vector | Values, weight: int) -> None:
        """Adds `weight` times `values`."""
        if isinstance(values, Values) and not self._waiting and values.is_at_hand and values.size <= _SMALL:
            values = values.all()
        if self._waiting or isinstance(values, Values):
            self._waiting.append((values, weight))
            return
        if self._total is None:
            self._total = np.zeros(self._size)
        _add_to(self._total, values, weight)

    def mean(self, weight: float) -> Vector:
        """Sum / weight, rounded once to float32; of nothing, zeros."""
        out = np.empty(self._size, dtype=np.float32)
        if self._total is not None and not self._waiting:
            return np.divide(self._total, weight or 1, out=out, casting="same_kind")
        with self._opened() as waiting, ThreadPoolExecutor(min(_THREADS, -(-self._size // _PIECE) or 1)) as threads:
            pieces = range(0, self._size, _PIECE)
            list(
                threads.map(lambda start: self._mean_piece(waiting, start, weight, out[start : start + _PIECE]), pieces)
            )
        return out

    @contextlib.contextmanager
    def _opened(self) -> Iterator[list[tuple[Vector | Values, int]]]:
        """What waits, with as many files kept open as a process may well have."""
        with contextlib.ExitStack() as files:
            most = self._waiting[:_MOST_OPEN]
            opened = [(files.enter_context(v.opened()) if isinstance(v, Values) else v, n) for v, n in most]
            yield opened + self._waiting[_MOST_OPEN:]

    def _mean_piece(self, waiting: list[tuple[Vector | Values, int]], start: int, weight: float, out: Vector) -> None:
        end = start + len(out)
        total = np.zeros(len(out)) if self._total is None else self._total[start:end].copy()
        read = np.empty_like(out)
        for values, times in waiting:
            if isinstance(values, Values):
                values.read(start, read)
                _add_to(total, read, times)
            else:
                _add_to(total, values[start:end], times)
        np.divide(total, weight or 1, out=out, casting="same_kind")


def _add_to(total: npt.NDArray[np.float64], values: Vector, weight: int) -> None:
    term = np.empty(min(_BLOCK, len(total)))
    for start in range(0, len(total), _BLOCK):
        into = total[start : start + _BLOCK]
        part = term[: len(into)]
        np.copyto(part, values[start : start + _BLOCK])  # faster than a product of mixed types
        np.multiply(part, np.float64(weight), out=part)
        np.add(into, part, out=into)


class _Part:
    """The sum of updates that carry the same extra vectors, as far as it has been added up."""

    def __init__(self, size: int, extra: Mapping[str, int]) -> None:
        self._sum = _Sum(size)
        self._extra = {name: _Sum(length) for name, length in extra.items()}
        self._weight = 0
        self._losses = np.zeros(2, dtype=np.float64)
        self.clients: list[str] = []
        self.examples = 0

    def add(self, client: str, answer: Update, weight: int) -> None:
        weights, extra = answer.weights, answer.extra
        self._sum.add(weights.values if isinstance(weights, Spooled) else weights.vector, weight)
        for name, total in self._extra.items():
            total.add(extra.values_of(name) if isinstance(extra, SpooledExtras) else extra[name], weight)
        if answer.loss is not None:
            self._losses += (answer.loss * answer.examples, answer.examples)
        self._weight += weight
        self.clients.append(client)
        self.examples += answer.examples

    def mean(self, manifest: Manifest, over: float | None) -> Mean:
        """The mean of what was added; of nothing, zeros."""
        weight = self._weight if over is None else over
        update = Weights(manifest, self._sum.mean(weight))
        extra = {name: total.mean(weight) for name, total in self._extra.items()}
        loss = float(self._losses[0] / self._losses[1]) if self._losses[1] else None
        return Mean(update, self.examples, tuple(self.clients), loss, extra)


class MeanFold(Fold[Update]):
    """sum(w_k u_k) / sum(w_k) in float64, with w_k the example count or 1, rounded once to float32.

    With `over`, the sum is divided by that number instead, whoever answered.
    Updates must carry the same extra vectors; those that differ from what most clients sent are rejected.
    """

    def __init__(
        self, cohort: Iterable[str], manifest: Manifest, weighting: Weighting, *, over: float | None = None
    ) -> None:
        super().__init__(cohort)
        self._over = over
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
        part = next(iter(self._parts.values()), None) or _Part(self._manifest.size, {})
        return part.mean(self._manifest, self._over)


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
