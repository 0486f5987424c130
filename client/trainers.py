"""Worker processes as the agent sees them: a job in, a result out, stopped within seconds when called off."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import structlog

from fedkit.client.nursery import Nursery
from fedkit.crypto.chunks import Scheme
from fedkit.errors import Reason, Refused
from fedkit.rounds.sealing import Letters
from fedkit.rounds.seat import Cover
from fedkit.weights import Manifest

__all__ = ["Job", "KeyJob", "Trainers"]

log = structlog.get_logger("fedkit.client")

Progress: TypeAlias = Callable[[int, int], None]
Reserve: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]  # what a private job may spend, and the answer to it
T = TypeVar("T")

_LENGTH = struct.Struct("<I")
_STOP_S = 3.0  # a worker that has not stopped by itself is killed


@dataclass(frozen=True, slots=True)
class Job:
    """One assignment with the files it needs and those it writes."""

    id: str
    assignment: bytes  # serialised
    model: tuple[Path, Manifest] | None
    state: Path | None
    out: Path
    spare: Path  # may be there, and may be made into `out`
    out_state: Path
    cover: Cover | None = None  # that goes on the answer, or opens the sum
    letters: Letters = Letters()  # for what is sealed

    def message(self, known: set[str]) -> dict[str, Any]:
        """The job as a worker reads it that has seen the manifests with the digests `known`; adds its own to them."""
        found: dict[str, Any] = {"id": self.id, "assignment": base64.b64encode(self.assignment).decode()}
        found |= {"state": None if self.state is None else str(self.state), "model": None}
        found |= {"out": str(self.out), "spare": str(self.spare), "out_state": str(self.out_state)}
        if self.cover is not None:
            found["cover"] = [[base64.b64encode(one).decode() for one in some] for some in self.cover.secrets]
        found["letters"] = self.letters.to_dict()
        if self.model is not None:
            path, manifest = self.model
            found |= {"model": str(path), "manifest_digest": manifest.digest}
            if manifest.digest not in known:
                known.add(manifest.digest)
                found["manifest"] = manifest.to_json()
        return found


@dataclass(frozen=True, slots=True)
class KeyJob:
    """That a worker makes the key of an encrypted sum, which native code does."""

    id: str
    scheme: Scheme

    def message(self, _: set[str]) -> dict[str, Any]:
        """The job as a worker reads it."""
        return {"id": self.id, "make_key": astuple(self.scheme)}


class _Died(Exception):
    """The worker process ended before it answered."""


def _called_off(_: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job that nobody waits for any more."""
    return {"refused": Reason.CANCELLED.value, "detail": "called off"}


class _Worker:
    """One worker process and the socket to it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int) -> None:
        self._reader = reader
        self._writer = writer
        self._pid = pid
        self.known: set[str] = set()

    @property
    def is_over(self) -> bool:
        """Whether the process has ended, as far as anybody has noticed."""
        return self._reader.at_eof() or self._writer.is_closing()

    def send(self, message: dict[str, Any]) -> None:
        raw = json.dumps(message).encode()
        self._writer.write(_LENGTH.pack(len(raw)) + raw)

    async def outcome(self, key: str, progress: Progress, reserve: Reserve = _called_off) -> dict[str, Any]:
        """The outcome of job `key`; raises `_Died`."""
        while True:
            try:
                head = await self._reader.readexactly(_LENGTH.size)
                message: dict[str, Any] = json.loads(await self._reader.readexactly(_LENGTH.unpack(head)[0]))
            except (asyncio.IncompleteReadError, ConnectionError):
                raise _Died from None
            if message["id"] == key and "done" in message:
                progress(message["done"], message["total"])
            elif "reserve" in message:
                self.send({"reserved": reserve(message["reserve"])})
            elif message["id"] == key:
                return message

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._writer.close()


class Trainers:
    """`count` worker processes; a job waits until one is free."""

    def __init__(self, nursery: Nursery, count: int) -> None:
        self._nursery = nursery
        self._free: asyncio.Queue[_Worker | None] = asyncio.Queue()
        self._alive: set[_Worker] = set()
        for _ in range(count):
            self._free.put_nowait(None)

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[Callable[[Job | KeyJob, Progress, Reserve], Any]]:
        """A free worker: `perform(job, progress, reserve)` gives the outcome or raises `Refused`."""
        worker = await self._free.get()
        slot = [worker]
        try:
            yield lambda job, progress, reserve: self._perform(slot, job, progress, reserve)
        finally:
            self._free.put_nowait(slot[0])

    async def _perform(
        self, slot: list[_Worker | None], job: Job | KeyJob, progress: Progress, reserve: Reserve
    ) -> dict[str, Any]:
        worker = slot[0] = await self._alive_or_new(slot[0])
        worker.send(job.message(worker.known))
        try:
            return await worker.outcome(job.id, progress, reserve)
        except _Died:
            slot[0] = None
            self._end(worker)
            detail = "the training process died, most likely out of memory"
            raise Refused(Reason.FAILED, detail) from None
        except asyncio.CancelledError:
            slot[0] = await _to_its_end(self._stop(worker, job))
            raise

    async def _alive_or_new(self, worker: _Worker | None) -> _Worker:
        if worker is not None and worker.is_over:  # it was killed while it had nothing to do
            self._end(worker)
            worker = None
        return worker or await self._start()

    async def _start(self) -> _Worker:
        sock, pid = await asyncio.to_thread(self._nursery.fork)
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=1 << 26)
        worker = _Worker(reader, writer, pid)
        self._alive.add(worker)
        return worker

    async def _stop(self, worker: _Worker, job: Job | KeyJob) -> _Worker | None:
        """The worker, once it has stopped by itself; None where it had to be killed."""
        worker.send({"cancel": job.id})
        try:
            await asyncio.wait_for(worker.outcome(job.id, lambda *_: None), _STOP_S)
        except (TimeoutError, _Died):
            log.warning("training process killed", assignment=job.id)
            self._end(worker)
            return None
        return worker

    def _end(self, worker: _Worker) -> None:
        worker.kill()
        self._alive.discard(worker)

    def close(self) -> None:
        """Ends every worker."""
        for worker in list(self._alive):
            self._end(worker)
        self._nursery.close()


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, however often whoever waits for it is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    return task.result()
