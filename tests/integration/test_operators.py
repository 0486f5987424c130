"""The operators' side of a coordinator: a real gRPC server over runs in memory, and the real callers against it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
import structlog
from torch import nn
from typer.testing import CliRunner, Result

import fedkit
from fedkit import codec, packing, rng
from fedkit.cli import app
from fedkit.config import Evaluation, Participation
from fedkit.errors import (
    ConfigError,
    IncompatibleStrategy,
    NameTaken,
    NoSuchRun,
    PayloadError,
    Reason,
    RemoteError,
    RunCancelled,
    RunError,
    RunFailed,
    TaskError,
    Unreachable,
)
from fedkit.protos import operators_pb2 as pb
from fedkit.protos import tensors_pb2
from fedkit.protos.wire import SERVER_OPTIONS, Calls, frame, handlers, unframe
from fedkit.remote import Coordinator, connect
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.rounds.call import Refusal
from fedkit.rounds.conduct import Outcome, Plan, conduct
from fedkit.rounds.journal import MemoryJournal, RoundRecord
from fedkit.runfile import RunFile
from fedkit.server.operators import InitialModels, OperatorService
from fedkit.server.runbook import ClientStatus, JobStatus, RunStatus
from fedkit.simulation.transport import SimulatedTransport
from fedkit.simulation.workers import InProcess, Setting
from fedkit.strategies import FedAdam, FedAvg, FedSGD, Scaffold
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.testing import toy_task
from fedkit.weights import Manifest, Weights
from fedkit.work import Answer, Fit

T = TypeVar("T")

SERVICE = pb.DESCRIPTOR.services_by_name["Operators"]
CLIENTS = ("east", "north", "west")
LOCAL = Fit(steps=4, batch_size=8, lr=0.1)
MIB = 1 << 20


class Gate:
    """Clients begin no round beyond `round`."""

    def __init__(self) -> None:
        self.round = 1 << 30
        self.moved = asyncio.Event()

    def open(self, round: int) -> None:
        self.round = round
        self.moved.set()
        self.moved = asyncio.Event()

    async def pass_through(self, round: int) -> None:
        while round > self.round:
            await self.moved.wait()


class GatedTransport(SimulatedTransport):
    gate: Gate

    async def perform(self, assignment: Assignment, parcel: Parcel, *, race: bool) -> Answer:
        await self.gate.pass_through(assignment.round)
        return await super().perform(assignment, parcel, race=race)


@dataclasses.dataclass
class Entry:
    file: RunFile
    strategy: Strategy
    journal: MemoryJournal
    state: str = "running"
    detail: str = ""
    outcome: Outcome | None = None
    moved: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    work: asyncio.Task[None] | None = None

    def move(self) -> None:
        self.moved.set()
        self.moved = asyncio.Event()


class Book:
    """A `RunBook` in memory that conducts real runs over simulated clients, on the event loop it is called on."""

    def __init__(self, *tasks: Task) -> None:
        self.tasks = {task.name: task for task in tasks}
        self.gate = Gate()
        self.entries: dict[str, Entry] = {}
        self.more: list[RunStatus] = []
        self.here: list[ClientStatus] = []

    def submit(self, file: RunFile, init: Weights | None) -> RunStatus:
        name = file.run.name
        if name in self.entries:
            raise NameTaken(f"there is a run {name!r} already")
        if file.run.task not in self.tasks:
            raise ConfigError(f"there is no task {file.run.task!r}")
        task, strategy = self.tasks[file.run.task], file.build_strategy()
        strategy.check(task, task.build(0))
        entry = self.entries[name] = Entry(file, strategy, MemoryJournal())
        entry.work = asyncio.get_running_loop().create_task(self._conduct(entry, task, init))
        return self._status(entry)

    async def _conduct(self, entry: Entry, task: Task, init: Weights | None) -> None:
        run, evaluate = entry.file.run, entry.file.evaluate
        place = InProcess(Setting(task, run.seed, "cpu", evaluate is not None))
        transport = GatedTransport(CLIENTS, place, seed=run.seed)
        transport.gate = self.gate
        plan = Plan(
            name=task.name,
            task=task,
            strategy=entry.strategy,
            seed=run.seed,
            init=init,
            evaluate=evaluate,
            on_round=lambda _: entry.move(),
        )
        try:
            with rng.seeded(run.seed):
                entry.outcome = await conduct(plan, transport, entry.journal)
            entry.state = "finished"
        except RunFailed as error:
            entry.state, entry.detail = "failed", str(error)
        except asyncio.CancelledError:
            entry.state = "cancelled"
        entry.move()

    def cancel(self, name: str) -> RunStatus:
        entry = self._entry(name)
        if entry.state == "running":
            entry.state = "cancelled"
            entry.work.cancel()
        return self._status(entry)

    def runs(self, name: str = "") -> list[RunStatus]:
        found = [self._entry(name)] if name else reversed(self.entries.values())
        return [self._status(entry) for entry in found] + ([] if name else self.more)

    def clients(self) -> list[ClientStatus]:
        return self.here

    async def watch(self, name: str, after_round: int) -> AsyncIterator[RoundRecord | RunStatus]:
        entry = self._entry(name)
        while True:
            moved = entry.moved
            for record in entry.journal.history():
                if record.round > max(after_round, 0):
                    after_round = record.round
                    yield record
            if entry.state != "running":
                yield self._status(entry)
                return
            await moved.wait()

    def file(self, name: str) -> RunFile:
        return self._entry(name).file

    def outcome(self, name: str) -> Outcome:
        entry = self._entry(name)
        if entry.outcome is None:
            raise RunError(f"{name} is {entry.state}: there is no outcome")
        return entry.outcome

    def model(self, name: str, which: str) -> Weights | bytes:
        entry = self._entry(name)
        last, best = entry.journal.last(), entry.journal.best()
        commit = best if which == "best" else last
        if commit is None:
            raise RunError(f"{name} has no {which} model")
        return packing.pack(commit.state) if which == "state" else commit.model

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise NoSuchRun(f"there is no run {name!r}")
        return self.entries[name]

    def _status(self, entry: Entry) -> RunStatus:
        last, run = entry.journal.last(), entry.file.run
        models = () if last is None else ("final", *(["best"] if entry.journal.best() else []))
        ended = 0.0 if entry.state == "running" else 1.7e9
        return RunStatus(
            run.name,
            run.task,
            type(entry.strategy).__name__,
            entry.state,
            0 if last is None else last.round,
            entry.strategy.rounds,
            run.seed,
            entry.detail,
            1.6e9,
            ended,
            None if last is None or last.round == 0 else last.record,
            models,
        )


class Serving:
    """An event loop in a thread, the book that lives on it, and a server that comes and goes on one port."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.book = self.on_loop(_made(toy_task()))
        self.port = 0
        self.server: Any = None

    def on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, service: OperatorService | None = None) -> None:
        async def begin() -> None:
            self.server = grpc.aio.server(options=SERVER_OPTIONS)
            self.server.add_generic_rpc_handlers((handlers(SERVICE, service or OperatorService(self.book)),))
            self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
            await self.server.start()

        self.on_loop(begin())

    def stop(self) -> None:
        if self.server is not None:
            self.on_loop(self.server.stop(None))
            self.server = None

    def gate(self, round: int) -> None:
        async def move() -> None:
            self.book.gate.open(round)

        self.on_loop(move())

    def close(self) -> None:
        async def end() -> None:
            for name in self.book.entries:
                self.book.cancel(name)
            await asyncio.gather(*(entry.work for entry in self.book.entries.values()))

        self.on_loop(end())
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


async def _made(*tasks: Task) -> Book:
    return Book(*tasks)


@pytest.fixture
def serving() -> Iterator[Serving]:
    with structlog.testing.capture_logs():
        found = Serving()
        found.start()
        yield found
        found.close()


@pytest.fixture
def coordinator(serving: Serving) -> Iterator[Coordinator]:
    with connect(serving.address, patience_s=20) as found:
        yield found


@pytest.fixture
def calls(serving: Serving) -> Iterator[Calls]:
    with grpc.insecure_channel(serving.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield Calls(channel, SERVICE)


def code(call: Callable[[], Any]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name


def timeless(records: list[RoundRecord]) -> list[RoundRecord]:
    return [dataclasses.replace(record, seconds=0.0) for record in records]


# -- the same result ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [FedAdam(rounds=3, local=LOCAL), Scaffold(rounds=2, local=LOCAL)])
def test_a_run_gives_what_simulate_gives_bit_for_bit(coordinator: Coordinator, strategy: Strategy) -> None:
    rule, task = Evaluation(best="loss:min"), toy_task()
    there = coordinator.run(task, strategy, seed=7, evaluate=rule, progress=False)
    here = fedkit.simulate(task, strategy, clients=CLIENTS, seed=7, evaluate=rule, progress=False)
    assert there.weights == here.weights
    assert timeless(there.history) == timeless(here.history)
    assert (there.test, there.test_per_client, there.refusals) == (here.test, here.test_per_client, here.refusals)
    assert there.best == here.best
    assert packing.pack(there.strategy.state_dict()) == packing.pack(here.strategy.state_dict())
    assert (there.clients, there.seed, there.task) == (here.clients, here.seed, here.task)


def test_a_warm_start_begins_from_the_weights_given(coordinator: Coordinator, tmp_path: Path) -> None:
    task, strategy = toy_task(), FedAvg(rounds=1, local=LOCAL)
    init = Weights.from_module(task.build(99))
    here = fedkit.simulate(task, strategy, clients=CLIENTS, init=init, progress=False)
    codec.save(tmp_path / "init.fedkit", init)
    for start in (init, task.build(99), tmp_path / "init.fedkit"):
        assert coordinator.run(task, strategy, init=start, progress=False).weights == here.weights


def test_records_arrive_in_order_while_the_run_goes_on(serving: Serving, coordinator: Coordinator) -> None:
    serving.gate(1)
    run = coordinator.submit(toy_task(), FedAvg(rounds=2, local=LOCAL), name="live")
    records = coordinator.watch(run)
    assert next(records).round == 1
    assert coordinator.status("live").runs[0].state == "running"
    serving.gate(2)
    assert [record.round for record in records] == [2]
    assert list(coordinator.watch(run, after_round=1)) == coordinator.result(run, toy_task()).history[1:]


def test_an_interrupted_run_goes_on_and_is_found_again(serving: Serving, coordinator: Coordinator) -> None:
    def interrupt(_: RoundRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"mine goes on at .* fedkit status mine"):
        coordinator.run(toy_task(), FedAvg(rounds=3, local=LOCAL), name="mine", on_round=interrupt, progress=False)
    assert len(list(coordinator.watch("mine"))) == 3
    found = coordinator.result("mine", toy_task())
    assert [record.round for record in found.history] == [1, 2, 3]
    assert found.strategy.rounds == 3


def test_a_result_has_the_strategy_that_was_submitted(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = coordinator.submit(toy_task(), FedSGD(rounds=1, lr=0.1))
    list(coordinator.watch(run))
    assert coordinator.result(run, toy_task()).strategy.to_dict() == FedSGD(rounds=1, lr=0.1).to_dict()
    monkeypatch.setattr("fedkit.registry.entry_points", lambda group: [])  # another process knows others
    with pytest.raises(ConfigError, match=r"no strategy 'FedSGD'(.|\n)*\nGive the FedSGD that"):
        coordinator.result(run, toy_task())
    assert coordinator.result(run, toy_task(), FedSGD(rounds=1, lr=0.1)).strategy.lr == 0.1


def test_progress_is_shown_and_passed_on(coordinator: Coordinator, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[RoundRecord] = []
    found = coordinator.run(toy_task(), FedAvg(rounds=2, local=LOCAL), on_round=seen.append, progress=True)
    assert seen == found.history
    assert "FedAvg" in capsys.readouterr().err


def test_a_name_is_made_up_that_says_what_runs(coordinator: Coordinator) -> None:
    run = coordinator.submit(toy_task(), FedAvg(rounds=1, local=LOCAL), seed=5)
    assert run.startswith("toy-fedavg-5-")
    assert len(run) == len("toy-fedavg-5-") + 8


# -- how runs end ------------------------------------------------------------------------------------------------------


def test_a_run_that_fails_raises_what_simulate_raises(coordinator: Coordinator) -> None:
    strategy = FedAvg(rounds=1, local=LOCAL, participation=Participation(quorum=4))
    with pytest.raises(RunFailed, match="quorum"):
        coordinator.run(toy_task(), strategy, name="small", progress=False)
    with pytest.raises(RunError, match="failed"):
        coordinator.result("small", toy_task())


def test_a_cancelled_run_ends_with_its_last_model(serving: Serving, coordinator: Coordinator) -> None:
    serving.gate(1)
    coordinator.submit(toy_task(), FedAvg(rounds=9, local=LOCAL), name="long")
    records = coordinator.watch("long")
    next(records)
    assert coordinator.cancel("long").state == "cancelled"
    with pytest.raises(RunCancelled, match="after round 1"):
        next(records)
    assert coordinator.weights("long").is_finite()
    assert coordinator.cancel("long").state == "cancelled"


# -- a coordinator that goes away --------------------------------------------------------------------------------------


def test_a_watch_goes_on_when_the_coordinator_is_back(serving: Serving, coordinator: Coordinator) -> None:
    serving.gate(2)
    coordinator.submit(toy_task(), FedAvg(rounds=4, local=LOCAL), name="long")
    said: list[str] = []

    def back(text: str) -> None:
        said.append(text)
        if serving.server is None and len(said) > 2:
            serving.start()

    records = coordinator.watch("long", say=back)
    assert [next(records).round, next(records).round] == [1, 2]
    serving.stop()
    serving.gate(4)
    assert [record.round for record in records] == [3, 4]
    assert said[0] == "the coordinator does not answer; asking again"


def test_a_coordinator_that_stays_away_is_unreachable_and_the_run_is_named(serving: Serving) -> None:
    with connect(serving.address, patience_s=0.2) as coordinator:
        serving.gate(1)
        coordinator.submit(toy_task(), FedAvg(rounds=2, local=LOCAL), name="long")
        records = coordinator.watch("long")
        next(records)
        serving.stop()
        with pytest.raises(Unreachable, match=r"is fedkit server running there.* fedkit status long"):
            next(records)


def test_a_coordinator_that_never_answered_is_not_waited_for_long(serving: Serving) -> None:
    serving.stop()
    with connect(serving.address, patience_s=0.1) as coordinator, pytest.raises(Unreachable, match=serving.address):
        coordinator.run(toy_task(), FedAvg())


def test_a_closed_coordinator_is_not_asked_again(serving: Serving) -> None:
    serving.gate(1)
    with connect(serving.address) as coordinator:
        coordinator.submit(toy_task(), FedAvg(rounds=2, local=LOCAL), name="long")
        records = coordinator.watch("long")
        next(records)
    with pytest.raises(ValueError, match="closed"):
        next(records)


def test_no_proxy_stands_between(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with connect(serving.address, patience_s=1) as coordinator:
        assert coordinator.status().runs == ()


class _Forgetful(OperatorService):
    """Answers to the first submission are lost; `instead` is what has happened meanwhile."""

    def __init__(self, book: Book, instead: pb.SubmitRequest | None = None) -> None:
        super().__init__(book)
        self.asked, self.instead = 0, instead

    async def submit(self, request: pb.SubmitRequest, context: Any) -> pb.Run:
        self.asked += 1
        answer = await super().submit(request if self.instead is None else self.instead, context)
        if self.asked == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        return answer


def test_a_submission_whose_answer_was_lost_begins_one_run(serving: Serving, coordinator: Coordinator) -> None:
    serving.stop()
    service = _Forgetful(serving.book)
    serving.start(service)
    assert coordinator.submit(toy_task(), FedAvg(rounds=1, local=LOCAL), name="once") == "once"
    assert service.asked == 2
    assert list(serving.book.entries) == ["once"]


def test_a_name_that_somebody_else_took_meanwhile_is_refused(serving: Serving, coordinator: Coordinator) -> None:
    serving.stop()
    other = {"run": {"name": "once", "task": "toy", "seed": 8}, "strategy": {"name": "FedAvg", "rounds": 1}}
    serving.start(_Forgetful(serving.book, pb.SubmitRequest(run_file=json.dumps(other))))
    with pytest.raises(NameTaken):
        coordinator.submit(toy_task(), FedAvg(rounds=1, local=LOCAL), name="once")


def _wide(seed: int = 0) -> Weights:
    return Weights(
        Manifest.from_json('[["w",[700000],"float32",true]]'), np.random.default_rng(seed).random(700_000, np.float32)
    )


class _Breaking(OperatorService):
    """Every stream of a model breaks after its first MiB, until the last."""

    def __init__(self, book: Book, breaks: int) -> None:
        super().__init__(book)
        self.breaks, self.offsets = breaks, []

    async def fetch_model(self, request: pb.ModelRequest, context: Any) -> AsyncIterator[bytes]:
        self.offsets.append(request.offset)
        taken = 0
        async for raw in super().fetch_model(request, context):
            yield raw
            taken += len(unframe(raw) or b"")
            if taken and self.breaks:
                self.breaks -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


class _Keeping(Book):
    """A book with models and nothing else; each one is given `lasts` times."""

    def __init__(self, *found: Weights | bytes, lasts: int = 1) -> None:
        super().__init__()
        self.found, self.lasts, self.given = found, lasts, 0

    def model(self, name: str, which: str) -> Weights | bytes:
        self.given += 1
        return self.found[min((self.given - 1) // self.lasts, len(self.found) - 1)]


async def _keeping(*found: Weights | bytes, lasts: int) -> Book:
    return _Keeping(*found, lasts=lasts)


def test_a_download_that_breaks_goes_on_where_it_was(serving: Serving, coordinator: Coordinator) -> None:
    serving.stop()
    service = _Breaking(serving.on_loop(_keeping(_wide(), lasts=9)), breaks=2)
    serving.start(service)
    assert coordinator.weights("any") == _wide()
    assert service.offsets == [0, MIB, 2 * MIB]


def test_a_download_begins_anew_where_the_model_has_changed(serving: Serving, coordinator: Coordinator) -> None:
    serving.stop()
    service = _Breaking(serving.on_loop(_keeping(_wide(1), _wide(2), lasts=1)), breaks=1)
    serving.start(service)
    assert coordinator.weights("any") == _wide(2)
    assert service.offsets == [0, MIB, 0]


# -- what is refused ---------------------------------------------------------------------------------------------------


def run_file(**changes: Any) -> str:
    values = {"run": {"name": "one", "task": "toy"}, "strategy": {"name": "FedAvg", "rounds": 1}}
    return json.dumps(values | changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ("[" * 100_000, "not JSON"),
        (run_file()[:-1] + ', "evaluate": NaN}', "not JSON"),
        (run_file() + " " * 300_000, "at most 262144 characters"),
        (run_file(run={"name": "../up", "task": "toy"}), "run.name"),
        (run_file(run={"name": "one"}), "run.task: must be given"),
        (run_file(run={"name": "one", "task": "toy", "seed": 1 << 64}), "run.seed"),
        (run_file(run={"name": "one", "task": "os:system"}), "there is no task"),
        (run_file(strategy={"name": "os.system"}), "there is no strategy"),
        (run_file(strategy={"name": "FedAvg", "round": 1}), "did you mean 'rounds'?"),
        (run_file(strategy={"name": "FedAvg"} | {f"x{i}": i for i in range(5000)}), "there is no such setting"),
        (run_file(extra=1), "extra: there is no such setting"),
    ],
)
def test_a_run_file_that_is_none_is_refused_with_what_is_wrong(calls: Calls, text: str, words: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        calls.submit(pb.SubmitRequest(run_file=text))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in caught.value.details()


def test_each_error_has_its_code(serving: Serving, calls: Calls) -> None:
    serving.gate(0)
    calls.submit(pb.SubmitRequest(run_file=run_file()))
    asked = {
        "ALREADY_EXISTS": lambda: calls.submit(pb.SubmitRequest(run_file=run_file())),
        "NOT_FOUND": lambda: calls.cancel_run(pb.RunRequest(run="none")),
        "FAILED_PRECONDITION": lambda: calls.fetch_outcome(pb.RunRequest(run="one")),
        "INVALID_ARGUMENT": lambda: list(calls.fetch_model(pb.ModelRequest(run="one", which="../final"))),
    }
    assert {code(call): None for call in asked.values()}.keys() == asked.keys()


@pytest.mark.parametrize("name", ["none", "", "../../etc/passwd", "a\n", "x" * 5000])
def test_a_run_that_is_not_there_is_not_found_by_any_call(calls: Calls, name: str) -> None:
    assert code(lambda: calls.cancel_run(pb.RunRequest(run=name))) == "NOT_FOUND"
    assert code(lambda: calls.fetch_outcome(pb.RunRequest(run=name))) == "NOT_FOUND"
    assert code(lambda: list(calls.watch(pb.WatchRequest(run=name)))) == "NOT_FOUND"
    assert code(lambda: list(calls.fetch_model(pb.ModelRequest(run=name, which="final")))) == "NOT_FOUND"
    if name:
        assert code(lambda: calls.status(pb.StatusRequest(run=name))) == "NOT_FOUND"


def test_an_offset_beyond_the_model_is_refused(serving: Serving, calls: Calls) -> None:
    serving.gate(0)
    calls.submit(pb.SubmitRequest(run_file=run_file()))
    wanted = pb.ModelRequest(run="one", which="final", offset=1 << 40)
    assert code(lambda: list(calls.fetch_model(wanted))) == "INVALID_ARGUMENT"


def test_errors_keep_their_kind_on_the_way(coordinator: Coordinator) -> None:
    class Odd(FedAvg):
        pass

    with pytest.raises(NoSuchRun, match="there is no run 'none'"):
        coordinator.cancel("none")
    with pytest.raises(NoSuchRun):
        next(coordinator.watch("none"))
    with pytest.raises(ConfigError, match=r"there is no strategy 'Odd'[\s\S]*entry point in fedkit.strategies"):
        coordinator.submit(toy_task(), Odd(rounds=1))
    with pytest.raises(IncompatibleStrategy, match="over_select"):
        coordinator.submit(
            toy_task(), fedkit.strategies.CyclicWeightTransfer(participation=Participation(over_select=2.0))
        )
    coordinator.submit(toy_task(), FedAvg(rounds=1, local=LOCAL), name="one")
    with pytest.raises(NameTaken, match="'one' already"):
        coordinator.submit(toy_task(), FedAvg(rounds=1, local=LOCAL), name="one")


def test_a_task_that_cannot_be_built_there_raises_what_it_raises_here(serving: Serving) -> None:
    def broken() -> nn.Module:
        raise TaskError("the model cannot be built")

    serving.book.tasks["broken"] = toy_task(name="broken", model=broken)
    with connect(serving.address) as coordinator, pytest.raises(TaskError, match="cannot be built"):
        coordinator.submit(toy_task(name="broken"), FedAvg(rounds=1))


# -- hostile uploads ---------------------------------------------------------------------------------------------------


def header(weights: Weights, **changes: Any) -> bytes:
    fields = {
        "manifest": weights.manifest.to_json(),
        "payload_bytes": weights.vector.nbytes,
        "digest": bytes.fromhex(weights.digest),
    }
    return tensors_pb2.Piece(header=tensors_pb2.Header(**(fields | changes))).SerializeToString()


def pieces(weights: Weights) -> list[bytes]:
    raw = weights.vector.tobytes()
    return [frame(raw[at : at + MIB]) for at in range(0, len(raw), MIB)]


WIDE = _wide()
ABSURD = '[["w",[1000000000000],"float32",true]]'
LARGE = '[["w",[34359738368],"float32",true]]'
TWICE = '[["w",[1],"float32",true],["w",[1],"float32",true]]'


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ([], "no header"),
        ([b"\xff\xff"], "not a piece"),
        ([frame(b"1234")], "must be a header"),
        ([header(WIDE, digest=b"\0" * 32), *pieces(WIDE)], "digest"),
        ([header(WIDE, digest=b"\0" * 31)], "digest"),
        ([header(WIDE), *pieces(WIDE)[:-1]], "bytes arrived"),
        ([header(WIDE), *pieces(WIDE), frame(b"1")], "more than the announced"),
        ([header(WIDE), header(WIDE)], "pieces of data"),
        ([header(WIDE), frame(b"")], "pieces of data"),
        ([header(WIDE), frame(b"0" * (MIB + 1))], "pieces of data"),
        ([header(WIDE, manifest=ABSURD, payload_bytes=4 * 10**12)], "a shape is at most"),
        ([header(WIDE, manifest=LARGE, payload_bytes=1 << 37)], "announces 137438953472 bytes"),
        ([header(WIDE, manifest=LARGE)], "announces 2800000 bytes"),
        ([header(WIDE, manifest=TWICE, payload_bytes=8)], "same name"),
        ([header(WIDE, manifest="[" * 1_000_000)], "not a manifest"),
        ([header(WIDE, manifest='[["w",[1],"object",true]]', payload_bytes=4)], "dtype"),
        ([header(WIDE, extras=[tensors_pb2.Extra(name="x", length=1)], payload_bytes=2_800_004)], "extra"),
    ],
)
def test_a_hostile_upload_is_refused_and_nothing_of_it_stays(calls: Calls, sent: list[bytes], words: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        calls.store_model(iter(sent))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in caught.value.details()
    digest = bytes.fromhex(WIDE.digest)
    assert code(lambda: calls.submit(pb.SubmitRequest(run_file=run_file(), init_digest=digest))) == (
        "FAILED_PRECONDITION"
    )


def test_an_upload_without_an_end_is_cut_off_at_what_it_announced(calls: Calls) -> None:
    def endless() -> Iterator[bytes]:
        yield header(WIDE)
        while True:
            yield frame(b"\0" * MIB)

    assert code(lambda: calls.store_model(endless())) == "INVALID_ARGUMENT"


def test_weights_that_are_not_finite_are_refused(calls: Calls) -> None:
    bad = WIDE.with_vector(np.full(WIDE.vector.size, np.nan))
    assert code(lambda: calls.store_model(iter([header(bad), *pieces(bad)]))) == "INVALID_ARGUMENT"


def test_a_file_that_is_no_model_is_refused_before_anything_is_sent(coordinator: Coordinator) -> None:
    with pytest.raises(PayloadError, match="not a fedkit model file"):
        coordinator.submit(toy_task(), FedAvg(), init=__file__)


async def _sent(sent: list[bytes]) -> AsyncIterator[bytes]:
    for raw in sent:
        yield raw


def small(value: float) -> Weights:
    return Weights(Manifest.from_json('[["w",[100],"float32",true]]'), np.full(100, value, np.float32))


def stored(initial: InitialModels, weights: Weights) -> bytes:
    return asyncio.run(initial.take(_sent([header(weights), *pieces(weights)])))


def test_initial_weights_are_kept_for_an_hour() -> None:
    now = [0.0]
    initial = InitialModels(clock=lambda: now[0])
    digest = stored(initial, small(1))
    now[0] = 3599.0
    assert initial.find(digest) == small(1)
    now[0] = 3601.0
    with pytest.raises(RunError, match="send them again"):
        initial.find(digest)


def test_few_initial_weights_wait_at_a_time() -> None:
    initial = InitialModels()
    digests = [stored(initial, small(value)) for value in range(InitialModels.MOST + 1)]
    assert initial.find(digests[-1]) == small(InitialModels.MOST)
    with pytest.raises(RunError):
        initial.find(digests[0])


def test_initial_weights_together_take_no_more_than_one_may() -> None:
    initial = InitialModels(codec.Limits(payload_bytes=800))
    digests = [stored(initial, small(value)) for value in range(3)]
    assert initial.find(digests[1]) == small(1)
    with pytest.raises(RunError):
        initial.find(digests[0])


def test_only_two_models_arrive_at_a_time() -> None:
    async def crowd() -> None:
        stop = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield header(small(1))
            await stop.wait()

        initial = InitialModels()
        busy = [asyncio.create_task(initial.take(slow())) for _ in range(InitialModels.ARRIVING)]
        await asyncio.sleep(0)
        with pytest.raises(RunError, match="arriving already"):
            await initial.take(_sent([]))
        stop.set()
        for one in busy:
            with pytest.raises(PayloadError):
                await one
        assert await initial.take(_sent([header(small(1)), *pieces(small(1))]))

    asyncio.run(crowd())


# -- messages that would be too large ----------------------------------------------------------------------------------


def status(name: str, **changes: Any) -> RunStatus:
    record = RoundRecord(3, clients=CLIENTS, loss=0.5, per_client={f"site-{i}": {"loss": 1.0} for i in range(50)})
    fields = {
        "name": name,
        "task": "toy",
        "strategy": "FedAvg",
        "state": "finished",
        "round": 3,
        "rounds": 10**30,
        "seed": 0,
        "detail": "",
        "submitted_at": 1.6e9,
        "ended_at": 0.0,
        "last": record,
        "models": ("final",),
    }
    return RunStatus(**(fields | changes))


def test_more_runs_than_a_message_holds_leave_out_the_oldest(serving: Serving, coordinator: Coordinator) -> None:
    serving.book.more = [status(f"run-{i}", detail="x" * 500) for i in range(10_000)]
    found = coordinator.status().runs
    assert 1000 < len(found) < 10_000
    assert found[0].name == "run-0"


def test_a_history_longer_than_a_message_is_fetched_round_by_round(
    serving: Serving, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedkit.server.operators._REPLY_BYTES", 10)
    found = coordinator.run(toy_task(), FedAvg(rounds=3, local=LOCAL), progress=False)
    assert [record.round for record in found.history] == [1, 2, 3]


# -- answers that make no sense ----------------------------------------------------------------------------------------


def test_a_server_that_is_no_coordinator_is_named_as_such(serving: Serving, coordinator: Coordinator) -> None:
    async def other() -> None:
        serving.server = grpc.aio.server(options=SERVER_OPTIONS)
        serving.server.add_insecure_port(serving.address)
        await serving.server.start()

    serving.stop()
    serving.on_loop(other())
    with pytest.raises(RemoteError, match="not a coordinator of fedkit"):
        coordinator.status()


class _Lying(OperatorService):
    async def fetch_model(self, request: pb.ModelRequest, context: Any) -> AsyncIterator[bytes]:
        async for raw in super().fetch_model(request, context):
            chunk = unframe(raw)
            yield raw if chunk is None else frame(bytes(chunk)[:-1] + b"\xee")

    async def status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        return pb.StatusReply(software="fedkit\x1b[2J")


def test_changed_bytes_and_terminal_commands_are_caught_at_the_caller(
    serving: Serving, coordinator: Coordinator
) -> None:
    serving.stop()
    serving.start(_Lying(serving.on_loop(_keeping(_wide(), packing.pack({"a": 1}), lasts=1))))
    with pytest.raises(PayloadError, match="digest"):
        coordinator.weights("any")
    assert coordinator.status().software == "fedkit [2J"
    with pytest.raises(RemoteError, match="says nothing of one"):
        coordinator.status("one")


# -- the command line --------------------------------------------------------------------------------------------------

RUN = """
[run]
name = "toy-1"
task = "toy"
seed = 3
[strategy]
name = "FedAvg"
rounds = 2
local = { steps = 4, batch_size = 8, lr = 0.1 }
[evaluate]
best = "loss:min"
"""


@pytest.fixture
def fedkit_at(serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "mine.py").write_text("from fedkit.testing import toy_task\ntask = toy_task()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FEDKIT_COORDINATOR", serving.address)
    monkeypatch.setattr("fedkit.cli.show.console._width", 80)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_a_run_file_runs_over_the_network_and_is_saved(fedkit_at: Callable[..., Result], tmp_path: Path) -> None:
    found = fedkit_at("run", "run.toml", "--task", "mine:task", "--out", "kept")
    assert found.exit_code == 0, found.stderr
    assert "2/2" in found.stdout
    assert "Test data" in found.stdout
    assert "Next: fedkit export kept" in found.stdout
    here = fedkit.simulate(
        toy_task(),
        FedAvg(rounds=2, local=LOCAL),
        clients=CLIENTS,
        seed=3,
        evaluate=Evaluation(best="loss:min"),
        progress=False,
    )
    assert codec.load(tmp_path / "kept" / "model.fedkit") == here.weights
    assert codec.load(tmp_path / "kept" / "best.fedkit") == here.best.weights


def test_json_of_a_run_is_that_of_its_result(fedkit_at: Callable[..., Result]) -> None:
    found = fedkit_at("run", "run.toml", "--task", "mine:task", "--json")
    facts = json.loads(found.stdout)
    assert [record["round"] for record in facts["history"]] == [1, 2]
    assert facts["strategy"]["name"] == "FedAvg"


def test_a_detached_run_needs_no_task_here_and_is_seen_by_status_and_weights(
    serving: Serving, coordinator: Coordinator, fedkit_at: Callable[..., Result], tmp_path: Path
) -> None:
    assert "Next: fedkit status toy-1" in fedkit_at("run", "run.toml", "--detach").stdout
    list(coordinator.watch("toy-1"))
    table = fedkit_at("status", "toy-1").stdout
    assert "finished" in table
    assert "Task toy, FedAvg, 2 rounds, seed 3\nRound 2: 3 clients" in table
    assert json.loads(fedkit_at("status", "--json").stdout)["runs"][0]["name"] == "toy-1"
    assert {one["which"] for one in json.loads(fedkit_at("weights", "--json").stdout)} == {"final", "best"}
    assert "toy-1" in fedkit_at("weights").stdout
    assert fedkit_at("weights", "toy-1", "--out", "m.fedkit", "--which", "best").exit_code == 0
    assert codec.load(tmp_path / "m.fedkit") == coordinator.weights("toy-1", "best")
    facts = json.loads(fedkit_at("weights", "toy-1", "--out", "m.fedkit", "--json").stdout)
    assert facts["digest"] == coordinator.weights("toy-1").digest
    assert "was over already: finished" in fedkit_at("cancel", "toy-1").stdout


def test_a_coordinator_with_nothing_says_what_to_do_next(fedkit_at: Callable[..., Result]) -> None:
    found = fedkit_at("status").stdout
    assert "No client has attended yet. Next: start one at each site with fedkit client" in found
    assert "There are no runs yet. Next: fedkit run RUN.toml" in found
    assert "There are no models yet" in fedkit_at("weights").stdout
    assert json.loads(fedkit_at("status", "--json").stdout)["clients"] == []
    assert json.loads(fedkit_at("weights", "--json").stdout) == []


def test_tables_fit_eighty_columns_and_take_no_text_for_markup(
    serving: Serving, fedkit_at: Callable[..., Result]
) -> None:
    job = JobStatus("heart-weekly-refresh-2026-11", 12, "0" * 32, "Evaluate", 40, 100)
    serving.book.here = [
        ClientStatus("university-hospital-of-a-very-long-town", "working", ("heart",), 4000.0, (job,), ""),
        ClientStatus("va", "away", ("heart", "toy"), 90_000.0, (), "[red]policy[/red] in heart-1"),
    ]
    serving.book.more = [
        status("heart-weekly-refresh-2026-11", rounds=15),
        status("w", rounds=15, state="waiting", detail="[b]"),
    ]
    found = fedkit_at("status").stdout
    assert max(len(line) for line in found.splitlines()) <= 80
    assert "[red]po" in found
    assert "w waiting: [b]" in found
    assert all(word in found for word in ("working", "waiting", "3/15", "1 h", "0.5000"))


def test_a_running_run_is_cancelled(serving: Serving, fedkit_at: Callable[..., Result]) -> None:
    serving.gate(0)
    fedkit_at("run", "run.toml", "--detach")
    assert "toy-1 is cancelled" in fedkit_at("cancel", "toy-1").stdout
    assert json.loads(fedkit_at("cancel", "toy-1", "--json").stdout)["state"] == "cancelled"


class _Watched(OperatorService):
    """Knows when somebody watches."""

    def __init__(self, book: Book) -> None:
        super().__init__(book)
        self.begun = threading.Event()

    async def watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.RunEvent]:
        async for event in super().watch(request, context):
            yield event
            self.begun.set()


def test_control_c_leaves_the_run_alone_and_says_how_to_look_again(
    serving: Serving, fedkit_at: Callable[..., Result], tmp_path: Path
) -> None:
    serving.stop()
    service = _Watched(serving.book)
    serving.start(service)
    serving.gate(0)
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # in a background job too
    program = f"{heeds}; from fedkit.cli import app; app()"
    command = [sys.executable, "-c", program, "run", "run.toml", "--task", "mine:task"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert service.begun.wait(60)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "detached; toy-1 goes on at the coordinator: look again with fedkit status toy-1" in " ".join(said.split())
    assert fedkit_at("status", "toy-1", "--json").exit_code == 0
    assert serving.book.entries["toy-1"].state == "running"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cancel", "none"), "there is no run 'none'"),
        (("status", "none"), "there is no run 'none'"),
        (("weights", "none", "--out", "x"), "there is no run 'none'"),
        (("weights", "--out", "x"), "fedkit weights RUN --out FILE"),
        (("status", "--coordinator", "127.0.0.1:1"), "nothing answers at 127.0.0.1:1: is fedkit server running there"),
        (("status", "--coordinator", "far.example:8443"), "off loopback an identity is needed"),
        (("run", "run.toml", "--detach", "--out", "x"), "--detach returns before there is a result"),
    ],
)
def test_what_cannot_be_done_is_one_clear_message(
    fedkit_at: Callable[..., Result], arguments: tuple[str, ...], words: str
) -> None:
    found = fedkit_at(*arguments)
    assert found.exit_code == 1
    assert words in " ".join(found.stderr.split())


def test_refusals_travel_with_their_reasons(serving: Serving, coordinator: Coordinator) -> None:
    refusal = Refusal("va", Reason.POLICY, "not here")
    serving.book.more = [status("one", last=RoundRecord(1, refusals=(refusal,)))]
    assert coordinator.status().runs[0].last.refusals == ()
