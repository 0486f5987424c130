"""The way to simulated clients. Time is virtual: it decides who comes first where that matters, and costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias, TypeVar

import numpy as np

from fedkit import rng
from fedkit.crypto.adding import add_up
from fedkit.crypto.chunks import Scheme
from fedkit.crypto.ring import Words
from fedkit.errors import Reason, Refused
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.simulation.roster import SimulatedRoster
from fedkit.simulation.workers import Workers
from fedkit.weights import Weights
from fedkit.work import Answer

__all__ = ["Latency", "SimulatedTransport"]

T = TypeVar("T")

Latency: TypeAlias = Callable[[Assignment], float]  # virtual seconds from question to answer; math.inf: never


_PATIENCE = 24  # turns of the event loop in which a strategy reacts to an answer


class _Turn:
    """One answer on its way: when it is due, and whether it has been worked out."""

    def __init__(self, due: float, order: int) -> None:
        self.due, self.order = due, order
        self.ready = False
        self.given: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __lt__(self, other: _Turn) -> bool:
        return (self.due, self.order) < (other.due, other.order)


class SimulatedTransport:
    """Implements `fedkit.rounds.assignment.Transport` over clients in this process or in worker processes.

    Answers are worked out as soon as there is a free place and given in the order of their virtual times. Where that
    order decides something (`race`), each client has its own seeded speed; everywhere else answers come in the order
    asked, so that they can be folded at once. `latency` overrides both.
    """

    def __init__(self, clients: Sequence[str], workers: Workers, *, seed: int, latency: Latency | None = None) -> None:
        self._clients = sorted(clients)
        self._workers = workers
        self._seed = seed
        self._latency = latency
        self._clock = 0.0
        self._order = itertools.count()
        self._due: dict[str, float] = {}
        self._asked: dict[str, str] = {}
        self.restart()

    def restart(self) -> None:
        """After a crash of whoever asked: nobody waits any more, and virtual time goes on."""
        self._turns: list[_Turn] = []
        self._places = asyncio.Semaphore(self._workers.slots)
        self._looking = False

    def present(self) -> list[str]:
        """All clients, always."""
        return self._clients

    def members(self) -> Mapping[str, str]:
        """Everybody is a member."""
        return SimulatedRoster()

    async def assemble(self, least: int) -> None:
        """Returns at once: who is simulated is there."""

    async def aside(self, phase: Literal["fold", "commit"], work: Callable[[], T]) -> T:  # noqa: ARG002
        """What `work()` returns, worked out here: time is virtual, so nobody waits."""
        return work()

    async def add_up(
        self, scheme: Scheme, fingerprint: bytes, values: int, uploads: Mapping[str, Weights]
    ) -> tuple[Words, dict[str, str]]:
        """The sum of uploads, added here."""
        total = np.empty(scheme.words_of_sum(values), dtype="<u4")
        words = {name: weights.vector.view("<u4") for name, weights in uploads.items()}
        return total, add_up(scheme, fingerprint, values, words, total)

    def now(self) -> float:
        """Virtual seconds."""
        return self._clock

    async def sleep_until(self, deadline: float) -> None:
        """Returns when every answer due before `deadline` has been given."""
        with self._turn(deadline) as turn:
            self._is_ready(turn)
            await turn.given

    async def perform(self, assignment: Assignment, parcel: Parcel, *, race: bool) -> Answer:
        """The client's answer, when its virtual time has come; raises `Refused`."""
        self._asked[assignment.id] = assignment.client
        if not race and self._latency is None and self._workers.in_order:
            async with self._places:
                answer = await self._workers.perform(assignment, parcel)
                await asyncio.sleep(0)  # a place is held until the answer is folded, which bounds memory
                return answer
        due = self._due.setdefault(assignment.id, self._clock + self._seconds(assignment, race))
        if math.isinf(due):
            raise Refused(Reason.LOST, f"{assignment.client} went away")
        with self._turn(due) as turn:
            async with self._places:
                outcome = await self._worked_out(assignment, parcel)
                self._is_ready(turn)
                if not race:  # as above
                    await turn.given
            await turn.given
        if isinstance(outcome, Refused):
            raise outcome
        return outcome

    async def _worked_out(self, assignment: Assignment, parcel: Parcel) -> Answer | Refused:
        try:
            return await self._workers.perform(assignment, parcel)
        except Refused as refused:
            return refused

    def _seconds(self, assignment: Assignment, race: bool) -> float:
        if self._latency is not None:
            return self._latency(assignment)
        if not race:
            return 0.0
        return float(rng.generator(self._seed, "speed", assignment.client).lognormal())

    @contextlib.contextmanager
    def _turn(self, due: float) -> Iterator[_Turn]:
        """A place in the order of answers; whoever leaves without having had it stands in nobody's way."""
        turn = _Turn(due, next(self._order))
        heapq.heappush(self._turns, turn)
        try:
            yield turn
        finally:
            turn.given.cancel()
            self._look()

    def _is_ready(self, turn: _Turn) -> None:
        turn.ready = True
        self._look()

    def _look(self) -> None:
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._give, _PATIENCE)

    def _give(self, patience: int) -> None:
        """Gives what is due. Before time moves on, whoever waited for the last answer may ask for more."""
        self._looking = False
        while self._turns and (self._turns[0].given.done() or self._turns[0].ready):
            turn = self._turns[0]
            if turn.given.done():
                heapq.heappop(self._turns)
                continue
            if turn.due > self._clock and patience:
                self._looking = True
                asyncio.get_running_loop().call_soon(self._give, patience - 1)
                return
            heapq.heappop(self._turns)
            self._clock = max(self._clock, turn.due)
            turn.given.set_result(None)
            patience = _PATIENCE

    def committed(self, accepted: list[str], dropped: list[str]) -> None:
        """Tells each client which of its results stand and which are undone."""
        news: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for which, ids in enumerate((accepted, dropped)):
            for key in ids:
                self._due.pop(key, None)
                client = self._asked.pop(key, None)
                if client is not None:
                    news[client][which].append(key)
        self._workers.settle(dict(news))
