"""The journal of one run in the coordinator's database: what it has taken is on disk when its method returns."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from fedkit import spool as spools
from fedkit.errors import StorageError
from fedkit.history import History
from fedkit.packing import parts, unpack
from fedkit.rounds.journal import BestRound, Commit, Entry, OpenRound, RoundRecord, Started
from fedkit.server.answers import Answers, Reopen
from fedkit.server.blobs import Blobs
from fedkit.server.database import Database, write_settled
from fedkit.server.models import INLINE_BYTES, Models
from fedkit.server.records import (
    assignment_from_json,
    assignment_to_json,
    entry_from_json,
    entry_to_json,
    record_from_json,
    record_to_json,
)
from fedkit.weights import Vector, Weights
from fedkit.work import Answer

__all__ = ["SqliteJournal"]

log = structlog.get_logger("fedkit.server")


class SqliteJournal:
    """Implements `fedkit.rounds.journal.Journal` for the run of that name; raises `NoSuchRun`.

    Each write is one transaction. `commit` makes the model durable before the row that names it, writes down what
    became of the round's assignments (as `Database.settle` does), and removes what nothing refers to any more. Answers
    are written together with the next fact. `spool` is the folder of the run's spool files: an update in it is kept by
    its name and read again by `reopen`, which gets the names and lengths (in elements) of the extras behind the model;
    `remove` is given each file that is not needed any more (None: it is unlinked).
    Models and strategy states of at most `inline_bytes` lie in the database. Each commit that stands goes into `lines`
    too, as soon as the disk takes it: one that fails is logged and written with a later one, or by `catch_up`. Raises
    `StorageError` where the disk does not do its part; what was to be written is then not there at all.
    """

    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        run: str,
        spool: Path | None = None,
        reopen: Reopen | None = None,
        *,
        remove: Callable[[Path], None] | None = None,
        inline_bytes: int = INLINE_BYTES,
        lines: History | None = None,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._run = database.run(run).name
        self._models = Models(database, blobs, inline_bytes)
        self._inline_bytes = inline_bytes
        self._reopen = reopen
        self._position: int | None = None  # of the open round's row
        self._open: OpenRound | None = None
        self._last: Commit | None = None
        self._best: BestRound | None = None
        self._is_read = False
        self._history = self._records("committed")
        self._attempts = self._records("abandoned")
        self._lines = lines
        self._unwritten: list[dict[str, Any]] = []
        self._read_open()
        self._answers = Answers(database, self._position, spool, remove)

    # -- what stands -----------------------------------------------------------------------------------------------

    def last(self) -> Commit | None:
        """The last commit, or None before the first."""
        self._read_standing()
        return self._last

    def best(self) -> BestRound | None:
        """The committed round whose record says best, the last of them."""
        self._read_standing()
        return self._best

    def history(self) -> list[RoundRecord]:
        """The records of all commits in order, the preparation (round 0) included."""
        return list(self._history)

    def abandoned(self) -> list[RoundRecord]:
        """The records of abandoned attempts, in order."""
        return list(self._attempts)

    def latest(self) -> RoundRecord | None:
        """The record of the last commit, without its model."""
        sql = "SELECT record FROM rounds WHERE run = ? AND state = 'committed' ORDER BY position DESC LIMIT 1"
        row = self._database.row(sql, (self._run,))
        return None if row is None else record_from_json(row[0])

    def has_best(self) -> bool:
        """Whether any commit's record says best."""
        sql = "SELECT 1 FROM rounds WHERE run = ? AND state = 'committed' AND best LIMIT 1"
        return self._database.row(sql, (self._run,)) is not None

    def _records(self, state: str) -> list[RoundRecord]:
        sql = "SELECT record FROM rounds WHERE run = ? AND state = ? ORDER BY position"
        return [record_from_json(text) for (text,) in self._database.rows(sql, (self._run, state))]

    def _read_standing(self) -> None:
        if self._is_read:
            return
        sql = "SELECT last, best, state, state_file, accepted, dropped FROM standing WHERE run = ?"
        row = self._database.row(sql, (self._run,))
        if row is not None:
            last, best, *rest = row
            record, digest = self._stored(last)
            model = self._models.get(digest)
            self._last = self._with_rest(record, model, *rest)
            self._best = BestRound(record, model) if best == last else self._read_best(best)
        self._is_read = True

    def _stored(self, position: int) -> tuple[RoundRecord, str]:
        row = self._database.row("SELECT record, model FROM rounds WHERE position = ?", (position,))
        assert row is not None  # standing refers to it
        return record_from_json(row[0]), row[1]

    def _read_best(self, position: int | None) -> BestRound | None:
        if position is None:
            return None
        record, digest = self._stored(position)
        return BestRound(record, self._models.later(digest))

    def _with_rest(
        self, record: RoundRecord, model: Weights, state: bytes | None, file: str | None, accepted: str, dropped: str
    ) -> Commit:
        values: dict[str, Any] = unpack(state or b"" if file is None else self._blobs.get_bytes(file))
        started = self._read_flights({model.digest: model})
        settled = tuple(json.loads(accepted)), tuple(json.loads(dropped))
        return Commit(record.round, model, values, record, started, *settled)

    def _read_flights(self, models: dict[str, Weights]) -> tuple[Started, ...]:
        """The work under way; flights of one model share it."""
        sql = "SELECT assignment, model FROM flights WHERE run = ? ORDER BY position"
        found = []
        for assignment, digest in self._database.rows(sql, (self._run,)):
            if digest not in models:
                models[digest] = self._models.get(digest)
            found.append(Started(assignment_from_json(assignment), models[digest]))
        return tuple(found)

    @property
    def secret(self) -> bytes:
        """32 bytes of the operating system's randomness, the same for the whole run, that nobody else knows."""
        return self._database.run_secret(self._run)

    # -- the open round --------------------------------------------------------------------------------------------

    def open(self) -> OpenRound | None:
        """The round that has begun and is not committed."""
        return self._open

    def _read_open(self) -> None:
        sql = "SELECT position, number, attempt, clients FROM rounds WHERE run = ? AND state = 'open'"
        row = self._database.row(sql, (self._run,))
        if row is None:
            return
        self._position, number, attempt, clients = row
        facts = self._database.rows("SELECT fact FROM entries WHERE round = ? ORDER BY position", (self._position,))
        entries = tuple(entry_from_json(fact) for (fact,) in facts)
        self._open = OpenRound(number, attempt, tuple(json.loads(clients)), entries)

    def begin(self, round: int, attempt: int, clients: tuple[str, ...]) -> None:
        """A round begins with these clients; it takes the place of one that is open."""
        values = (round, attempt, json.dumps(clients))
        position = self._position
        with self._database.write() as connection:
            if position is None:
                sql = "INSERT INTO rounds (run, state, number, attempt, clients) VALUES (?, 'open', ?, ?, ?)"
                position = connection.execute(sql, (self._run, *values)).lastrowid
            else:
                sql = "UPDATE rounds SET number = ?, attempt = ?, clients = ? WHERE position = ?"
                connection.execute(sql, (*values, position))
                connection.execute("DELETE FROM entries WHERE round = ?", (position,))
        self._position, self._open = position, OpenRound(round, attempt, clients, ())

    def note(self, entry: Entry) -> None:
        """One more fact of the open round, and the answers that were accepted before it."""
        position, now = self._opened()
        with self._database.write() as connection:
            connection.execute("INSERT INTO entries (round, fact) VALUES (?, ?)", (position, entry_to_json(entry)))
            keys = self._answers.write(connection, position)
        self._answers.written(keys)
        self._open = dataclasses.replace(now, entries=(*now.entries, entry))

    def answer(self, assignment_id: str) -> Answer | None:
        """The answer to an accepted assignment, where it is still here."""
        if self._position is None:
            return None
        return self._answers.find(self._position, assignment_id, self._reopen or self._reopen_as_model)

    def keep(self, assignment_id: str, answer: Answer) -> None:
        """An accepted answer, kept as long as its round is open; a crash before the next fact loses it."""
        self._opened()
        self._answers.keep(assignment_id, answer)

    def _opened(self) -> tuple[int, OpenRound]:
        if self._position is None or self._open is None:
            raise RuntimeError("no round is open")
        return self._position, self._open

    def _reopen_as_model(
        self, path: Path, extras: tuple[tuple[str, int], ...]
    ) -> tuple[Weights, Mapping[str, Vector]] | None:
        """An update in its spool file; its tensors are those of the run's model."""
        last = self.last()
        return None if last is None else spools.reopen(path, last.model.manifest, dict(extras))

    # -- ends ------------------------------------------------------------------------------------------------------

    def commit(self, commit: Commit) -> None:
        """The open round is over and stands."""
        position, _ = self._opened()
        self._read_standing()
        pieces = list(parts(dict(commit.state)))
        with self._blobs.lock:
            small = self._models.put([commit.model, *(flight.model for flight in commit.started)])
            state = self._put_state(pieces)
            with self._database.write() as connection:
                self._models.insert(connection, small)
                self._write_commit(connection, position, commit, state)
                write_settled(connection, commit.accepted, commit.dropped)
                files = self._answers.delete(connection, position)
                self._models.sweep_rows(connection)
            self._stands(commit)
            self._models.sweep_files()
        self._answers.forget(files)
        self._write_line(commit)

    def _write_line(self, commit: Commit) -> None:
        """Where the disk fails now, the round stands all the same: its line is written with the next one."""
        if self._lines is None:
            return
        settled = list(commit.accepted), list(commit.dropped)
        self._unwritten.append(_line(record_to_json(commit.record), commit.model.digest, settled))
        try:
            while self._unwritten:
                self._lines.append(self._unwritten[0])
                del self._unwritten[0]
        except StorageError as error:
            log.error("history lags behind", run=self._run, round=commit.round, why=str(error))

    def catch_up(self) -> None:
        """Writes lines of history that a crash or a full disk has kept from being written; raises `StorageError`."""
        if self._lines is None:
            return
        sql = "SELECT record, model FROM rounds WHERE run = ? AND state = 'committed' ORDER BY position"
        lines = [_line(*row) for row in self._database.rows(sql, (self._run,))]
        row = self._database.row("SELECT accepted, dropped FROM standing WHERE run = ?", (self._run,))
        if row is not None:
            lines[-1] |= {"accepted": json.loads(row[0]), "dropped": json.loads(row[1])}
        self._lines.catch_up(lines)
        self._unwritten.clear()

    def _put_state(self, pieces: Sequence[bytes | memoryview]) -> tuple[bytes | None, str | None]:
        """The strategy's state as it goes into the row: itself, or the digest of its file."""
        if sum(len(piece) for piece in pieces) <= self._inline_bytes:
            return b"".join(pieces), None
        return None, self._blobs.put_bytes(pieces)

    def _write_commit(
        self, connection: sqlite3.Connection, position: int, commit: Commit, state: tuple[bytes | None, str | None]
    ) -> None:
        record = record_to_json(commit.record)
        connection.execute(
            "UPDATE rounds SET state = 'committed', record = ?, model = ?, best = ? WHERE position = ?",
            (record, commit.model.digest, commit.record.best, position),
        )
        connection.execute("DELETE FROM entries WHERE round = ?", (position,))
        ids = json.dumps(commit.accepted), json.dumps(commit.dropped)
        connection.execute(
            "INSERT INTO standing (run, last, best, state, state_file, accepted, dropped) VALUES (?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (run) DO UPDATE SET last = excluded.last, best = coalesce(excluded.best, best),"
            " state = excluded.state, state_file = excluded.state_file,"
            " accepted = excluded.accepted, dropped = excluded.dropped",
            (self._run, position, position if commit.record.best else None, *state, *ids),
        )
        self._write_flights(connection, commit.started)

    def _write_flights(self, connection: sqlite3.Connection, started: Sequence[Started]) -> None:
        connection.execute("DELETE FROM flights WHERE run = ?", (self._run,))
        connection.executemany(
            "INSERT INTO flights (run, position, assignment, model) VALUES (?, ?, ?, ?)",
            [
                (self._run, i, assignment_to_json(flight.assignment), flight.model.digest)
                for i, flight in enumerate(started)
            ],
        )

    def _stands(self, commit: Commit) -> None:
        """The transaction stands. Of two models, only the last one stays in memory."""
        if commit.record.best:
            self._best = BestRound(commit.record, commit.model)
        elif self._best is not None:
            self._best = BestRound(self._best.record, self._models.set_aside(self._best.model))
        self._last, self._open, self._position = commit, None, None
        self._history.append(commit.record)

    def abandon(self, record: RoundRecord) -> None:
        """The open attempt is over and counts for nothing; its facts are forgotten, its record is kept."""
        position, _ = self._opened()
        with self._database.write() as connection:
            connection.execute(
                "UPDATE rounds SET state = 'abandoned', record = ? WHERE position = ?",
                (record_to_json(record), position),
            )
            connection.execute("DELETE FROM entries WHERE round = ?", (position,))
            files = self._answers.delete(connection, position)
        self._attempts.append(record)
        self._open, self._position = None, None
        self._answers.forget(files)


def _line(record: str, model: str, settled: tuple[list[str] | None, list[str] | None] = (None, None)) -> dict[str, Any]:
    """A commit as a line of history; of older ones nobody knows which results they settled."""
    return {**json.loads(record), "model": model, "accepted": settled[0], "dropped": settled[1]}
