"""What cannot be trained with differential privacy is refused before anything is asked of anybody, with the fix."""

from __future__ import annotations

import itertools

from torch import nn

from fedkit.config import DP, Privacy
from fedkit.crypto.ckks import refuse_handing_back
from fedkit.crypto.member import LEAST_COHORT
from fedkit.crypto.seal import require_library
from fedkit.errors import ConfigError, IncompatibleStrategy
from fedkit.privacy import models
from fedkit.privacy.clients import ClientLevel, require_client_level
from fedkit.privacy.sealed import require_sealable
from fedkit.privacy.shared import Sharing, require_shared
from fedkit.rounds.layout import Secret
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.weights import Weights
from fedkit.work import Fit

__all__ = ["fewest", "require_privacy", "require_private", "sharing_for", "shield_for", "with_aggregation"]


def require_privacy(
    strategy: Strategy, task: Task, module: nn.Module, privacy: Privacy, clients: int, *, simulated: bool = False
) -> None:
    """Raises `IncompatibleStrategy` or `ConfigError` where a run over at least `clients` cannot be protected so."""
    if privacy.sealed:
        require_sealable(strategy, privacy)
    if privacy.dp is not None:
        require_private(strategy, task, module, privacy.dp)
    shield_for(strategy, privacy.dp, clients)
    if privacy.dp is not None and privacy.dp.noise == "shared":
        require_shared(strategy, privacy, clients)
    secret = Secret.of(privacy)
    if secret is None:
        return
    kind = f"aggregation {privacy.aggregation}"
    _require_summable(kind, strategy, task, privacy)
    asked = clients if privacy.sealed else strategy.asked(clients)
    if asked < LEAST_COHORT:
        few = f"and {type(strategy).__name__} may ask {asked} of {clients}: let more take part (min_clients)"
        raise IncompatibleStrategy(f"{kind} adds up at least {LEAST_COHORT} clients, {few}")
    if secret.scheme != "masked":
        refuse_handing_back(to_coordinator=secret.scheme == "ckks" and not simulated)
        require_library()
    secret.mean(Weights.from_module(module, task.travels).manifest.size, asked, 1)


def with_aggregation(
    strategy: Strategy, task: Task, module: nn.Module, privacy: Privacy, clients: int, members: int
) -> Privacy:
    """The same privacy with its aggregation settled where it says none, for a roster of so many members."""
    if privacy.aggregation is not None:
        return privacy
    masked = privacy.replace(aggregation="masked")
    try:
        require_privacy(strategy, task, module, masked, clients)
    except (ConfigError, IncompatibleStrategy):
        return privacy.replace(aggregation="plain")
    return masked if members >= LEAST_COHORT else privacy.replace(aggregation="plain")


def fewest(strategy: Strategy, privacy: Privacy) -> int:
    """With how many clients a run may begin where nothing else is said: 2, or as many as leave a sum of three."""
    if privacy.aggregation == "plain":
        return max(strategy.least, 2)
    return next(count for count in itertools.count(LEAST_COHORT) if strategy.asked(count) >= LEAST_COHORT)


def _require_summable(kind: str, strategy: Strategy, task: Task, privacy: Privacy) -> None:
    """Raises `IncompatibleStrategy` where something needs more than a sum."""
    name = type(strategy).__name__
    if "hop" in strategy.uses and not privacy.sealed:
        raise IncompatibleStrategy(
            f"{kind} and {name}: it needs one client's model, and nobody sees more than a sum; with "
            "sealed=True the model is sealed on its way from site to site"
        )
    other = sorted(strategy.uses - {"mean", "send", "hop"})
    if other:
        what = {"updates": "single updates", "start": "updates one by one"}[other[0]]
        raise IncompatibleStrategy(f"{kind} and {name}: it needs {what}, and nobody sees more than a sum")
    if strategy.participation.max_update_norm is not None:
        raise IncompatibleStrategy(
            f"{kind} and participation.max_update_norm: nobody sees one update's norm; privacy.clip bounds each "
            "element, and Evaluation(max_drop=...) judges the round"
        )
    if strategy.trains and task.prepare is not None and task.prepare.query.bounds is None:
        raise IncompatibleStrategy(f"{kind} and the statistics of {task.name}: Standardize needs bounds")
    if privacy.dp is not None and privacy.dp.level == "client" and privacy.dp.noise == "local":
        raise IncompatibleStrategy(
            f"{kind} and dp at level client: the coordinator could not see that updates are clipped, nor add its noise "
            "unseen; with aggregation='masked' and noise='shared' the clients do both"
        )


def shield_for(strategy: Strategy, dp: DP | None, clients: int) -> ClientLevel | None:
    """What protects whole clients in a run, where that was asked for; raises `IncompatibleStrategy` for too few."""
    if dp is None or dp.level == "example":
        return None
    shield = ClientLevel(dp, strategy.participation.fraction, strategy.rounds)
    shield.require(clients)
    return shield


def sharing_for(strategy: Strategy, task: Task, privacy: Privacy) -> Sharing | None:
    """What plans the noise that clients share in a run, where that was asked for."""
    dp = privacy.dp
    if dp is None or dp.noise == "local":
        return None
    visits = strategy.visits if dp.level == "example" else strategy.rounds
    return Sharing(privacy, visits, strategy.questions(task))


def require_private(strategy: Strategy, task: Task, module: nn.Module, dp: DP) -> None:
    """Raises `IncompatibleStrategy` where this strategy, task or model cannot be trained so; the message names both."""
    if dp.level == "client":
        require_client_level(strategy, task)
        return
    name = type(strategy).__name__
    if not strategy.trains:
        return
    models.require_private(task, module)
    if getattr(strategy, "gate", None) is not None:
        raise IncompatibleStrategy(f"dp and the gate of {name}: a gate tells what a site's own rows say of a model")
    if isinstance(strategy.local, Fit) and strategy.local.mixed_precision:
        raise IncompatibleStrategy("dp and mixed_precision: bfloat16 measures gradients too coarsely for a clip")
    if isinstance(strategy.local, Fit) and strategy.local.quantize_from is not None:
        raise IncompatibleStrategy(
            "dp and quantize_from: a batch's range of activations ties each row's gradient to the other rows, which "
            "no clip bounds; leave quantize_from out, or protect whole clients: DP(level='client')"
        )
    if task.prepare is not None and task.prepare.query.bounds is None:
        raise IncompatibleStrategy(
            f"dp and the statistics of {task.name}: Standardize needs public bounds, or they would give rows away"
        )
    if "start" in strategy.uses and dp.epsilon is not None:
        raise IncompatibleStrategy(
            f"{name} asks a client as often as it answers, so that no noise can be planned for epsilon={dp.epsilon:g}: "
            "give DP(noise_multiplier=...), and each site's budget is kept to"
        )
