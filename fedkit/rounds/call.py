"""The state machine of one group call: who is asked, whose answers count, when it closes. It does no I/O.

Events go in together with the time, commands come out. A call closes as soon as enough clients have answered, when
nobody is left to answer, or at its deadline; with fewer answers than the quorum it is abandoned.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

from fedkit.config import Participation
from fedkit.errors import ConfigError, Reason

__all__ = ["Ask", "Cancel", "Command", "GroupCall", "Refusal", "State"]


class State(enum.Enum):
    """A call is open until it is closed (its accepted set stands) or abandoned (nothing is averaged)."""

    OPEN = "open"
    CLOSED = "closed"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A client that brought no contribution, with the typed reason and a sentence."""

    client: str
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Ask:
    """Command: send this client its assignment."""

    client: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Command: this client's answer is no longer wanted."""

    client: str


Command: TypeAlias = Ask | Cancel


class GroupCall:
    """One question to a cohort.

    `wanted` answers close the call, `quorum` of them are needed, and never fewer than `least`; at `deadline` it closes
    anyway. Accepted clients stay accepted; each client is accepted or refused at most once.
    """

    def __init__(
        self,
        cohort: Collection[str],
        participation: Participation,
        now: float = 0.0,
        *,
        of: int | None = None,
        least: int = 1,
    ) -> None:
        if not cohort or len(set(cohort)) != len(cohort):
            raise ConfigError(f"a cohort is one or more different clients, got {sorted(cohort)}")
        self.cohort = tuple(sorted(cohort))
        share = int(participation.fraction * (of or 0) + 1e-9)  # of all clients, where the cohort could hold no more
        wanted = max(int(len(self.cohort) / participation.over_select + 1e-9), min(share, len(self.cohort)), 1)
        self.quorum = max(participation.quorum or math.ceil(wanted / 2), least)
        self.wanted = max(wanted, self.quorum)
        self.deadline = math.inf if participation.deadline_s is None else now + participation.deadline_s
        self.max_update_norm = participation.max_update_norm or math.inf
        self.state = State.OPEN
        self.accepted: list[str] = []
        self.refusals: list[Refusal] = []
        self._members = frozenset(self.cohort)
        self._waiting = set(self.cohort)

    @property
    def is_race(self) -> bool:
        """Whether the order of answers decides who counts."""
        return self.wanted < len(self.cohort) or self.deadline < math.inf

    def start(self) -> list[Command]:
        """Asks everybody who has not answered, or abandons at once a cohort that cannot reach the quorum."""
        if self.state is not State.OPEN:
            return []
        if self.quorum > len(self.cohort):
            self._end(State.ABANDONED, Reason.ABANDONED)
            return []
        return [Ask(client) for client in self.cohort if client in self._waiting]

    def answered(self, client: str, now: float, *, norm: float = 0.0) -> list[Command]:
        """A client's checked answer, with the norm of its update."""
        reason = self._why_not(client, now)
        if reason is not None:
            self.refusals.append(Refusal(client, reason))
            self._waiting.discard(client)
            return self.tick(now)
        if not norm <= self.max_update_norm:
            return self.refused(client, Reason.NORM, now, f"norm {norm:.4g} is above {self.max_update_norm:.4g}")
        self._waiting.discard(client)
        self.accepted.append(client)
        return self._settle(now)

    def refused(self, client: str, reason: Reason, now: float, detail: str = "") -> list[Command]:
        """A client will not contribute: it refused, failed, went away, or its answer did not pass the checks."""
        if client in self._waiting:
            self._waiting.discard(client)
            self.refusals.append(Refusal(client, reason, detail))
        return self._settle(now)

    def tick(self, now: float) -> list[Command]:
        """Time has passed."""
        return self._settle(now)

    def _why_not(self, client: str, now: float) -> Reason | None:
        if client in self._waiting and self.state is State.OPEN and now < self.deadline:
            return None
        if client not in self._members:
            return Reason.UNKNOWN
        return Reason.DUPLICATE if client in self.accepted else Reason.LATE

    def _settle(self, now: float) -> list[Command]:
        if self.state is not State.OPEN:
            return []
        if len(self.accepted) >= self.wanted:
            return self._end(State.CLOSED, Reason.SURPLUS)
        if not self._waiting or now >= self.deadline:
            enough = len(self.accepted) >= self.quorum
            return self._end(State.CLOSED if enough else State.ABANDONED, Reason.DEADLINE)
        if len(self.accepted) + len(self._waiting) < self.quorum:
            return self._end(State.ABANDONED, Reason.ABANDONED)
        return []

    def _end(self, state: State, reason: Reason) -> list[Command]:
        self.state = state
        left, self._waiting = sorted(self._waiting), set()
        self.refusals += [Refusal(client, reason) for client in left]
        return [Cancel(client) for client in left]
