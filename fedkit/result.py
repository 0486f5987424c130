"""What a run gives back: the model, its history, its scores, and the way to deployment."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fedkit import codec
from fedkit.errors import ConfigError, Reason, RefusalWarning
from fedkit.rounds.call import Refusal
from fedkit.rounds.conduct import Best, Outcome
from fedkit.rounds.journal import RoundRecord
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.weights import Weights

__all__ = ["Result", "opened", "trained", "warn_of_failures"]


def opened(outcome: Outcome, open: Callable[[Weights], Weights]) -> Outcome:
    """An outcome whose models somebody opens who can; plain ones stay as they are."""
    best = outcome.best
    if best is not None:
        best = dataclasses.replace(best, weights=open(best.weights))
    return dataclasses.replace(outcome, weights=open(outcome.weights), best=best)


def trained(strategy: Strategy, outcome: Outcome) -> Strategy:
    """A copy of `strategy` with the state it had after the last round."""
    found = copy.copy(strategy)
    found.load_state_dict(outcome.state)
    return found


def warn_of_failures(outcome: Outcome) -> None:
    """Issues a `RefusalWarning` at the caller's caller if a client's own code failed; the result lacks that client."""
    refusals = [*(refusal for record in outcome.history for refusal in record.refusals), *outcome.refusals]
    failed = [refusal for refusal in refusals if refusal.reason is Reason.FAILED]
    if failed:
        clients = len({refusal.client for refusal in failed})
        text = f"{clients} clients failed and the run went on without them; {failed[0].client}: {failed[0].detail}"
        warnings.warn(text, RefusalWarning, stacklevel=3)


@dataclass(frozen=True)
class Result:
    """The end of a run, the same from `simulate` and from a real federation. `strategy` has its final state."""

    task: Task
    strategy: Strategy
    seed: int
    clients: tuple[str, ...]
    outcome: Outcome

    @property
    def weights(self) -> Weights:
        """The final weights; raises `ModelSealed` where the run was sealed and its owner's key was not at hand."""
        self.outcome.weights.manifest.require_readable()
        return self.outcome.weights

    @functools.cached_property
    def model(self) -> nn.Module:
        """The module with the final weights, preprocessing included, on the CPU, in evaluation mode."""
        return self.module(self.weights)

    def module(self, weights: Weights) -> nn.Module:
        """A fresh module of the task with these weights."""
        return weights.to_module(self.task.build(self.seed), self.task.travels).eval()

    @property
    def best(self) -> Best:
        """The round of the best validation metric; raises `ConfigError` where the run had no such metric."""
        if self.outcome.best is None:
            raise ConfigError(
                'this run has no best round: run it with evaluate=fedkit.Evaluation(best="loss:min"), '
                "and see .history for rounds whose evaluation was refused"
            )
        return self.outcome.best

    @property
    def history(self) -> list[RoundRecord]:
        """One record a round."""
        return self.outcome.history

    @property
    def abandoned(self) -> list[RoundRecord]:
        """One record for each attempt that fell below its quorum."""
        return self.outcome.abandoned

    @property
    def test(self) -> Mapping[str, float]:
        """Loss and metrics of the final model, pooled over all clients' test data."""
        return self.outcome.test

    @property
    def test_per_client(self) -> Mapping[str, Mapping[str, float]]:
        """Loss and metrics of the final model at each client whose site releases them."""
        return self.outcome.test_per_client

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Who was not scored on test data, and why."""
        return self.outcome.refusals

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, as values JSON can hold."""
        best = self.outcome.best
        return {
            "task": self.task.name,
            "strategy": {"name": type(self.strategy).__name__, **self.strategy.to_dict()},
            "seed": self.seed,
            "clients": list(self.clients),
            "history": [dataclasses.asdict(record) for record in self.history],
            "abandoned": [dataclasses.asdict(record) for record in self.abandoned],
            "test": dict(self.test),
            "test_per_client": {name: dict(scores) for name, scores in self.test_per_client.items()},
            "refusals": [dataclasses.asdict(refusal) for refusal in self.refusals],
            "best": None if best is None else {"round": best.round, "metrics": best.metrics, "test": best.test},
        }

    def save(self, folder: Path | str) -> Path:
        """Writes `run.json`, `model.fedkit` and, where there is a best round, `best.fedkit`; each file whole.

        Models that are sealed stay so: `fedkit open` opens them.
        """
        folder = Path(folder)
        codec.save(folder / "model.fedkit", self.outcome.weights)
        if self.outcome.best is not None:
            codec.save(folder / "best.fedkit", self.outcome.best.weights)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        codec.write_atomically(folder / "run.json", text.encode())
        return folder

    def export(self, folder: Path | str, quantize: str = "none") -> Path:
        """Writes `model.onnx` (float32, raw inputs, dynamic batch) and checks it; raises `ExportError`.

        The weights are the final ones. ONNX Runtime must give what PyTorch gives.
        """
        from fedkit import deploy

        return deploy.export(self.model, self.task, folder, quantize=quantize).path
