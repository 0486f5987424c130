"""`fedkit.connect`: the Python face of a federation on a network. The same strategies, the same `Result`."""

from __future__ import annotations

import contextlib
import queue
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError
from torch import nn

from fedkit import codec, packing, registry
from fedkit.codec import Decoder, Limits
from fedkit.config import Evaluation, Privacy, parse
from fedkit.crypto.box import Owner
from fedkit.enrolment import renew
from fedkit.errors import (
    ConfigError,
    NameTaken,
    NoSuchRun,
    PayloadError,
    RemoteError,
    RunCancelled,
    RunFailed,
    Unreachable,
)
from fedkit.progress import shown
from fedkit.protos import convert_operators as convert
from fedkit.protos import operators_pb2 as pb
from fedkit.protos import tensors_pb2
from fedkit.protos.channels import channel
from fedkit.protos.failures import meant
from fedkit.protos.wire import CHANNEL_OPTIONS, Calls, frame, unframe
from fedkit.result import Result, opened, trained, warn_of_failures
from fedkit.rounds.conduct import Outcome
from fedkit.rounds.journal import RoundRecord
from fedkit.runfile import RunFile
from fedkit.status import RunStatus, Say, Status, unsaid
from fedkit.strategies import HandOver
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.tracking import About, Track, Tracking, tracker_for
from fedkit.trust.certificates import Role
from fedkit.trust.diagnosis import diagnose
from fedkit.trust.identity import Identity
from fedkit.weights import Weights

if TYPE_CHECKING:
    from fedkit.handover import Asked
    from fedkit.report.facts import Facts

__all__ = ["Coordinator", "asking", "connect"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Init: TypeAlias = Weights | nn.Module | Path | str | None

_ANSWER_S = 60.0  # a short question is answered within
_FIRST_S = 5.0  # a coordinator that never answered is not waited for longer
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
# A server that stops ends its calls with CANCELLED.
_AWAY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})
_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
_REGISTER = (
    "a strategy travels by its name, so the coordinator must have it: fedkit server --strategy module:Class, "
    "or an entry point in fedkit.strategies"
)
_CHOICE = random.SystemRandom()


def connect(
    address: str, credentials: Identity | Path | str | None = None, *, patience_s: float = 300.0
) -> Coordinator:
    """The coordinator at `address` ("host:port"). Nothing is asked yet; use it in a `with` block, or close it.

    `credentials` is an operator's identity, or the folder that `fedkit enroll` wrote: its certificate is renewed now
    where two thirds of its life are over, and not while the connection is open. None will do on loopback only, for a
    coordinator without TLS. A coordinator that goes away is waited for `patience_s` seconds, then `Unreachable` is
    raised. Raises `ConfigError` and `TrustError`.
    """
    if patience_s < 0:
        raise ConfigError(f"patience_s must be 0 or more, got {patience_s}")
    folder = Path(credentials) if isinstance(credentials, Path | str) else None
    identity = Identity.load(folder) if folder is not None else credentials
    if isinstance(identity, Identity):
        identity.require(Role.OPERATOR)
    elif identity is not None:
        raise ConfigError(f"credentials must be an identity or its folder, got {type(identity).__name__}")
    if identity is not None and folder is not None and time.time() >= identity.renew_at:
        with channel(address, identity, _OPTIONS) as opened:
            identity = renew(opened, identity, folder)
    return Coordinator(address, patience_s, identity)


class Coordinator:
    """A coordinator on a network. `connect` makes one.

    While it does not answer it is asked again, with growing pauses; what has begun there goes on meanwhile. Raises
    `Unreachable` when patience ends, `NoSuchRun` for a run that is not there, `RemoteError` for answers that make no
    sense.
    """

    def __init__(self, address: str, patience_s: float, identity: Identity | None = None) -> None:
        self.address = address
        self._peer = _Peer(address, patience_s, identity)
        self._channel = channel(address, identity, _OPTIONS)
        self._calls = Calls(self._channel, pb.DESCRIPTOR.services_by_name["Operators"])

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; runs go on."""
        self._channel.close()

    # -- runs ----------------------------------------------------------------------------------------------------------

    def run(
        self,
        task: str | Task,
        strategy: Strategy,
        *,
        name: str | None = None,
        seed: int = 0,
        init: Init = None,
        evaluate: Evaluation | None = None,
        privacy: Privacy | None = None,
        min_clients: int | None = None,
        owner: Owner | None = None,
        progress: bool | None = None,
        on_round: Callable[[RoundRecord], None] | None = None,
        track: Track = None,
    ) -> Result:
        """Trains `task` with `strategy` over the clients that attend, and gives what `fedkit.simulate` gives.

        Task and strategy travel by name and must be registered at the coordinator; `name` names the run (None: made
        up). Every round begins when `min_clients` are there (None: the quorum, else 2). Interrupted, it detaches: the
        run goes on. The models of a sealed run are for its `owner`, without whom the result holds them sealed. `track`
        is where the run is written down beside that, as in `fedkit.simulate`.

        Raises `ConfigError`, `TaskError`, `IncompatibleStrategy` before anything is trained, `RunFailed` where a round
        stays below its quorum, `RunCancelled`.
        """
        known = registry.find_task(task) if isinstance(task, str) else task
        given: dict[str, Any] = {"init": init, "evaluate": evaluate, "privacy": privacy, "min_clients": min_clients}
        tracker = tracker_for(track)
        run = self.submit(task, strategy, name=name, seed=seed, owner=owner, **given)
        what: Any = {"task": known, "strategy": strategy, "seed": seed, "engine": "federation"}
        about = About(run=run, privacy=privacy, evaluate=evaluate, **what)
        try:
            with Tracking(tracker, about, on_round) as tracking:
                with shown(strategy, progress, tracking) as watcher:
                    for record in self.watch(run, say=watcher.say):
                        watcher(record)
                found = self._result(run, known, strategy, owner)
                tracking.end(found.outcome, found.clients, found.privacy)
        except KeyboardInterrupt:
            text = f'detached; {run} goes on at {self.address}. Look again: connect(...).result("{run}")'
            raise KeyboardInterrupt(f"{text}, or fedkit status {run}") from None
        warn_of_failures(found.outcome)
        return found

    def submit(
        self,
        task: str | Task,
        strategy: Strategy,
        *,
        name: str | None = None,
        seed: int = 0,
        init: Init = None,
        evaluate: Evaluation | None = None,
        privacy: Privacy | None = None,
        min_clients: int | None = None,
        owner: Owner | None = None,
    ) -> str:
        """Begins a run and returns its name; raises what `run` raises before anything is trained."""
        of, how = task if isinstance(task, str) else task.name, type(strategy).__name__
        section = {"name": name or _made_up(of, how, seed), "task": of, "seed": seed, "min_clients": min_clients}
        values = {"run": section, "strategy": _described(strategy)}
        if evaluate is not None:
            values["evaluate"] = evaluate.to_dict()
        if privacy is not None:
            values["privacy"] = privacy.to_dict()
        file = parse(RunFile, values)
        start = _start(init, task)
        try:
            return self.submit_file(file, start, owner)
        except ConfigError as error:
            if how in registry.strategies() or "strategy" not in str(error):
                raise
            raise type(error)(f"{error}\n{how} is not one of fedkit's own: {_REGISTER}") from None

    def submit_file(self, file: RunFile, init: Weights | None = None, owner: Owner | None = None) -> str:
        """Begins the run of a run file, whose `[simulation]` stays here, and returns its name.

        `owner` is whom a sealed run's models are for.
        """
        name, file = file.run.name, file if owner is None else _owned(file, owner)
        taken = self._find(name)
        if taken is not None:
            raise NameTaken(f"there is a run {name!r} already ({taken.state}); give this one another name")
        absence, again = self._absence(), False
        while True:
            try:
                self._submit(file, init)
            except grpc.RpcError as error:
                if again and error.code() is grpc.StatusCode.ALREADY_EXISTS and self._is_ours(file):
                    return name  # the first answer was lost, the run was not
                absence.bear(error)
                again = True
            else:
                return name

    def _submit(self, file: RunFile, init: Weights | None) -> None:
        digest = b""
        if init is not None:
            digest = self._calls.store_model(_pieces(init)).digest
        text = file.to_json()
        self._calls.submit(pb.SubmitRequest(run_file=text, init_digest=digest), timeout=_ANSWER_S)

    def _is_ours(self, file: RunFile) -> bool:
        found = self._find(file.run.name)
        ours = (file.run.task, file.strategy["name"], file.run.seed)
        return found is not None and (found.task, found.strategy, found.seed) == ours

    def _find(self, run: str) -> RunStatus | None:
        try:
            return self.status(run).runs[0]
        except NoSuchRun:
            return None

    def watch(self, run: str, after_round: int = 0, *, say: Say = unsaid) -> Iterator[RoundRecord]:
        """Every committed round after `after_round`, as it happens, until the run has finished.

        `say` is told in a few words what the run waits for, or that the coordinator is away. Raises `RunFailed` or
        `RunCancelled` where the run ends so.
        """
        for event in self._events(run, after_round, say):
            if isinstance(event, RoundRecord):
                yield event
            elif event.state == "failed":
                raise RunFailed(f"{run} failed: {event.detail}" if event.detail else f"{run} failed")
            elif event.state == "cancelled":
                raise RunCancelled(f"{run} was cancelled after round {event.round}; its last committed model stands")
            elif event.detail:
                say(f"{event.state}: {event.detail}")

    def _events(self, run: str, after: int, say: Say) -> Generator[RoundRecord | RunStatus]:
        absence = self._absence(run, say)
        while True:
            request = pb.WatchRequest(run=run, after_round=after)
            try:
                with _Stream(self._calls.watch, request) as stream:
                    for message in stream:
                        absence.end()
                        event = _event(message)
                        if isinstance(event, RoundRecord):
                            after = max(after, event.round)
                        yield event
                        if isinstance(event, RunStatus) and event.is_over:
                            return
                raise RemoteError(f"the coordinator at {self.address} stopped telling of {run} before its end")
            except grpc.RpcError as error:
                absence.bear(error)

    def result(
        self,
        run: str,
        task: str | Task | None = None,
        strategy: Strategy | None = None,
        owner: Owner | None = None,
    ) -> Result:
        """What a finished run gave; raises `RunError` while it goes on, or where it failed.

        `task` and `strategy` are the run's own where they are registered here too (None); raises `ConfigError` where
        they are not. The `owner` of a sealed run opens its models; raises `Refused` where they are not for it.
        """
        found = self._result(run, task, strategy, owner)
        warn_of_failures(found.outcome)
        return found

    def _result(
        self, run: str, task: str | Task | None, strategy: Strategy | None, owner: Owner | None = None
    ) -> Result:
        status = self.status(run).runs[0]
        known = task if isinstance(task, Task) else registry.find_task(task or status.task)
        message = self._ask("fetch_outcome", pb.RunRequest(run=run))
        file = RunFile.from_json(message.run_file)
        strategy = strategy or _strategy(status, file)
        outcome = self._outcome(run, message)
        privacy = file.privacy
        ask: Asked | None = asking(self.address, self._peer.identity, known, status.seed, file.run.min_clients)
        if _is_sealed(outcome):  # by what came, and not by what the coordinator says of it
            privacy, ask = privacy.replace(sealed=True), None
        if owner is not None:
            outcome = opened(outcome, owner.open)
        about: Any = {"name": run, "privacy": privacy, "evaluate": file.evaluate, "engine": "federation"}
        return Result(known, trained(strategy, outcome), status.seed, _seen(outcome), outcome, **about, ask=ask)

    def _outcome(self, run: str, message: pb.Outcome) -> Outcome:
        history = [convert.record_from_proto(record) for record in message.history] or list(self.watch(run))
        weights = self.weights(run)
        best = None
        if message.HasField("best"):
            is_last = bool(history) and message.best.round == history[-1].round
            best = weights if is_last else self.weights(run, "best")
        state = packing.unpack(self._fetch(run, "state", _Packed))
        if not isinstance(state, dict):
            raise PayloadError(f"the strategy's state of {run} is not one")
        return convert.outcome_from_proto(message, history=history, weights=weights, best=best, state=state)

    def facts(self, run: str) -> Facts:
        """What is on record of a run now, without its models: it may go on. `fedkit.report.page` makes a page of it.

        What protects a run, and its scores on test data, are told once it has finished.
        """
        from fedkit.report.facts import of_status  # passports and all, which no run needs

        status = self.status(run).runs[0]
        known: dict[str, Any] = {}
        if status.state == "finished":
            message = self._ask("fetch_outcome", pb.RunRequest(run=run))
            file = RunFile.from_json(message.run_file)
            known = {"privacy": file.privacy, "evaluate": file.evaluate, "strategy": file.strategy}
            known |= convert.ending_from_proto(message) | {"best": convert.best_from_proto(message)}
        return of_status(status, self._so_far(status), **known)

    def _so_far(self, status: RunStatus) -> list[RoundRecord]:
        """The rounds that are committed, of a run that may go on."""
        found: list[RoundRecord] = []
        if status.round == 0:
            return found
        with contextlib.closing(self._events(status.name, 0, unsaid)) as events:
            for event in events:
                if isinstance(event, RoundRecord):
                    found.append(event)
                    if event.round >= status.round:
                        break
        return found

    def weights(self, run: str, which: str = "final") -> Weights:
        """The "final" weights, which are the last committed ones while the run goes on, or the "best"."""
        return self._fetch(run, which, _decoder)

    def status(self, run: str = "") -> Status:
        """Everybody who attends or has attended, and all runs, the newest first, or the one named."""
        reply = convert.status_from_proto(self._ask("status", pb.StatusRequest(run=run)))
        if run and not reply.runs:
            raise RemoteError(f"the coordinator at {self.address} says nothing of {run}")
        return reply

    def cancel(self, run: str) -> RunStatus:
        """Ends a run; its last committed model stands. One that is over stays as it is."""
        return convert.run_from_proto(self._ask("cancel_run", pb.RunRequest(run=run)))

    # -- the way there -------------------------------------------------------------------------------------------------

    def _absence(self, run: str = "", say: Say = unsaid) -> _Absence:
        return _Absence(self._peer, run, say)

    def _ask(self, method: str, request: Any) -> Any:
        absence = self._absence()
        while True:
            try:
                reply = getattr(self._calls, method)(request, timeout=_ANSWER_S)
            except grpc.RpcError as error:
                absence.bear(error)
            else:
                absence.end()
                return reply

    def _fetch(self, run: str, which: str, begin: Callable[[tensors_pb2.Header], _Sink[T]]) -> T:
        """Takes a model or state to its end, going on where it broke off as long as it is the same one."""
        absence = self._absence(run)
        header: tensors_pb2.Header | None = None
        sink: _Sink[T] | None = None
        while True:
            request = pb.ModelRequest(run=run, which=which, offset=0 if sink is None else sink.offset)
            try:
                with _Stream(self._calls.fetch_model, request) as stream:
                    announced = _header(next(stream, b""))
                    if sink is not None and announced != header:
                        sink = None
                        continue
                    header, sink = announced, sink or begin(announced)
                    for raw in stream:
                        absence.end()
                        sink.feed(sink.offset, _data(raw))
                return sink.finish()
            except grpc.RpcError as error:
                absence.bear(error)


class _Stream:
    """The messages of a stream, read in a thread of its own.

    Control-C reaches the main thread only. In the middle of gRPC's bookkeeping it would leave a channel that never
    closes and never gives another message.
    """

    def __init__(self, method: Callable[[Any], Any], request: Any) -> None:
        self._method = method
        self._request = request
        self._items: queue.Queue[Any] = queue.Queue(maxsize=4)
        self._call: Any = None
        self._closed = threading.Event()

    def __enter__(self) -> Iterator[Any]:
        threading.Thread(target=self._read, daemon=True).start()
        return self._messages()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()
        if self._call is not None:
            self._call.cancel()
        with contextlib.suppress(queue.Empty):
            while True:  # the reader may wait for a place
                self._items.get_nowait()

    def _messages(self) -> Iterator[Any]:
        while (item := self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def _read(self) -> None:
        try:
            self._call = self._method(self._request)
            if self._closed.is_set():
                self._call.cancel()
            for message in self._call:
                self._items.put(message)
            self._items.put(None)
        except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed
            self._items.put(error)


@dataclass
class _Peer:
    """Whom we talk to, how long it may be away, and whether it has ever answered."""

    address: str
    patience_s: float
    identity: Identity | None = None
    has_answered: bool = False

    @property
    def patience_now_s(self) -> float:
        """One that never answered may not be there at all."""
        return self.patience_s if self.has_answered else min(self.patience_s, _FIRST_S)


class _Absence:
    """How long a coordinator has not answered, and when to ask again."""

    def __init__(self, peer: _Peer, run: str, say: Say) -> None:
        self._peer = peer
        self._run = run
        self._say = say
        self._since: float | None = None
        self._pause_s = _PAUSE_S

    def end(self) -> None:
        """It answers."""
        self._peer.has_answered = True
        self._since = None
        self._pause_s = _PAUSE_S

    def bear(self, error: grpc.RpcError) -> None:
        """Waits a moment. Raises `Unreachable` at the end of patience, and at once what any other error stands for."""
        if error.code() not in _AWAY:
            raise meant(error, self._peer.address) from None
        now = time.monotonic()
        if self._since is None and not self._peer.has_answered:
            hint = diagnose(self._peer.address, self._peer.identity)
            if hint:
                raise Unreachable(hint) from None
        self._since = now if self._since is None else self._since
        left = self._since + self._peer.patience_now_s - now
        if left <= 0:
            raise Unreachable(self._text()) from None
        self._say("the coordinator does not answer; asking again")
        time.sleep(min(left, self._pause_s * _CHOICE.uniform(0.5, 1.0)))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _text(self) -> str:
        text = f"nothing answers at {self._peer.address}: is fedkit server running there, and is the address right?"
        if not self._run:
            return text
        return f"{text} {self._run} goes on as soon as the coordinator does: look again with fedkit status {self._run}"


# -- what is sent ------------------------------------------------------------------------------------------------------


def _made_up(task: str, strategy: str, seed: int) -> str:
    parts = re.sub(r"[^a-z0-9_.-]+", "-", f"{task}-{strategy}-{seed}".lower()).lstrip("_.-")
    return f"{parts[:91]}-{secrets.token_hex(4)}"


def _described(strategy: Strategy) -> dict[str, Any]:
    """A strategy as its registered name and its settings; raises `ConfigError` where that would not be all of it."""
    kind = type(strategy)
    name = kind.__name__
    if name in registry.strategies() and registry.find_strategy(name) is not kind:
        raise ConfigError(f"{kind.__module__}.{name} is not the strategy registered as {name}: rename it. {_REGISTER}")
    settings = strategy.to_dict()
    if packing.pack(strategy.state_dict()) != packing.pack(parse(kind, settings).state_dict()):
        kept = ", ".join(strategy.state_dict())
        raise ConfigError(f"this {name} has state ({kept}) that does not travel: begin with a fresh one, and init=")
    return {"name": name, **settings}


def _owned(file: RunFile, owner: Owner) -> RunFile:
    """With the owner's name and box key; raises `ConfigError` where there is nothing to own, or another owner."""
    privacy = file.privacy
    if not privacy.sealed or privacy.owner not in (None, owner.name):
        whose = f"names {privacy.owner} as its owner" if privacy.sealed else "is not sealed, and has no owner"
        raise ConfigError(f"{file.run.name} {whose}: {owner.name} has no part in it")
    box = owner.offer(file.run.name).to_bytes().hex()
    return file.replace(privacy=privacy.replace(owner=owner.name, owner_box=box))


def _start(init: Init, task: str | Task) -> Weights | None:
    if init is None or isinstance(init, Weights):
        return init
    if isinstance(init, nn.Module):
        known = registry.find_task(task) if isinstance(task, str) else task
        return Weights.from_module(init, known.travels)
    return codec.load(init)


def _pieces(weights: Weights) -> Iterator[bytes]:
    header, chunks = codec.encode(weights)
    yield tensors_pb2.Piece(header=convert.model_header_to_proto(header)).SerializeToString()
    for chunk in chunks:
        yield frame(chunk)


# -- what comes back ---------------------------------------------------------------------------------------------------


class _Sink(Protocol[T_co]):
    """Takes bytes in order and makes something of them."""

    @property
    def offset(self) -> int:
        """The number of bytes taken."""
        ...

    def feed(self, offset: int, chunk: bytes | memoryview) -> None:
        """Takes one chunk that begins at `offset`."""
        ...

    def finish(self) -> T_co:
        """What the bytes are, once all are there; raises `PayloadError`."""
        ...


class _Packed:
    """A payload without a manifest, held against its length and digest."""

    def __init__(self, header: tensors_pb2.Header) -> None:
        if header.manifest or header.extras or header.payload_bytes > Limits().payload_bytes:
            raise PayloadError("the state is announced as something else, or larger than is taken")
        self._header = header
        self._received = bytearray()

    @property
    def offset(self) -> int:
        return len(self._received)

    def feed(self, offset: int, chunk: bytes | memoryview) -> None:
        if offset != self.offset or self.offset + len(chunk) > self._header.payload_bytes:
            raise PayloadError(f"more than the announced {self._header.payload_bytes} bytes arrived")
        self._received += chunk

    def finish(self) -> bytes:
        whole = len(self._received) == self._header.payload_bytes
        if not whole or convert.packed_digest(self._received) != self._header.digest:
            raise PayloadError("the state's digest is not the announced one; the bytes were changed on the way")
        return bytes(self._received)


def _decoder(header: tensors_pb2.Header) -> Decoder:
    return Decoder(convert.model_header_from_proto(header))


def _header(raw: bytes) -> tensors_pb2.Header:
    try:
        piece = tensors_pb2.Piece.FromString(raw)
    except DecodeError:
        piece = tensors_pb2.Piece()
    if not piece.HasField("header"):
        raise PayloadError("a model begins with its header")
    return piece.header


def _data(raw: bytes) -> memoryview:
    chunk = unframe(raw)
    if not chunk:
        raise PayloadError("after the header come pieces of data")
    return chunk


def _event(message: pb.RunEvent) -> RoundRecord | RunStatus:
    if message.HasField("round"):
        return convert.record_from_proto(message.round)
    return convert.run_from_proto(message.state)


def _is_sealed(outcome: Outcome) -> bool:
    models = [outcome.weights, *([] if outcome.best is None else [outcome.best.weights])]
    return any(model.manifest.is_sealed for model in models)


def asking(
    address: str, identity: Identity | Path | None, task: str | Task, seed: int, min_clients: int | None = None
) -> Asked:
    """What hands a model over to the clients that attend a coordinator, in a run of its own."""

    def ask(strategy: HandOver, model: Weights, privacy: Privacy) -> HandOver:
        with connect(address, identity) as coordinator:
            about: Any = {"init": model, "privacy": privacy, "min_clients": min_clients, "progress": False}
            found = coordinator.run(task, strategy, seed=seed, **about).strategy
        assert isinstance(found, HandOver)  # it is the strategy that was given
        return found

    return ask


def _strategy(status: RunStatus, file: RunFile) -> Strategy:
    try:
        return file.build_strategy()
    except ConfigError as error:
        raise ConfigError(f"{error}\nGive the {status.strategy} that {status.name} was submitted with") from None


def _seen(outcome: Outcome) -> tuple[str, ...]:
    """Everybody whom the history names."""
    names = {refusal.client for refusal in outcome.refusals} | set(outcome.test_per_client)
    for record in [*outcome.history, *outcome.abandoned]:
        names |= {*record.clients, *record.per_client, *(refusal.client for refusal in record.refusals)}
    return tuple(sorted(names))
