"""What must survive so that a run can be taken up again: client lists, accepted sets, commits.

A `Journal` is written before anything that depends on what it holds is sent. After a crash the round's coroutine runs
again and finds its earlier answers here. `MemoryJournal` is the twin that simulation and tests use.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fedkit.rounds.assignment import Assignment
from fedkit.rounds.call import Refusal
from fedkit.weights import Weights
from fedkit.work import Answer

__all__ = ["BestRound", "Commit", "Entry", "Journal", "MemoryJournal", "OpenRound", "RoundRecord", "Started"]


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One line of a run's history.

    `loss` is the mean training loss, `metrics` the validation scores pooled over the clients `scored`, and `per_client`
    each client's, where a round was evaluated and sites release them. `seconds` is wall time; bytes are payload, up
    from and down to clients. `epsilon` is what the run has cost each client so far, or all of them alike under
    `fedkit.rounds.shield.EVERY_CLIENT`; `releases` counts the noised means of the attempt, and `clip` is the norm to
    which the next one's updates are clipped. `rejected` says why a round does not stand: the scores are then those of
    the model it would have made.
    """

    round: int
    attempt: int = 1
    clients: tuple[str, ...] = ()
    examples: int = 0
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    per_client: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    refusals: tuple[Refusal, ...] = ()
    epsilon: Mapping[str, float] = field(default_factory=dict)
    best: bool = False
    rejected: str = ""
    scored: tuple[str, ...] = ()
    releases: int = 0
    clip: float | None = None

    @property
    def stands(self) -> bool:
        """Whether the round's model took the place of the one before."""
        return not self.rejected


@dataclass(frozen=True, slots=True)
class Entry:
    """One fact of an open round: what was asked (`key` for the machine, `label` for people) and what came of it.

    `accepted` holds (client, assignment id) in the order of acceptance.
    """

    kind: Literal["call", "update", "start", "arrival"]
    key: str
    label: str
    accepted: tuple[tuple[str, str], ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """Asynchronous work under way: its assignment and the model it was started from."""

    assignment: Assignment
    model: Weights


@dataclass(frozen=True, slots=True)
class OpenRound:
    """A round that has begun and is not committed."""

    round: int
    attempt: int
    clients: tuple[str, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """The durable end of a round: the model, the strategy's state, the record, and work still under way.

    `accepted` and `dropped` are the assignment ids that clients are told about, again after every restart.
    """

    round: int
    model: Weights
    state: Mapping[str, Any]
    record: RoundRecord
    started: tuple[Started, ...] = ()
    accepted: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BestRound:
    """What is kept of the round whose record says best; its model may lie in a file until its values are used."""

    record: RoundRecord
    model: Weights

    @property
    def round(self) -> int:
        """The number of the round."""
        return self.record.round


class Journal(Protocol):
    """What a run writes down. Every method returns only when what it was given would survive a crash."""

    @property
    def secret(self) -> bytes:
        """32 bytes of the operating system's randomness, the same for the whole run, that nobody else knows."""
        ...

    def last(self) -> Commit | None:
        """The last commit, or None before the first."""
        ...

    def best(self) -> BestRound | None:
        """The committed round whose record says best, the last of them; asked every round, so it must cost nothing."""
        ...

    def history(self) -> list[RoundRecord]:
        """The records of all commits in order, the preparation (round 0) included."""
        ...

    def abandoned(self) -> list[RoundRecord]:
        """The records of abandoned attempts, in order."""
        ...

    def open(self) -> OpenRound | None:
        """The round that has begun and is not committed."""
        ...

    def begin(self, round: int, attempt: int, clients: tuple[str, ...]) -> None:
        """A round begins with these clients."""
        ...

    def note(self, entry: Entry) -> None:
        """One more fact of the open round."""
        ...

    def answer(self, assignment_id: str) -> Answer | None:
        """The answer to an accepted assignment, where it is still here."""
        ...

    def keep(self, assignment_id: str, answer: Answer) -> None:
        """An accepted answer, kept as long as its round is open. It may be lost: clients are then asked again."""
        ...

    def commit(self, commit: Commit) -> None:
        """The open round is over and stands."""
        ...

    def abandon(self, record: RoundRecord) -> None:
        """The open attempt is over and counts for nothing; its facts are forgotten, its record is kept."""
        ...


class MemoryJournal:
    """A journal in memory. With `keep_answers`, accepted answers are kept too, as a coordinator's spool files are."""

    def __init__(self, *, keep_answers: bool = False) -> None:
        self.secret = secrets.token_bytes(32)
        self._keep_answers = keep_answers
        self._last: Commit | None = None
        self._best: BestRound | None = None
        self._history: list[RoundRecord] = []
        self._abandoned: list[RoundRecord] = []
        self._open: OpenRound | None = None
        self._answers: dict[str, Answer] = {}

    def last(self) -> Commit | None:
        """The last commit, or None before the first."""
        return self._last

    def best(self) -> BestRound | None:
        """The committed round whose record says best, the last of them."""
        return self._best

    def history(self) -> list[RoundRecord]:
        """The records of all commits in order, the preparation (round 0) included."""
        return list(self._history)

    def abandoned(self) -> list[RoundRecord]:
        """The records of abandoned attempts, in order."""
        return list(self._abandoned)

    def open(self) -> OpenRound | None:
        """The round that has begun and is not committed."""
        return self._open

    def begin(self, round: int, attempt: int, clients: tuple[str, ...]) -> None:
        """A round begins with these clients."""
        self._open = OpenRound(round, attempt, clients, ())

    def note(self, entry: Entry) -> None:
        """One more fact of the open round."""
        now = self._opened()
        self._open = OpenRound(now.round, now.attempt, now.clients, (*now.entries, entry))

    def answer(self, assignment_id: str) -> Answer | None:
        """The answer to an accepted assignment, where it is still here."""
        return self._answers.get(assignment_id)

    def keep(self, assignment_id: str, answer: Answer) -> None:
        """An accepted answer, kept as long as its round is open."""
        if self._keep_answers:
            self._answers[assignment_id] = answer

    def commit(self, commit: Commit) -> None:
        """The open round is over and stands."""
        self._opened()
        self._last = commit
        self._best = BestRound(commit.record, commit.model) if commit.record.best else self._best
        self._history.append(commit.record)
        self._open = None
        self._answers.clear()

    def abandon(self, record: RoundRecord) -> None:
        """The open attempt is over and counts for nothing."""
        self._opened()
        self._abandoned.append(record)
        self._open = None
        self._answers.clear()

    def _opened(self) -> OpenRound:
        if self._open is None:
            raise RuntimeError("no round is open")
        return self._open
