"""fedkit's tasks and strategies on Flower's engines: a ServerApp conducts the run, a ClientApp does the work."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fedkit import rng
from fedkit.config import Engine, Evaluation, Privacy
from fedkit.engines.flower.library import flower, quiet, require_ray
from fedkit.engines.flower.node import Node
from fedkit.engines.flower.transport import ATTEND, GridTransport
from fedkit.errors import ConfigError, FedkitError, IncompatibleStrategy, RunError
from fedkit.result import Result, trained, warn_of_failures
from fedkit.rounds.conduct import Outcome, Plan, conduct
from fedkit.rounds.journal import Journal, MemoryJournal, RoundRecord
from fedkit.simulation.run import require_counts, submitted
from fedkit.simulation.splits import client_names
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.weights import Weights

__all__ = ["apps", "run"]


def apps(
    task: Task,
    strategy: Strategy,
    *,
    clients: Sequence[str],
    on_result: Callable[[Result], object],
    seed: int = 0,
    init: Weights | nn.Module | Path | str | None = None,
    evaluate: Evaluation | None = None,
    privacy: Privacy = Privacy(),
    threads: int = 1,
    device: str = "auto",
    on_round: Callable[[RoundRecord], None] | None = None,
) -> tuple[Any, Any]:
    """(ServerApp, ClientApp) that train `task` with `strategy`, for Flower's SuperLink and SuperNodes.

    A node is the client that its configuration names: `--node-config 'client="va"'`, or `partition-id=N` for number N
    (from 0) of `clients` in the order of the alphabet. A round begins when all of them are there. `on_result` gets the
    result in the process of the ServerApp; the rest is as in `fedkit.simulate`. Policy, ledger and budget belong to
    fedkit's own agent: a SuperNode has none, and does what it is asked.

    Raises `ConfigError`, `TaskError`, `IncompatibleStrategy` at once for what cannot be run so.
    """
    names = client_names(clients)
    _require_shareable(privacy, seed)
    plan = submitted(task, strategy, len(names), seed=seed, init=init, evaluate=evaluate, privacy=privacy)
    require_counts(threads=threads)
    server = _Server(dataclasses.replace(plan, on_round=on_round), tuple(names), "federation", on_result)
    return server.app(), _client_app(Node(secrets.token_hex(8), task, tuple(names), seed, device, threads))


def run(
    task: Task,
    strategy: Strategy,
    *,
    clients: Sequence[str],
    seed: int = 0,
    init: Weights | nn.Module | Path | str | None = None,
    evaluate: Evaluation | None = None,
    privacy: Privacy = Privacy(),
    workers: int = 1,
    threads: int = 1,
    device: str = "auto",
    on_round: Callable[[RoundRecord], None] | None = None,
    journal: Journal | None = None,
) -> Result:
    """Trains on Flower's simulation engine, `workers` clients at a time, each in a process of Ray's.

    Everything else is as in `fedkit.simulate`, and the same seed gives the same bits. `journal` is refused: what Flower
    has begun is not taken up again.

    Raises `ConfigError`, `TaskError`, `IncompatibleStrategy` before anything is trained, `RunFailed` where a round
    stays below its quorum.
    """
    names = client_names(clients)
    _require_shareable(privacy, seed, journal)
    plan = submitted(task, strategy, len(names), seed=seed, init=init, evaluate=evaluate, privacy=privacy)
    require_counts(workers=workers, threads=threads)
    require_ray()
    found: list[Result] = []
    server = _Server(dataclasses.replace(plan, on_round=on_round), tuple(names), "simulation", found.append)
    client_app = _client_app(Node(secrets.token_hex(8), task, tuple(names), seed, device, threads))
    server.simulate(client_app, workers)
    if server.error is not None:
        raise server.error
    warn_of_failures(found[0].outcome)
    return found[0]


def _require_shareable(privacy: Privacy, seed: int, journal: Journal | None = None) -> None:
    """Refuses, in a sentence, what fedkit and Flower's engines do not have in common."""
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed travels as 64 bits: it must be 0 or more and below 2^64, got {seed}")
    why = "its keys belong to members of a roster, and Flower has none: use fedkit.simulate or fedkit.connect"
    if privacy.aggregation not in (None, "plain"):
        raise IncompatibleStrategy(f"aggregation {privacy.aggregation} and Flower's engines: {why}")
    if privacy.sealed:
        raise IncompatibleStrategy(f"sealed hops and Flower's engines: {why}")
    if privacy.dp is not None and privacy.dp.noise == "shared":
        raise IncompatibleStrategy(f"dp with noise='shared' and Flower's engines: it needs masked sums, and {why}")
    if journal is not None:
        raise ConfigError(
            "a journal and Flower's engines: a ServerApp that has ended is not taken up again, nor are its nodes' "
            "results kept; for durable rounds use fedkit's own coordinator, or fedkit.simulate(journal=...)"
        )


def _client_app(node: Node) -> Any:
    app = flower("clientapp").ClientApp()
    for register in (app.train, app.evaluate, app.query):
        register()(node.answer)
    app.query(ATTEND)(node.attend)
    return app


class _Server:
    """Conducts one plan over whatever grid its app is given."""

    def __init__(
        self, plan: Plan, clients: tuple[str, ...], engine: Engine, on_result: Callable[[Result], object]
    ) -> None:
        self.error: FedkitError | None = None
        self._plan = plan
        self._clients = clients
        self._engine = engine
        self._on_result = on_result
        self._ended = threading.Event() if engine == "simulation" else None

    def app(self) -> Any:
        """The ServerApp. In simulation it keeps fedkit's own errors in `error`: the engine ends in order."""
        app = flower("serverapp").ServerApp()

        def main(grid: Any, context: Any) -> None:  # noqa: ARG001
            try:
                self._conduct(grid)
            except FedkitError as error:
                if self._ended is None:
                    raise
                self.error = error

        app.main()(main)
        return app

    def simulate(self, client_app: Any, workers: int) -> None:
        """Runs the app on Flower's simulation engine."""
        assert self._ended is not None  # what is simulated has it
        backend = {"init_args": {"num_cpus": workers}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        about = {"num_supernodes": len(self._clients), "backend_config": backend}
        simulation = flower("simulation")
        try:
            with quiet(logging.ERROR), warnings.catch_warnings():  # Flower's: `flwr run` is to come in its place
                warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
                simulation.run_simulation(self.app(), client_app, **about)
        except RuntimeError as error:
            raise self.error or RunError(f"Flower's simulation engine has failed: {error}") from error
        finally:
            self._ended.set()

    def _conduct(self, grid: Any) -> None:
        plan = self._plan
        about: dict[str, Any] = {"task": plan.task.name, "strategy": type(plan.strategy).__name__}
        about |= {"holds_out_valid": plan.holds_out_valid, "engine_ended": self._ended}
        transport = GridTransport(grid, self._clients, **about)
        try:
            with rng.seeded(plan.seed):
                outcome = asyncio.run(conduct(plan, transport, MemoryJournal()))
        finally:
            transport.close()
        self._on_result(self._result(outcome))

    def _result(self, outcome: Outcome) -> Result:
        plan = self._plan
        about: Any = {"name": plan.name, "privacy": plan.privacy, "evaluate": plan.evaluate, "engine": self._engine}
        return Result(plan.task, trained(plan.strategy, outcome), plan.seed, self._clients, outcome, **about)
