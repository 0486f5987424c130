"""What a run would ask of this site, held against its policy before it takes part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import grpc

from fedkit.client.permits import objections_to_code
from fedkit.client.settings import AgentSettings
from fedkit.config import DP
from fedkit.policy import Objection, Policy, Wish
from fedkit.protos import agents_pb2 as pb
from fedkit.protos.channels import channel
from fedkit.protos.failures import meant
from fedkit.protos.wire import CHANNEL_OPTIONS, Calls
from fedkit.rounds.assignment import Returns
from fedkit.runfile import RunFile
from fedkit.source import source_of
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.trust.identity import Identity
from fedkit.work import Evaluate, Fit, Gradient, Summarize, Work

__all__ = ["Prospect", "Request", "describe", "prospect"]

_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Request:
    """One kind of work that a run asks for, in words, and what the policy objects to it."""

    kind: str
    what: str
    objections: tuple[Objection, ...]


@dataclass(frozen=True, slots=True)
class Prospect:
    """A run as it is described, and all it asks; `known` says whether the agent has the task at all."""

    file: RunFile
    state: str
    clients: int
    aggregation: str
    known: bool
    requests: tuple[Request, ...]

    @property
    def is_welcome(self) -> bool:
        """Whether this site would take part in all of it."""
        return self.known and not any(request.objections for request in self.requests)


def describe(settings: AgentSettings, run: str) -> pb.RunDescription:
    """What the coordinator says of a run; raises `NoSuchRun`, `TrustError`, `Unreachable`."""
    identity = None if settings.identity is None else Identity.load(settings.identity)
    with channel(settings.coordinator, identity, CHANNEL_OPTIONS) as dialled:
        calls = Calls(dialled, pb.DESCRIPTOR.services_by_name["Runs"])
        try:
            found = calls.describe(pb.DescribeRequest(run=run), timeout=_ANSWER_S)
        except grpc.RpcError as error:
            raise meant(error, settings.coordinator) from None
    assert isinstance(found, pb.RunDescription)  # the deserializer makes nothing else
    return found


def prospect(described: pb.RunDescription, policy: Policy, tasks: Mapping[str, Task]) -> Prospect:
    """The run held against the policy; raises `ConfigError` for one whose strategy is not known here."""
    file = RunFile.from_json(described.run_file)
    strategy, task = file.build_strategy(), tasks.get(str(file.run.task))
    clients, aggregation = int(described.clients), described.aggregation or "plain"
    least = max(clients, file.run.min_clients or 1)  # before so many are there, no round begins
    source = source_of(task) if task is not None and task.name in policy.tasks else ""
    found = []
    for wish in _wishes(file, strategy, task, aggregation, least):
        objections = [*policy.objections(wish), *objections_to_code(policy, task, source, wish.work)]
        noise = _noise(file.privacy.dp) if wish.returns != "sums" or wish.private else ""
        sealed = ", and to seal the model" if wish.sealed else ""
        found.append(Request(wish.kind, f"{_words(wish.work)}{noise}{sealed}", tuple(objections)))
    return Prospect(file, described.state, clients, aggregation, task is not None, tuple(found))


def _wishes(file: RunFile, strategy: Strategy, task: Task | None, aggregation: str, clients: int) -> Iterator[Wish]:
    local, cohort, dp = strategy.local, strategy.asked(clients), file.privacy.dp
    private = dp is not None and dp.level == "example"
    colluders = dp.colluders if dp is not None and dp.noise == "shared" else None
    if dp is not None and not private and colluders is None and strategy.participation.fraction < 1.0:
        cohort = 1  # nobody is told who else was drawn

    def wish(work: Work, returns: Returns, count: int, *, noised: bool = private) -> Wish:
        about = (str(file.run.task), str(file.strategy["name"]), work, returns, aggregation, count)
        shared = colluders if isinstance(work, Fit | Gradient) else None
        return Wish(*about, private=noised, colluders=shared, sealed=file.privacy.sealed and returns == "weights")

    if strategy.uses & {"mean", "updates"}:
        yield wish(local, "update", cohort)
    if "start" in strategy.uses:
        yield wish(local, "update", 1)
    if "hop" in strategy.uses:
        gate = getattr(strategy, "gate", None)
        yield wish(local if gate is None else local.replace(gate=gate), "weights", 1)
    for asked in _questions(file, strategy, task):
        yield wish(asked, "sums", clients, noised=private and isinstance(asked, Summarize))


def _questions(file: RunFile, strategy: Strategy, task: Task | None) -> Iterator[Work]:
    """What is asked besides training."""
    yield from strategy.asks()
    if not strategy.trains:
        return
    if task is not None and task.prepare is not None:
        yield Summarize(query=task.prepare.query)
    if file.evaluate is not None:
        yield Evaluate()
    yield Evaluate(split="test")


def _noise(dp: DP | None) -> str:
    if dp is None:
        return ""
    how = f"epsilon {dp.epsilon:g}" if dp.epsilon is not None else f"noise {dp.noise_multiplier:g}"
    if dp.noise == "shared":
        whose = "of each client" if dp.level == "client" else "of each row"
        lost = f"with {dp.dropouts} dropouts and {dp.colluders} colluders"
        return f", with a part of the noise that all sites share: {how} at delta {dp.delta:g} {whose}, {lost}"
    if dp.level == "client":
        return f", clipped as a whole; the coordinator adds noise: {how} at delta {dp.delta:g} for each client"
    return f", privately: {how} at delta {dp.delta:g} over the run"


def _words(work: Work) -> str:
    if isinstance(work, Fit):
        much = f"{work.steps} steps" if work.steps is not None else f"{work.epochs} passes"
        rate = "the task's own rate" if work.lr is None else f"learning rate {work.lr:g}"
        judged = "" if work.gate is None else ", after judging the hop before"
        return f"{much} in batches of {work.batch_size}, {rate}{judged}"
    if isinstance(work, Gradient):
        return f"one gradient of {work.batch_size} rows"
    if isinstance(work, Evaluate):
        what = "" if work.exam is None else f" of the model exported as {work.exam.variant}"
        return f"scores{what} on {work.split} data"
    return f"{type(work.query).__name__.lower()} of the training data"
