"""`fedkit.simulate`: one call, many clients, one machine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fedkit import codec, rng
from fedkit.config import Evaluation, Privacy
from fedkit.errors import ConfigError, RunFailed
from fedkit.privacy.submission import require_privacy, sharing_for, shield_for
from fedkit.progress import shown
from fedkit.result import Result, opened, trained, warn_of_failures
from fedkit.rounds.conduct import Plan, conduct
from fedkit.rounds.journal import Journal, MemoryJournal, RoundRecord
from fedkit.simulation.roster import open_any, owned
from fedkit.simulation.splits import client_names
from fedkit.simulation.transport import Latency, SimulatedTransport
from fedkit.simulation.workers import InProcess, Processes, Setting, Workers
from fedkit.strategies import HandOver
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.tracking import About, Track, Tracking
from fedkit.weights import Weights

__all__ = ["asking", "require_counts", "simulate", "submitted"]

T = TypeVar("T")


def simulate(
    task: Task,
    strategy: Strategy,
    *,
    clients: Sequence[str],
    seed: int = 0,
    init: Weights | nn.Module | Path | str | None = None,
    evaluate: Evaluation | None = None,
    privacy: Privacy = Privacy(),
    workers: int = 1,
    threads: int | None = None,
    device: str = "auto",
    progress: bool | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
    track: Track = None,
    journal: Journal | None = None,
    latency: Latency | None = None,
) -> Result:
    """Trains `task` with `strategy` over simulated clients and scores the result on their test data, once.

    The same seed gives the same bits on a CPU for any number of `workers` (processes). `threads` is how many torch
    uses in each of them (None: as many as it is set to); other numbers may give other bits, and small models or
    busy machines want 1. `init` is a warm start: weights, a module, or a file. With `evaluate`, a tenth of each
    client's training rows is set aside where it has no validation data. `device` is "auto", "cpu", "cuda" or "mps".
    `progress` shows a live table on the terminal (None: where there is one). `track` is where the run is written
    down beside that ("mlflow", "tensorboard:FOLDER", or a function: see `fedkit.tracking`). With `privacy.dp`,
    samples and noise come from the operating system and differ from run to run, whatever the seed. `latency` gives
    virtual seconds per assignment.

    Raises `ConfigError`, `TaskError`, `IncompatibleStrategy` before anything is trained, `RunFailed` where a round
    stays below its quorum.
    """
    names = client_names(clients)
    plan = submitted(task, strategy, len(names), seed=seed, init=init, evaluate=evaluate, privacy=privacy)
    require_counts(workers=workers, threads=1 if threads is None else threads)
    setting = Setting(task, seed, device, plan.holds_out_valid, threads=threads or torch.get_num_threads())
    what: Any = {"task": task, "strategy": strategy, "seed": seed, "engine": "simulation", "clients": len(names)}
    tracking = Tracking(track, About(run=task.name, privacy=privacy, evaluate=evaluate, **what), on_round)
    place = _place(setting, min(workers, len(names)))
    transport = SimulatedTransport(names, place, seed=seed, latency=latency)
    try:
        with tracking, shown(strategy, progress, tracking) as watcher, rng.seeded(seed), _settled(setting.threads):
            work = conduct(replace(plan, on_round=watcher), transport, journal or MemoryJournal())
            outcome = opened(_run(work), open_any)
            tracking.end(outcome, names, privacy)
    except RunFailed as error:
        raise error from place.failure() or error.__cause__
    finally:
        place.close()
    warn_of_failures(outcome)
    about: Any = {"name": task.name, "privacy": privacy, "evaluate": evaluate, "engine": "simulation"}
    ask = asking(task, names, seed, workers=workers, threads=threads, device=device)
    return Result(task, trained(strategy, outcome), seed, tuple(names), outcome, **about, ask=ask)


def submitted(
    task: Task,
    strategy: Strategy,
    clients: int,
    *,
    seed: int,
    init: Weights | nn.Module | Path | str | None = None,
    evaluate: Evaluation | None = None,
    privacy: Privacy = Privacy(),
) -> Plan:
    """What is to be run over so many clients of one machine; raises as `simulate` does before anything is trained."""
    require_privacy(strategy, task, task.build(seed), privacy, clients, simulated=True)
    return Plan(
        name=task.name,
        task=task,
        strategy=strategy,
        seed=seed,
        init=_init(init, task),
        evaluate=evaluate,
        privacy=owned(privacy, task.name),
        shield=shield_for(strategy, privacy.dp, clients),
        sharing=sharing_for(strategy, task, privacy),
        min_clients=clients,
    )


def asking(
    task: Task, clients: Sequence[str], seed: int, **how: Any
) -> Callable[[HandOver, Weights, Privacy], HandOver]:
    """What hands a model over to the same simulated clients; `how` is as in `simulate`."""

    def ask(strategy: HandOver, model: Weights, privacy: Privacy) -> HandOver:
        about: Any = {"clients": clients, "seed": seed, "init": model, "privacy": privacy, "progress": False}
        found = simulate(task, strategy, **about, **how).strategy
        assert isinstance(found, HandOver)  # it is the strategy that was given
        return found

    return ask


@contextlib.contextmanager
def _settled(threads: int) -> Iterator[None]:
    """Torch uses `threads`, and what exists already is not searched for garbage again and again."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


def _init(init: Weights | nn.Module | Path | str | None, task: Task) -> Weights | None:
    if init is None or isinstance(init, Weights):
        return init
    if isinstance(init, nn.Module):
        return Weights.from_module(init, task.travels)
    return codec.load(init)


def require_counts(**counts: int) -> None:
    """Raises `ConfigError` for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} must be 1 or more, got {count}")


def _place(setting: Setting, workers: int) -> Workers:
    return InProcess(setting) if workers == 1 else Processes(setting, workers)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Runs to the end, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()
