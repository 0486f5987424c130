"""What a client does for a hand-over: ranges of its rows' activations, and scores of the ONNX file it makes itself."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import nn
from torch.utils.data import Dataset, Subset

from fedkit import rng
from fedkit.errors import DataError
from fedkit.exam import Exam
from fedkit.examination import ExamSums
from fedkit.metrics import MetricSet
from fedkit.ranges import Ranges
from fedkit.task import Data, Task
from fedkit.trainer.batches import all_rows, row_count
from fedkit.weights import Vector
from fedkit.work import Evaluate, MetricSums, Summary

if TYPE_CHECKING:
    from fedkit.deploy.site import SiteModel

__all__ = ["Exporter"]

Watched: TypeAlias = Callable[[Iterator[Any]], Iterator[Any]]

_CPU = torch.device("cpu")
_BATCH = 64
_LEAST_ROWS = 10  # of a group at one client, and of what is in no group: the scores of a few rows are those of persons


class Exporter:
    """Converts the module of one task, and runs the result on the CPU; the last conversion is kept."""

    def __init__(self, task: Task, seed: int, watched: Watched) -> None:
        self._task = task
        self._seed = seed
        self._watched = watched
        self._last: tuple[str, SiteModel] | None = None

    def ranges(self, module: nn.Module, query: Ranges, client: str, data: Data, rows: Dataset[Any]) -> Summary:
        """The sums of the extremes that the client's rows make."""
        count = row_count(rows)
        if query.per_row:  # one at a time, because not every tensor keeps the rows of a batch apart
            batches = all_rows(data, rows, 1, _CPU)
        else:
            index = rng.generator(self._seed, "ranges", client).permutation(count)[: query.rows]
            batches = all_rows(data, Subset(rows, sorted(index.tolist())), _BATCH, _CPU)
        extremes = self._converted(module).extremes(query.graph, self._watched(batches))
        return Summary(query.answer(extremes), count)

    def examine(
        self, module: nn.Module, work: Evaluate, exam: Exam, ranges: Vector | None, data: Data, rows: Dataset[Any]
    ) -> MetricSums:
        """The scores of what the module exports to."""
        deployed = self._converted(module).variant(exam.graph, exam.variant, ranges, exam.noise)

        def sums(some: Dataset[Any]) -> npt.NDArray[np.float64]:
            metrics = MetricSet(self._task)
            with torch.inference_mode():
                for batch, count in self._watched(all_rows(data, some, work.batch_size, _CPU)):
                    metrics.update(deployed, batch, count)
            return metrics.sums()

        pooled, tally = sums(rows), dataclasses.replace(deployed.tally)
        groups = {name: sums(Subset(rows, index)) for name, index in _groups(data, row_count(rows), exam, work)}
        vector = ExamSums(MetricSet(self._task), exam).pack(pooled, tally.agreeing, tally.rows, groups)
        return MetricSums(vector, row_count(rows))

    def _converted(self, module: nn.Module) -> SiteModel:
        from fedkit.deploy.site import SiteModel

        total = blake3()
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():  # counters, as of batches, are in no graph
                total.update(name.encode()).update(tensor.detach().float().cpu().numpy().tobytes())
        digest = total.hexdigest()
        if self._last is None or self._last[0] != digest:
            self._last = digest, SiteModel(copy.deepcopy(module).cpu(), self._task)
        return self._last[1]


def _groups(data: Data, rows: int, exam: Exam, work: Evaluate) -> Iterable[tuple[str, list[int]]]:
    """The test rows of each group that is asked for and has enough, where the client's data says which is which."""
    if not exam.groups or data.groups is None or work.split != "test":
        return
    if len(data.groups) != rows:
        raise DataError(f"groups names {len(data.groups)} rows, and there are {rows} test rows")
    found = {name: [i for i, one in enumerate(data.groups) if str(one) == name] for name in exam.groups}
    told = {name: index for name, index in found.items() if len(index) >= _LEAST_ROWS}
    while told and 0 < rows - sum(map(len, told.values())) < _LEAST_ROWS:  # what is left is told by the difference
        del told[min(told, key=lambda name: len(told[name]))]
    yield from told.items()
