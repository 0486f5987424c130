"""`fedkit export`: from a finished run to a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedkit import saved
from fedkit.cli import show
from fedkit.cli.edge import HERE
from fedkit.config import NAME
from fedkit.deploy.bundle import MODELS
from fedkit.deploy.settings import Export
from fedkit.errors import ConfigError
from fedkit.exam import Questions
from fedkit.handover import Asked, Handed
from fedkit.registry import choose_task
from fedkit.remote import asking as asking_coordinator
from fedkit.remote import connect
from fedkit.result import Result, load
from fedkit.simulation.run import asking
from fedkit.trust.identity import Identity

__all__ = ["Wish", "bundled", "exported", "facts", "kept", "report"]

Peer: TypeAlias = tuple[str | None, Path | None]  # the coordinator's address, and the folder of one's own identity


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a person asks of an export: which model, how, examined in what, signed by which folder's key, told whom."""

    settings: Export = Export()
    best: bool = False
    acceptance: Path | None = None
    key: Path | None = None
    track: str | None = None


def exported(run: str, out: Path, task: str | None, peer: Peer, wish: Wish, as_json: bool) -> Handed:
    """Hands over a saved run (a folder), or one that a coordinator knows by that name; raises `ConfigError`."""
    result = _saved(Path(run), task, peer) if Path(run).is_dir() else _fetched(run, task, peer)
    return bundled(result, out, wish, as_json)


def bundled(result: Result, out: Path, wish: Wish, as_json: bool) -> Handed:
    """Writes the bundle of a result, and shows what is under way."""
    questions = Questions()
    if wish.acceptance is not None:
        from fedkit.deploy.acceptance import read

        questions = read(wish.acceptance).questions()
    how: Any = {"settings": wish.settings, "best": wish.best, "key": wish.key, "track": wish.track}
    with show.stages(as_json) as say:
        return result.export(out, **how, questions=questions, say=say)


def _saved(folder: Path, task: str | None, peer: Peer) -> Result:
    found = saved.read(folder)
    chosen = choose_task(task, found.task)
    ask: Asked | None = None
    if found.engine == "simulation":
        ask = asking(chosen, found.clients, found.seed)
    elif peer[0] is not None:
        ask = asking_coordinator(peer[0], peer[1] and Identity.load(peer[1]), chosen, found.seed)
    return load(folder, chosen, ask)


def _fetched(run: str, task: str | None, peer: Peer) -> Result:
    if not NAME.fullmatch(run):
        raise ConfigError(f"{run} is no folder, and no coordinator knows a run by such a name")
    with connect(peer[0] or HERE, peer[1]) as coordinator:
        known = choose_task(task, coordinator.status(run).runs[0].task)
        return coordinator.result(run, known)


def kept(result: Result, out: Path, settings: Export | None, track: str | None, as_json: bool) -> Handed | None:
    """Saves a result, and hands it over as the run file's `[export]` says, to `out`/bundle."""
    result.save(out)
    if settings is None:
        return None
    return bundled(result, out / "bundle", Wish(settings=settings, track=track), as_json)


def facts(result: Result, handed: Handed | None) -> dict[str, Any]:
    """A result for a program that reads along, with where its bundle is."""
    return result.to_dict() | ({} if handed is None else {"bundle": str(handed.folder)})


def report(handed: Handed, as_json: bool, served: Path | None = None) -> None:
    """The gate's table, and what to do next."""
    passport = handed.passport
    if as_json:
        facts = {"folder": str(handed.folder), "signer": handed.signer, "layout": served and str(served)}
        show.print_json(facts | {"passport": passport.to_dict()})
        return
    show.gate(passport)
    show.say(f"\nShipped    {handed.folder / MODELS[passport.shipped]} ({passport.shipped})")
    show.say(f"Card       {handed.folder / 'card.md'}")
    if served is not None:
        show.say(f"To serve   {served}")
    show.say(f"Signed by  {handed.signer}")
    show.say(
        f"\nNext: fedkit verify {handed.folder}, then fedkit models add {handed.folder} --name {passport.task.name}"
    )
