"""Metrics that leave a client only as sums.

A torchmetrics metric whose states all add up becomes one float64 vector per client; the vectors are summed, and the
metric is computed from the sum. A metric that keeps raw predictions is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedkit.errors import MetricNotSummable, TaskError
from fedkit.task import Task

__all__ = ["MetricSet"]

Sums: TypeAlias = npt.NDArray[np.float64]

_REMEDIES = {
    "cat": "use its binned form, for example BinaryAUROC(thresholds=200)",
    "raw": "use its binned form, for example BinaryAUROC(thresholds=200)",
    "mean": "use a metric that keeps sums and counts",
    "max": "a maximum is one person's value; use a histogram or a rate",
    "min": "a minimum is one person's value; use a histogram or a rate",
}


class MetricSet:
    """A task's metrics plus its mean loss, as one vector of sums: [loss * n, n, states ...].

    Raises `MetricNotSummable` where a metric's states do not add up.
    """

    def __init__(self, task: Task, device: torch.device | None = None) -> None:
        self._task = task
        if "loss" in task.metrics:
            raise TaskError("metric 'loss': the mean loss has that name already")
        self.metrics = {name: _made(name, factory).to(device or "cpu") for name, factory in task.metrics.items()}
        self._loss = np.zeros(2, dtype=np.float64)

    def update(self, module: nn.Module, batch: Any, rows: int) -> None:
        """Adds one batch of `rows` rows."""
        loss, outputs, targets = self._task.scored(module, batch, with_outputs=bool(self.metrics))
        if self._task.loss is not None or self._task.step is not None:
            self._loss += (float(loss) * rows, rows)
        for metric in self.metrics.values():
            metric.update(self._as_outputs(metric, outputs), _as_targets(metric, targets))

    def _as_outputs(self, metric: Any, outputs: Any) -> Any:
        """Probabilities for binary metrics of logits; torchmetrics would guess, batch by batch, which they are."""
        binary = type(metric).__name__.startswith(("Binary", "Multilabel"))
        if type(metric).__name__.startswith("Multiclass") and isinstance(self._task.loss, nn.CrossEntropyLoss):
            return outputs.softmax(1) if self._task.predict is None else outputs
        return outputs.sigmoid() if binary and self._task.gives_logits else outputs

    def sums(self) -> Sums:
        """The vector of everything added so far."""
        for label, metric in self.metrics.items():
            for state, fresh in metric._defaults.items():
                if getattr(metric, state).numel() != fresh.numel():
                    raise MetricNotSummable(f"metric {label!r}: its state {state!r} grows with use")
        parts = [state.detach().cpu().double().reshape(-1).numpy() for _, _, state in self._states()]
        return np.concatenate([self._loss, *parts])

    @property
    def size(self) -> int:
        """The length of the vector."""
        return 2 + sum(state.numel() for _, _, state in self._states())

    def compute(self, sums: Sums) -> dict[str, float]:
        """Mean loss and metrics of a sum of vectors; a metric of several values gives one entry each."""
        if sums.shape != (self.size,):
            raise TaskError(f"expected {self.size} metric sums, got shape {sums.shape}")
        self._load(sums)
        found = {"loss": float(sums[0] / sums[1]) if sums[1] else math.nan}
        for name, metric in self.metrics.items():
            metric._update_count = 1  # torchmetrics warns about a compute that no update went before
            found |= _flat(name, _computed(metric))
        return found

    def _states(self) -> Iterator[tuple[Any, str, torch.Tensor]]:
        for metric in self.metrics.values():
            for name in sorted(metric._reductions):
                yield metric, name, getattr(metric, name)

    def _load(self, sums: Sums) -> None:
        for metric in self.metrics.values():
            metric.reset()
        start = 2
        for metric, name, state in list(self._states()):
            part = torch.from_numpy(sums[start : start + state.numel()].copy())
            setattr(metric, name, part.reshape(state.shape).to(state.dtype))
            start += state.numel()


def _made(name: str, factory: Any) -> Any:
    import torchmetrics

    made = not isinstance(factory, torchmetrics.Metric) and callable(factory)
    metric = factory() if made else factory
    if not made or not isinstance(metric, torchmetrics.Metric):
        raise TaskError(f"metric {name!r}: expected a function that makes a torchmetrics.Metric, got {metric!r:.80}")
    if any(isinstance(part, torchmetrics.Metric) for part in metric.modules() if part is not metric):
        raise MetricNotSummable(f"metric {name!r} is made of other metrics, whose states it hides: list those instead")
    for state, reduction in metric._reductions.items():
        kind = "raw" if isinstance(metric._defaults[state], list) else _kind(reduction)
        if kind != "sum":
            remedy = _REMEDIES.get(kind, "use a metric that keeps sums and counts")
            raise MetricNotSummable(f"metric {name!r} keeps {state!r} ({kind}), which does not add up: {remedy}")
    return metric


def _kind(reduction: Any) -> str:
    return str(getattr(reduction, "__name__", "none")).removeprefix("dim_zero_")


def _computed(metric: Any) -> Any:
    try:
        return metric.compute()
    except ValueError:  # undefined for so few rows
        return torch.tensor(math.nan)


def _as_targets(metric: Any, targets: torch.Tensor) -> torch.Tensor:
    if type(metric).__module__.startswith("torchmetrics.classification") and targets.is_floating_point():
        return targets.long()
    return targets


def _flat(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return {name: float(value)}
    if isinstance(value, torch.Tensor):
        return {f"{name}_{i}": float(part) for i, part in enumerate(value.reshape(-1))}
    raise TaskError(f"metric {name!r} computes {type(value).__name__}; only numbers and tensors can be shown")
