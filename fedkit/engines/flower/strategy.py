"""Flower's strategies as fedkit strategies: they say who is asked and what becomes of the answers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NoReturn

import numpy as np
from pydantic import Field, PlainSerializer
from torch import nn

from fedkit import rng
from fedkit.engines.flower.arrays import from_arrays, to_arrays
from fedkit.engines.flower.config import CONFIG, Config, config_to
from fedkit.engines.flower.library import flower, identify, quiet
from fedkit.errors import ConfigError, IncompatibleStrategy, RoundAbandoned
from fedkit.strategy import Federation, Strategy
from fedkit.task import Task
from fedkit.weights import Weights
from fedkit.work import Update

__all__ = ["FlowerStrategy"]

_ARRAYS = "ArrayRecord"  # marks one in the state


def _named(make: Callable[[], Any] | None) -> str | None:
    return None if make is None else f"{make.__module__}.{make.__qualname__}"


class FlowerStrategy(Strategy):
    """A strategy of `flwr.serverapp.strategy` (FedTrimmedAvg, FedYogi, Krum, Bulyan ...), which `make` makes.

    Each round its `configure_train` picks nodes out of the cohort that `participation` draws, and its `aggregate_train`
    makes the next model of what they answer, in the order of their names. `config` goes to clients as its train config
    does on Flower, with what the strategy adds to it; its `proximal-mu` is the local work's `proximal`. Clients answer
    with their number of rows, under the name by which the strategy weighs them, and with `train_loss`. Evaluation is
    the run's own; the strategy's is not called.

    Its numbers and arrays are this strategy's state (`kept`): committed with each round, put back when a run is taken
    up again. To register one by `--strategy module:Class`, subclass and override `flower`.

    Refused, since fedkit cannot vouch for them: wrappers that add noise (use `fedkit.DP`), trees, the older
    `flwr.server.strategy`. Masked and encrypted aggregation show no single updates, and refuse it as they do Krum.
    """

    make: Annotated[Callable[[], Any] | None, PlainSerializer(_named)] = None
    config: Config = Field(default_factory=dict)

    uses: ClassVar[frozenset[str]] = frozenset({"updates", "send"})

    def flower(self) -> Any:
        """The Flower strategy as it is before the first round."""
        if self.make is None:
            raise ConfigError(f"{type(self).__name__} needs make=lambda: ..., or a method flower() of its own")
        return self.make()

    @property
    def least(self) -> int:
        """As many as the Flower strategy wants to see and to train, or waits for."""
        found = self.flower()
        return max(int(getattr(found, name, 1)) for name in ("min_available_nodes", "min_train_nodes"))

    def check(self, task: Task, module: nn.Module) -> None:
        """Refuses what is no strategy of Flower's, and those that fedkit cannot vouch for."""
        _require_shareable(self.flower())
        super().check(task, module)
        config_to(self.config)

    async def round(self, federation: Federation, model: Weights) -> Weights:
        """Whom the Flower strategy picks trains; what it makes of their models is the next one."""
        live = copy.deepcopy(self.flower())
        before = dict(vars(live))
        _put(live, getattr(self, "kept", {}))
        name, arrays = f"Flower's {type(live).__name__}", to_arrays(model)
        asked = self._asked(live, federation, arrays)
        local = self.local.replace(proximal=asked.config.get("proximal-mu", self.local.proximal))
        stream = federation.updates(sorted(asked.messages), model, local, {CONFIG: config_to(asked.config)})
        found = {client: update async for client, update in stream}
        replies = _replies(asked.messages, found, model, getattr(live, "weighted_by_key", "num-examples"))
        made = await asyncio.to_thread(_made, live, federation.round, replies)
        if made is None:
            raise RoundAbandoned(f"round {federation.round}: {name} has made no model of {len(replies)} answers.")
        self.kept = _kept(live, before)
        return from_arrays(made, model, name)

    def _asked(self, live: Any, federation: Federation, arrays: Any) -> _Asked:
        """Whom the strategy asks, with what config; it draws from Python's generator, which is seeded for it."""
        identify()
        nodes = _Nodes(self.cohort(federation), self.least)
        config = flower("app").ConfigRecord(copy.deepcopy(self.config))
        with rng.seeded(int(federation.rng.integers(1 << 32))), quiet():
            messages = list(live.configure_train(federation.round, arrays, config, nodes))
        return nodes.asked(messages, arrays)


@dataclass(frozen=True)
class _Asked:
    """The message that a strategy has for each client, and the config in all of them."""

    messages: dict[str, Any]
    config: Config


class _Nodes:
    """The cohort as a strategy sees it: a Grid that has node ids, from 1 on, and nothing else.

    Raises `RoundAbandoned` for a cohort so small that a strategy would wait for more.
    """

    def __init__(self, cohort: Sequence[str], least: int) -> None:
        if len(cohort) < least:
            raise RoundAbandoned(f"{len(cohort)} clients are there, and Flower's strategy waits for {least}.")
        self._cohort = dict(enumerate(sorted(cohort), start=1))

    def get_node_ids(self) -> list[int]:
        """All of them."""
        return list(self._cohort)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise IncompatibleStrategy(f"the Flower strategy uses grid.{name} itself, and fedkit asks clients for it")

    def asked(self, messages: Iterable[Any], arrays: Any) -> _Asked:
        """Whom these messages ask; raises `IncompatibleStrategy` where they are not all asked the same."""
        found: dict[str, Any] = {}
        configs = []
        for message in messages:
            found[self._cohort[message.metadata.dst_node_id]] = message
            [sent] = message.content.array_records.values()
            if sent is not arrays and dict(sent) != dict(arrays):
                raise IncompatibleStrategy("the Flower strategy sends clients another model than the run's")
            configs.append(
                {key: value for one in message.content.config_records.values() for key, value in one.items()}
            )
        if not configs:
            raise RoundAbandoned("Flower's strategy has asked nobody to train.")
        if any(config != configs[0] for config in configs):
            raise IncompatibleStrategy("the Flower strategy tells clients different things, and fedkit tells all one")
        return _Asked(found, configs[0])


def _replies(asked: Mapping[str, Any], found: Mapping[str, Update], model: Weights, weighed_by: str) -> list[Any]:
    """What came, as the messages that clients of Flower's would have sent, in the order of names."""
    app, replies = flower("app"), []
    tell_loss = all(update.loss is not None for update in found.values())
    for client in sorted(found):
        update = found[client]
        metrics = {weighed_by: update.examples} | ({"train_loss": update.loss} if tell_loss else {})
        content = {"arrays": to_arrays(model + update.weights), "metrics": app.MetricRecord(metrics)}
        replies.append(app.Message(app.RecordDict(content), reply_to=asked[client]))
    return replies


def _made(live: Any, round: int, replies: list[Any]) -> Any:
    """The ArrayRecord of the next model; None where the strategy makes none of so many replies."""
    with quiet():
        made, _ = live.aggregate_train(round, replies)
    return made


def _require_shareable(found: Any) -> None:
    """Raises `IncompatibleStrategy` for what fedkit cannot run as a strategy of Flower's, or not vouch for."""
    kinds, name = flower("serverapp.strategy"), type(found).__name__
    if not isinstance(found, kinds.Strategy):
        older = type(found).__module__.startswith("flwr.server.strategy")
        hint = "take its namesake there" if older else "make= must give one"
        raise IncompatibleStrategy(f"{name} is no strategy of flwr.serverapp.strategy: {hint}")
    if name.startswith("DifferentialPrivacy"):
        raise IncompatibleStrategy(
            f"{name} adds noise that fedkit's accounting does not see: take the strategy inside, and "
            "privacy=fedkit.Privacy(dp=...)"
        )
    if isinstance(found, kinds.FedXgbBagging | kinds.FedXgbCyclic):
        raise IncompatibleStrategy(f"{name} joins trees, and a fedkit model is one vector of numbers")


# -- state -------------------------------------------------------------------------------------------------------------


def _kept(live: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """What of a strategy has changed, or may have: what it was made with and cannot be stored stays out."""
    containers = (Mapping, list, np.ndarray)
    changed = {
        name: value
        for name, value in vars(live).items()
        if name not in before or value is not before[name] or isinstance(value, containers)
    }
    return {name: _stored(value) for name, value in changed.items()}


def _stored(value: Any) -> Any:
    """A value as `Strategy.state_dict` takes it; what that refuses is refused there."""
    if isinstance(value, flower("app").ArrayRecord):
        return {_ARRAYS: {name: one.numpy() for name, one in value.items()}}
    if isinstance(value, dict):
        return {key: _stored(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_stored, value))
    return value.item() if isinstance(value, np.generic) else value


def _put(live: Any, kept: Mapping[str, Any]) -> None:
    for name, value in copy.deepcopy(dict(kept)).items():
        setattr(live, name, _restored(value))


def _restored(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {_ARRAYS}:
        app = flower("app")
        return app.ArrayRecord({name: app.Array(np.asarray(one)) for name, one in value[_ARRAYS].items()})
    if isinstance(value, dict):
        return {key: _restored(one) for key, one in value.items()}
    return type(value)(map(_restored, value)) if isinstance(value, list | tuple) else value
