"""SCAFFOLD: control variates that undo the drift of clients with different data."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from fedkit.config import PositiveFloat
from fedkit.errors import IncompatibleStrategy
from fedkit.strategy import Federation, Strategy
from fedkit.task import Task
from fedkit.weights import Weights

__all__ = ["Scaffold"]


class Scaffold(Strategy):
    """SCAFFOLD (Karimireddy et al. 2020, algorithm 1, option II), for clients that train with plain SGD.

    x <- x + server_lr * mean(y_i - x) and c <- c + |S|/N * mean(c_i+ - c_i), both means over the cohort, unweighted.
    """

    server_lr: PositiveFloat = 1.0

    uses: ClassVar[frozenset[str]] = frozenset({"mean", "send"})

    def check(self, task: Task, module: nn.Module) -> None:
        """Refuses tasks whose own train loop would ignore the control variates."""
        super().check(task, module)
        if task.train is not None:
            raise IncompatibleStrategy(f"Scaffold corrects the built-in loop, and {task.name} has its own train loop")

    async def round(self, federation: Federation, model: Weights) -> Weights:
        """Clients correct each step by c - c_i and send how both they and their c_i have moved."""
        control = getattr(self, "control", 0.0 * model)
        work = self.local.replace(control_variates=True)
        mean = await federation.mean(self.cohort(federation), model, work, send={"control": control}, weights="uniform")
        share = len(mean.clients) / len(federation.clients)
        self.control = control + share * model.with_vector(mean.extra["control"])
        return model + self.server_lr * mean.update
