"""What a run gives back: the model, its history, its scores, and the way to deployment."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fedkit import codec, saved
from fedkit.config import Engine, Evaluation, Privacy, parse
from fedkit.deploy.settings import Export, Quantize
from fedkit.errors import ConfigError, Reason, RefusalWarning
from fedkit.exam import Questions
from fedkit.registry import find_strategy
from fedkit.rounds.call import Refusal
from fedkit.rounds.conduct import Best, Outcome, holds_out_valid
from fedkit.rounds.journal import RoundRecord
from fedkit.status import Say, unsaid
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.tracking import About, Shipped, Teller, Track, shipped, story
from fedkit.weights import Weights

if TYPE_CHECKING:
    from fedkit.handover import Asked, Handed, Subject

__all__ = ["Result", "load", "opened", "subject", "trained", "warn_of_failures"]


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
    """The end of a run, the same from `simulate` and from a real federation. `strategy` has its final state.

    `ask` runs another strategy over the same clients, for the hand-over; None where that cannot be.
    """

    task: Task
    strategy: Strategy
    seed: int
    clients: tuple[str, ...]
    outcome: Outcome
    name: str = ""
    privacy: Privacy = Privacy()
    evaluate: Evaluation | None = None
    engine: Engine = "simulation"
    ask: Asked | None = field(default=None, repr=False, compare=False)

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
            "name": self.name or self.task.name,
            "task": self.task.name,
            "engine": self.engine,
            "privacy": self.privacy.to_dict(),
            "evaluate": None if self.evaluate is None else self.evaluate.to_dict(),
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

    def export(
        self,
        folder: Path | str,
        quantize: Quantize | None = None,
        *,
        best: bool = False,
        settings: Export = Export(),
        questions: Questions = Questions(),
        key: Path | None = None,
        track: Track = None,
        say: Say = unsaid,
    ) -> Handed:
        """Writes the signed bundle of the final model, or of the best round's: ONNX, its passport, a model card.

        What is quantised is calibrated, scored and examined by the run's clients. `settings` says more than `quantize`,
        which goes before what they say; `questions` is what the examination asks (`fedkit.deploy.acceptance`), `key`
        where the signing key is, `track` who is told of the bundle (`fedkit.tracking`), `say` what is under way.

        Raises `ConfigError`, `ModelSealed`, `ExportError` where ONNX Runtime does not give what PyTorch gives.
        """
        from fedkit import handover

        tell = Teller(track)
        chosen = settings if quantize is None else settings.replace(quantize=quantize)
        model = subject(self, best=best)
        handed = handover.hand_over(model, folder, chosen, questions=questions, key=key, say=say)
        tell(lambda: _shipment(self, handed))
        return handed


def _shipment(result: Result, handed: Handed) -> Shipped:
    """What a tracker is told of a result's bundle."""
    what: Any = {"task": result.task, "strategy": result.strategy, "seed": result.seed, "engine": result.engine}
    what |= {"privacy": result.privacy, "evaluate": result.evaluate, "clients": len(result.clients)}
    whole = story(About(run=result.name or result.task.name, **what), result.outcome, result.clients)
    return shipped(handed.folder, handed.passport, handed.signer, whole)


def subject(result: Result, *, best: bool = False) -> Subject:
    """A run's result as the hand-over takes it."""
    from fedkit.deploy.passport import RunFacts
    from fedkit.handover import Subject

    weights = result.best.weights if best else result.weights
    weights.manifest.require_readable()
    rounds = [record.round for record in result.history if record.stands]
    run = RunFacts(
        name=result.name or result.task.name,
        seed=result.seed,
        engine=result.engine,
        rounds=len(result.history),
        round=result.best.round if best else max(rounds, default=0),
        best=best,
        held_out=holds_out_valid(result.strategy, result.evaluate),
        strategy=type(result.strategy).__name__,
        settings=result.strategy.to_dict(),
    )
    return Subject(
        task=result.task,
        weights=weights,
        module=result.module(weights),
        run=run,
        clients=result.clients,
        history=result.history,
        test=result.best.test if best else result.test,
        test_per_client={} if best else result.test_per_client,
        privacy=result.privacy,
        criterion=None if result.evaluate is None else result.evaluate.best,
        ask=None if result.privacy.sealed else result.ask,  # the coordinator must not see a sealed model
    )


def load(folder: Path, task: Task, ask: Asked | None = None) -> Result:
    """What `Result.save` wrote; `ask` asks its clients again. The strategy has its settings, and no state.

    Raises `ConfigError` where the folder holds no run, or one of another task, `PayloadError` for a damaged model.
    """
    found = saved.read(folder)
    if found.task != task.name:
        raise ConfigError(f"{folder} holds a run of {found.task}, not of {task.name}")
    if not (folder / "model.fedkit").is_file():
        raise ConfigError(f"{folder / 'model.fedkit'} is not there: it was written with run.json, and belongs to it")
    best = None
    if found.best is not None:
        best = Best(found.best.round, codec.load(folder / "best.fedkit"), found.best.metrics, found.best.test)
    rounds = list(found.history), list(found.abandoned)
    tests = found.test, found.test_per_client
    outcome = Outcome(codec.load(folder / "model.fedkit"), *rounds, *tests, best, found.refusals)
    settings = dict(found.strategy)
    strategy = parse(find_strategy(settings.pop("name")), settings, where="strategy")
    about: Any = {"name": found.name, "privacy": found.privacy, "evaluate": found.evaluate}
    return Result(task, strategy, found.seed, found.clients, outcome, **about, engine=found.engine, ask=ask)
