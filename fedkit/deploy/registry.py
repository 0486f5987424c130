"""The registry of models: bundles by name and version, the stage each is in, and who put it there and why.

Embedded: a folder with a database, an audit log and the bundles, and nothing to install. A version is a candidate, the
canary, in production, or archived. Of each name there is one canary and one version in production at most; whatever
another version takes the place of is archived.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from blake3 import blake3

from fedkit.config import require_name
from fedkit.deploy import acceptance
from fedkit.deploy.acceptance import Criteria, Verdict
from fedkit.deploy.bundle import verify_bundle
from fedkit.deploy.passport import Passport
from fedkit.deploy.records import STAGES, Change, Move, Records, Stage, Version
from fedkit.deploy.shelf import Shelf, Verify
from fedkit.errors import ConfigError, FedkitError, NotAccepted

__all__ = ["STAGES", "Change", "Registry", "Stage", "Verdict", "Version"]

_SPEC = re.compile(r"(?P<name>[^:]*)(:(?P<which>[a-z]+|[1-9][0-9]{0,8}))?")
_NOTE_CHARACTERS = 1000


class Registry:
    """The registry in a folder, for one thread; several processes may use it at once, of which one writes.

    `create` makes one where there is none. Nothing is added or promoted that `verify` does not pass, and it looks at
    the bundle again each time. Raises `ConfigError` for names, versions and ways between stages that there are not,
    what `verify` raises for a bundle that is not as it was signed, and `StorageError` where the disk does not do its
    part; then nothing has changed. A change stands when its method returns, whatever becomes of the machine.
    """

    def __init__(self, folder: Path, *, create: bool = False, verify: Verify = verify_bundle) -> None:
        self.folder = folder
        self._records = Records(folder, create=create)
        self._shelf = Shelf(folder / "bundles", verify)

    def close(self) -> None:
        """Closes the database."""
        self._records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- looking -------------------------------------------------------------------------------------------------------

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, or those of one name, by name and number; raises `ConfigError` where it has none."""
        found = self._records.versions(name)
        if name is not None and not found:
            known = ", ".join(sorted({one.name for one in self._records.versions()})) or "none"
            raise ConfigError(f"{self.folder} holds no model {name!r:.100}; known are {known}")
        return found

    def find(self, spec: str) -> Version:
        """The version that is written NAME:NUMBER or NAME:STAGE; of a bare NAME the one in production, or the newest.

        Raises `ConfigError` where there is none.
        """
        match = _SPEC.fullmatch(spec)
        which = match["which"] if match else None
        if match is None or (which is not None and which.isalpha() and which not in ("canary", "production")):
            raise ConfigError(f"{spec!r:.100}: a version is written NAME:NUMBER, NAME:canary or NAME:production")
        versions = self.versions(require_name(match["name"], "a model's name"))
        wanted = which or "production"
        found = [one for one in versions if wanted in (one.stage, str(one.number))]
        if not found and which is not None:
            raise ConfigError(f"there is no {spec}: fedkit models show {match['name']} lists what there is")
        return (found or versions)[-1]

    def path(self, version: Version) -> Path:
        """The folder of that version's bundle."""
        return self._shelf.path(version.bundle)

    def passport(self, version: Version) -> Passport:
        """The passport of that version; raises `TrustError` where it is not the one that was added."""
        return self._shelf.passport(version.bundle)

    def changes(self, name: str) -> list[Change]:
        """What became of the versions of that name, oldest first."""
        return self._records.changes(name)

    def criteria(self) -> Criteria | None:
        """The criteria in `criteria.toml` in the registry's folder, which hold where no others are given."""
        path = self.folder / "criteria.toml"
        return acceptance.read(path) if path.exists() else None

    # -- changing ------------------------------------------------------------------------------------------------------

    def add(self, bundle: Path, name: str, *, signer: str | None = None, note: str = "") -> Version:
        """Keeps a copy of the bundle as the next version of `name`, a candidate.

        `signer`, if given, must have signed it (public key, hex). A version stays with the signer that it came with.
        """
        require_name(name, "a model's name")
        facts = {"note": _required(note)}
        with self._records.locked():
            self._shelf.keep_only({one.bundle for one in self._records.versions()})
            found = self._shelf.take(bundle, signer)
            before = self._records.versions(name)
            for one in before:
                if one.bundle == found.digest:
                    raise ConfigError(f"{bundle} is {one} already, which is {one.stage}")
            number = before[-1].number + 1 if before else 1
            version = Version(name, number, "candidate", found.digest, found.signer, time.time())
            self._records.add(version, facts | {"signer": found.signer})
        return version

    def promote(
        self,
        spec: str,
        to: Literal["canary", "production"],
        *,
        criteria: Criteria | None = None,
        unjudged: bool = False,
        note: str = "",
    ) -> list[Verdict]:
        """Puts a version to its next stage once it is as it was signed and keeps to `criteria`; returns the verdicts.

        `criteria`: None takes those of the registry. Without any, only a canary is promoted, unless `unjudged` says to
        go without. Raises `NotAccepted`, which holds the verdicts, for a version that misses one.
        """
        wanted = None if unjudged else criteria or self.criteria()
        if wanted is None and to == "production" and not unjudged:
            raise ConfigError(f"no criteria: give some, keep them in {self.folder / 'criteria.toml'}, or go without")
        note = _required(note)
        with self._records.locked():
            version = self._found_by_number(spec)
            self._require_way(version, to)
            passport = self._shelf.check(version.bundle, version.signer).passport
            verdicts = wanted.judge(passport) if wanted else []
            _require_accepted(version, verdicts)
            self._records.move([*self._replaced(version, to), _promotion(version, to, wanted, verdicts)], note)
        return verdicts

    def rollback(self, name: str, *, note: str = "") -> Version:
        """Puts back the version that was in production before; the present one is archived. Returns what is put back.

        What was rolled back or archived by hand is passed over: called again, it goes back further.
        """
        note = _required(note)
        with self._records.locked():
            present = [one for one in self.versions(name) if one.stage == "production"]
            before = self._records.replaced(name)
            if before is None:
                raise ConfigError(f"of {name} no other version was in production: promote one, or archive this one")
            try:
                self._shelf.check(before.bundle, before.signer)
            except FedkitError as error:
                text = f"after fedkit models archive {before}, rollback goes to the one before"
                raise type(error)(f"{before} is damaged, and stays where it is: {error}; {text}") from error
            moves = [Move(one, "archived", "model rolled back") for one in present]
            self._records.move([*moves, Move(before, "production", "model put back")], note)
        return self.find(str(before))

    def archive(self, spec: str, *, note: str = "") -> Version:
        """Takes a version out of use; rollback passes it over from now on. It can be promoted again."""
        note = _required(note)
        with self._records.locked():
            version = self._found_by_number(spec)
            if version.stage == "archived" and not self._records.is_replaced(version):
                raise ConfigError(f"{version} is archived already")
            self._records.move([Move(version, "archived", "model archived")], note)
        return self.find(str(version))

    def _replaced(self, by: Version, stage: Stage) -> list[Move]:
        """What has to leave the stage, where there is room for one; rollback comes back to what was in production."""
        back = True if stage == "production" else None
        return [
            Move(one, "archived", "model replaced", is_replaced=back, facts={"by": str(by)})
            for one in self._records.versions(by.name)
            if one.stage == stage
        ]

    def _found_by_number(self, spec: str) -> Version:
        """What `find` finds; raises `ConfigError` for a bare name, of which nobody could say which version it means."""
        if ":" not in spec:
            raise ConfigError(f"say which version: {spec}:NUMBER; fedkit models show {spec} lists them")
        return self.find(spec)

    @staticmethod
    def _require_way(version: Version, to: Stage) -> None:
        if version.stage == to:
            raise ConfigError(f"{version} is {'the canary' if to == 'canary' else 'in production'} already")
        if version.stage == "production":
            raise ConfigError(f"{version} is in production: put another one there, or fedkit models rollback")


def _required(note: str) -> str:
    if len(note) > _NOTE_CHARACTERS:
        raise ConfigError(f"a note has at most {_NOTE_CHARACTERS} characters, got {len(note)}")
    return note


def _require_accepted(version: Version, verdicts: Sequence[Verdict]) -> None:
    missed = [one for one in verdicts if not one.passed]
    if missed:
        text = f"{version} is not promoted: it does not pass {len(missed)} of {len(verdicts)} criteria"
        raise NotAccepted(f"{text} ({'; '.join(one.criterion for one in missed):.500})", tuple(verdicts))


def _promotion(version: Version, to: Stage, criteria: Criteria | None, verdicts: Sequence[Verdict]) -> Move:
    """With what the audit log says of it: the criteria's BLAKE3 digest and what was found, or that there were none."""
    facts: dict[str, Any] = {"judged": criteria is not None}
    if criteria is not None:
        digest = blake3(json.dumps(criteria.to_dict(), sort_keys=True).encode()).hexdigest()
        facts |= {"criteria": digest, "found": {f"{one.criterion} {one.asked}": one.found for one in verdicts}}
    return Move(version, to, "model promoted", is_replaced=False if to == "production" else None, facts=facts)
