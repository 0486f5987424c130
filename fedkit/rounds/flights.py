"""Asynchronous work under way: launched by `start`, landed by `next`, in an order that the journal fixes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from fedkit.errors import Refused, RoundAbandoned
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.rounds.call import Refusal
from fedkit.rounds.journal import Started
from fedkit.work import Answer, Update

__all__ = ["Flights", "Landed"]


Perform: TypeAlias = Callable[[Assignment, Parcel], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Landed:
    """Work that came to its end: an update, or a refusal in its place."""

    started: Started
    outcome: Update | Refusal

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why there is no update; empty where there is one."""
        return (self.outcome,) if isinstance(self.outcome, Refusal) else ()


class Flights:
    """The assignments that nobody waits for yet, each running as a task."""

    def __init__(self) -> None:
        self._flying: dict[str, tuple[Started, asyncio.Task[Landed]]] = {}
        self._landed: asyncio.Queue[str] = asyncio.Queue()

    def clients(self) -> set[str]:
        """The clients with work under way."""
        return {started.assignment.client for started, _ in self._flying.values()}

    def ids(self) -> set[str]:
        """The ids of the assignments under way."""
        return set(self._flying)

    def started(self) -> tuple[Started, ...]:
        """The work under way, in the order it was started."""
        return tuple(started for started, _ in self._flying.values())

    def launch(self, started: Started, perform: Perform) -> None:
        """Begins one assignment; `perform` brings its checked answer."""
        key = started.assignment.id
        task = asyncio.create_task(_fly(started, perform))
        task.add_done_callback(lambda _: self._landed.put_nowait(key))
        self._flying[key] = started, task

    async def land(self, key: str | None) -> Landed:
        """The flight `key`, or the next one to end; raises `RoundAbandoned` where nothing is under way."""
        while key is None or key not in self._flying:
            if not self._flying:
                raise RoundAbandoned("no work is under way: every client refused, or none was started")
            found = await self._landed.get()
            key = found if found in self._flying else None
        landed = await self._flying[key][1]
        del self._flying[key]
        return landed

    def ground(self) -> None:
        """Cancels everything under way."""
        for _, task in self._flying.values():
            task.cancel()
        self._flying.clear()
        self._landed = asyncio.Queue()


async def _fly(started: Started, perform: Perform) -> Landed:
    client = started.assignment.client
    try:
        answer = await perform(started.assignment, Parcel(started.model))
    except Refused as refused:
        return Landed(started, Refusal(client, refused.reason, refused.detail))
    assert isinstance(answer, Update)  # inspected against the assignment
    return Landed(started, answer)
