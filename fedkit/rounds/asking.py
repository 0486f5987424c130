"""How a run asks: questions become assignments, their outcomes are journaled, replays are answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, TypeAlias, TypeVar

import numpy as np

from fedkit.aggregation import Fold
from fedkit.config import Participation
from fedkit.errors import ConfigError, Refused, RoundAbandoned
from fedkit.rounds.assignment import (
    Assignment,
    Clip,
    Parcel,
    Returns,
    Sealing,
    Transport,
)
from fedkit.rounds.call import GroupCall, Refusal
from fedkit.rounds.checks import inspect
from fedkit.rounds.drive import drive
from fedkit.rounds.journal import Entry, Journal, OpenRound
from fedkit.rounds.open import Progress
from fedkit.rounds.question import Question, RunIdentity, too_few
from fedkit.work import Answer, Update, Work

__all__ = ["Asking", "Each"]

A = TypeVar("A", bound=Answer)
Each: TypeAlias = Callable[[str, Answer], None]


class Asking:
    """The calls of one run, round by round, over a `Transport` and a `Journal`."""

    def __init__(self, identity: RunIdentity, transport: Transport, journal: Journal) -> None:
        self.identity = identity
        self.transport = transport
        self.journal = journal
        self.round = 0
        self._attempt = 1
        self._now: Progress | None = None

    def enter(self, round: int, attempt: int = 1) -> None:
        """`round` is next; nothing is journaled until it asks for something."""
        self.round, self._attempt, self._now = round, attempt, None

    @property
    def now(self) -> Progress:
        """The open round; it begins, and its client list is journaled, when it is first needed."""
        if self._now is None:
            opened = self.journal.open()
            if opened is None or opened.round != self.round:
                opened = OpenRound(self.round, self._attempt, tuple(sorted(self.transport.present())), ())
                self.journal.begin(opened.round, opened.attempt, opened.clients)
            self._now = Progress(self.identity.seed, opened)
        return self._now

    @property
    def clients(self) -> tuple[str, ...]:
        """The round's journaled client list, sorted by name."""
        return self.now.opened.clients

    @property
    def rng(self) -> np.random.Generator:
        """A generator seeded by (run seed, round, attempt)."""
        return self.now.rng

    def _ask(
        self,
        work: Work,
        returns: Returns,
        parcel: Parcel,
        cohort: Collection[str],
        clip: Clip | None = None,
        sealing: Sealing | None = None,
    ) -> Question:
        unknown = sorted(set(cohort) - set(self.clients))
        if unknown:
            there = ", ".join(self.clients[:5]) + (", ..." if len(self.clients) > 5 else "")
            raise ConfigError(f"round {self.round}: {unknown[0]!r} is not one of the round's clients ({there})")
        return Question(self.identity, self.now, work, returns, parcel, list(cohort), clip, sealing=sealing)

    async def _group(
        self,
        question: Question,
        fold: Fold[Any],
        rule: Participation,
        *,
        each: Each | None = None,
        optional: bool = False,
    ) -> None:
        """One call from its first question to its journaled end; an `optional` one may end without any answer."""
        async with self.now.replay.call(question.key, question.label) as entry:
            call = self._call(question, rule, entry)
            if call is not None:
                await self._drive(call, question, fold, each)
        fold.close()
        refusals = [Refusal(client, why.reason, why.detail) for client, why in fold.rejected.items()]
        refusals += entry.refusals if entry else call.refusals if call else []
        self.now.refusals += refusals
        if call is not None and len(fold.clients) < call.quorum and (entry or not optional):
            raise RoundAbandoned(too_few(self.round, call, refusals))
        if entry is None and call is not None:
            accepted = tuple((client, question.ids[client]) for client in call.accepted)
            self.journal.note(Entry("call", question.key, question.label, accepted, tuple(call.refusals)))

    def _call(self, question: Question, rule: Participation, entry: Entry | None) -> GroupCall | None:
        """A new call, or on replay one to exactly those who were accepted then (None where nobody was)."""
        if entry is None:
            return self._new_call(question, rule)
        names = [client for client, _ in entry.accepted]
        return GroupCall(names, Participation(quorum=len(names)), self.transport.now()) if names else None

    def _new_call(self, question: Question, rule: Participation, least: int = 1) -> GroupCall:
        return GroupCall(question.cohort, rule, self.transport.now(), of=len(self.clients), least=least)

    async def _drive(self, call: GroupCall, question: Question, fold: Fold[Any], each: Each | None) -> None:
        for client in set(question.cohort) - set(call.cohort):
            fold.add(client, None)

        def accept(client: str, answer: Answer) -> None:
            self._take(client, question.ids[client], answer)
            if each is not None:
                each(client, answer)
            fold.add(client, answer)

        perform = self._performer(call, question)
        await drive(call, self.transport, perform, question.norm, accept, lambda client: fold.add(client, None))

    def _performer(self, call: GroupCall, question: Question) -> Callable[[str], Any]:
        race = call.is_race

        async def perform(client: str) -> Answer:
            return await self._perform(question.assignment(client), question.parcel, race=race)

        return perform

    async def _singly(self, question: Question, call: GroupCall, *, is_over: bool) -> AsyncIterator[tuple[str, Update]]:
        """Those journaled first, in their order; then the others as they come, unless the call is over."""
        asked = set(question.ids.values())
        before = [entry.accepted[0][0] for key, entry in self.now.replay.updates.items() if key in asked]
        for client in before:
            answer = await self._again(question, client)
            call.answered(client, self.transport.now())
            yield client, self._take_update(client, question.ids[client], answer)
        if not is_over:
            async for item in self._newly(question, call):
                yield item

    async def _again(self, question: Question, client: str) -> Answer:
        """An answer that was accepted before; raises `RoundAbandoned` where it is not to be had any more."""
        try:
            return await self._perform(question.assignment(client), question.parcel)
        except Refused as refused:
            text = f"round {self.round}: {client} had answered {question.label} before, and now refuses: {refused}"
            raise RoundAbandoned(text) from refused

    async def _newly(self, question: Question, call: GroupCall) -> AsyncIterator[tuple[str, Update]]:
        """Answers as they come, each journaled before it is given."""
        inbox: asyncio.Queue[tuple[str, Answer] | None] = asyncio.Queue()
        perform = self._performer(call, question)
        driving = asyncio.create_task(self._drive_into(inbox, call, question, perform))
        try:
            while (item := await inbox.get()) is not None:
                client, answer = item
                key = question.ids[client]
                self.journal.note(Entry("update", key, f"update from {client}", ((client, key),)))
                yield client, self._take_update(client, key, answer)
            await driving
        finally:
            driving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await driving

    async def _drive_into(
        self, inbox: asyncio.Queue[Any], call: GroupCall, question: Question, perform: Callable[[str], Any]
    ) -> None:
        try:
            await drive(call, self.transport, perform, question.norm, lambda *item: inbox.put_nowait(item), _ignored)
        finally:
            inbox.put_nowait(None)

    async def _perform(self, assignment: Assignment, parcel: Parcel, *, race: bool = True) -> Answer:
        """One checked answer: from the journal where it is kept, else from the client."""
        now = self.now
        now.sent.append(assignment.id)
        kept = self.journal.answer(assignment.id)
        if kept is not None:
            return kept
        now.bytes_down += parcel.payload_bytes + (len(assignment.masking.message) if assignment.masking else 0)
        answer = await self.transport.perform(assignment, parcel, race=race)
        inspect(answer, assignment.returns, assignment.answer_manifest(parcel.model.manifest))
        return answer

    def _take(self, client: str, key: str, answer: A) -> A:
        if isinstance(answer, Update) and answer.epsilon is not None:
            self.now.epsilon[client] = answer.epsilon
        self.now.accepted.append(key)
        self.now.bytes_up += answer.payload_bytes
        self.journal.keep(key, answer)
        return answer

    def _take_update(self, client: str, key: str, answer: Answer) -> Update:
        assert isinstance(answer, Update)  # inspected against the assignment
        return self._take(client, key, answer)


def _ignored(_: str) -> None:
    """Single updates are given as they come; who brings none is in the call's refusals."""
