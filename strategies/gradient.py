"""FedSGD: one gradient per client, one optimiser step at the coordinator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from fedkit.config import PositiveFloat
from fedkit.errors import ConfigError, IncompatibleStrategy
from fedkit.strategy import Federation, Strategy
from fedkit.task import Task
from fedkit.weights import Weights
from fedkit.work import Gradient

__all__ = ["FedSGD"]

ServerOptimizer: TypeAlias = (
    Literal["SGD", "Adam", "AdamW", "Adagrad", "RMSprop"] | Callable[..., torch.optim.Optimizer]
)


class FedSGD(Strategy):
    """Federated SGD (McMahan et al. 2017, section 2): w <- w - lr * sum of n_k / n times the gradient at client k.

    `server_optimizer` replaces plain SGD: a name from torch.optim, or a class or partial called with the parameters and
    `lr`. Its state is committed with the round. Buffers have no gradient: models with running statistics are refused.
    """

    lr: PositiveFloat
    server_optimizer: ServerOptimizer | None = None
    local: Gradient = Gradient()  # type: ignore[assignment]

    async def round(self, federation: Federation, model: Weights) -> Weights:
        """Each client computes one gradient at the global model; the coordinator makes one step."""
        mean = await federation.mean(self.cohort(federation), model, self.local)
        return self.step(model, mean.gradient)

    def step(self, model: Weights, gradient: Weights) -> Weights:
        """One step of the server's optimiser; what gradients do not change stays as it is."""
        if self.server_optimizer is None:
            return model - self.lr * gradient
        parameter = torch.from_numpy(model.vector.copy()).requires_grad_()
        parameter.grad = torch.from_numpy(gradient.vector)
        optimizer = self._optimizer(parameter)
        optimizer.step()
        self.optimizer_state = _plain(optimizer.state_dict()["state"].get(0, {}))
        stepped = parameter.detach().numpy()
        return model.with_vector(np.where(model.manifest.trainable, stepped, model.vector))

    def _optimizer(self, parameter: torch.Tensor) -> torch.optim.Optimizer:
        name = self.server_optimizer
        make = getattr(torch.optim, name) if isinstance(name, str) else name
        if make is None:
            raise ConfigError("server_optimizer must be given")
        optimizer: torch.optim.Optimizer = make([parameter], lr=self.lr)
        before = getattr(self, "optimizer_state", None)
        if before:
            groups = optimizer.state_dict()["param_groups"]
            state = {key: torch.as_tensor(value) for key, value in before.items()}
            optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
        return optimizer

    def check(self, task: Task, module: nn.Module) -> None:
        """Refuses models whose running statistics would never be learned."""
        super().check(task, module)
        for name, layer in module.named_modules():
            if getattr(layer, "track_running_stats", False):
                text = f"FedSGD sends gradients, and the running statistics of {name!r} have none"
                raise IncompatibleStrategy(f"{text}: use GroupNorm in the model, or FedAvg")


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state for one parameter as arrays, which can be committed."""
    return {key: value.numpy().copy() for key, value in state.items() if isinstance(value, torch.Tensor)}
