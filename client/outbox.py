"""What an agent has worked out and the coordinator has not committed yet, and the state its work leaves.

SQLite and files: a result is stored whole before its first byte is sent, and forgotten only when it is settled. The
ids of settled results are kept for ever. State that outlives an assignment is on disk before its result counts as
stored; a result without state may be lost with the machine's power, and is then worked out again.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedkit.codec import CHUNK_BYTES
from fedkit.crypto.holder import require_kept
from fedkit.errors import ConfigError, StorageError
from fedkit.spool import payload_digest
from fedkit.work import MetricSums, Reply, Summary

__all__ = ["Outbox", "Stored"]

_PATIENCE_S = 1.0  # with an agent that is about to end

_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    run TEXT NOT NULL,
    facts TEXT NOT NULL,
    has_state INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS settled (id TEXT PRIMARY KEY, accepted INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS states (run TEXT PRIMARY KEY, file TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seats (call TEXT PRIMARY KEY, kept BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS vows (question BLOB PRIMARY KEY, statement BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calls (id TEXT PRIMARY KEY, call TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Stored:
    """A result: an update whose bytes lie in a file, or sums."""

    id: str
    run: str
    examples: int
    loss: float | None = None
    manifest: str = ""  # the digest of the manifest of the model that was received
    payload_bytes: int = 0
    digest: str = ""
    extras: dict[str, int] = field(default_factory=dict)
    sums: list[Any] | None = None
    kind: str = ""  # of the sums: "metrics", "integers", "reals", or "reply" (of base64)
    epsilon: float | None = None  # what the run had cost this client by then, where the work was private
    released: bool = True  # metrics: whether they may be shown apart from the sum over clients

    def answer(self) -> MetricSums | Summary | Reply:
        """The sums as the library's value."""
        if self.kind == "reply":
            return Reply(base64.b64decode("".join(self.sums or [])))
        if self.kind == "integers":
            return Summary(np.array(self.sums, dtype=np.int64), self.examples)
        vector = np.array(self.sums, dtype=np.float64)
        return (
            MetricSums(vector, self.examples, self.released)
            if self.kind == "metrics"
            else Summary(vector, self.examples)
        )


class Outbox:
    """The store of one agent in `folder`. Only one process may open it; raises `ConfigError` where another has.

    Raises `StorageError` where the folder or its database cannot be used at all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._db = _opened(folder)
        self._verified: set[str] = set()
        self._is_durable: bool | None = None  # what the database's transactions are
        self._sweep()
        self.spare = folder / "spare"  # may be there, and nobody needs it: the next result may take its place

    def path(self, key: str) -> Path:
        """Where the payload of a result lies."""
        return self.folder / key

    def state_path(self, key: str) -> Path:
        """Where the state that a result leaves lies."""
        return self.folder / f"{key}.state"

    def find(self, key: str) -> Stored | None:
        """The stored result of an assignment; None where there is none, or where its bytes were lost."""
        row = self._db.execute("SELECT facts FROM results WHERE id = ?", (key,)).fetchone()
        if row is None:
            return None
        stored = Stored(**json.loads(row[0]))
        if stored.sums is None and key not in self._verified:
            if not self._is_whole(stored):
                self._db.execute("DELETE FROM results WHERE id = ?", (key,))
                return None
            self._verified.add(key)
        return stored

    def _is_whole(self, stored: Stored) -> bool:
        total = payload_digest(stored.manifest)
        try:
            with open(self.path(stored.id), "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    total.update(chunk)
        except FileNotFoundError:
            return False
        return total.hexdigest() == stored.digest

    def is_settled(self, key: str) -> bool:
        """Whether the assignment was committed or dropped before."""
        return self._db.execute("SELECT 1 FROM settled WHERE id = ?", (key,)).fetchone() is not None

    def held(self) -> list[str]:
        """The ids of all stored results, oldest first."""
        return [key for (key,) in self._db.execute("SELECT id FROM results ORDER BY seq")]

    def state(self, run: str) -> Path | None:
        """The state after the last work done for `run`, settled or not."""
        row = self._db.execute(
            "SELECT id FROM results WHERE run = ? AND has_state ORDER BY seq DESC LIMIT 1", (run,)
        ).fetchone()
        if row is not None:
            return self.state_path(row[0])
        return self._standing(run)

    def seat(self, call: str) -> bytes | None:
        """What this site keeps of a masked sum; None where it is over, or never began."""
        row = self._db.execute("SELECT kept FROM seats WHERE call = ?", (call,)).fetchone()
        return None if row is None else bytes(row[0])

    def put(
        self,
        stored: Stored,
        *,
        has_state: bool,
        durable: bool = False,
        seat: tuple[str, bytes] | None = None,
        vow: tuple[bytes, bytes] | None = None,
    ) -> None:
        """Stores a result whose files are in place, with the state it leaves.

        A `durable` one outlives a power loss as one with state does: what cost privacy must not be worked out again.
        `seat` is what it leaves of a masked sum (its call, secrets), which is durable with it, and gone when the round
        is over. `vow` is a question and what is said to it, for ever: raises `Refused`, and stores nothing, where
        something else was said before.
        """
        durable = durable or seat is not None
        if has_state:
            _flush(self.path(stored.id), self.state_path(stored.id), self.folder)
        elif durable:
            _flush(self.path(stored.id), self.folder)
        self._make_durable(has_state or durable)
        facts = json.dumps({name: getattr(stored, name) for name in Stored.__slots__})
        with _transaction(self._db):
            self._keep_vow(vow)
            self._db.execute(
                "INSERT OR REPLACE INTO results (id, run, facts, has_state) VALUES (?, ?, ?, ?)",
                (stored.id, stored.run, facts, has_state),
            )
            if seat is not None:
                self._db.execute("INSERT OR REPLACE INTO seats VALUES (?, ?)", seat)
                self._db.execute("INSERT OR REPLACE INTO calls VALUES (?, ?)", (stored.id, seat[0]))
        self._verified.add(stored.id)

    def _make_durable(self, durable: bool) -> None:
        if durable is not self._is_durable:
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._is_durable = durable

    def _keep_vow(self, vow: tuple[bytes, bytes] | None) -> None:
        if vow is None:
            return
        before = self._db.execute("SELECT statement FROM vows WHERE question = ?", vow[:1]).fetchone()
        require_kept(vow[1], None if before is None else bytes(before[0]))
        self._db.execute("INSERT OR IGNORE INTO vows VALUES (?, ?)", vow)

    def settle(self, accepted: Iterable[str], dropped: Iterable[str]) -> None:
        """Accepted results stand and may go; dropped ones are undone. What is not here is only remembered."""
        stands = set(accepted)
        gone = stands | set(dropped)
        if not gone:
            return
        rows = self._db.execute("SELECT id, run, has_state FROM results ORDER BY seq").fetchall()
        kept = {run: key for key, run, has_state in rows if key in stands and has_state}
        stale = [path for run in kept if (path := self._standing(run)) is not None]
        self._make_durable(bool(kept))
        with _transaction(self._db):
            for run, key in kept.items():
                file = self.state_path(key).name
                self._db.execute("INSERT OR REPLACE INTO states (run, file) VALUES (?, ?)", (run, file))
            self._db.executemany("INSERT OR IGNORE INTO settled VALUES (?, ?)", [(key, key in stands) for key in gone])
            self._db.executemany("DELETE FROM results WHERE id = ?", [(key,) for key in gone])
            self._leave(gone)
        self._verified -= gone
        for key in gone.intersection(key for key, _, _ in rows):
            self._spare(self.path(key))
            stale += [] if key in kept.values() else [self.state_path(key)]
        for path in stale:
            path.unlink(missing_ok=True)

    def _leave(self, gone: set[str]) -> None:
        """Forgets all secrets of the masked sums to which these results belong."""
        if self._db.execute("SELECT 1 FROM calls LIMIT 1").fetchone() is None:
            return
        over = "call IN (SELECT call FROM calls WHERE id = ?)"
        self._db.executemany(f"DELETE FROM seats WHERE {over}", [(key,) for key in gone])  # noqa: S608
        self._db.executemany("DELETE FROM calls WHERE id = ?", [(key,) for key in gone])

    def _spare(self, path: Path) -> None:
        """Keeps one payload file to be written over: giving its memory back and taking fresh one costs more."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, self.spare)

    def _standing(self, run: str) -> Path | None:
        """The state of the run's last accepted result."""
        row = self._db.execute("SELECT file FROM states WHERE run = ?", (run,)).fetchone()
        return None if row is None else self.folder / row[0]

    def _sweep(self) -> None:
        """Removes files that no row speaks of, before any work begins."""
        held = set(self.held())
        kept = {*held, *(f"{key}.state" for key in held)}
        kept |= {file for (file,) in self._db.execute("SELECT file FROM states")}
        for path in self.folder.iterdir():
            if path.name not in kept and not path.name.startswith("outbox.db"):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the files."""
        self._db.close()


def _opened(folder: Path) -> sqlite3.Connection:
    path = folder / "outbox.db"
    with contextlib.ExitStack() as undo:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            db = undo.enter_context(contextlib.closing(sqlite3.connect(path, _PATIENCE_S, isolation_level=None)))
            db.execute("PRAGMA locking_mode=EXCLUSIVE")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA secure_delete=ON")  # of seats' secrets nothing stays in free pages
            db.executescript(_SCHEMA)
        except OSError as error:
            raise StorageError(f"{folder}: {error.strerror}; the agent must be able to write to its folder") from None
        except sqlite3.Error as error:
            if error.sqlite_errorname.startswith("SQLITE_BUSY"):
                raise ConfigError(f"{folder} is in use by another agent process: end it, or choose another") from None
            raise StorageError(f"{path}: {error}; check the disk, or move the file away to begin without it") from None
        undo.pop_all()
    return db


class _transaction:  # noqa: N801
    """BEGIN and COMMIT around a block, ROLLBACK where it raises."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def _flush(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
