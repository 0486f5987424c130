"""A client's durable record of the privacy its data has cost: events, and never only an epsilon, across runs.

A reservation is on disk before the first noisy step of an assignment, and counts in full from then on, so that whatever
happens later, nothing is counted too low. One assignment has one reservation, however often it is asked for, until its
work has ended: then it is closed, and nothing is noised under it again.

Entries are only ever appended. Each carries the BLAKE3 digest of its own text behind the digest of the entry before, so
that one that is altered, removed or moved is found when the ledger is opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from blake3 import blake3

from fedkit.errors import Reason, Refused, StorageError
from fedkit.privacy.accounting import Spent, Tally, epsilon_of, rdp_of, spent
from fedkit.work import Steps

__all__ = ["WHOLE_CLIENT", "Account", "Budget", "Ledger", "Reservation"]

WHOLE_CLIENT = "/client"  # after a data set's id: the account of what hides the client with all its rows

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, digest BLOB NOT NULL);
CREATE TRIGGER IF NOT EXISTS no_change BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS no_removal BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append only'); END;
"""
_START = bytes(32)
_ROW = "add_or_remove_one"
_CLIENT = "any_update_of_the_client"


@dataclass(frozen=True, slots=True)
class Budget:
    """What one data set may cost in all: `epsilon` at `delta`, for adding or removing one row."""

    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one assignment may spend: `steps` of a Poisson-sampled mechanism, gradients clipped to `clip`.

    `is_whole`: it is the whole client that the noise hides, and an update that is clipped.
    """

    assignment: str
    run: str
    data: str
    steps: Steps
    clip: float
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Account:
    """One data set: how many rows it has, the fingerprint of its content, and everything it was used for."""

    data: str
    rows: int = 0
    fingerprint: str = ""
    reservations: tuple[Reservation, ...] = ()
    open: frozenset[str] = frozenset()  # assignments whose work has not ended
    clipped: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # by run: clipped gradients, and all of them
    steps: Tally = field(default_factory=Tally)  # all of them, those that are only reserved too
    steps_by_run: Mapping[str, Tally] = field(default_factory=dict)

    def steps_of(self, run: str) -> Tally:
        """The steps of one run."""
        return self.steps_by_run.get(run, Tally())

    def spent(self, delta: float, *, run: str | None = None, tight: bool = True) -> Spent:
        """What all steps cost, or those of one run."""
        return spent(self.steps if run is None else self.steps_of(run), delta, tight=tight)


class Ledger:
    """The ledger in a SQLite file, which one process at a time may write to, and any may look at (`look`).

    Raises `StorageError` where the file cannot be used, or is not as it was written: then nothing may be spent.
    """

    def __init__(self, path: Path, *, look: bool = False) -> None:
        self._path = path
        self._head = _START
        self._accounts: dict[str, Account] = {}
        self._reserved: dict[str, Reservation] = {}  # by assignment
        with contextlib.ExitStack() as files:
            with self._told():
                self._db = files.enter_context(contextlib.closing(self._looking() if look else self._writing(files)))
                rows = self._db.execute("SELECT seq, body, digest FROM entries ORDER BY seq").fetchall()
            self._read(rows)
            self._files = files.pop_all()

    def _read(self, rows: list[tuple[int, str, bytes]]) -> None:
        for number, (seq, body, digest) in enumerate(rows, 1):
            self._head = _chained(self._head, body)
            if seq != number or digest != self._head:
                raise StorageError(
                    f"{self._path}: entry {number} was altered, removed or moved: put back the newest copy, whose "
                    "digest must be the last that the audit log has of it. Until then no privacy can be spent here"
                )
            self._take(json.loads(body))

    def _looking(self) -> sqlite3.Connection:
        if not self._path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return sqlite3.connect(f"file:{quote(str(self._path.absolute()))}?mode=ro", uri=True, timeout=5.0)

    def _writing(self, files: contextlib.ExitStack) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = files.enter_context(open(self._path.with_suffix(".lock"), "ab"))  # noqa: SIM115 - held until `close`
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        db = sqlite3.connect(self._path, isolation_level=None, timeout=5.0)
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(_SCHEMA)
        return db

    @property
    def head(self) -> str:
        """The digest (hex) of the newest entry: kept elsewhere, it shows whether later ones are missing."""
        return self._head.hex()

    def account(self, data: str) -> Account:
        """One data set, an unused one where it was never heard of."""
        return self._accounts.get(data, Account(data))

    def accounts(self) -> list[Account]:
        """All data sets, by id."""
        return [self._accounts[data] for data in sorted(self._accounts)]

    def identify(self, data: str, rows: int, fingerprint: str) -> None:
        """Notes what the data set is now. What was spent stays spent, whatever its content has become."""
        account = self.account(data)
        if (account.rows, account.fingerprint) != (rows, fingerprint):
            self._append({"kind": "data", "data": data, "rows": rows, "fingerprint": fingerprint})

    def reserve(self, wish: Reservation, budget: Budget, of_run: Budget | None = None) -> None:
        """Puts a reservation on disk; returns at once for an assignment that has this very one open.

        Raises `Refused` where it would go beyond the budget of the data, or of the run (`of_run`), is another one than
        the assignment had before, or was used up: what was noised and stored once must not be noised again.
        """
        before = self._reserved.get(wish.assignment)
        if before is not None:
            if before != wish:
                raise Refused(Reason.PRIVACY, f"assignment {wish.assignment} has another reservation already")
            if wish.assignment not in self.account(wish.data).open:
                raise Refused(Reason.PRIVACY, f"assignment {wish.assignment} was done, and its noise is drawn once")
            return
        account = self.account(wish.data)
        self.check(wish, budget)
        if of_run is not None:
            _require(wish, account.steps_of(wish.run), of_run, f"the run at {wish.data}")
        steps, mechanism = wish.steps.to_dict(), "sampled_gaussian" if wish.steps.parts is None else "sampled_skellam"
        about = {"assignment": wish.assignment, "run": wish.run, "data": wish.data, "steps": steps, "clip": wish.clip}
        relation = _CLIENT if wish.is_whole else _ROW
        self._append({"kind": "reserve", "relation": relation, "mechanism": mechanism, **about})

    def check(self, wish: Reservation, budget: Budget) -> None:
        """Raises `Refused` where the reservation would go beyond the budget of the data."""
        if wish.assignment not in self._reserved:
            _require(wish, self.account(wish.data).steps, budget, wish.data)

    def close_reservation(
        self, assignment: str, clipped: int = 0, gradients: int = 0, *, is_stored: bool = False
    ) -> None:
        """The work under it has ended, with a result or a refusal, and so many of its gradients were clipped.

        Nothing happens where there is no open reservation. Where the result is stored, which says so too, a power loss
        may undo it.
        """
        wish = self._reserved.get(assignment)
        if wish is not None and assignment in self.account(wish.data).open:
            about = {"assignment": assignment, "run": wish.run, "data": wish.data}
            self._append({"kind": "closed", "clipped": clipped, "gradients": gradients, **about}, flush=not is_stored)

    # -- entries -------------------------------------------------------------------------------------------------------

    def _append(self, entry: dict[str, Any], *, flush: bool = True) -> None:
        body = json.dumps(entry | {"at": round(time.time(), 3)}, sort_keys=True, separators=(",", ":"))
        head = _chained(self._head, body)
        with self._told():
            self._db.execute(f"PRAGMA synchronous = {'FULL' if flush else 'NORMAL'}")
            self._db.execute("INSERT INTO entries (body, digest) VALUES (?, ?)", (body, head))
        self._head = head
        self._take(json.loads(body))

    def _take(self, entry: dict[str, Any]) -> None:
        """Makes the entry count."""
        kind, data = entry["kind"], entry["data"]
        account = self.account(data)
        if kind == "data":
            account = replace(account, rows=entry["rows"], fingerprint=entry["fingerprint"])
        elif kind == "reserve":
            named = {name: entry[name] for name in ("assignment", "run", "data", "clip")}
            wish = Reservation(steps=Steps.from_dict(entry["steps"]), is_whole=entry["relation"] == _CLIENT, **named)
            account = replace(
                account,
                reservations=(*account.reservations, wish),
                open=account.open | {wish.assignment},
                steps=account.steps.plus(wish.steps),
                steps_by_run={**account.steps_by_run, wish.run: account.steps_of(wish.run).plus(wish.steps)},
            )
            self._reserved[wish.assignment] = wish
        else:
            clipped, gradients = account.clipped.get(entry["run"], (0, 0))
            sums = (clipped + entry["clipped"], gradients + entry["gradients"])
            account = replace(
                account, open=account.open - {entry["assignment"]}, clipped={**account.clipped, entry["run"]: sums}
            )
        self._accounts[data] = account

    def close(self) -> None:
        """Closes the file, and lets another process write to it."""
        self._files.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            text = f"{self._path}: {error}; free space or mend the disk, or end the other agent that uses it"
            raise StorageError(text) from error


def _require(wish: Reservation, before: Tally, budget: Budget, whose: str) -> None:
    """Raises `Refused` where the wish, after what was before, is beyond the budget."""
    cost = epsilon_of(rdp_of(before.plus(wish.steps)), budget.delta)
    if not cost <= budget.epsilon:
        left = max(budget.epsilon - epsilon_of(rdp_of(before), budget.delta), 0.0)
        text = (
            f"{whose} would have cost epsilon {_up(cost)}, its budget is {budget.epsilon:g} at delta {budget.delta:g}; "
            f"{_down(left)} are left"
        )
        raise Refused(Reason.PRIVACY, text)


def _chained(head: bytes, body: str) -> bytes:
    return blake3(head + body.encode()).digest()


def _up(epsilon: float) -> str:
    """Three decimals, never less than it is."""
    return f"{math.ceil(epsilon * 1000) / 1000:g}" if math.isfinite(epsilon) else "infinity"


def _down(epsilon: float) -> str:
    return f"{math.floor(epsilon * 1000) / 1000:g}"
