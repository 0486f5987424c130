"""The way from one run to the agents: `fedkit.rounds.assignment.Transport` over their sessions."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import structlog

from fedkit.crypto.chunks import Scheme
from fedkit.crypto.ring import Words
from fedkit.errors import Refused
from fedkit.protos import agents_pb2 as pb
from fedkit.protos.convert import assignment_to_proto, voucher_to_proto
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.server.adder import AddingProcesses
from fedkit.server.attendance import Attendance, Away
from fedkit.server.errands import Errand, Published
from fedkit.server.metrics import Metrics
from fedkit.spool import Room, Spares, Spool, Spooled
from fedkit.weights import Weights
from fedkit.work import Answer

__all__ = ["Fates", "RunTransport", "Terms"]

T = TypeVar("T")

_SMALL_BYTES = 4 << 20
_SPARES = 64

log = structlog.get_logger("fedkit.server")


class Fates(Protocol):
    """Where it is written down what became of each result."""

    def settle(self, accepted: list[str], dropped: list[str]) -> None:
        """These results stand, those are undone: durable when this returns."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What an agent must know of a run beside each assignment."""

    run: str
    task: str
    strategy: str
    holds_out_valid: bool
    aggregation: str


class RunTransport:
    """Asks agents on behalf of one run. `room` or `folder` takes the answers' bytes as they arrive."""

    def __init__(
        self,
        terms: Terms,
        attendance: Attendance,
        fates: Fates,
        folder: Path,
        metrics: Metrics,
        room: Room,
        adder: AddingProcesses,
    ) -> None:
        self.waits_for = ""  # for people: who is missing before the run can go on
        self._terms = terms
        self._attendance = attendance
        self._fates = fates
        self._folder = folder
        self._metrics = metrics
        self._room = room
        self._adder = adder
        self._sums = itertools.count()
        self._asked: dict[str, str] = {}
        self._model_bytes = 0
        self._published: weakref.WeakValueDictionary[int, Published] = weakref.WeakValueDictionary()
        folder.mkdir(parents=True, exist_ok=True)
        if terms.aggregation == "bfv":
            adder.start()
        self.spares = Spares(folder, _SPARES)

    def present(self) -> list[str]:
        """The clients here that know the run's task."""
        return self._attendance.present(self._terms.task)

    def members(self) -> Mapping[str, str]:
        """The keys of the roster under which this coordinator asks."""
        roster = self._attendance.roster
        return {} if roster is None else roster.members

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    async def sleep_until(self, deadline: float) -> None:
        """Returns when the clock has reached `deadline`."""
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def aside(self, phase: Literal["fold", "commit"], work: Callable[[], T]) -> T:
        """What `work()` returns: small models at once, large ones from a thread, so that streams go on meanwhile."""
        with self._metrics.seconds.labels(phase=phase).time():
            return work() if self._model_bytes <= _SMALL_BYTES else await asyncio.to_thread(work)

    async def add_up(
        self, scheme: Scheme, fingerprint: bytes, values: int, uploads: Mapping[str, Weights]
    ) -> tuple[Words, dict[str, str]]:
        """The sum of uploads, added in a process of its own."""
        paths = {name: _path_of(weights) for name, weights in uploads.items()}
        out = self._folder / f"{next(self._sums)}.sum"
        with self._metrics.seconds.labels(phase="fold").time():
            return await self._adder.add_up(scheme, fingerprint, values, paths, out)

    async def assemble(self, least: int) -> None:
        """Returns when `least` clients are here and nobody is missing who went away a moment ago."""
        began = self.now()
        try:
            while True:
                here, missing = self.present(), self._attendance.missing(self._terms.task)
                if len(here) >= least and not missing:
                    return
                self._say_waiting(len(here), least, sorted(missing))
                await self._attendance.change(min(missing.values(), default=None))
        finally:
            self.waits_for = ""
            self._metrics.seconds.labels(phase="wait").observe(self.now() - began)

    def _say_waiting(self, here: int, least: int, missing: list[str]) -> None:
        text = f"{here} of at least {least} clients are here"
        if missing:
            text += f"; {', '.join(missing[:5])} may be back in a moment"
        if text != self.waits_for:
            self.waits_for = text
            log.info("waiting for clients", run=self._terms.run, here=here, least=least, missing=missing[:20])

    async def perform(self, assignment: Assignment, parcel: Parcel, *, race: bool) -> Answer:  # noqa: ARG002
        """The client's answer, over as many sessions as it takes; raises `Refused`."""
        errand = self._errand(assignment, parcel)
        self._asked[assignment.id] = assignment.client
        self._attendance.over.pop(assignment.id, None)
        try:
            while True:
                session = await self._attendance.session(assignment.client)
                self._vouch(errand)
                try:
                    with self._metrics.seconds.labels(phase="answer").time():
                        return await session.ask(errand)
                except Away:
                    errand.cut_off()
        except Refused as refused:
            self._refused(assignment, refused)
            raise
        finally:
            errand.discard()
            if assignment.id in self._asked:
                self._attendance.over[assignment.id] = assignment.client, errand.why_over

    def _errand(self, assignment: Assignment, parcel: Parcel) -> Errand:
        published = self._published.get(id(parcel))  # which holds the parcel, so that its id stays its own
        if published is None:
            published = self._published[id(parcel)] = Published(parcel)
        self._model_bytes = published.payload_bytes
        message = assignment_to_proto(
            assignment,
            parcel,
            published.digest,
            task=self._terms.task,
            strategy=self._terms.strategy,
            holds_out_valid=self._terms.holds_out_valid,
        )
        message.aggregation = self._terms.aggregation
        if self._attendance.roster is not None:
            message.roster_version = self._attendance.roster.version
            message.roster_digest = bytes.fromhex(self._attendance.roster.digest)
        return Errand(assignment, message, published, self._folder, self.spares, self._room)

    def _vouch(self, errand: Errand) -> None:
        """Adds the word of the others who are asked, as it stands now."""
        vouchers = self._attendance.vouchers(errand.assignment.client, errand.assignment.cohort)
        errand.message.ClearField("cohort")
        errand.message.cohort.extend(map(voucher_to_proto, vouchers))

    def _refused(self, assignment: Assignment, refused: Refused) -> None:
        self._metrics.refusals.labels(reason=refused.reason.value).inc()
        detail = f": {refused.detail}" if refused.detail else ""
        run = self._terms.run.rpartition(".")[0]
        self._attendance.refusals[assignment.client] = f"{refused.reason.value} in {run}{detail}"
        log.warning(
            "refused",
            run=assignment.run,
            round=assignment.round,
            client=assignment.client,
            assignment=assignment.id,
            reason=refused.reason.value,
        )

    def committed(self, accepted: list[str], dropped: list[str]) -> None:
        """Writes down what became of these results and tells the clients that are here; others hear when they come."""
        if not accepted and not dropped:
            return
        self._fates.settle(accepted, dropped)
        news: defaultdict[str, pb.Settlement] = defaultdict(pb.Settlement)
        for key in accepted:
            news[self._forget(key)].accepted.append(key)
        for key in dropped:
            news[self._forget(key)].dropped.append(key)
        for client, settlement in news.items():
            session = self._attendance.sessions.get(client)
            if session is not None:
                session.tell(settlement)

    def release(self) -> None:
        """The run is over: what is still out counts for nothing."""
        self.committed([], list(self._asked))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _forget(self, key: str) -> str:
        self._attendance.over.pop(key, None)
        path = self._folder / key
        self.spares.give(path)
        Spool.forget(path)
        return self._asked.pop(key, "")


def _path_of(weights: Weights) -> Path:
    """The file in which an upload lies, or is put now."""
    assert isinstance(weights, Spooled)  # as everything that an agent sends
    weights.payload.save()
    return weights.payload.path
