"""`fedkit roster`: the members' own list of each other's keys."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from fedkit.cli import show
from fedkit.errors import ConfigError
from fedkit.trust.identity import Identity
from fedkit.trust.roster import Chain, Version, fingerprint_of
from fedkit.trust.signing import load_signing_key, make_signing_key, public_of

__all__ = ["begin", "propose", "show_key", "show_roster", "sign"]


def show_key(folder: Path) -> None:
    """Prints a site's name and public signing key, as `init` and `propose` take them; makes the key if need be."""
    name, key = Identity.load(folder).holder.name, public_of(make_signing_key(folder))
    show.print_line(f"{name}={key}")
    show.errors.print(f"fingerprint {fingerprint_of(key)}: read it to the other members over the telephone")


def begin(path: Path, federation: str, members: list[str], threshold: int | None) -> None:
    """Writes a first version, which everybody it names has yet to sign."""
    if path.exists():
        raise ConfigError(f"{path} is there already: fedkit roster propose changes a roster")
    Chain.begin(federation, _members(members), threshold).save(path)
    show_roster(path)


def propose(path: Path, add: list[str], remove: list[str], threshold: int | None) -> None:
    """Appends a version, which enough members have yet to sign."""
    Chain.load(path).propose(add=_members(add), remove=set(remove), threshold=threshold).save(path)
    show_roster(path)


def sign(path: Path, folder: Path) -> None:
    """Signs the newest version with a site's key."""
    name = Identity.load(folder).holder.name
    Chain.load(path).sign(name, load_signing_key(folder)).save(path)
    show_roster(path)


def show_roster(path: Path, as_json: bool = False) -> None:
    """Shows the newest version: who is on it, what it changes, and who has yet to sign."""
    chain = Chain.load(path)
    last, before = chain.last, chain.versions[-2] if len(chain.versions) > 1 else None
    missing = last.missing(before)
    if as_json:
        facts = {"federation": last.federation, "version": last.version, "digest": last.digest, "missing": missing}
        show.print_json(facts | {"threshold": last.threshold, "members": dict(last.members)})
        return
    show.console.print(_table(last, before))
    show.say(f"\nDigest {last.digest[:32]}. The next version takes {last.threshold} of {len(last.members)} signatures.")
    if missing:
        show.say(f"This version still needs signatures: {missing}.")
        show.say(f"\nNext: compare the fingerprints, then fedkit roster sign {path} --identity FOLDER, at each of them")
    else:
        chain.check()
        show.say(f"It is complete. Next: give {path} to every member")


def _table(last: Version, before: Version | None) -> Table:
    table = Table(
        "member", "fingerprint", "change", "signed", title=f"{last.federation}, version {last.version}", box=None
    )
    old, signers = {} if before is None else dict(before.members), last.signers(before)
    for name in sorted({*last.members, *old}):
        key = last.members.get(name)
        change = "" if key == old.get(name) else "leaves" if key is None else "new key" if name in old else "joins"
        signed = "yes" if name in signers else ""
        table.add_row(name, fingerprint_of(key or old[name]), change, signed)
    return table


def _members(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, sign, key = text.partition("=")
        if not sign or name in found:
            raise ConfigError(f"a member is NAME=KEY, once, as fedkit roster key prints it; got {text!r:.100}")
        found[name] = key.strip().lower()
    return found
