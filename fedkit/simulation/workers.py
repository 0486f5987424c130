"""Where simulated clients work: in this process, or each in its own one of N worker processes.

A client always works in the same place, so what it keeps between rounds stays there.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from fedkit.errors import ConfigError, RunError
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.simulation.roster import simulated_box, simulated_seat
from fedkit.task import Task
from fedkit.trainer.client import LocalClient, MemoryStore
from fedkit.trainer.trainer import Trainer
from fedkit.work import Answer

__all__ = ["InProcess", "Processes", "Setting", "Workers"]

News: TypeAlias = Mapping[str, tuple[list[str], list[str]]]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a worker needs to know to be any client of a run."""

    task: Task
    seed: int
    device: str = "auto"
    holds_out_valid: bool = False
    keeps_answers: bool = False
    threads: int = 1


class Workers(Protocol):
    """Clients at work: `slots` answers may be under way at once; `in_order` says that they come in the order asked."""

    slots: int
    in_order: bool

    async def perform(self, assignment: Assignment, parcel: Parcel) -> Answer:
        """One client's answer; raises `Refused`."""
        ...

    def settle(self, news: News) -> None:
        """For each client (accepted, dropped) assignment ids of a round that is over."""
        ...

    def failure(self) -> Exception | None:
        """An error of the task's own code, with its traceback, where it happened in this process."""
        ...

    def close(self) -> None:
        """Ends all work."""
        ...


class InProcess:
    """All clients in this process, one after the other, sharing one model on one device."""

    slots = 8  # answers that may wait to be folded; one client works at a time
    in_order = True

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._trainer = Trainer(
            setting.task, setting.seed, device=setting.device, holds_out_valid=setting.holds_out_valid
        )
        self.clients: dict[str, LocalClient] = {}

    def answer(self, assignment: Assignment, parcel: Parcel) -> Answer:
        """One client's answer; raises `Refused`."""
        name = assignment.client
        if name not in self.clients:
            store = MemoryStore(keeps_answers=self._setting.keeps_answers)
            self.clients[name] = LocalClient(name, self._trainer, store, simulated_seat(name), simulated_box(name))
        return self.clients[name].perform(assignment, parcel)

    async def perform(self, assignment: Assignment, parcel: Parcel) -> Answer:
        """One client's answer; raises `Refused`."""
        return self.answer(assignment, parcel)

    def settle(self, news: News) -> None:
        """For each client (accepted, dropped) assignment ids of a round that is over."""
        for name, (accepted, dropped) in news.items():
            if name in self.clients:
                self.clients[name].settle(accepted, dropped)

    def failure(self) -> Exception | None:
        """An error of the task's own code, with its traceback."""
        return next((client.failure for client in self.clients.values() if client.failure is not None), None)

    def close(self) -> None:
        """Nothing runs on its own."""


class Processes:
    """Clients spread over N processes by a hash of their names. `threads` torch threads in each, as in the caller."""

    in_order = False

    def __init__(self, setting: Setting, count: int) -> None:
        import cloudpickle
        import loky

        try:
            packed = cloudpickle.dumps(setting)
        except Exception as error:  # any object of the task may refuse
            text = f"workers={count}: the task cannot be sent to another process ({error}); use workers=1"
            raise ConfigError(text) from error
        self.slots = 2 * count
        self._pools = [
            loky.ProcessPoolExecutor(max_workers=1, initializer=_begin, initargs=(packed,), timeout=None)
            for _ in range(count)
        ]

    def _pool(self, client: str) -> Any:
        return self._pools[zlib.crc32(client.encode()) % len(self._pools)]

    async def perform(self, assignment: Assignment, parcel: Parcel) -> Answer:
        """One client's answer; raises `Refused`, or `RunError` where a worker process died."""
        from loky.process_executor import BrokenProcessPool

        try:
            future = self._pool(assignment.client).submit(_answer, assignment, parcel)
            return await asyncio.wrap_future(future)
        except BrokenProcessPool as error:
            raise RunError("a worker process died, most likely out of memory; use fewer workers") from error

    def settle(self, news: News) -> None:
        """For each client (accepted, dropped) assignment ids of a round that is over."""
        for pool in self._pools:
            mine = {client: ids for client, ids in news.items() if self._pool(client) is pool}
            if mine:
                pool.submit(_settle, mine)

    def failure(self) -> Exception | None:
        """None: the traceback stayed in the worker process."""
        return None

    def close(self) -> None:
        """Ends the processes."""
        for pool in self._pools:
            pool.shutdown(wait=True, kill_workers=True)


_place: InProcess | None = None  # of a worker process, set when it begins


def _begin(packed: bytes) -> None:
    import cloudpickle

    global _place
    setting: Setting = cloudpickle.loads(packed)
    torch.set_num_threads(setting.threads)
    _place = InProcess(setting)


def _answer(assignment: Assignment, parcel: Parcel) -> Answer:
    assert _place is not None  # the initializer has run
    return _place.answer(assignment, parcel)


def _settle(news: News) -> None:
    assert _place is not None  # the initializer has run
    _place.settle(news)
