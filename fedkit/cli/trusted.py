"""`fedkit ca` and `fedkit enroll`: who is let into a federation."""

from __future__ import annotations

import dataclasses
import datetime as dt
import getpass
import sys
import time
from pathlib import Path

from rich.table import Table

from fedkit.cli import show
from fedkit.enrolment import enroll
from fedkit.errors import ConfigError
from fedkit.trust.authority import Authority, Member
from fedkit.trust.certificates import Role, fingerprint

__all__ = ["found", "invite", "join", "members", "revoke"]


def found(folder: Path, name: str) -> None:
    """Makes an authority."""
    authority = Authority.create(folder, name)
    show.say(f"{folder} holds the authority of {name}, SHA-256 {fingerprint(authority.certificate).hex()[:16]}...")
    show.say("Whoever can read this folder can let anybody in: keep it on the coordinator's machine, and back it up.\n")
    show.say("Next: fedkit server --listen 0.0.0.0:8443 --enrolment 0.0.0.0:8444 --authority " + str(folder))
    show.say("      fedkit ca token SITE    a token for each site; --role operator for whoever begins runs")


def invite(folder: Path, name: str, role: str, hours: float) -> None:
    """Prints a token, and beside it what to do with it."""
    token = Authority(folder).token(Role(role), name, dt.timedelta(hours=hours))
    show.print_line(str(token))
    text = f"lets the {role} {name} enrol once, within {hours:g} hours. Next, at {name}: fedkit enroll --coordinator"
    show.errors.print(f"{text} HOST:PORT --out FOLDER", highlight=False, markup=False)


def join(address: str, folder: Path, file: Path | None) -> None:
    """Trades a token for an identity."""
    mine = enroll(address, _token(file), folder).holder
    until = dt.datetime.fromtimestamp(mine.expires, dt.UTC)
    show.say(
        f"{folder} is the identity of the {mine.role} {mine.name}, until {until:%Y-%m-%d}; it is renewed in time.\n"
    )
    what = "client --task TASK" if mine.role is Role.AGENT else "status"
    show.say(f"Next: fedkit {what} --coordinator HOST:PORT --identity {folder}")


def _token(file: Path | None) -> str:
    if file is None:
        if not sys.stdin.isatty():
            raise ConfigError("give the token with --token-file FILE, or --token-file - for standard input")
        return getpass.getpass("Token (it is not shown): ")
    if str(file) == "-":
        return sys.stdin.readline()
    try:
        return file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{file} cannot be read, or holds no token") from None


def members(folder: Path, as_json: bool) -> None:
    """Shows who has a certificate."""
    everybody = Authority(folder).members()
    if as_json:
        show.print_json([dataclasses.asdict(one) | {"state": _state(one)} for one in everybody])
        return
    if not everybody:
        show.say("Nobody has enrolled yet. Next: fedkit ca token SITE")
        return
    table = Table("name", "role", "certificate", "until", box=None)
    for one in everybody:
        until = dt.datetime.fromtimestamp(one.expires, dt.UTC)
        table.add_row(one.name, one.role, _state(one), f"{until:%Y-%m-%d %H:%M} UTC")
    show.console.print(table)


def _state(member: Member) -> str:
    if member.revoked is not None:
        return "revoked"
    return "valid" if member.expires > time.time() else "expired"


def revoke(folder: Path, name: str, role: str | None) -> None:
    """Ends a name's certificates."""
    ended = Authority(folder).revoke(name, None if role is None else Role(role))
    what = f"{len(ended.serials)} certificates and {ended.tokens} open tokens of {name}"
    show.say(f"{what} are revoked; its connections end within a second.")
    show.say(f"\nNext: fedkit ca token {name}, should it come back")
