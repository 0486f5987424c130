"""The local training loop: plain SGD (or the task's optimiser), FedProx's pull, SCAFFOLD's correction.

Gradients are those of the batches, or private ones: pull and correction are added after the noise. Both are functions
of the model and of vectors that came from noisy updates, so they cost no privacy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from fedkit.errors import DataError, IncompatibleStrategy
from fedkit.privacy.dpsgd import NoisyGradients
from fedkit.task import Task
from fedkit.weights import Binding, Vector
from fedkit.work import Fit

__all__ = ["Loop"]


class Loop:
    """Trains a bound module over batches; afterwards `steps`, `lr` and `loss` say what happened.

    With `noisy`, its gradients take the place of the batches', and no loss is told.
    """

    def __init__(
        self,
        task: Task,
        module: torch.nn.Module,
        binding: Binding,
        fit: Fit,
        device: torch.device,
        noisy: NoisyGradients | None = None,
    ) -> None:
        self._task = task
        self._module = module
        self._binding = binding
        self._fit = fit
        self._device = device
        self._noisy = noisy
        self._pulls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._corrections: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.optimizer = self._optimizer()
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        self.steps = 0
        self._loss = torch.zeros((), device=device)

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        if self._fit.lr is None:
            return self._task.optimizer(parameters)
        return self._task.optimizer(parameters, lr=self._fit.lr)

    def pull_to(self, received: Vector) -> None:
        """FedProx: adds mu (w - received) to each gradient, the derivative of mu/2 ||w - received||²."""
        if self._fit.proximal:
            self._pulls = self._along(received.copy())

    def correct_by(self, correction: Vector) -> None:
        """SCAFFOLD: adds this vector (c - c_i) to each gradient; only plain SGD has that meaning."""
        group = self.optimizer.param_groups[0]
        if type(self.optimizer) is not torch.optim.SGD or group.get("momentum") or group.get("weight_decay"):
            raise IncompatibleStrategy("control variates are defined for plain SGD, without momentum and weight decay")
        self._corrections = self._along(correction)

    def _along(self, vector: Vector) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parts = self._binding.split(vector)
        return [(tensor, parts[i]) for i, tensor in self._binding.trainable()]

    def run(self, batches: Iterable[Any]) -> None:
        """One optimiser step a batch."""
        for batch in batches:
            self.optimizer.zero_grad(set_to_none=True)
            if self._noisy is None:
                self._differentiate(batch)
            else:
                self._noisy.write()
            self._adjust()
            self.optimizer.step()
            self.steps += 1

    def _differentiate(self, batch: Any) -> None:
        with self._precision():
            loss = self._task.mean_loss(self._module, batch)
        self._require_scalar(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        self._loss += loss.detach().reshape(())

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._fit.mixed_precision and self._device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _adjust(self) -> None:
        with torch.no_grad():
            for tensor, start in self._pulls:
                if tensor.grad is not None:
                    tensor.grad.add_(tensor - start, alpha=self._fit.proximal)
            for tensor, correction in self._corrections:
                if tensor.grad is not None:
                    tensor.grad.add_(correction)

    def _require_scalar(self, loss: Any) -> None:
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise DataError(
                f"{self._task.name}: the loss must be one number, the mean over the batch (reduction='mean')"
            )

    def mean_loss(self) -> float | None:
        """The mean of the batches' losses; None under privacy, which does not cover it."""
        return float(self._loss) / self.steps if self.steps and self._noisy is None else None

    def control(self, received: Vector, trained: Vector, before: Vector, server: Vector) -> Vector:
        """The client's next control variate, option II: c_i - c + (received - trained) / (steps lr)."""
        drift = (received - trained) / np.float32(max(self.steps, 1) * self.lr)
        return np.where(self._binding.manifest.trainable, before - server + drift, np.float32(0)).astype(np.float32)
