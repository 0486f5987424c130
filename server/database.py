"""The coordinator's database: one SQLite file, one process, every change durable when its method returns."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from fedkit.errors import ConfigError, NameTaken, NoSuchRun, StorageError
from fedkit.server.schema import migrate
from fedkit.status import RunState

__all__ = ["Attending", "Database", "KnownClient", "StoredRun", "write_settled"]

Attending: TypeAlias = Literal["here", "away", "left"]

_BUSY_MS = 10_000  # for which a backup tool may hold the file
_LARGEST = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class StoredRun:
    """One run as it was submitted and as it stands. `id` is what its assignment ids are made of.

    `file` is the run file as `Settings.to_dict` gives it, `init` the digest of the weights it begins with. Times are
    seconds since 1970, UTC; `ended_at` is None while the run goes on.
    """

    name: str
    id: str
    file: Mapping[str, Any]
    init: str | None
    state: RunState
    detail: str
    submitted_at: float
    ended_at: float | None
    outcome: Mapping[str, Any] | None

    @property
    def is_over(self) -> bool:
        """Whether the run has finished, failed or been cancelled."""
        return self.ended_at is not None


@dataclass(frozen=True, slots=True)
class KnownClient:
    """One client that has attended: since `last_seen` (seconds since 1970, UTC) it is here, away, or has left."""

    name: str
    state: Attending
    last_seen: float
    max_examples: int
    tasks: tuple[str, ...]


class Database:
    """The tables of one coordinator. Methods may be called from any thread; one writes at a time.

    Raises `ConfigError` where another coordinator uses the folder or a newer fedkit wrote it, and `StorageError`
    wherever the disk does not do its part; what was being written is then not there at all.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._lock = threading.RLock()
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, _lock_folder(path.parent))
            self._connection = opened.enter_context(contextlib.closing(self._connect()))
            self._prepare()
            self._opened = opened.pop_all()

    def _connect(self) -> sqlite3.Connection:
        with self._told():
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            return sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)

    def _prepare(self) -> None:
        with self._told():
            self._connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            migrate(self._connection, str(self.path))

    def close(self) -> None:
        """Closes the file and gives the folder back."""
        with self._lock:
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- transactions ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it stands when the block ends, or none where it raises.

        Without `durable` a power loss, but not a crash of this process, may undo it.
        """
        with self._lock, self._told():
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows a query finds."""
        with self._lock, self._told():
            return self._connection.execute(sql, values).fetchall()

    def row(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row a query finds, or None."""
        return next(iter(self.rows(sql, values)), None)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            advice = "free space or mend the disk, then start again; what was committed before is safe"
            raise StorageError(f"{self.path}: {error}; {advice}") from error

    # -- runs ------------------------------------------------------------------------------------------------------

    def add_run(self, name: str, file: Mapping[str, Any], init: str | None = None) -> StoredRun:
        """A new run that waits; raises `NameTaken`. Its id is new even where a run of that name was wiped before."""
        with self.write() as connection:
            if connection.execute("SELECT 1 FROM runs WHERE name = ?", (name,)).fetchone():
                raise NameTaken(f"there is a run {name!r} already; choose another name")
            connection.execute(
                "INSERT INTO runs (name, id, file, init, state, detail, submitted_at, secret)"
                " VALUES (?, ?, ?, ?, 'waiting', '', ?, ?)",
                (
                    *(name, f"{name}.{secrets.token_hex(4)}", json.dumps(file), init, self._clock()),
                    secrets.token_bytes(32),
                ),
            )
        return self.run(name)

    def run(self, name: str) -> StoredRun:
        """The run of that name; raises `NoSuchRun`."""
        row = self.row(f"SELECT {_RUN} FROM runs WHERE name = ?", (name,))  # noqa: S608
        if row is None:
            raise NoSuchRun(f"there is no run {name!r}")
        return _run(row)

    def run_secret(self, name: str) -> bytes:
        """32 bytes of that run's own, for draws and noise that nobody may foresee; raises `NoSuchRun`."""
        row = self.row("SELECT secret FROM runs WHERE name = ?", (name,))
        if row is None or row[0] is None:
            raise NoSuchRun(f"there is no run {name!r} with a secret: it was begun by an older fedkit")
        return bytes(row[0])

    def runs(self) -> list[StoredRun]:
        """All runs in the order they were submitted."""
        return [_run(row) for row in self.rows(f"SELECT {_RUN} FROM runs ORDER BY rowid")]  # noqa: S608

    def set_run_state(self, name: str, state: Literal["waiting", "running"], detail: str = "") -> StoredRun:
        """The run waits or goes on; one that is over stays as it is. Raises `NoSuchRun`."""
        with self.write() as connection:
            connection.execute(
                "UPDATE runs SET state = ?, detail = ? WHERE name = ? AND ended_at IS NULL",
                (state, _printable(detail), name),
            )
        return self.run(name)

    def finish_run(
        self,
        name: str,
        state: Literal["finished", "failed", "cancelled"],
        detail: str = "",
        outcome: Mapping[str, Any] | None = None,
    ) -> StoredRun:
        """The run is over, and what its open round had gathered is gone; one that is over already stays as it is.

        Raises `NoSuchRun`.
        """
        mine = "(SELECT position FROM rounds WHERE run = ? AND state = 'open')"
        with self.write() as connection:
            connection.execute(f"DELETE FROM answers WHERE round IN {mine}", (name,))  # noqa: S608
            connection.execute(f"DELETE FROM entries WHERE round IN {mine}", (name,))  # noqa: S608
            connection.execute(
                "UPDATE runs SET state = ?, detail = ?, outcome = ?, ended_at = ? WHERE name = ? AND ended_at IS NULL",
                (state, _printable(detail), None if outcome is None else json.dumps(outcome), self._clock(), name),
            )
        return self.run(name)

    # -- what became of results ------------------------------------------------------------------------------------

    def settle(self, accepted: Collection[str], dropped: Collection[str]) -> None:
        """These results stand, those are undone; written down before, it costs nothing."""
        with self.write() as connection:
            write_settled(connection, accepted, dropped)

    def fates(self, ids: Collection[str]) -> tuple[list[str], list[str]]:
        """Those of the ids whose results stand, and those whose results are undone; others are still open."""
        known = dict(
            self.rows(
                "SELECT id, accepted FROM settled WHERE id IN (SELECT value FROM json_each(?))",
                (json.dumps(list(ids)),),
            )
        )
        return [key for key in ids if known.get(key) == 1], [key for key in ids if known.get(key) == 0]

    # -- clients ---------------------------------------------------------------------------------------------------

    def saw(self, name: str, *, tasks: Collection[str], max_examples: int) -> None:
        """The client is here, with these tasks and at most that many rows. A power loss may undo it."""
        with self.write(durable=False) as connection:
            connection.execute(
                "INSERT OR REPLACE INTO clients (name, state, last_seen, max_examples, tasks)"
                " VALUES (?, 'here', ?, ?, ?)",
                (name, self._clock(), min(max_examples, _LARGEST), json.dumps(list(tasks))),
            )

    def mark(self, name: str, state: Attending) -> None:
        """The client's state changes now; a name that was never seen is passed over. A power loss may undo it."""
        with self.write(durable=False) as connection:
            connection.execute(
                "UPDATE clients SET state = ?, last_seen = ? WHERE name = ?", (state, self._clock(), name)
            )

    def clients(self) -> list[KnownClient]:
        """All clients that have attended, by name; after a crash, those who were here then are still on record so."""
        found = self.rows("SELECT name, state, last_seen, max_examples, tasks FROM clients ORDER BY name")
        return [KnownClient(name, state, at, most, tuple(json.loads(tasks))) for name, state, at, most, tasks in found]


def write_settled(connection: sqlite3.Connection, accepted: Collection[str], dropped: Collection[str]) -> None:
    """`Database.settle` as a part of a larger transaction."""
    connection.executemany(
        "INSERT INTO settled (id, accepted) VALUES (?, ?)"
        " ON CONFLICT (id) DO UPDATE SET accepted = excluded.accepted WHERE accepted <> excluded.accepted",
        [*((key, 1) for key in accepted), *((key, 0) for key in dropped)],
    )


_RUN = "name, id, file, init, state, detail, submitted_at, ended_at, outcome"


def _run(row: tuple[Any, ...]) -> StoredRun:
    name, key, file, init, state, detail, submitted_at, ended_at, outcome = row
    found = None if outcome is None else json.loads(outcome)
    return StoredRun(name, key, json.loads(file), init, state, detail, submitted_at, ended_at, found)


def _printable(text: str) -> str:
    """SQLite holds UTF-8, and the text of an error may hold what is none."""
    return text.encode("utf-8", "backslashreplace").decode()


def _lock_folder(folder: Path) -> int:
    """Makes the folder this process's own until the descriptor is closed or the process ends."""
    path = folder / "lock"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0) as file:
            _take(file.fileno(), folder)
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            return os.dup(file.fileno())
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}; the coordinator must be able to write to its folder") from error


def _take(held: int, folder: Path) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(held, 20).decode(errors="replace") or "unknown"
        text = f"{folder} is in use by another coordinator (process {owner}): end it, or choose another folder"
        raise ConfigError(text) from None
