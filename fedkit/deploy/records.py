"""What a registry writes down: versions and their stages in SQLite, each change in the audit log beside it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from fedkit.audit import AuditLog
from fedkit.codec import flush_folder
from fedkit.config import NAME
from fedkit.errors import ConfigError, StorageError

__all__ = ["STAGES", "Change", "Move", "Records", "Stage", "Version"]

Stage: TypeAlias = Literal["candidate", "canary", "production", "archived"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_DATABASE = "registry.db"
_LOG = "audit.log"
_FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BUSY_S = 10.0  # for which a backup tool may hold the file
_VERSION = "name, number, stage, bundle, signer, added_at"
_SCHEMA = """
BEGIN;
CREATE TABLE versions (
    name TEXT NOT NULL,
    number INTEGER NOT NULL CHECK (number >= 1),
    stage TEXT NOT NULL CHECK (stage IN ('candidate', 'canary', 'production', 'archived')),
    bundle TEXT NOT NULL,  -- sha256 of its passport.json
    signer TEXT NOT NULL,
    added_at REAL NOT NULL,  -- seconds since 1970, UTC
    replaced_in INTEGER,  -- the change by which another version took its place in production
    PRIMARY KEY (name, number),
    UNIQUE (name, bundle)
) STRICT;
CREATE UNIQUE INDEX one_canary ON versions (name) WHERE stage = 'canary';
CREATE UNIQUE INDEX one_production ON versions (name) WHERE stage = 'production';
CREATE TABLE changes (
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    event TEXT NOT NULL,  -- JSON, as the audit log gets it
    is_logged INTEGER NOT NULL DEFAULT 0,
    FOREIGN KEY (name, version) REFERENCES versions (name, number)
) STRICT;
PRAGMA user_version = 1;
COMMIT;
"""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a model. `bundle` is the sha256 of its passport, `signer` the key that signed it (hex)."""

    name: str
    number: int
    stage: Stage
    bundle: str
    signer: str
    added_at: float

    def __str__(self) -> str:
        return f"{self.name}:{self.number}"


@dataclass(frozen=True, slots=True)
class Move:
    """A version's way into another stage; `facts` go into its line in the log.

    `is_replaced`: another one takes its place in production, and rollback may come back to it; it may not where that is
    False, and None leaves it as it is.
    """

    version: Version
    to: Stage
    event: str
    is_replaced: bool | None = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """One change as it was written down; `event` is its line in the audit log, less what the log adds."""

    number: int
    version: int
    event: Mapping[str, Any]


class Records:
    """The records in a registry's folder, for one thread. Read at any time; write with `locked` around it.

    A change and its line for the audit log are committed together. The line then goes to the log; where a crash or a
    full disk comes between, it goes there before the next change, or when the registry is next opened. It is there
    once: a line that a crash kept from being ticked off is found at the end of the log.

    Raises `ConfigError` where there is no registry, or a newer one, `StorageError` where the disk does not do its part
    or the database is damaged.
    """

    def __init__(self, folder: Path, *, create: bool) -> None:
        self.folder = folder
        path = folder / _DATABASE
        if not create and not path.is_file():
            text = f"fedkit models add BUNDLE --name NAME --registry {folder} makes one"
            raise ConfigError(f"{folder} holds no registry: {text}")
        with self._told():
            folder.mkdir(parents=True, exist_ok=True)
            flush_folder(folder.parent)
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            with contextlib.ExitStack() as undo:
                undo.callback(self._connection.close)
                self._prepare()
                undo.pop_all()

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        if self._format() == 0:
            with self._lock(wait=True):
                if self._format() == 0:
                    self._connection.executescript(_SCHEMA)
        if self._format() != _FORMAT:
            raise ConfigError(f"{self.folder} was written by another fedkit: use a newer one")
        faults = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if faults != ("ok",):
            raise sqlite3.DatabaseError(faults[0])
        with self._lock(wait=False) as is_ours:  # whoever else has it writes the log
            if is_ours:
                self._write_log()

    def _format(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    # -- reading -------------------------------------------------------------------------------------------------------

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, or those of one name, by name and number."""
        query = f"SELECT {_VERSION} FROM versions WHERE ? IN (name, '') ORDER BY name, number"  # noqa: S608
        return [self._version(row) for row in self._rows(query, name or "")]

    def replaced(self, name: str) -> Version | None:
        """The version that was in production before the present one, and was not withdrawn."""
        query = f"SELECT {_VERSION} FROM versions WHERE name = ? AND replaced_in > 0 ORDER BY replaced_in DESC LIMIT 1"  # noqa: S608
        return next((self._version(row) for row in self._rows(query, name)), None)

    def is_replaced(self, version: Version) -> bool:
        """Whether rollback may come back to that version."""
        query = "SELECT 1 FROM versions WHERE name = ? AND number = ? AND replaced_in > 0"
        return bool(self._rows(query, version.name, version.number))

    def changes(self, name: str) -> list[Change]:
        """What became of the versions of that name, oldest first."""
        query = "SELECT number, version, event FROM changes WHERE name = ? ORDER BY number"
        try:
            return [Change(number, version, json.loads(event)) for number, version, event in self._rows(query, name)]
        except (ValueError, TypeError) as error:
            raise self._damaged("a change cannot be read") from error

    def _version(self, row: tuple[Any, ...]) -> Version:
        """A row as it was written, or `StorageError`: SQLite does not notice a bit that has turned."""
        kinds = all(type(value) is kind for value, kind in zip(row, (str, int, str, str, str, float), strict=True))
        if not kinds or not NAME.fullmatch(row[0]) or row[2] not in STAGES or not _DIGEST.fullmatch(row[3]):
            raise self._damaged("a version cannot be read")
        return Version(*row)

    def _damaged(self, what: object) -> StorageError:
        advice = "put it back from a backup; the bundles and the audit log beside it are as they were"
        return StorageError(f"{self.folder / _DATABASE} is damaged ({what}): {advice}")

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._told():
            return self._connection.execute(query, values).fetchall()

    # -- writing -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time writes; the others wait for it here."""
        with contextlib.ExitStack() as held:
            with self._told():
                held.enter_context(self._lock(wait=True))
                self._write_log()
            yield

    @contextlib.contextmanager
    def _lock(self, *, wait: bool) -> Iterator[bool]:
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            is_ours = True
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                is_ours = False
            yield is_ours
        finally:
            os.close(handle)

    def add(self, version: Version, facts: Mapping[str, Any]) -> None:
        """A new version; `facts` go into its line."""
        with self._commit():
            values = (version.name, version.number, version.stage, version.bundle, version.signer, version.added_at)
            self._connection.execute(f"INSERT INTO versions ({_VERSION}) VALUES (?, ?, ?, ?, ?, ?)", values)  # noqa: S608
            self._note(version, "model added", None, version.stage, facts)

    def move(self, moves: Sequence[Move], note: str) -> None:
        """All of the moves, in this order, or none, and why."""
        with self._commit():
            for one in moves:
                number = self._note(one.version, one.event, one.version.stage, one.to, {"note": note, **one.facts})
                key = (one.version.name, one.version.number)
                where = "WHERE name = ? AND number = ?"
                self._connection.execute(f"UPDATE versions SET stage = ? {where}", (one.to, *key))  # noqa: S608
                if one.is_replaced is not None:
                    place = number if one.is_replaced else None
                    self._connection.execute(f"UPDATE versions SET replaced_in = ? {where}", (place, *key))  # noqa: S608

    @contextlib.contextmanager
    def _commit(self) -> Iterator[None]:
        with self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection:  # commits, or rolls back
                yield
            try:
                self._write_log()
            except (StorageError, OSError) as error:
                text = "the change stands, and its line is written as soon as that is mended"
                raise StorageError(f"{error}; {text}") from error

    def _note(self, of: Version, event: str, before: Stage | None, after: Stage, facts: Mapping[str, Any]) -> int:
        number = int(self._connection.execute("SELECT coalesce(max(number), 0) + 1 FROM changes").fetchone()[0])
        line = {"event": event, "change": number, "model": of.name, "version": of.number, "bundle": of.bundle}
        line |= {"from": before, "to": after, "who": _who(), "changed_at": round(time.time(), 3), **facts}
        self._connection.execute(
            "INSERT INTO changes (number, name, version, event) VALUES (?, ?, ?, ?)",
            (number, of.name, of.number, json.dumps(line)),
        )
        return number

    def _write_log(self) -> None:
        """Brings the log up to date with what is committed."""
        pending = self._connection.execute(
            "SELECT number, event FROM changes WHERE NOT is_logged ORDER BY number"
        ).fetchall()
        if not pending:
            return
        with contextlib.closing(AuditLog(self.folder / _LOG)) as log:
            numbers = [number for number, _ in pending]
            known = log.last.get("change")  # written, and not ticked off before a crash
            for _, event in pending[numbers.index(known) + 1 if known in numbers else 0 :]:
                log.write(json.loads(event))
            log.flush()
        self._connection.execute("UPDATE changes SET is_logged = 1 WHERE number <= ?", (numbers[-1],))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        path = self.folder / _DATABASE
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StorageError(f"{path}: {error}; free space or mend the disk, then try again") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        except OSError as error:
            text = "it must be possible to write there"
            raise StorageError(f"{self.folder}: {error.strerror or error}; {text}") from error


def _who() -> str:
    """The account that this process runs under, as the system knows it and not as the environment says."""
    number = os.getuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"uid {number}"
