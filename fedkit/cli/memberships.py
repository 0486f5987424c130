"""`fedkit ca`, `roster` and `audit-log`: who is let in, whom the members know, and what was done."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Annotated

import typer

from fedkit import audit
from fedkit.cli.edge import Json, edge

__all__ = ["audit_log", "ca", "roster"]

ca = typer.Typer(name="ca", help="The federation's certificate authority: who is let in.", no_args_is_help=True)
CaFolder = Annotated[Path, typer.Option("--authority", metavar="FOLDER", help="What fedkit ca init wrote.")]
CA = Path("fedkit-authority")


class Kind(enum.StrEnum):
    """What a member may do."""

    AGENT = "agent"
    OPERATOR = "operator"


@ca.command("init")
def ca_init(
    name: Annotated[str, typer.Argument(metavar="FEDERATION", help="Its name, for people.")], authority: CaFolder = CA
) -> None:
    """Make an authority in a new folder. Guard that folder: whoever has its key can let anybody in."""
    from fedkit.cli import trusted

    with edge():
        trusted.found(authority, name)


@ca.command("token")
def ca_token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site's or operator's name.")],
    role: Annotated[Kind, typer.Option(help="agent: takes part. operator: begins runs and fetches models.")] = (
        Kind.AGENT
    ),
    hours: Annotated[float, typer.Option(min=0.01, max=24 * 30, help="For how long it lets in.")] = 24.0,
    authority: CaFolder = CA,
) -> None:
    """Print a token that lets one site or operator enrol once. Hand it over on a way you trust."""
    from fedkit.cli import trusted

    with edge():
        trusted.invite(authority, name, role.value, hours)


@ca.command("list")
def ca_list(authority: CaFolder = CA, as_json: Json = False) -> None:
    """Show who has a certificate."""
    from fedkit.cli import trusted

    with edge():
        trusted.members(authority, as_json)


@ca.command("revoke")
def ca_revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose certificates end.")],
    role: Annotated[Kind | None, typer.Option(help="Only in this role.")] = None,
    authority: CaFolder = CA,
) -> None:
    """End all certificates and tokens of a name. A running coordinator closes its connections within a second."""
    from fedkit.cli import trusted

    with edge():
        trusted.revoke(authority, name, None if role is None else role.value)


roster = typer.Typer(
    name="roster",
    help="The members' own list of each other's signing keys, which no operator can add to.",
    no_args_is_help=True,
)
RosterFile = Annotated[Path, typer.Argument(metavar="ROSTER.json", help="The roster.")]
Mine = Annotated[
    Path, typer.Option("--identity", envvar="FEDKIT_IDENTITY", metavar="FOLDER", help="The site's folder.")
]
Threshold = Annotated[int | None, typer.Option(min=1, help="How many members must sign the next version.")]


@roster.command("key")
def roster_key(identity: Mine) -> None:
    """Print a site's name and public signing key, for the roster; the key is made where there is none."""
    from fedkit.cli import rosters

    with edge():
        rosters.show_key(identity)


@roster.command("init")
def roster_init(
    path: RosterFile,
    federation: Annotated[str, typer.Argument(metavar="FEDERATION", help="Its name.")],
    member: Annotated[list[str], typer.Option(metavar="NAME=KEY", help="A member; to be repeated.")],
    threshold: Threshold = None,
) -> None:
    """Write a first version; everybody it names must sign it."""
    from fedkit.cli import rosters

    with edge():
        rosters.begin(path, federation, member, threshold)


@roster.command("propose")
def roster_propose(
    path: RosterFile,
    add: Annotated[list[str] | None, typer.Option(metavar="NAME=KEY", help="Who joins; may be repeated.")] = None,
    remove: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Who leaves; may be repeated.")] = None,
    threshold: Threshold = None,
) -> None:
    """Append a version; enough of the members, and everybody who joins, must sign it."""
    from fedkit.cli import rosters

    with edge():
        rosters.propose(path, add or [], remove or [], threshold)


@roster.command("sign")
def roster_sign(path: RosterFile, identity: Mine) -> None:
    """Sign the newest version with the site's key. Compare the fingerprints before."""
    from fedkit.cli import rosters

    with edge():
        rosters.sign(path, identity)


@roster.command("show")
def roster_show(path: RosterFile, as_json: Json = False) -> None:
    """Show the newest version: who is on it, what it changes, who has yet to sign."""
    from fedkit.cli import rosters

    with edge():
        rosters.show_roster(path, as_json)


audit_log = typer.Typer(name="audit-log", no_args_is_help=True)


@audit_log.callback()
def _audit_log() -> None:
    """The record of what a coordinator or agent has done."""


@audit_log.command("verify")
def audit_log_verify(
    path: Annotated[Path, typer.Argument(metavar="AUDIT.log", help="audit.log of a coordinator's or agent's folder.")],
    head: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A copy of the head that was kept elsewhere.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify an audit log: it names the first line that was altered, removed or moved."""
    from fedkit.cli import show

    with edge():
        found = audit.verify(path, head)
        if as_json:
            show.print_json(dataclasses.asdict(found))
        else:
            text = f"{path}: {found.lines} lines, {found.since} to {found.until}, as they were written"
            show.console.print(f"{text}\ndigest {found.digest}", highlight=False, markup=False)
