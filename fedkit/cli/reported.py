"""`fedkit report`: from a run to a page."""

from __future__ import annotations

from pathlib import Path

from fedkit.cli import show
from fedkit.cli.edge import HERE
from fedkit.cli.exported import Peer
from fedkit.config import NAME
from fedkit.errors import ConfigError
from fedkit.remote import connect
from fedkit.report.facts import Facts, handed, read
from fedkit.report.page import write

__all__ = ["reported"]


def reported(run: str, out: Path, bundle: Path | None, peer: Peer, as_json: bool) -> None:
    """Writes the page of a saved run (a folder), or of one that a coordinator knows; raises `ConfigError`."""
    folder = Path(run)
    facts = read(folder) if folder.is_dir() else _fetched(run, peer)
    if bundle is None and (folder / "bundle").is_dir():
        bundle = folder / "bundle"
    found = None if bundle is None else handed(bundle, facts)
    write(out, facts, found)
    if as_json:
        about = {"path": str(out), "run": facts.name, "state": facts.state, "rounds": len(facts.history)}
        show.print_json(about | {"bytes": out.stat().st_size, "bundle": bundle and str(bundle)})
        return
    show.say(f"{out}: {facts.name}, {facts.state}, {len(facts.history)} rounds, {out.stat().st_size:,} bytes")


def _fetched(run: str, peer: Peer) -> Facts:
    if not NAME.fullmatch(run):
        raise ConfigError(f"{run} is no folder, and no coordinator knows a run by such a name")
    with connect(peer[0] or HERE, peer[1]) as coordinator:
        return coordinator.facts(run)
