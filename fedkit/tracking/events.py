"""What a tracker is told of a run, and what it is not told.

Of single clients it is told nothing but scores that their sites release: no names of those who took part or refused,
only how many; no loss, score or count that is pooled over one client alone. Simulated clients have nothing to hide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedkit.config import Engine, Evaluation, Privacy
from fedkit.deploy.acceptance import cost
from fedkit.deploy.passport import Passport
from fedkit.errors import TaskError
from fedkit.rounds.conduct import Outcome
from fedkit.rounds.journal import RoundRecord
from fedkit.source import source_of
from fedkit.strategy import Strategy
from fedkit.task import Task

__all__ = [
    "MODEL",
    "About",
    "Begun",
    "Ended",
    "Event",
    "Scored",
    "Shipped",
    "begun",
    "ended",
    "scored",
    "shipped",
    "story",
]

Scalar: TypeAlias = str | int | float | bool
Scores: TypeAlias = Mapping[str, float]

MODEL = "fedkit.model"  # the tag with the digest of a run's last model
_MOST_CLIENTS = 32  # whose own scores are told; more would only hide the others'
_UNTOLD = frozenset({"owner_box"})  # a key, and no setting that anybody compares


@dataclass(frozen=True, slots=True)
class Begun:
    """A run begins. `params` are its settings, nested ones with dots in their names; `tags` are what it is found by."""

    run: str
    task: str
    params: Mapping[str, Scalar]
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Scored:
    """A round is committed. `metrics` has names such as "train/loss", "valid/accuracy", "privacy/epsilon"."""

    round: int
    metrics: Scores


@dataclass(frozen=True, slots=True)
class Ended:
    """A run is over after `round`: its test scores ("test/accuracy"), and the tags that only its end could tell.

    `state` is "stopped" where a person interrupted it, or stopped looking.
    """

    state: Literal["finished", "failed", "stopped"]
    round: int = 0
    metrics: Scores = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shipped:
    """A run's model was handed over as the signed bundle in `folder`, to be known as `name`.

    `model` is the digest of the run's last model, which its `Ended` has among its tags. `story` is the whole run, for
    a tracker that was not told of it.
    """

    name: str
    folder: Path
    model: str
    tags: Mapping[str, str]
    story: tuple[Begun | Scored | Ended, ...]


Event: TypeAlias = Begun | Scored | Ended | Shipped


@dataclass(frozen=True, kw_only=True)
class About:
    """A run as whoever begins it knows it; `clients` is how many take part, where that is known."""

    run: str
    task: Task
    strategy: Strategy
    seed: int
    engine: Engine
    privacy: Privacy | None = None
    evaluate: Evaluation | None = None
    clients: int | None = None


def begun(about: About) -> Begun:
    """A run as it begins."""
    settings = {
        "task": about.task.name,
        "strategy": {"name": type(about.strategy).__name__} | about.strategy.to_dict(),
        "seed": about.seed,
        "clients": about.clients,
        "privacy": None if about.privacy is None else about.privacy.to_dict(),
        "evaluate": None if about.evaluate is None else about.evaluate.to_dict(),
    }
    tags = {"fedkit.engine": about.engine, "fedkit.run": about.run} | _source(about.task)
    if about.engine == "simulation" and about.privacy is not None:
        tags |= _protection(about.privacy)
    return Begun(about.run, about.task.name, dict(_flat(settings)), tags)


def scored(record: RoundRecord, engine: Engine) -> Scored:
    """A committed round. Scores of a round that does not stand are those of the model it would have made."""
    found = {
        "clients": len(record.clients),
        "refusals": len(record.refusals),
        "seconds": record.seconds,
        "bytes/up": record.bytes_up,
        "bytes/down": record.bytes_down,
        "stands": record.stands,
    }
    metrics = {name: float(value) for name, value in found.items()}
    if _may_be_told(record.clients, record.per_client, engine):
        metrics["examples"] = float(record.examples)
        metrics |= {} if record.loss is None else {"train/loss": record.loss}
    if _may_be_told(record.scored, record.per_client, engine):
        metrics |= {f"valid/{name}": value for name, value in record.metrics.items()}
    if record.epsilon:
        metrics["privacy/epsilon"] = max(record.epsilon.values())
    return Scored(record.round, metrics | _single("valid", record.per_client))


def ended(outcome: Outcome, clients: Collection[str], privacy: Privacy, engine: Engine) -> Ended:
    """A run that has finished; `clients` are those that it had."""
    metrics: dict[str, float] = {}
    best, last = outcome.best, outcome.history[-1].round if outcome.history else 0
    if best is not None:
        metrics["best/round"] = float(best.round)
    refused = {refusal.client for refusal in outcome.refusals}
    if _may_be_told(set(clients) - refused, outcome.test_per_client, engine):
        metrics |= {f"test/{name}": value for name, value in outcome.test.items()}
        metrics |= {} if best is None else {f"best/test/{name}": value for name, value in best.test.items()}
    tags = {MODEL: outcome.weights.digest} | _protection(privacy)
    return Ended("finished", last, metrics | _single("test", outcome.test_per_client), tags)


def story(about: About, outcome: Outcome, clients: Collection[str]) -> tuple[Begun | Scored | Ended, ...]:
    """A run that is over, as it would have been told while it went on."""
    rounds = [scored(record, about.engine) for record in outcome.history]
    return begun(about), *rounds, ended(outcome, clients, about.privacy or Privacy(), about.engine)


def shipped(folder: Path, passport: Passport, signer: str, story: Sequence[Begun | Scored | Ended]) -> Shipped:
    """A bundle that was written, by what its passport says; `story` is that of its run."""
    model = next(event.tags[MODEL] for event in story if isinstance(event, Ended))
    tags = {
        "fedkit.run": passport.run.name,
        "fedkit.round": str(passport.run.round),
        "fedkit.variant": passport.shipped,
        "fedkit.signer": signer,
        "fedkit.weights": passport.model.weights,
        "fedkit.aggregation": passport.privacy.aggregation,
        "fedkit.epsilon": _epsilon(passport),
    }
    return Shipped(passport.task.name, folder, model, tags, tuple(story))


def _epsilon(passport: Passport) -> str:
    """What the model has cost the client that it cost most, in a word where that is no number."""
    if passport.privacy.dp is None:
        return "none"
    most, _ = cost(passport, "epsilon")
    return f"{most:.6g}" if math.isfinite(most) else "unknown" if math.isnan(most) else "unbounded"


def _may_be_told(pooled: Collection[str], released: Collection[str], engine: Engine) -> bool:
    """Whether what was pooled over these clients is more than one client's own, or that client releases its own."""
    return engine == "simulation" or len(pooled) > 1 or set(pooled) <= set(released)


def _single(split: str, scores: Mapping[str, Scores]) -> dict[str, float]:
    """Scores of single clients, of those whose sites release them."""
    if len(scores) > _MOST_CLIENTS:
        return {}
    return {f"client/{one}/{split}/{name}": value for one, own in scores.items() for name, value in own.items()}


def _protection(privacy: Privacy) -> dict[str, str]:
    """How a run protects its clients' data. A coordinator decides on some of it, so that is known at the end."""
    level = "none" if privacy.dp is None else privacy.dp.level
    return {"fedkit.dp": level, "fedkit.aggregation": privacy.aggregation or "plain"}


def _source(task: Task) -> dict[str, str]:
    try:
        return {"fedkit.source": source_of(task)}
    except TaskError:  # it was written in no file
        return {}


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Scalar]]:
    """Settings one by one, those of settings with dots; what is not set is left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        elif value is not None and name not in _UNTOLD:
            is_plain = isinstance(value, str | int | float | bool)
            yield f"{above}{name}", value if is_plain else json.dumps(value, default=str)
