"""Whatever bytes a call is made of, it ends with a gRPC code that says something, and nothing is left of it.

Arbitrary bytes, and well-formed messages with hostile fields, go to every RPC of every service over a real socket.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

import fedkit
from fedkit.protos import agents_pb2 as pb
from fedkit.protos.wire import PROTOCOL, frame
from fedkit.trust.identity import Identity
from tests.network.place import HONEST, MAL, METHODS, Place, ended, trains
from tests.network.scripted import Answer, Talk, honest, update

Code = grpc.StatusCode
EXAMPLES = int(os.environ.get("FEDKIT_FUZZ_EXAMPLES", "40"))  # of each kind, for each RPC; `make faults` takes more
ALLOWED = {
    *(Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.ALREADY_EXISTS),
    *(Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.OUT_OF_RANGE, Code.RESOURCE_EXHAUSTED),
}
SHORT_S = 10.0  # a call that says nothing for so long hangs

HELLO = pb.FromAgent(
    hello=pb.Hello(protocol=PROTOCOL, client=MAL, instance=bytes(16), tasks=["plain"], max_examples=9)
).SerializeToString()
NASTY = [
    "",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\x1b[2J",
    "ada",
    "toy",
    "plain",
    "x" * 2000,
    "0" * 32,
    "\u202e",
    "{}",
    "run-0",
]
TEXT = st.sampled_from(NASTY) | st.text(max_size=20)
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
    FieldDescriptor.CPPTYPE_ENUM: (0, 9),
}


ODD = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


def settings_of(**known: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of these keys, now and then with an odd value or beside an odd key."""
    odd = st.fixed_dictionaries({}, optional={name: value | JSON for name, value in known.items()})
    odder = st.builds(lambda these, others: these | others, odd, st.dictionaries(TEXT, JSON, max_size=1))
    good = st.fixed_dictionaries(known)
    return good | good | good | good | odd | odder


COUNT = st.integers(1, 3) | st.integers(1, 3) | st.integers(-2, 1 << 64)
SHARE = st.just(0.5) | st.floats()
NAME = st.text("abc-.", min_size=1, max_size=8) | TEXT
LOCAL = settings_of(steps=COUNT, batch_size=COUNT, lr=SHARE) | settings_of(epochs=COUNT, proximal=SHARE)
PARTICIPATION = settings_of(fraction=SHARE, quorum=COUNT, deadline_s=SHARE, max_update_norm=SHARE)
RUN_FILES = settings_of(
    run=settings_of(name=NAME, task=st.sampled_from(["plain", "plain", "os:system"]), seed=COUNT, min_clients=COUNT),
    strategy=settings_of(name=st.sampled_from(["FedAvg", "FedSGD", "FedBuff", "os:system"]), rounds=COUNT)
    | settings_of(name=st.just("FedAvg"), rounds=COUNT, local=LOCAL, participation=PARTICIPATION),
    evaluate=settings_of(every=COUNT) | settings_of(every=COUNT) | settings_of(every=COUNT, best=TEXT, patience=COUNT),
).map(json.dumps)


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """What a field may hold, the edges first."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        return messages(field.message_type)
    if field.cpp_type in INTEGERS:
        low, high = INTEGERS[field.cpp_type]
        return st.sampled_from([0, 1, 2, high, low]) | st.integers(low, high)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if field.name == "run_file":
            return RUN_FILES | TEXT
        return TEXT if field.type == FieldDescriptor.TYPE_STRING else st.binary(max_size=64)
    return st.booleans() if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL else st.floats()


def messages(kind: Descriptor) -> st.SearchStrategy[Any]:
    """Messages of this kind, with any of their fields."""

    @st.composite
    def drawn(draw: Callable[[Any], Any]) -> Any:
        message = message_factory.GetMessageClass(kind)()
        names = st.lists(st.sampled_from(sorted(kind.fields_by_name)), unique=True, max_size=6)
        for name in draw(names) if kind.fields else []:
            _set(message, kind.fields_by_name[name], draw)
        return message

    return st.deferred(drawn)


def _set(message: Any, field: FieldDescriptor, draw: Callable[[Any], Any]) -> None:
    if field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(values(field), max_size=3)))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        getattr(message, field.name).CopyFrom(draw(values(field)))
    else:
        setattr(message, field.name, draw(values(field)))


def raw(method: MethodDescriptor) -> st.SearchStrategy[bytes]:
    """A request as bytes: anything at all, a well-formed one, one that is cut or has more behind it."""
    formed = messages(method.input_type).map(lambda message: message.SerializeToString())
    cut = st.tuples(formed, st.integers(0, 40), st.binary(max_size=8)).map(lambda t: t[0][: t[1]] + t[2])
    return st.one_of(formed, st.binary(max_size=200), cut, st.binary(max_size=40).map(frame))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    running = Place(tmp_path_factory.mktemp("coordinator"), tls=True)
    yield running
    running.close()


MINE = {  # whose identity each service takes
    "fedkit.v1.Agents": MAL,
    "fedkit.v1.Operators": "operator",
    "fedkit.v1.Runs": MAL,
    "fedkit.v1.Identities": MAL,
}


class Caller:
    """Calls each RPC with the identity it takes, and with the session of a client that attends."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._channels = contextlib.ExitStack()
        self._by_service = {name: self._dialled(place.address, place.identities[who]) for name, who in MINE.items()}
        self._by_service["fedkit.v1.Enrolment"] = self._dialled(place.enrolment or "", None)
        self._agent = place.do(place.joined(MAL, honest))

    def _dialled(self, address: str, identity: Identity | None) -> grpc.Channel:
        authority = self.place.identities[MAL].authority
        shown = () if identity is None else (identity.key, identity.certificate)
        credentials = grpc.ssl_channel_credentials(authority, *shown)
        return self._channels.enter_context(grpc.secure_channel(address, credentials))

    def ended(self, method: MethodDescriptor, requests: list[bytes]) -> tuple[grpc.StatusCode, str]:
        """How a call of these messages ends."""
        channel = self._by_service[method.containing_service.full_name]
        return ended(channel, method, requests, self._agent.talk.welcome.session, SHORT_S)

    def close(self) -> None:
        self.place.do(self._agent.talk.vanish())
        self._channels.close()


@pytest.fixture
def caller(place: Place) -> Iterator[Caller]:
    calling = Caller(place)
    yield calling
    calling.close()


@pytest.fixture(autouse=True)
def nothing_is_logged_that_is_no_event(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No traceback, no warning of gRPC or asyncio: whatever is said is an event of fedkit's own, and none an error."""
    with capture_logs() as events:
        yield
    assert [record.getMessage() for record in caplog.records] == []
    assert [event for event in events if event["log_level"] == "error" or "exc_info" in event] == []


@pytest.mark.parametrize("name", METHODS)
def test_whatever_is_sent_ends_with_a_code_that_says_something(
    caller: Caller, name: str, record_property: Callable[[str, object], None]
) -> None:
    method = METHODS[name]
    sent = 0

    @settings(max_examples=EXAMPLES)
    @given(st.lists(raw(method), min_size=1, max_size=4 if method.client_streaming else 1), st.booleans())
    def fuzz(requests: list[bytes], says_hello: bool) -> None:
        nonlocal sent
        sent += len(requests)
        first = [HELLO] if says_hello and name == "Agents.Attend" else []
        code, details = caller.ended(method, [*first, *requests])
        assert code in ALLOWED, f"{code.name}: {details}"
        assert len(details) < 2100

    fuzz()
    record_property("inputs", sent)
    for run in caller.place.coordinator.database.runs():  # of a run file that was good by chance
        caller.place.do(cancelled(caller.place, run.name))


async def cancelled(place: Place, name: str) -> None:
    place.coordinator.runs.cancel(name)


ROUNDS = 40  # in which the scripted clients' model stays small


def test_a_fuzzed_update_is_never_taken(place: Place, record_property: Callable[[str, object], None]) -> None:
    drawn: list[tuple[pb.Announcement, list[bytes]]] = []

    @settings(max_examples=EXAMPLES)
    @given(messages(pb.Announcement.DESCRIPTOR), st.lists(raw(METHODS["Agents.Upload"]), max_size=4))
    def draw(announcement: pb.Announcement, pieces: list[bytes]) -> None:
        drawn.append((announcement, pieces))

    draw()
    honestly = place.run(rounds=ROUNDS)
    for start in range(0, len(drawn), ROUNDS):
        result = place.run((MAL, trains(fuzzing(drawn[start:]))), rounds=ROUNDS)
        assert result.weights == honestly.weights
        assert [record.clients for record in result.history] == [HONEST] * ROUNDS
    record_property("inputs", len(drawn))


def fuzzing(drawn: list[tuple[pb.Announcement, list[bytes]]]) -> Answer:
    """A client that hands in a fuzzed update in each round, with a digest that no payload has."""

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        changed, pieces = drawn[asked.round % len(drawn)]
        hand = await update(talk, asked)
        hand.announcement.MergeFrom(changed)
        hand.announcement.assignment_id = asked.id
        hand.announcement.digest = bytes(32)
        if asked.round % 2:
            await talk.post(hand)
            return
        hand.pieces = pieces or None
        with contextlib.suppress(grpc.aio.AioRpcError):
            replies = await talk.hand_in(hand.messages())
            assert "taken" not in [reply.WhichOneof("what") for reply in replies]

    return act


def test_after_all_that_an_honest_round_is_what_it_was(place: Place, alone: fedkit.Result) -> None:
    assert place.run().weights == alone.weights
    assert place.coordinator.attendance.sessions == {}
    assert place.coordinator.attendance.over == {}
