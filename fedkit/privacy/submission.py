"""What cannot be trained with differential privacy is refused before anything is asked of anybody, with the fix."""

from __future__ import annotations

from torch import nn

from fedkit.config import DP
from fedkit.errors import IncompatibleStrategy
from fedkit.privacy import models
from fedkit.privacy.clients import ClientLevel, require_client_level
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.work import Fit

__all__ = ["require_private", "shield_for"]


def shield_for(strategy: Strategy, dp: DP | None, clients: int) -> ClientLevel | None:
    """What protects whole clients in a run, where that was asked for; raises `IncompatibleStrategy` for too few."""
    if dp is None or dp.level == "example":
        return None
    shield = ClientLevel(dp, strategy.participation.fraction, strategy.rounds)
    shield.require(clients)
    return shield


def require_private(strategy: Strategy, task: Task, module: nn.Module, dp: DP) -> None:
    """Raises `IncompatibleStrategy` where this strategy, task or model cannot be trained so; the message names both."""
    if dp.level == "client":
        require_client_level(strategy, task)
        return
    name = type(strategy).__name__
    models.require_private(task, module)
    if getattr(strategy, "gate", None) is not None:
        raise IncompatibleStrategy(f"dp and the gate of {name}: a gate tells what a site's own rows say of a model")
    if isinstance(strategy.local, Fit) and strategy.local.mixed_precision:
        raise IncompatibleStrategy("dp and mixed_precision: bfloat16 measures gradients too coarsely for a clip")
    if task.prepare is not None and task.prepare.query.bounds is None:
        raise IncompatibleStrategy(
            f"dp and the statistics of {task.name}: Standardize needs public bounds, or they would give rows away"
        )
    if "start" in strategy.uses and dp.epsilon is not None:
        raise IncompatibleStrategy(
            f"{name} asks a client as often as it answers, so that no noise can be planned for epsilon={dp.epsilon:g}: "
            "give DP(noise_multiplier=...), and each site's budget is kept to"
        )
