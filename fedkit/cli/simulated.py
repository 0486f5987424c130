"""`fedkit simulate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedkit.cli import show
from fedkit.cli.exported import facts, kept, report
from fedkit.errors import ConfigError
from fedkit.handover import Handed
from fedkit.registry import choose_task
from fedkit.result import Result
from fedkit.rounds.journal import RoundRecord
from fedkit.runfile import RunFile, read
from fedkit.simulation import simulate

__all__ = ["Given", "simulated"]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a person gives beside the run file, or instead of what it says."""

    task: str | None = None
    clients: list[str] | None = None
    workers: int | None = None
    track: str | None = None


def simulated(path: Path, given: Given, out: Path | None, as_json: bool) -> None:
    """Runs a run file and shows its rounds and test scores."""
    run = read(path)
    if as_json:
        result = _run(run, given, None)
    else:
        total = run.build_strategy().rounds
        with show.rounds(f"{run.run.name}: {run.strategy['name']}, seed {run.run.seed}", total) as observe:
            result = _run(run, given, observe)
    handed = None if out is None else kept(result, out, run.export, given.track, as_json)
    _report(result, out, handed, as_json)


def _run(run: RunFile, given: Given, observe: Callable[[RoundRecord], None] | None) -> Result:
    names = given.clients or list(run.simulation.clients)
    if not names:
        raise ConfigError('simulation.clients: must be given, or --clients a,b,c (example: clients = ["a", "b"])')
    return simulate(
        choose_task(given.task, run.run.task),
        run.build_strategy(),
        clients=names,
        seed=run.run.seed,
        evaluate=run.evaluate,
        privacy=run.privacy,
        workers=given.workers or run.simulation.workers,
        threads=run.simulation.threads,
        device=run.simulation.device,
        progress=False,
        on_round=observe,
        track=given.track,
    )


def _report(result: Result, out: Path | None, handed: Handed | None, as_json: bool) -> None:
    if as_json:
        show.print_json(facts(result, handed))
        return
    if result.test:
        show.console.print()
        show.console.print(show.test_scores(result))
    if handed is not None:
        report(handed, as_json=False)
        return
    where = f"fedkit export {out} --out BUNDLE" if out else "add --out DIR to keep the model, then fedkit export DIR"
    show.console.print(f"\nNext: {where}", highlight=False)
