"""FedAvg with an optimiser at the coordinator: the mean update is its pseudo-gradient.

Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2; FedAvgM is Hsu et al. 2019.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedkit.config import PositiveFloat
from fedkit.strategies.averaging import FedAvg
from fedkit.strategy import Federation
from fedkit.weights import Weights

__all__ = ["FedAdagrad", "FedAdam", "FedAvgM", "FedYogi"]

Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Second: TypeAlias = npt.NDArray[np.float32]


class FedAvgM(FedAvg):
    """FedAvg with server momentum: v <- momentum v + mean update; w <- w + server_lr v (Hsu et al. 2019)."""

    server_lr: PositiveFloat = 1.0
    momentum: Decay = 0.9

    async def round(self, federation: Federation, model: Weights) -> Weights:
        """One averaged update, one step with momentum."""
        mean = await federation.mean(self.cohort(federation), model, self.local)
        velocity = getattr(self, "velocity", 0.0 * mean.update)
        self.velocity = self.momentum * velocity + mean.update
        return model + self.server_lr * self.velocity


class _Adaptive(FedAvg):
    """m <- beta1 m + (1 - beta1) d; v <- second(v, d²); w <- w + server_lr m / (sqrt(v) + tau)."""

    server_lr: PositiveFloat = 0.01
    beta1: Decay = 0.9
    tau: PositiveFloat = 1e-3

    async def round(self, federation: Federation, model: Weights) -> Weights:
        """One averaged update d, one adaptive step."""
        mean = await federation.mean(self.cohort(federation), model, self.local)
        delta = mean.update
        first = getattr(self, "first", 0.0 * delta)
        second = getattr(self, "second", delta.with_vector(np.full_like(delta.vector, self.tau**2)))
        self.first = self.beta1 * first + (1 - self.beta1) * delta
        self.second = delta.with_vector(self.moment(second.vector, delta.vector**2))
        return model + self.server_lr * model.with_vector(self.first.vector / (np.sqrt(self.second.vector) + self.tau))

    def moment(self, second: Second, square: Second) -> Second:
        """The next second moment from this one and the squared mean update."""
        raise NotImplementedError


class FedAdagrad(_Adaptive):
    """v <- v + d² (Reddi et al. 2021); without momentum unless `beta1` is given."""

    beta1: Decay = 0.0

    def moment(self, second: Second, square: Second) -> Second:
        """The sum of all squares."""
        return second + square


class FedAdam(_Adaptive):
    """v <- beta2 v + (1 - beta2) d² (Reddi et al. 2021)."""

    beta2: Decay = 0.99

    def moment(self, second: Second, square: Second) -> Second:
        """A decaying mean of squares."""
        mixed: Second = np.float32(self.beta2) * second + np.float32(1 - self.beta2) * square
        return mixed


class FedYogi(_Adaptive):
    """v <- v - (1 - beta2) d² sign(v - d²) (Reddi et al. 2021)."""

    beta2: Decay = 0.99

    def moment(self, second: Second, square: Second) -> Second:
        """Moves towards the square by a step that does not depend on the distance."""
        moved: Second = second - np.float32(1 - self.beta2) * square * np.sign(second - square)
        return moved
