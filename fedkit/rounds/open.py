"""The open round: what was journaled of it and not yet replayed, and what has happened in it so far."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection
from typing import Any

import numpy as np

from fedkit import rng
from fedkit.crypto.ceremony import BoxKey
from fedkit.errors import NonDeterministicStrategy
from fedkit.rounds.assignment import assignment_id
from fedkit.rounds.call import Refusal
from fedkit.rounds.journal import Entry, OpenRound, RoundRecord

__all__ = ["Progress", "Replay"]

_IDLE_TURNS = 32  # turns of the event loop without a question after which all tasks of a strategy are taken to wait


class Replay:
    """The journaled facts of the open round, handed out as the strategy asks for them again.

    Calls are matched by what they ask, so a strategy may gather several at once. A question that the journal does not
    hold waits until the others are through; if none of them comes to what the journal holds, the strategy has changed.
    """

    def __init__(self, round: int, entries: Collection[Entry]) -> None:
        self._round = round
        self._calls = {entry.key: entry for entry in entries if entry.kind in ("call", "start")}
        self.updates = {entry.key: entry for entry in entries if entry.kind == "update"}
        self.arrivals = [entry for entry in entries if entry.kind == "arrival"]
        self._running = 0

    def left(self) -> Entry | None:
        """A journaled fact that has not been asked for yet, or None when everything is replayed."""
        return next(iter([*self._calls.values(), *self.arrivals]), None)

    @contextlib.asynccontextmanager
    async def call(self, key: str, label: str) -> AsyncIterator[Entry | None]:
        """The journaled outcome of a call, or None for a new one; raises `NonDeterministicStrategy`."""
        entry = await self._find(key, label)
        self._running += entry is not None
        try:
            yield entry
        finally:
            self._running -= entry is not None

    async def _find(self, key: str, label: str) -> Entry | None:
        turns = 0
        while key not in self._calls:
            if self.left() is None:
                return None
            if turns == _IDLE_TURNS:
                raise self.changed(label)
            turns = 0 if self._running else turns + 1
            await asyncio.sleep(0.001 if self._running else 0)
        return self._calls.pop(key)

    def start(self, key: str, label: str) -> bool:
        """Whether asynchronous work was started before; raises `NonDeterministicStrategy`."""
        if key not in self._calls and self.left() is not None:
            raise self.changed(label)
        return self._calls.pop(key, None) is not None

    def arrival(self) -> Entry | None:
        """The next journaled arrival; raises `NonDeterministicStrategy` where the journal expects a question first."""
        if self.arrivals:
            return self.arrivals.pop(0)
        if self.left() is not None:
            raise self.changed("the next arrival")
        return None

    def changed(self, label: str) -> NonDeterministicStrategy:
        """The error that names what the journal holds and what was asked instead."""
        held = self.left()
        holds = held.label if held else "nothing more"
        return NonDeterministicStrategy(
            f"round {self._round}: the journal holds [{holds}], but the strategy asks for [{label}]; "
            "a strategy must draw from federation.rng alone and not read clocks or files"
        )


class Progress:
    """What has happened in one attempt of one round."""

    def __init__(self, seed: int, opened: OpenRound) -> None:
        self.opened = opened
        self.replay = Replay(opened.round, opened.entries)
        self.rng: np.random.Generator = rng.generator(seed, "round", opened.round, opened.attempt)
        self.sent: list[str] = []
        self.accepted: list[str] = []
        self.refusals: list[Refusal] = []
        self.epsilon: dict[str, float] = {}  # what the run has cost each client so far, by its own ledger
        self.releases = 0  # of noised means
        self.clip: float | None = None  # after the last of them
        self.boxes: dict[str, BoxKey] | None = None  # of those who can take part in sealed hops, once they were asked
        self.bytes_up = 0
        self.bytes_down = 0
        self._asked: Counter[tuple[str, str]] = Counter()
        self._contributions: list[tuple[tuple[str, ...], int, float | None]] = []
        self._began = time.monotonic()

    def next_id(self, question: str, client: str) -> str:
        """The id of this question to `client`, told apart from equal ones before."""
        occurrence = self._asked[question, client]
        self._asked[question, client] += 1
        return assignment_id(question, client, occurrence)

    def contributed(self, clients: Collection[str], examples: int, loss: float | None) -> None:
        """Training answers entered the model."""
        self._contributions.append((tuple(clients), examples, loss))

    def withdrawn(self, client: str, key: str) -> None:
        """A client's visit of this round, assignment `key`, is undone after all."""
        if key not in self.accepted:
            return  # it was of an earlier round
        self.accepted.remove(key)
        at = max(i for i, (clients, *_) in enumerate(self._contributions) if clients == (client,))
        del self._contributions[at]

    def _loss(self) -> float | None:
        """The mean training loss by examples, the same in whatever order the answers came."""
        known = [(loss * examples, examples) for _, examples, loss in self._contributions if loss is not None]
        rows = sum(examples for _, examples in known)
        return math.fsum(total for total, _ in known) / rows if rows else None

    def record(self, **more: Any) -> RoundRecord:
        """The attempt so far as a line of history."""
        return RoundRecord(
            round=self.opened.round,
            attempt=self.opened.attempt,
            clients=tuple(sorted({client for clients, *_ in self._contributions for client in clients})),
            examples=sum(examples for _, examples, _ in self._contributions),
            loss=self._loss(),
            seconds=time.monotonic() - self._began,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            refusals=tuple(self.refusals),
            epsilon=dict(sorted(self.epsilon.items())),
            releases=self.releases,
            clip=self.clip,
            **more,
        )
