"""Drives one group call over a transport: asks, waits, checks, and hands each accepted answer on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from fedkit.errors import Refused
from fedkit.rounds.assignment import Transport
from fedkit.rounds.call import Ask, Command, GroupCall, State
from fedkit.work import Answer

__all__ = ["drive"]

Perform: TypeAlias = Callable[[str], Awaitable[Answer]]
Norm: TypeAlias = Callable[[Answer], float]
Accept: TypeAlias = Callable[[str, Answer], None]
Resolve: TypeAlias = Callable[[str], None]


async def drive(
    call: GroupCall, transport: Transport, perform: Perform, norm: Norm, accept: Accept, resolve: Resolve
) -> None:
    """Runs `call` to its end, asking those who have not answered yet.

    `perform(client)` brings a checked answer or raises `Refused`; `norm(answer)` says how far it would move the model;
    `accept(client, answer)` takes each answer that counts at once; `resolve(client)` learns of each client that will
    bring none.
    """
    measure = norm if math.isfinite(call.max_update_norm) else _unmeasured
    async with _Desk(transport, perform, call.deadline) as desk:
        desk.obey(call.start())
        seen = 0
        while call.state is State.OPEN:
            client, outcome = await desk.next()
            desk.obey(_take(call, client, outcome, transport.now(), measure, accept))
            for refusal in call.refusals[seen:]:
                resolve(refusal.client)
            seen = len(call.refusals)


def _unmeasured(_: Answer) -> float:
    return 0.0


def _take(
    call: GroupCall, client: str, outcome: Answer | Refused | None, now: float, norm: Norm, accept: Accept
) -> list[Command]:
    if outcome is None:
        return call.tick(now)
    if isinstance(outcome, Refused):
        return call.refused(client, outcome.reason, now, outcome.detail)
    before = len(call.accepted)
    commands = call.answered(client, now, norm=norm(outcome))
    if len(call.accepted) > before:
        accept(client, outcome)
    return commands


class _Desk:
    """The answers on their way, and the clock."""

    def __init__(self, transport: Transport, perform: Perform, deadline: float) -> None:
        self._perform = perform
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._inbox: asyncio.Queue[tuple[str, Answer | Refused | None]] = asyncio.Queue()
        self._transport = transport
        self._deadline = deadline
        self._error: BaseException | None = None

    async def __aenter__(self) -> _Desk:
        if not math.isinf(self._deadline):
            self._tasks[""] = asyncio.create_task(self._ring())
        return self

    async def __aexit__(self, *_: object) -> None:
        left = [task for task in self._tasks.values() if not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self._tasks.clear()  # a cancelled one holds its frames, which hold this desk

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Ask):
                task = self._tasks[command.client] = asyncio.create_task(self._ask(command.client))
                task.add_done_callback(self._failed)
            else:
                self._tasks[command.client].cancel()

    async def next(self) -> tuple[str, Answer | Refused | None]:
        item = await self._inbox.get()
        if self._error is not None:
            raise self._error
        return item

    def _failed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._error = task.exception()
            self._inbox.put_nowait(("", None))

    async def _ask(self, client: str) -> None:
        try:
            self._inbox.put_nowait((client, await self._perform(client)))
        except Refused as refused:
            self._inbox.put_nowait((client, refused.with_traceback(None)))

    async def _ring(self) -> None:
        await self._transport.sleep_until(self._deadline)
        self._inbox.put_nowait(("", None))
