"""What this site has been asked before, as far as its policy counts it: kept across restarts and runs."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedkit.errors import Reason, Refused, StorageError
from fedkit.policy import Kind, Objection, Policy, refuse

__all__ = ["Visit", "Visits"]

_DAY_S = 24 * 3600.0
_KEPT_S = 30 * _DAY_S  # of what is counted by the day or the round
_SCHEMA = """
CREATE TABLE IF NOT EXISTS visits (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL,
    question TEXT NOT NULL, at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_run ON visits (run, kind);
CREATE INDEX IF NOT EXISTS by_data ON visits (data, at);
"""
_TRAINING = ("fit", "hop", "gradient")


@dataclass(frozen=True, slots=True)
class Visit:
    """One assignment: its id, where it belongs, the data set it reads, and a digest of what it asks.

    `is_charged` says that the answer is noised and the ledger accounts for it: the budget bounds such questions.
    """

    id: str
    run: str
    round: int
    kind: Kind
    data: str
    question: str
    is_charged: bool = False


class Visits:
    """The visits of one site, in a SQLite file. Raises `StorageError` where that cannot be used."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
            self._db.execute("DELETE FROM visits WHERE kind != 'summarize' AND at < ?", (clock() - _KEPT_S,))

    def admit(self, visit: Visit, policy: Policy) -> None:
        """Notes a visit, durably, before anything is done for it; raises `Refused` where there were enough.

        The same visit may come again, and so may the same question of the same run.
        """
        limit, count = self._limit(visit, policy)
        if limit is None:
            return
        with self._told():
            columns = "run, round, kind, data, question"
            before = self._db.execute(f"SELECT {columns} FROM visits WHERE id = ?", (visit.id,)).fetchone()  # noqa: S608
            found = count(visit)
        about = (visit.run, visit.round, visit.kind, visit.data, visit.question)
        if before is not None and before != about:
            raise Refused(Reason.POLICY, f"assignment {visit.id} stands for something else than it stood for before")
        if before is not None:
            return
        refuse([Objection(_RULES[visit.kind], str(found + 1), f"at most {limit}") if found >= limit else None])
        with self._told():
            row = (visit.id, visit.run, visit.round, visit.kind, visit.data, visit.question, self._clock())
            self._db.execute("INSERT INTO visits VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def _limit(self, visit: Visit, policy: Policy) -> tuple[int | None, Callable[[Visit], int]]:
        if visit.kind in _TRAINING:
            return policy.rounds_per_day, self._rounds
        if visit.kind == "evaluate":
            return policy.evaluations_per_round, self._evaluations
        return None if visit.is_charged else policy.summaries_per_run, self._summaries

    def _rounds(self, visit: Visit) -> int:
        """Other rounds that trained on the same data within 24 hours."""
        return self._count(
            "SELECT COUNT(*) FROM (SELECT DISTINCT run, round FROM visits WHERE data = ? AND at > ? "
            "AND kind IN ('fit', 'hop', 'gradient') AND NOT (run = ? AND round = ?))",
            *(visit.data, self._clock() - _DAY_S, visit.run, visit.round),
        )

    def _evaluations(self, visit: Visit) -> int:
        return self._count(
            "SELECT COUNT(*) FROM visits WHERE run = ? AND round = ? AND kind = 'evaluate'", visit.run, visit.round
        )

    def _summaries(self, visit: Visit) -> int:
        """Other questions about the same data in the same run."""
        return self._count(
            "SELECT COUNT(DISTINCT question) FROM visits WHERE run = ? AND kind = 'summarize' AND data = ? "
            "AND question != ?",
            *(visit.run, visit.data, visit.question),
        )

    def _count(self, query: str, *values: object) -> int:
        return int(self._db.execute(query, values).fetchone()[0])

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{self._path}: {error}; free space or mend the disk, then try again") from error


_RULES = {
    **dict.fromkeys(_TRAINING, "rounds within 24 hours"),
    "evaluate": "evaluations in one round",
    "summarize": "questions about the data in one run",
}
