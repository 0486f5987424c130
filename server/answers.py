"""The accepted answers of a run's open round, so that a coordinator that is started again need not ask for them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from fedkit.errors import StorageError
from fedkit.packing import pack, unpack
from fedkit.server.database import Database
from fedkit.spool import Payload, Spooled
from fedkit.weights import Vector, Weights
from fedkit.work import Answer, MetricSums, Reply, Summary, Update

__all__ = ["Answers", "Reopen"]

Reopen: TypeAlias = Callable[[Path, tuple[tuple[str, int], ...]], tuple[Weights, Mapping[str, Vector]] | None]

_KINDS: dict[str, type[MetricSums | Summary]] = {"MetricSums": MetricSums, "Summary": Summary}


class Answers:
    """Answers by assignment id. Those of the last calls wait in memory for the transaction that notes the call.

    The vectors of an update that lies in `spool` stay in their file. One that is still in memory is written one fact
    later than the others, because most rounds are over by then; lost, it is asked for again and not trained again.
    """

    def __init__(
        self, database: Database, round: int | None, spool: Path | None, remove: Callable[[Path], None] | None = None
    ) -> None:
        self._database = database
        self._remove_file = remove or _unlink
        self._spool = spool
        self._fresh: dict[str, Answer] = {}
        self._spared: set[str] = set()  # by the last `write`
        self._written = {key for (key,) in database.rows("SELECT id FROM answers WHERE round = ?", (round,))}

    def keep(self, key: str, answer: Answer) -> None:
        """Keeps an answer in memory until `write`."""
        self._fresh[key] = answer

    def find(self, round: int, key: str, reopen: Reopen) -> Answer | None:
        """The answer, where it is still here; `reopen` gives None for a spool file that is gone or short."""
        if key in self._fresh:
            return self._fresh[key]
        if key not in self._written:
            return None
        row = self._database.row("SELECT file, content FROM answers WHERE round = ? AND id = ?", (round, key))
        return None if row is None else self._from_row(row[0], row[1], reopen)

    def write(self, connection: sqlite3.Connection, round: int) -> list[str]:
        """Writes answers kept so far as a part of a transaction; returns their ids, which are for `written`."""
        spared = {key for key, answer in self._fresh.items() if key not in self._spared and _in_memory(answer)}
        due = {key: answer for key, answer in self._fresh.items() if key not in spared}
        rows = [(round, key, *self._to_row(answer)) for key, answer in due.items()]
        connection.executemany("INSERT OR REPLACE INTO answers (round, id, file, content) VALUES (?, ?, ?, ?)", rows)
        self._spared = spared
        return list(due)

    def written(self, keys: list[str]) -> None:
        """The transaction stands: these answers need no memory any more."""
        self._written.update(keys)
        for key in keys:
            self._fresh.pop(key, None)

    def delete(self, connection: sqlite3.Connection, round: int) -> list[str]:
        """Forgets the round's answers as a part of a transaction; returns their files, which are for `forget`."""
        found = connection.execute("SELECT file FROM answers WHERE round = ? AND file IS NOT NULL", (round,)).fetchall()
        connection.execute("DELETE FROM answers WHERE round = ?", (round,))
        fresh = (self._file(answer) for answer in self._fresh.values() if not _in_memory(answer))
        return [*(file for (file,) in found), *(file for file in fresh if file is not None)]

    def forget(self, files: list[str]) -> None:
        """The transaction stands: the round's answers and their files are gone."""
        self._fresh.clear()
        self._written.clear()
        for file in files:
            assert self._spool is not None  # where there is a file, there is a folder
            self._remove(self._spool / file)

    def _remove(self, path: Path) -> None:
        try:
            self._remove_file(path)
        except OSError as error:
            text = f"{path}: {error.strerror}; the coordinator must be able to remove its own files"
            raise StorageError(text) from error

    def _file(self, answer: Answer) -> str | None:
        """The name of the spool file that holds the answer's vectors, if one does."""
        path = None if (payload := _payload(answer)) is None else payload.path
        return path.name if path is not None and path.parent == self._spool else None

    def _to_row(self, answer: Answer) -> tuple[str | None, bytes]:
        if isinstance(answer, Reply):
            return None, pack(("Reply", answer.message.hex()))
        if not isinstance(answer, Update):
            return None, pack((type(answer).__name__, *(getattr(answer, name) for name in type(answer).__slots__)))
        file, facts, payload = self._file(answer), (answer.examples, answer.loss, answer.epsilon), _payload(answer)
        if file is not None and payload is not None:
            payload.save()
            return file, pack((answer.weights.manifest.digest, tuple(answer.sizes.items()), *facts))
        return None, pack(("Update", answer.weights, *facts[:2], dict(answer.extra), answer.epsilon))

    def _from_row(self, file: str | None, content: bytes, reopen: Reopen) -> Answer | None:
        if file is None:
            kind, *fields = unpack(content)
            if kind == "Reply":
                return Reply(bytes.fromhex(fields[0]))
            return Update(*fields) if kind == "Update" else _KINDS[kind](*fields)
        manifest, sizes, examples, loss, epsilon = unpack(content)
        found = None if self._spool is None else reopen(self._spool / file, sizes)
        if found is None or found[0].manifest.digest != manifest:
            return None
        return Update(found[0], examples, loss, found[1], epsilon)


def _payload(answer: Answer) -> Payload | None:
    """The bytes of an update as they arrived."""
    return answer.weights.payload if isinstance(answer, Update) and isinstance(answer.weights, Spooled) else None


def _in_memory(answer: Answer) -> bool:
    payload = _payload(answer)
    return payload is not None and payload.pieces is not None


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
