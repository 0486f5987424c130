"""The hand-over: a finished run becomes a bundle, whose variants its clients have calibrated, scored and examined."""

from __future__ import annotations

import datetime as dt
import functools
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from fedkit.config import DP, Participation, Privacy
from fedkit.deploy.bundle import MODELS, write_bundle
from fedkit.deploy.convert import BATCHES, TOLERANCE, as_outputs, checked, inputs
from fedkit.deploy.folders import require_free
from fedkit.deploy.gate import BATCHES as GATE_BATCHES
from fedkit.deploy.gate import measured, noise_ranges, onnx_seconds
from fedkit.deploy.passport import (
    Calibrated,
    ClientFacts,
    Examined,
    Measured,
    ModelFacts,
    Parity,
    Passport,
    PrivacyFacts,
    RunFacts,
    Scores,
    TaskFacts,
    TensorFacts,
)
from fedkit.deploy.probe import MOST_SHOWN, Probe, drawn
from fedkit.deploy.quantize import build
from fedkit.deploy.settings import Export, Method
from fedkit.deploy.signer import pseudonyms, signing_key
from fedkit.deploy.verify import looks_like_a_bundle
from fedkit.errors import ConfigError, ExportError, TaskError
from fedkit.exam import Questions, Variant
from fedkit.rounds.journal import RoundRecord
from fedkit.rounds.shield import EVERY_CLIENT
from fedkit.source import source_of
from fedkit.status import Say, unsaid
from fedkit.strategies import HandOver
from fedkit.task import Task
from fedkit.trust.signing import public_of
from fedkit.weights import Weights

__all__ = ["Asked", "Handed", "Subject", "hand_over"]

Asked: TypeAlias = Callable[[HandOver, Weights, Privacy], HandOver]  # runs it over the clients, and has it back

_LIBRARIES = ("fedkit", "torch", "onnx", "onnxruntime", "onnxscript")
_LEAST_BOUND = 1e-3
_PROBE_ROWS = 4
_REACH = 16.0  # public bounds of activations, in units of what normal inputs reach
_NOT_ASKED = "no client has scored it"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A finished run as the hand-over sees it. `ask` runs a `HandOver` over its clients; None where nobody is there."""

    task: Task
    weights: Weights
    module: nn.Module
    run: RunFacts
    clients: tuple[str, ...]
    history: Sequence[RoundRecord]
    test: Mapping[str, float]
    test_per_client: Mapping[str, Mapping[str, float]]
    privacy: Privacy
    criterion: str | None = None
    ask: Asked | None = None


@dataclass(frozen=True, slots=True)
class Handed:
    """A bundle that was written: its folder, what its passport says, and who signed it (a public key in hex)."""

    folder: Path
    passport: Passport
    signer: str


def hand_over(
    subject: Subject,
    folder: Path | str,
    export: Export = Export(),
    *,
    questions: Questions = Questions(),
    key: Path | None = None,
    say: Say = unsaid,
) -> Handed:
    """Writes the bundle of a finished run to `folder`, whole or not at all.

    The model is converted, variants are measured here, and the clients are asked for ranges, scores and the answers to
    `questions`. `key` is the folder of the signing key. `say` is told what is under way.

    Raises `ConfigError`, `ExportError` where the model cannot be handed over, and what a run raises.
    """
    require_free(Path(folder), looks_like_a_bundle)
    signing = signing_key(key)
    work = _Work(subject, export, questions)
    say("converting the model, and measuring its variants")
    work.convert()
    if work.asks and subject.ask is not None:
        say(f"asking {len(subject.clients)} clients")
        work.found = subject.ask(work.plan(), subject.weights, work.privacy())
    say("writing the bundle")
    passport = work.passport(pseudonyms(subject.clients, signing, run=subject.run.name))
    path = write_bundle(folder, work.models, passport, signing, probe=work.probe(passport.task), curves=work.curves())
    return Handed(path, passport, public_of(signing))


class _Work:
    """One hand-over on its way: what was converted and measured, and what the clients have `found`."""

    def __init__(self, subject: Subject, export: Export, questions: Questions) -> None:
        self._subject, self._export, self._questions = subject, export, questions
        self._module, self._task = subject.module.cpu().eval(), subject.task
        _require_whole(self._task, self._module)
        self._gate: list[Measured] = []
        self.found: HandOver | None = None
        self._price = _price(subject.privacy.dp, export)
        is_private = subject.privacy.dp is not None and self._price is None
        self._method: Method = export.calibration or ("noise" if is_private else "mean")
        if is_private and self._method != "noise":
            raise ConfigError(
                "the run is differentially private: give epsilon for what the ranges may cost, or calibration 'noise'"
            )

    def convert(self) -> None:
        """The model as ONNX, and what its variants cost."""
        self._converted, self._difference = checked(self._module, self._task)
        about = (self._converted, self._module, self._task)
        self._noise = noise_ranges(*about)
        self._gate = measured(*about, self._noise, self._export.variants, self._export.limits)

    @property
    def asks(self) -> bool:
        """Whether there is anything to ask the clients for."""
        asked = self._questions
        return bool(self._export.variants or asked.criteria or asked.groups or asked.noise)

    def plan(self) -> HandOver:
        """What the clients are asked."""
        able = [one for one in self._gate if one.passed and one.variant != "fp32"]
        wanted = sorted(able, key=lambda one: math.prod(one.cpu_ratio.values()))
        return HandOver(
            graph=self._converted.graph,
            bounds=np.maximum(_REACH * np.abs(self._noise).max(axis=1), _LEAST_BOUND).tolist(),
            variants=tuple(one.variant for one in wanted),
            method="mean" if self._method == "noise" else self._method,
            rows=self._export.rows,
            per_row=self._price is not None,
            given=[(low, high) for low, high in self._noise.tolist()] if self._method == "noise" else None,
            criterion=self._criterion,
            max_drop=self._export.limits.drop,
            least_agreement=self._export.limits.agreement,
            exam=self._questions,
            participation=Participation(attempts=3 if self._price is None else 1),  # each costs epsilon
        )

    def privacy(self) -> Privacy:
        """How the clients' answers are protected: added up as the run's were, and noised where that was asked for."""
        how = self._subject.privacy.aggregation
        return Privacy(dp=self._price, aggregation=how if how in ("masked", "bfv") else None)

    @property
    def _criterion(self) -> str:
        chosen = self._export.criterion or self._subject.criterion
        return chosen or ("accuracy:max" if "accuracy" in self._task.metrics else "loss:min")

    @property
    def _shipped(self) -> Variant:
        return "fp32" if self.found is None else self.found.chosen

    @functools.cached_property
    def models(self) -> dict[str, bytes]:
        """The files: fp32, and the variant that is shipped."""
        ranges = None if self.found is None else self.found.ranges
        shipped = build(self._converted, self._shipped, ranges)
        return {MODELS["fp32"]: self._converted.content, MODELS[self._shipped]: shipped}

    def passport(self, names: Mapping[str, str]) -> Passport:
        """Everything that is known, with clients by these pseudonyms."""
        subject, weights = self._subject, self._subject.weights
        return Passport(
            created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            run=subject.run,
            task=_task_facts(self._task, self._module),
            model=ModelFacts(weights=weights.digest, parameters=sum(p.numel() for p in self._module.parameters())),
            clients=[_client_facts(name, names[name], subject) for name in subject.clients],
            test=_scores(subject.test),
            privacy=_privacy_facts(subject.privacy),
            calibration=self._calibrated(),
            parity=Parity(difference=self._difference, allowed=TOLERANCE, batches=list(BATCHES)),
            gate=[self._finished(one) for one in self._gate],
            shipped=self._shipped,
            examined=self._examined(),
            versions={"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        )

    def _finished(self, one: Measured) -> Measured:
        """A measurement with what the clients have found."""
        found, name = self.found, one.variant
        if found is not None and name in found.scores:
            scores: Any = {"agreement": _number(found.agreement[name]), "valid": _scores(found.scores[name])}
            one = one.replace(**scores, drop=_number(found.drop(name)))
        if name == "fp32" or not one.passed:
            return one
        objection = _NOT_ASKED if found is None else found.objection(name)
        if objection:
            return one.replace(passed=False, why=objection)
        return one.replace(why="shipped: the fastest that passes" if name == self._shipped else "passes, but is slower")

    def _calibrated(self) -> Calibrated | None:
        clients = 0 if self.found is None else self.found.calibrated
        if not clients and self._shipped != "int8":
            return None
        if self._price is not None:
            cost = {"epsilon": self._price.epsilon, "delta": self._price.delta}
            return Calibrated(method="rows", clients=clients, rows=None, **cost)
        rows = 0 if self._method == "noise" else self._export.rows
        return Calibrated(method=self._method, clients=clients, rows=rows, epsilon=None, delta=None)

    def _examined(self) -> Examined | None:
        found = {} if self.found is None else self.found.examined
        if "pooled" not in found:
            return None
        batches = tuple(sorted({*GATE_BATCHES, *self._questions.batches}))
        [seconds] = onnx_seconds([self.models[MODELS[self._shipped]]], self._module, self._task, batches)
        return Examined(
            variant=self._shipped,
            sites=found["sites"],
            pooled=_scores(found["pooled"]),
            passing=found["passing"],
            groups={name: _scores(scores) for name, scores in found["groups"].items()},
            noise={much: _scores(scores) for much, scores in found.get("noise", {}).items()},
            latency_s=seconds,
        )

    def probe(self, facts: TaskFacts) -> Probe:
        """A few made-up rows, and what PyTorch gives for them."""
        feed = inputs(self._task, _PROBE_ROWS, self._module)
        if sum(array.size for array in feed.values()) > MOST_SHOWN:
            feed = drawn(facts, rows=_PROBE_ROWS)
        with torch.inference_mode():
            outputs = as_outputs(self._module(*(torch.from_numpy(array) for array in feed.values())))
        return Probe.of(feed, dict(zip(self._task.outputs, (one.numpy() for one in outputs), strict=True)))

    def curves(self) -> dict[str, dict[int, float | None]]:
        """Validation scores by round, and the training loss."""
        found: dict[str, dict[int, float | None]] = {}
        for record in self._subject.history:
            for name, value in record.metrics.items():
                found.setdefault(name, {})[record.round] = _number(value)
            if record.loss is not None:
                found.setdefault("training loss", {})[record.round] = _number(record.loss)
        return found


def _price(dp: DP | None, export: Export) -> DP | None:
    """What noised ranges cost each row, on top of a run with `dp`; None where nothing is noised."""
    if export.epsilon is None:
        return None
    if dp is None or dp.level != "example":
        raise ConfigError("epsilon is for runs with differential privacy of rows: ranges are exact in this one")
    return DP(epsilon=export.epsilon, delta=dp.delta)


def _require_whole(task: Task, module: nn.Module) -> None:
    """Raises `ExportError` where a part of the model has stayed at each client, so that there is no one model."""
    local = [name for name, one in module.state_dict().items() if one.is_floating_point() and not task.travels(name)]
    if local:
        names = ", ".join(local[:3]) + (", ..." if len(local) > 3 else "")
        raise ExportError(f"{task.name}: {names} stay at each client, so there is no one model to hand over")


def _number(value: float | None) -> float | None:
    """What JSON can hold of it."""
    return value if value is not None and math.isfinite(value) else None


def _scores(scores: Mapping[str, float]) -> Scores:
    return {name: _number(value) for name, value in scores.items()}


def _task_facts(task: Task, module: nn.Module) -> TaskFacts:
    feed = inputs(task, 2, module)
    with torch.inference_mode():
        outputs = as_outputs(module(*(torch.from_numpy(array) for array in feed.values())))
    given = [TensorFacts(name=name, dtype=one.dtype, shape=[None, *one.shape]) for name, one in task.inputs.items()]
    free = any(None in one.shape for one in task.inputs.values())
    made = [
        TensorFacts(
            name=name,
            dtype=str(one.dtype).removeprefix("torch."),
            shape=[None, *([None] * (one.dim() - 1) if free else one.shape[1:])],
        )
        for name, one in zip(task.outputs, outputs, strict=True)
    ]
    try:
        source = source_of(task)
    except TaskError:  # it was written in no file
        source = None
    return TaskFacts(name=task.name, source=source, inputs=given, outputs=made, metrics=[*task.metrics, "loss"])


def _client_facts(name: str, pseudonym: str, subject: Subject) -> ClientFacts:
    epsilon = next(
        (one.epsilon[key] for one in reversed(subject.history) for key in (name, EVERY_CLIENT) if key in one.epsilon),
        None,
    )
    own = subject.test_per_client.get(name)
    rounds = sum(record.stands and name in record.clients for record in subject.history)
    return ClientFacts(pseudonym=pseudonym, rounds=rounds, test=None if own is None else _scores(own), epsilon=epsilon)


def _privacy_facts(privacy: Privacy) -> PrivacyFacts:
    dp = None if privacy.dp is None else privacy.dp.to_dict()
    return PrivacyFacts(aggregation=privacy.aggregation or "plain", sealed=privacy.sealed, dp=dp)
