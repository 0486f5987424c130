"""What `fedkit models` does and shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedkit.cli import show
from fedkit.deploy import acceptance
from fedkit.deploy.acceptance import Verdict
from fedkit.deploy.differences import differences
from fedkit.deploy.passport import Passport
from fedkit.deploy.registry import Registry, Version
from fedkit.errors import ConfigError, FedkitError, NotAccepted

__all__ = ["Judging", "added", "archived", "compared", "listed", "promoted", "rolled_back", "shown"]


class Judging(NamedTuple):
    """By which criteria a version is judged: those of a file, the registry's own, or none."""

    criteria: Path | None
    unjudged: bool


def listed(folder: Path, as_json: bool) -> None:
    """All versions."""
    with Registry(folder) as registry:
        found = registry.versions()
        if as_json:
            show.print_json([_facts(registry, one) for one in found])
        elif found:
            _table(registry, found)
            show.say(f"\nNext: fedkit models show {found[-1]}")
        else:
            show.say("There are no models yet. Next: fedkit models add BUNDLE --name NAME")


def _table(registry: Registry, versions: Sequence[Version]) -> None:
    show.console.print(show.versions([(one, _passport(registry, one)) for one in versions]))


def _passport(registry: Registry, version: Version) -> Passport | None:
    """None where it cannot be read: the others are listed all the same."""
    try:
        return registry.passport(version)
    except FedkitError:
        return None


def _facts(registry: Registry, version: Version) -> dict[str, Any]:
    return {"version": str(version), **dataclasses.asdict(version), "path": str(registry.path(version))}


def added(folder: Path, bundle: Path, name: str, signer: str | None, note: str, as_json: bool) -> None:
    """One more version."""
    with Registry(folder, create=True) as registry, show.busy("verifying", as_json):
        version = registry.add(bundle, name, signer=signer, note=note)
        facts = _facts(registry, version)
    if as_json:
        show.print_json(facts)
        return
    show.say(f"{version} is a candidate, signed by {version.signer}")
    if signer is None:
        show.say("Nobody has said who must have signed it: compare that key, or give it with --signer")
    show.say(f"\nNext: fedkit models promote {version} --to canary")


def shown(folder: Path, spec: str, as_json: bool) -> None:
    """One version with its passport, and what became of all of that name."""
    with Registry(folder) as registry:
        version = registry.find(spec)
        passport, changes = registry.passport(version), registry.changes(version.name)
        if as_json:
            facts = _facts(registry, version) | {"passport": passport.to_dict()}
            show.print_json(facts | {"changes": [dict(change.event) for change in changes]})
            return
        if ":" not in spec:
            _table(registry, registry.versions(version.name))
            show.say("")
        show.console.print(show.version(version, passport), "", show.changes(changes))
        show.say(f"\nThe bundle is {registry.path(version)}")


def promoted(
    folder: Path, spec: str, to: Literal["canary", "production"], given: Judging, note: str, as_json: bool
) -> None:
    """The next stage, or the table of what is missed."""
    if given.criteria is not None and given.unjudged:
        raise ConfigError("--criteria and --without-criteria: give one or the other")
    criteria = None if given.criteria is None else acceptance.read(given.criteria)
    with Registry(folder) as registry:
        before = [one for one in registry.versions() if one.stage == to]
        try:
            with show.busy("verifying", as_json):
                verdicts = registry.promote(spec, to, criteria=criteria, unjudged=given.unjudged, note=note)
        except NotAccepted as error:
            _report(registry.find(spec), error.verdicts, as_json)
            raise
        (version,) = [one for one in registry.versions(spec.partition(":")[0]) if one.stage == to]
    _report(version, verdicts, as_json)
    if not as_json:
        _say_promoted(version, [one for one in before if one.name == version.name], bool(verdicts))


def _report(version: Version, verdicts: Sequence[Verdict], as_json: bool) -> None:
    if as_json:
        facts = {"version": str(version), "stage": version.stage}
        show.print_json(facts | {"criteria": [dataclasses.asdict(one) for one in verdicts]})
    elif verdicts:
        show.console.print(show.verdicts(verdicts), "")


def _say_promoted(version: Version, before: Sequence[Version], judged: bool) -> None:
    where = "the canary" if version.stage == "canary" else "in production"
    text = "; ".join(f"{one} is archived" for one in before)
    show.say(f"{version} is {where}{f'; {text}' if text else ''}" + ("" if judged else ", judged by no criteria"))
    if version.stage == "canary":
        show.say(f"\nNext: fedkit models promote {version} --to production")
    elif before:
        show.say(f"\nNext: fedkit models rollback {version.name} puts {before[0]} back")


def rolled_back(folder: Path, name: str, note: str, as_json: bool) -> None:
    """The version before."""
    with Registry(folder) as registry, show.busy("verifying", as_json):
        version = registry.rollback(name, note=note)
        facts = _facts(registry, version)
    if as_json:
        show.print_json(facts)
    else:
        show.say(f"{version} is in production again\n\nNext: fedkit models show {name}")


def archived(folder: Path, spec: str, note: str, as_json: bool) -> None:
    """Out of use."""
    with Registry(folder) as registry:
        was = registry.find(spec)
        version = registry.archive(spec, note=note)
        facts = _facts(registry, version)
    if as_json:
        show.print_json(facts)
        return
    show.say(f"{version} is archived")
    if was.stage == "production":
        show.say(f"Now no version of {version.name} is in production.\n\nNext: fedkit models rollback {version.name}")


def compared(folder: Path, one: str, other: str, as_json: bool) -> None:
    """Two passports."""
    with Registry(folder) as registry:
        versions = [registry.find(spec) for spec in (one, other)]
        found = differences(*(registry.passport(version) for version in versions))
    if as_json:
        show.print_json([dataclasses.asdict(difference) | {"change": difference.change} for difference in found])
    elif found:
        show.console.print(show.differences(str(versions[0]), str(versions[1]), found))
    else:
        show.say(f"The passports of {versions[0]} and {versions[1]} say the same")
