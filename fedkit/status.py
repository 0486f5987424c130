"""What a coordinator says about its runs and clients, as values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedkit.rounds.journal import RoundRecord

__all__ = ["ENDED", "ClientState", "ClientStatus", "JobStatus", "RunState", "RunStatus", "Say", "Status", "unsaid"]

Say: TypeAlias = Callable[[str], object]  # who is told, in a sentence, what is under way
RunState: TypeAlias = Literal["waiting", "running", "finished", "failed", "cancelled"]
ClientState: TypeAlias = Literal["ready", "working", "away", "left"]

ENDED: frozenset[str] = frozenset({"finished", "failed", "cancelled"})


def unsaid(_: str) -> None:
    """Nobody looks on."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run. `round` of `rounds` is the last committed one, `last` its record; `detail` says why it waits or failed.

    Times are seconds since 1970, UTC; `ended_at` is 0.0 while the run goes on. `models` names those that can be had.
    """

    name: str
    task: str
    strategy: str
    state: RunState
    round: int
    rounds: int
    seed: int
    detail: str
    submitted_at: float
    ended_at: float
    last: RoundRecord | None
    models: tuple[str, ...]

    @property
    def is_over(self) -> bool:
        """Whether the run has finished, failed or been cancelled."""
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One assignment that a client works on: `done` of `total` steps, 0 where unknown."""

    run: str
    round: int
    assignment_id: str
    work: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class ClientStatus:
    """One client, for `since_s` seconds in its state; `last_refusal` is why and in which run it last gave none."""

    name: str
    state: ClientState
    tasks: tuple[str, ...]
    since_s: float
    jobs: tuple[JobStatus, ...]
    last_refusal: str


@dataclass(frozen=True, slots=True)
class Status:
    """Everybody a coordinator knows, and its runs, the newest first."""

    clients: tuple[ClientStatus, ...]
    runs: tuple[RunStatus, ...]
    software: str = ""
