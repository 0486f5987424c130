"""`fedkit run | status | cancel | weights | open`: what an operator asks of a coordinator."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fedkit import codec
from fedkit.cli import show
from fedkit.cli.exported import facts, kept, report
from fedkit.crypto.box import Owner
from fedkit.crypto.sealing import header_of
from fedkit.errors import ConfigError
from fedkit.handover import Handed
from fedkit.progress import describe
from fedkit.registry import choose_task
from fedkit.remote import Coordinator, connect
from fedkit.result import Result
from fedkit.runfile import RunFile, read
from fedkit.status import RunStatus
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.tracking import About, Tracker, Tracking, tracker_for

__all__ = ["begin", "cancel", "status", "unseal", "weights"]

Peer: TypeAlias = tuple[str, Path | None]  # the coordinator's address, and the folder of one's own identity

_LISTED = 20  # runs in a table
_PATIENCE_S = 1.0  # of a question; a run is waited for longer


def begin(
    path: Path,
    peer: Peer,
    task: str | None,
    *,
    out: Path | None,
    detach: bool,
    roster: Path | None,
    track: str | None,
    as_json: bool,
) -> None:
    """Submits a run file, shows its rounds as they happen, and keeps the result."""
    file, owner = read(path), _owner(peer[1], roster)
    if detach and (out is not None or track is not None):
        raise ConfigError("--detach returns before there is a result: leave --out and --track to fedkit export")
    tracker = tracker_for(track)
    known = None if detach and task is None else choose_task(task, file.run.task)
    if file.run.task is None and known is not None:
        file = file.replace(run=file.run.replace(task=known.name))
    with connect(*peer) as coordinator:
        name = coordinator.submit_file(file, owner=owner)
        if known is None or detach:
            _report_begun(name, as_json)
            return
        try:
            result = _followed(coordinator, file, known, owner, tracker, as_json)
        except KeyboardInterrupt:
            text = f"detached; {name} goes on at the coordinator: look again with fedkit status {name}"
            raise KeyboardInterrupt(text) from None
    handed = None if out is None else kept(result, out, file.export, track, as_json)
    _report(result, name, out, handed, as_json)


def _owner(identity: Path | None, roster: Path | None) -> Owner | None:
    """Whoever has this identity on this roster, for a sealed run; None without a roster."""
    if roster is None:
        return None
    if identity is None:
        raise ConfigError("--roster is for the owner of a sealed run: give --identity, the folder with the owner's key")
    return Owner.load(identity, roster)


def _followed(
    coordinator: Coordinator, file: RunFile, task: Task, owner: Owner | None, tracker: Tracker | None, as_json: bool
) -> Result:
    name, strategy = file.run.name, file.build_strategy()
    what: Any = {"task": task, "strategy": strategy, "seed": file.run.seed, "engine": "federation"}
    about = About(run=name, privacy=file.privacy, evaluate=file.evaluate, **what)
    with Tracking(tracker, about) as tracking:
        if as_json:
            for record in coordinator.watch(name):
                tracking(record)
        else:
            _show_rounds(coordinator, file, strategy, tracking)
        result = coordinator.result(name, task, strategy, owner)
        tracking.end(result.outcome, result.clients, result.privacy)
    return result


def _show_rounds(coordinator: Coordinator, file: RunFile, strategy: Strategy, tracking: Tracking) -> None:
    title = f"{file.run.name}: {file.strategy['name']}, seed {file.run.seed}"
    with show.rounds(title, strategy.rounds) as observe:
        for record in coordinator.watch(file.run.name, say=observe.say):
            observe(record)
            tracking(record)


def _report_begun(name: str, as_json: bool) -> None:
    if as_json:
        show.print_json({"run": name})
    else:
        show.console.print(f"{name} has begun.\n\nNext: fedkit status {name}", highlight=False)


def _report(result: Result, name: str, out: Path | None, handed: Handed | None, as_json: bool) -> None:
    if as_json:
        show.print_json(facts(result, handed))
        return
    if result.test:
        show.console.print()
        show.console.print(show.test_scores(result))
    keep = f"fedkit weights {name} --out FILE keeps the model"
    if result.outcome.weights.manifest.is_sealed:
        _say_sealed(f"{out}/model.fedkit" if out else f"FILE (after {keep})")
        return
    if handed is not None:
        report(handed, as_json=False)
        return
    where = f"fedkit export {out} --out BUNDLE" if out else keep
    show.console.print(f"\nNext: {where}", highlight=False)


def status(run: str | None, peer: Peer, as_json: bool) -> None:
    """Shows clients and runs, or one run and who works for it."""
    with connect(*peer, patience_s=_PATIENCE_S) as coordinator:
        found = coordinator.status(run or "")
    if as_json:
        show.print_json({"coordinator": peer[0], **dataclasses.asdict(found)})
        return
    clients = [client for client in found.clients if run is None or run in {job.run for job in client.jobs}]
    if clients:
        show.console.print(show.clients(clients), "")
    elif run is None:
        show.say("No client has attended yet. Next: start one at each site with fedkit client\n")
    if not found.runs:
        show.say("There are no runs yet. Next: fedkit run RUN.toml")
        return
    _show_runs(found.runs)
    if run is not None:
        _show_last(found.runs[0])


def _show_runs(found: Sequence[RunStatus]) -> None:
    show.console.print(show.runs(found[:_LISTED], time.time()))
    if len(found) > _LISTED:
        show.say(f"and {len(found) - _LISTED} older ones: fedkit status --json shows them")
    for one in found[:_LISTED]:
        if one.detail:
            show.say(f"\n{one.name} {one.state}: {one.detail}")


def _show_last(run: RunStatus) -> None:
    show.say(f"\nTask {run.task}, {run.strategy}, {run.rounds} rounds, seed {run.seed}")
    if run.last is not None:
        show.say(f"Round {run.last.round}: {describe(run.last)}")
    if run.models:
        show.say(f"\nNext: fedkit weights {run.name} --out FILE ({', '.join(run.models)})")


def cancel(run: str, peer: Peer, as_json: bool) -> None:
    """Ends a run."""
    with connect(*peer, patience_s=_PATIENCE_S) as coordinator:
        found = coordinator.cancel(run)
    if as_json:
        show.print_json(dataclasses.asdict(found))
    elif found.state == "cancelled":
        show.say(f"{run} is cancelled; the model of round {found.round} stands")
    else:
        show.say(f"{run} was over already: {found.state} after round {found.round}")


def weights(run: str | None, peer: Peer, out: Path | None, which: str, as_json: bool) -> None:
    """Lists models, or writes one to a file."""
    if out is not None and run is None:
        raise ConfigError("--out FILE takes the model of one run: fedkit weights RUN --out FILE")
    with connect(*peer, patience_s=_PATIENCE_S) as coordinator:
        if run is not None and out is not None:
            _write(coordinator, run, out, which, as_json)
        else:
            _list(coordinator.status(run or "").runs, as_json)


def _list(runs: Sequence[RunStatus], as_json: bool) -> None:
    found = [(run, model) for run in runs for model in run.models]
    if as_json:
        show.print_json([_facts(run, model) for run, model in found])
    elif found:
        show.console.print(show.weights(found))
        show.say(f"\nNext: fedkit weights {found[0][0].name} --which {found[0][1]} --out FILE")
    else:
        show.say("There are no models yet: one is there when a run has committed its first round. Next: fedkit status")


def _facts(run: RunStatus, which: str) -> dict[str, Any]:
    return {"run": run.name, "which": which, "task": run.task, "strategy": run.strategy, "state": run.state}


def _write(coordinator: Coordinator, run: str, out: Path, which: str, as_json: bool) -> None:
    weights = coordinator.weights(run, which)
    codec.save(out, weights)
    size = out.stat().st_size
    if as_json:
        facts = {"run": run, "which": which, "path": str(out), "bytes": size, "sealed": weights.manifest.is_sealed}
        show.print_json(facts | {"elements": weights.vector.size, "digest": weights.digest})
        return
    what = "a sealed model" if weights.manifest.is_sealed else f"{weights.vector.size:,} weights"
    show.say(f"{out}: {what} of {run} ({which}), {size:,} bytes")
    if weights.manifest.is_sealed:
        _say_sealed(str(out))
        return
    show.say(
        f'\nNext: fedkit.simulate(..., init="{out}") or task.build(seed) and fedkit.codec.load("{out}").to_module(...)'
    )


def _say_sealed(file: str) -> None:
    show.say(
        f"\nNext: fedkit open {file} --identity FOLDER --roster ROSTER.json --out model.fedkit, with its owner's key"
    )


def unseal(path: Path, identity: Path, roster: Path, out: Path, as_json: bool) -> None:
    """Opens a sealed model for its owner, or for a site that it was sealed for, and writes it to a file."""
    sealed = codec.load(path)
    header, owner = header_of(sealed), Owner.load(identity, roster)
    weights = owner.open(sealed)
    codec.save(out, weights)
    about = header.subject
    if as_json:
        facts = {
            "path": str(out),
            "run": about.run,
            "round": about.round,
            "by": about.sealer,
            "for": sorted(header.names),
        }
        show.print_json(facts | {"elements": weights.vector.size, "digest": weights.digest})
        return
    show.say(f"{out}: {weights.vector.size:,} weights of {about.run}, sealed by {about.sealer} in round {about.round}")
    show.say(f"It can be opened by {', '.join(sorted(header.names))}.")
    show.say(f'\nNext: fedkit.simulate(..., init="{out}") or fedkit.codec.load("{out}").to_module(task.build(seed))')
