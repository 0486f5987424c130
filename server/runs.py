"""All runs of a coordinator: begun, taken up again after a restart, watched, ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from torch import nn

from fedkit import packing, registry
from fedkit.config import parse
from fedkit.errors import FedkitError, Reason, RunError, StorageError
from fedkit.history import History
from fedkit.privacy.submission import fewest, require_privacy, sharing_for, shield_for, with_aggregation
from fedkit.rounds.call import Refusal
from fedkit.rounds.conduct import Best, Outcome, Plan, conduct, holds_out_valid
from fedkit.rounds.journal import RoundRecord
from fedkit.runfile import RunFile
from fedkit.server.adder import AddingProcesses
from fedkit.server.attendance import Attendance
from fedkit.server.blobs import Blobs
from fedkit.server.database import Database, StoredRun
from fedkit.server.journal import SqliteJournal
from fedkit.server.metrics import Metrics
from fedkit.server.pages import Told
from fedkit.server.transport import RunTransport, Terms
from fedkit.spool import Room
from fedkit.status import ClientStatus, JobStatus, RunStatus
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.weights import Weights

__all__ = ["Runs"]

log = structlog.get_logger("fedkit.server")

_DISK_S = 15.0  # between two tries to go on with a disk that did not do its part
_ROOM_BYTES = 256 << 20  # for answers of all runs that stay in memory


@dataclass(eq=False)
class _Live:
    """A run that goes on."""

    name: str
    transport: RunTransport
    journal: SqliteJournal
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    watchers: set[asyncio.Queue[RoundRecord | None]] = field(default_factory=set)

    def tell(self, record: RoundRecord | None) -> None:
        for watcher in self.watchers:
            watcher.put_nowait(record)


class Runs:
    """Implements `fedkit.server.runbook.RunBook` over a database, models in files, and the clients that attend.

    `tasks` are those this process imported beside the registered ones.
    """

    def __init__(
        self,
        folder: Path,
        database: Database,
        attendance: Attendance,
        metrics: Metrics,
        tasks: Mapping[str, Task],
    ) -> None:
        self._folder = folder
        self._database = database
        self._blobs = Blobs(folder / "models")
        self._attendance = attendance
        self._metrics = metrics
        self._tasks = tasks
        self._room = Room(_ROOM_BYTES)
        self._adder = AddingProcesses()
        self._live: dict[str, _Live] = {}

    # -- beginning and ending ------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Takes up every run that is not over."""
        for stored in self._database.runs():
            if stored.is_over:
                continue
            try:
                self._begin(stored)
            except FedkitError as error:
                log.error("run cannot go on", run=stored.name, error=type(error).__name__)
                self._database.finish_run(stored.name, "failed", str(error))
            else:
                log.info("run taken up", run=stored.name)

    def submit(self, file: RunFile, init: Weights | None) -> RunStatus:
        """Begins a run; raises `ConfigError`, `TaskError`, `IncompatibleStrategy`, `NameTaken`."""
        strategy, task = file.build_strategy(), self._task(file)
        fresh = task.build(file.run.seed)
        strategy.check(task, fresh)
        file = self._settled(file, strategy, task, fresh)
        strategy.require_clients(_min_clients(file, strategy))
        require_privacy(strategy, task, fresh, file.privacy, _min_clients(file, strategy))
        if init is not None:
            Weights.from_module(fresh, task.travels).manifest.require_shapes(init.manifest, "init")
        with self._blobs.lock:
            digest = None if init is None else self._blobs.put(init)
            stored = self._database.add_run(file.run.name, file.to_dict(), digest)
        self._begin(stored)
        return self._status(stored)

    def _settled(self, file: RunFile, strategy: Strategy, task: Task, fresh: nn.Module) -> RunFile:
        """The run file with the aggregation that it leaves to this federation."""
        roster = self._attendance.roster
        members = 0 if roster is None else len(roster.members) - (file.privacy.owner_box is not None)
        about = (file.privacy, _min_clients(file, strategy), members)
        return file.replace(privacy=with_aggregation(strategy, task, fresh, *about))

    def _task(self, file: RunFile) -> Task:
        name = file.run.task or ""
        return self._tasks.get(name) or registry.find_task(name)

    def _begin(self, stored: StoredRun) -> _Live:
        file = parse(RunFile, stored.file)
        strategy, task = file.build_strategy(), self._task(file)
        held_out = holds_out_valid(strategy, file.evaluate)
        terms = Terms(stored.id, task.name, type(strategy).__name__, held_out, file.privacy.aggregation or "plain")
        spool = self._folder / "spool" / stored.id
        transport = RunTransport(terms, self._attendance, self._database, spool, self._metrics, self._room, self._adder)
        live = self._live[stored.name] = _Live(stored.name, transport, self._journal(stored, transport.spares.give))
        plan = Plan(
            name=stored.id,
            task=task,
            strategy=strategy,
            seed=file.run.seed,
            init=self._init(stored, live.journal),
            evaluate=file.evaluate,
            privacy=file.privacy,
            shield=shield_for(strategy, file.privacy.dp, _min_clients(file, strategy)),
            sharing=sharing_for(strategy, task, file.privacy),
            min_clients=_min_clients(file, strategy),
            on_round=functools.partial(self._committed, live),
        )
        live.task = asyncio.create_task(self._conduct(live, plan))
        return live

    def _init(self, stored: StoredRun, journal: SqliteJournal) -> Weights | None:
        """The weights a run begins with; none where it has begun."""
        return None if stored.init is None or journal.last() is not None else self._blobs.get(stored.init)

    def _journal(self, stored: StoredRun, remove: Callable[[Path], None] | None = None) -> SqliteJournal:
        spool = self._folder / "spool" / stored.id
        lines = History(self._folder / "history" / f"{stored.id}.jsonl")
        return SqliteJournal(self._database, self._blobs, stored.name, spool=spool, remove=remove, lines=lines)

    async def _conduct(self, live: _Live, plan: Plan) -> None:
        with structlog.contextvars.bound_contextvars(run=plan.name):
            self._database.set_run_state(live.name, "running")
            try:
                live.journal.catch_up()
                outcome = await conduct(plan, live.transport, live.journal)
            except asyncio.CancelledError:
                if not live.cancelled:
                    raise  # the coordinator ends, the run goes on with the next one
                self._end(live, "cancelled", "")
            except StorageError as error:
                await self._wait_for_disk(live, error)
            except FedkitError as error:
                self._end(live, "failed", str(error))
            except Exception as error:  # the strategy's own code runs here, and may raise anything
                self._end(live, "failed", f"{type(error).__name__} in the strategy: see the coordinator's log")
                log.exception("strategy failed")
            else:
                self._end(live, "finished", "", _facts(outcome))

    async def _wait_for_disk(self, live: _Live, error: StorageError) -> None:
        """Nothing is lost: the run is taken up again from its journal, as after a restart."""
        log.error("run pauses", error=str(error), again_in_s=_DISK_S)
        live.transport.waits_for = str(error)
        await asyncio.sleep(_DISK_S)
        following = self._begin(self._database.run(live.name))
        following.watchers |= live.watchers

    def _end(self, live: _Live, state: Any, detail: str, outcome: dict[str, Any] | None = None) -> None:
        live.transport.release()
        self._database.finish_run(live.name, state, detail, outcome)
        log.info("run over", state=state, detail=detail)
        self._live.pop(live.name, None)
        live.tell(None)

    def _committed(self, live: _Live, record: RoundRecord) -> None:
        self._metrics.rounds.labels(outcome="committed" if record.stands else "rejected").inc()
        last = live.journal.last()
        facts = {
            "model": "" if last is None else last.model.digest,
            "round": record.round,
            "clients": len(record.clients),
            "seconds": round(record.seconds, 3),
            "refusals": len(record.refusals),
        }
        if record.stands:
            log.info("round committed", **facts)
        else:
            log.info("round rejected", **facts, why=record.rejected)
        live.tell(record)

    def cancel(self, name: str) -> RunStatus:
        """Ends a run, one that is over stays as it is; raises `NoSuchRun`."""
        stored = self._database.run(name)
        live = self._live.get(name)
        if live is not None and live.task is not None:
            live.cancelled = True
            live.task.cancel()
            self._live.pop(name)
            stored = self._database.finish_run(name, "cancelled", "cancelled by an operator")
        return self._status(stored)

    async def close(self) -> None:
        """Stops where it is; the next coordinator goes on."""
        tasks = [live.task for live in self._live.values() if live.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._adder.close()

    # -- looking -------------------------------------------------------------------------------------------------------

    def runs(self, name: str = "") -> list[RunStatus]:
        """All runs, the newest first, or the one of that name; raises `NoSuchRun`."""
        stored = [self._database.run(name)] if name else reversed(self._database.runs())
        return [self._status(one) for one in stored]

    def states(self) -> list[str]:
        """The state of each run, in a word."""
        waiting = {name for name, live in self._live.items() if live.transport.waits_for}
        return ["waiting" if stored.name in waiting else stored.state for stored in self._database.runs()]

    def _status(self, stored: StoredRun) -> RunStatus:
        file = parse(RunFile, stored.file)
        live = self._live.get(stored.name)
        journal = live.journal if live is not None else self._journal(stored)
        last = journal.latest()
        waits = live.transport.waits_for if live is not None else ""
        models = [*(["final"] if last is not None else []), *(["best"] if journal.has_best() else [])]
        return RunStatus(
            name=stored.name,
            task=file.run.task or "",
            strategy=str(file.strategy.get("name")),
            state="waiting" if waits else stored.state,
            round=0 if last is None else last.round,
            rounds=_rounds(file),
            seed=file.run.seed,
            detail=waits or stored.detail,
            submitted_at=stored.submitted_at,
            ended_at=stored.ended_at or 0.0,
            last=last if last is not None and last.round > 0 else None,
            models=tuple(models),
        )

    def clients(self) -> list[ClientStatus]:
        """Everybody who attends or has attended, by name."""
        return [self._client(known) for known in self._database.clients()]

    def _client(self, known: Any) -> ClientStatus:
        session = self._attendance.sessions.get(known.name)
        refusal = self._attendance.refusals.get(known.name, "")
        if session is None:
            state = "left" if known.state == "left" else "away"
            return ClientStatus(known.name, state, known.tasks, time.time() - known.last_seen, (), refusal)  # type: ignore[arg-type]
        jobs = tuple(
            JobStatus(
                errand.assignment.run.rpartition(".")[0],
                errand.assignment.round,
                key,
                type(errand.assignment.work).__name__,
                errand.done,
                errand.total,
            )
            for key, errand in session.errands.items()
        )
        state = "working" if jobs else "ready"
        return ClientStatus(
            known.name,
            state,  # type: ignore[arg-type]
            tuple(sorted(session.tasks)),
            time.monotonic() - session.since,
            jobs,
            refusal,
        )

    async def watch(self, name: str, after_round: int) -> AsyncIterator[RoundRecord | RunStatus]:
        """Records after that round as they are committed, past ones first; the last item is a run that is over."""
        queue: asyncio.Queue[RoundRecord | None] = asyncio.Queue()
        live = self._live.get(name)
        if live is not None:
            live.watchers.add(queue)
        seen = after_round
        try:
            for record in self._history(name):
                if record.round > max(seen, 0):
                    seen = record.round
                    yield record
            while live is not None and (following := await queue.get()) is not None:
                if following.round > seen:
                    seen = following.round
                    yield following
        finally:
            if live is not None:
                live.watchers.discard(queue)
        yield self.runs(name)[0]

    def _history(self, name: str) -> list[RoundRecord]:
        return self._opened(name).history()

    def _opened(self, name: str) -> SqliteJournal:
        live = self._live.get(name)
        if live is not None:
            return live.journal
        return self._journal(self._database.run(name))

    def file(self, name: str) -> RunFile:
        """What was submitted; raises `NoSuchRun`."""
        return parse(RunFile, self._database.run(name).file)

    def outcome(self, name: str) -> Outcome:
        """What a run ended with; raises `NoSuchRun`, and `RunError` where it goes on or failed."""
        stored, journal = self._database.run(name), self._opened(name)
        last = journal.last()
        if stored.outcome is None or last is None:
            raise RunError(
                f"{name} has no result: it is {stored.state}{f' ({stored.detail})' if stored.detail else ''}"
            )
        facts, best = stored.outcome, journal.best()
        found = None
        if best is not None and facts["best"] is not None:
            found = Best(best.round, best.model, dict(best.record.metrics), facts["best"])
        history = [record for record in journal.history() if record.round > 0]
        refusals = _refusals(facts["refusals"])
        each = facts["test_per_client"]
        return Outcome(last.model, history, journal.abandoned(), facts["test"], each, found, refusals, last.state)

    def told(self, name: str) -> Told:
        """All that is on record of a run now, without its models; raises `NoSuchRun`."""
        stored, journal = self._database.run(name), self._opened(name)
        file, ending = parse(RunFile, stored.file), dict(stored.outcome or {})
        history = journal.history()
        best = next((record for record in reversed(history) if record.best), None)
        test = ending.pop("best", None) or {}
        known = {
            "privacy": file.privacy,
            "evaluate": file.evaluate,
            "strategy": file.strategy,
            "abandoned": journal.abandoned(),
            "refusals": _refusals(ending.pop("refusals", [])),
            "best": None if best is None else {"round": best.round, "metrics": dict(best.metrics), "test": test},
        }
        return Told(self._status(stored), history, known | ending)

    def model(self, name: str, which: str) -> Weights | bytes:
        """The "final" (last committed) or "best" weights, or the strategy's "state", packed; raises `RunError`."""
        journal = self._opened(name)
        if which == "best":
            best = journal.best()
            if best is None:
                raise RunError(f"{name} has no best model: it was not run with a metric to choose by")
            return best.model
        last = journal.last()
        if last is None:
            raise RunError(f"{name} has no model yet")
        return packing.pack(dict(last.state)) if which == "state" else last.model


def _min_clients(file: RunFile, strategy: Strategy) -> int:
    """How many must be there before a round begins."""
    return file.run.min_clients or strategy.participation.quorum or fewest(strategy, file.privacy)


def _rounds(file: RunFile) -> int:
    with contextlib.suppress(FedkitError):
        strategy: Strategy = file.build_strategy()
        return strategy.rounds
    return 0


def _refusals(facts: Iterable[tuple[str, str, str]]) -> tuple[Refusal, ...]:
    return tuple(Refusal(client, Reason(reason), detail) for client, reason, detail in facts)


def _facts(outcome: Outcome) -> dict[str, Any]:
    """What of an outcome the journal does not hold."""
    return {
        "test": outcome.test,
        "test_per_client": outcome.test_per_client,
        "best": None if outcome.best is None else outcome.best.test,
        "refusals": [(one.client, one.reason.value, one.detail) for one in outcome.refusals],
    }
