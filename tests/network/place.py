"""A coordinator for tests that misuse it, the honest clients beside whom it is misused, and calls of raw bytes."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pkgutil
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor

import fedkit
from bench.processes import free_port
from fedkit import protos
from fedkit.errors import Reason
from fedkit.protos import agents_pb2 as pb
from fedkit.protos.wire import SESSION_KEY
from fedkit.server.process import CoordinatorSettings
from fedkit.strategies import FedAvg
from fedkit.trust.authority import Authority
from fedkit.trust.certificates import Role
from fedkit.trust.identity import Identity
from tests.network import tasks
from tests.network.inside import Inside
from tests.network.scripted import Agent, Answer, Talk, honest

__all__ = ["HONEST", "MAL", "METHODS", "Place", "cost_nothing_else", "ended", "lost_once", "refusals", "trains"]

HONEST = ("ada", "bea")
MAL = "mal"
METHODS: dict[str, MethodDescriptor] = {
    f"{service.name}.{method.name}": method
    for module in (
        importlib.import_module(f"fedkit.protos.{one.name}") for one in pkgutil.iter_modules(protos.__path__)
    )
    if module.__name__.endswith("_pb2")
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


class Place(Inside):
    """A coordinator with the event loop in which the scripted agents live too; with `tls`, all have identities."""

    def __init__(self, folder: Path, *, tls: bool = False) -> None:
        self.folder = folder
        self.metrics = f"127.0.0.1:{free_port()}"
        self.enrolment = f"127.0.0.1:{free_port()}" if tls else None
        self.identities: dict[str, Identity] = {}
        self._numbers = itertools.count()
        given: dict[str, Any] = {"state": folder, "metrics": self.metrics, "heartbeat_s": 5.0, "rejoin_s": 0.1}
        if tls:
            given |= {"authority": self._authority(folder / "authority"), "enrolment": self.enrolment}
        settings = CoordinatorSettings(listen=f"127.0.0.1:{free_port()}", **given)
        super().__init__(settings, {"plain": tasks.plain})

    def _authority(self, folder: Path) -> Path:
        with contextlib.closing(Authority.create(folder, "hospitals")) as authority:
            self.identities = {name: authority.identity(Role.AGENT, name) for name in (*HONEST, MAL)}
            self.identities["operator"] = authority.identity(Role.OPERATOR, "operator")
        return folder

    def run(
        self,
        *answers: tuple[str, Answer],
        rounds: int = 2,
        raw: bool = False,
        hello: Mapping[str, Any] | None = None,
        **participation: Any,
    ) -> fedkit.Result:
        """A run with the honest clients and those given; none of them is here afterwards.

        The bad one is given what the coordinator takes as `raw` bytes, and a `hello` of its own.
        """
        chosen = {**dict.fromkeys(HONEST, honest), **dict(answers)}
        own = {"raw": raw, **(hello or {})}
        agents = [self.do(self.joined(name, answer, **(own if name == MAL else {}))) for name, answer in chosen.items()]
        try:
            strategy = FedAvg(rounds=rounds, participation=fedkit.Participation(**participation))
            with fedkit.connect(self.address, self.identities.get("operator")) as coordinator:
                name = f"run-{next(self._numbers)}"  # names by chance would meet one day
                return coordinator.run(tasks.plain, strategy, name=name, seed=7, min_clients=2, progress=False)
        finally:
            for agent in agents:
                self.do(agent.stop())

    async def joined(self, name: str, answer: Answer, **talk: Any) -> Agent:
        return await Agent(self.address, name, answer, identity=self.identities.get(name), **talk).start()

    def counted(self, name: str, **labels: str) -> float:
        """The value of one of the coordinator's counters."""
        return self.coordinator.metrics.registry.get_sample_value(f"fedkit_{name}_total", labels) or 0.0

    def metrics_page(self) -> dict[str, float]:
        """What Prometheus reads, line by line."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics") as reply:
            lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


async def without_data(talk: Talk, asked: pb.Assignment) -> None:
    await talk.say(refusal=pb.Refusal(assignment_id=asked.id, reason="no_data"))


def trains(act: Callable[[Talk, pb.Assignment], Awaitable[None]], otherwise: Answer = without_data) -> Answer:
    """A client that does this when it is to train, and something else, nothing by default, when it is to score."""

    async def answer(talk: Talk, asked: pb.Assignment) -> None:
        await (act if asked.WhichOneof("work") == "fit" else otherwise)(talk, asked)

    return answer


def refusals(result: fedkit.Result) -> list[tuple[str, str]]:
    return [(refusal.client, refusal.reason.value) for record in result.history for refusal in record.refusals]


def cost_nothing_else(result: fedkit.Result, alone: fedkit.Result, reason: Reason | str) -> None:
    """The model is that of the honest clients alone, and history says of the bad one why."""
    assert refusals(result) == [(MAL, Reason(reason).value)] * len(result.history)
    assert result.weights == alone.weights
    assert [record.clients for record in result.history] == [HONEST] * len(alone.history)
    assert result.test == alone.test


def lost_once(result: fedkit.Result, alone: fedkit.Result) -> None:
    """The model is that of the honest clients alone; the bad one left, or was made to, in the first round."""
    assert result.weights == alone.weights
    assert refusals(result) == [(MAL, Reason.LOST.value)]


def ended(
    channel: grpc.Channel,
    method: MethodDescriptor,
    messages: Sequence[bytes],
    session: bytes = b"",
    seconds: float = 20,
) -> tuple[grpc.StatusCode, str]:
    """How a call ends that sends these messages and then nothing more: its code, and what is said to it."""
    sides = (method.client_streaming, method.server_streaming)
    shape = "_".join("stream" if many else "unary" for many in sides)
    call = getattr(channel, shape)(f"/{method.containing_service.full_name}/{method.name}")
    metadata = [(SESSION_KEY, session)] if session else None
    given = iter(messages) if method.client_streaming else messages[0]
    try:
        answer = call(given, timeout=seconds, metadata=metadata)
        if method.server_streaming:
            for _ in answer:
                continue
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""
