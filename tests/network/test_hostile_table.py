"""Each file of `tests/hostile` is one bad input: refused with its own reason, at the cost of nothing else.

One coordinator serves all of them: it has to stay up through everything that is sent to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import grpc
import pytest
from google.protobuf import message_factory

import fedkit
from fedkit.errors import Reason
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import tensors_pb2
from fedkit.protos.wire import Laden, frame
from tests.network.hostile import FOLDER, BadAnswer, BadHello, BadMessage, BadRequest, BadUpdate, cases
from tests.network.place import HONEST, MAL, METHODS, Place, cost_nothing_else, ended, lost_once, refusals, trains
from tests.network.scripted import PATIENCE_S, Answer, Hand, Talk, honest, update

HEADERS = sorted((FOLDER / "headers").glob("*.json"))


class Bad:
    """A client that does what a file says, and hears what the file says; both ways of handing in, in turn.

    `before` are its updates of an earlier run, by round; `handed` are those of this one, `acts` counts the bad ones.
    """

    def __init__(self, bad: BadUpdate, before: Mapping[int, Hand] | None = None) -> None:
        self.bad = bad
        self.before = before or {}
        self.handed: dict[int, Hand] = {}
        self.acts = 0
        self._ways = itertools.cycle(bad.ways)
        self._asked_of_another: asyncio.Queue[str] = asyncio.Queue()
        self._done: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)  # by round

    @property
    def answers(self) -> list[tuple[str, Answer]]:
        """The bad client, and another one that keeps the round open, or whose assignment it answers."""
        mine = trains(self._act) if self.bad.reason else trains(self._act, otherwise=honest)
        holds = self.bad.is_another_clients or "pause" in SCRIPTS[self.bad.when]
        return [(MAL, mine), *([(HONEST[0], self._other)] if holds else [])]

    async def _other(self, talk: Talk, asked: pb.Assignment) -> None:
        if asked.WhichOneof("work") == "fit" and (asked.round == 1 or self.bad.reason != Reason.LOST):
            self._asked_of_another.put_nowait(asked.id)
            await asyncio.wait_for(self._done[asked.round].wait(), PATIENCE_S)
        await honest(talk, asked)

    async def _act(self, talk: Talk, asked: pb.Assignment) -> None:
        hand = self.handed[asked.round] = await update(talk, asked)
        way = next(self._ways)
        try:
            for step in SCRIPTS[self.bad.when]:
                await getattr(self, f"_{step}")(talk, hand, asked.round, way)
        finally:
            self._done[asked.round].set()

    # -- steps of a script ---------------------------------------------------------------------------------------------

    async def _honest(self, talk: Talk, hand: Hand, round: int, way: str) -> None:
        await self._hand_in(talk, hand, way, "taken")

    async def _bad(self, talk: Talk, hand: Hand, round: int, way: str, told: str = "") -> None:
        leaves = self.bad.reason == Reason.LOST
        key = await self._asked_of_another.get() if self.bad.is_another_clients else ""
        for each in self.bad.ways if leaves else [way]:
            await self._hand_in(talk, self.bad.spoil(copy.deepcopy(hand), key), each, told or self.bad.told)
            self.acts += 1
        if leaves:
            self._done[round].set()
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # it may have been ended before
                await talk.say(leaving=pb.Leaving())

    async def _spoilt(self, talk: Talk, hand: Hand, round: int, way: str) -> None:
        await self._bad(talk, hand, round, way, self.bad.reason)

    async def _better(self, talk: Talk, hand: Hand, round: int, way: str) -> None:
        await self._hand_in(talk, hand, way, self.bad.told)

    async def _pause(self, talk: Talk, hand: Hand, round: int, way: str) -> None:
        """The coordinator has done with the first answer; the round is still open, because another client waits."""
        await asyncio.sleep(0.05)

    async def _closed(self, talk: Talk, hand: Hand, round: int, way: str) -> None:
        while hand.announcement.assignment_id not in talk.dropped:
            await asyncio.sleep(0.005)

    async def _that_of_the_last_round(self, talk: Talk, hand: Hand, round: int, way: str) -> None:
        if round == 2:
            await self._bad(talk, self.handed[1], round, way)

    async def _that_of_the_last_run(self, talk: Talk, hand: Hand, round: int, way: str) -> None:
        await self._bad(talk, self.before[round], round, way)

    async def _hand_in(self, talk: Talk, hand: Hand, way: str, told: str) -> None:
        """Hands in, and hears "taken" or the reason why not."""
        if way == "upload":
            assert await uploaded(talk, hand) == [told]
            return
        key = hand.announcement.assignment_id
        await talk.post(hand)
        async with asyncio.timeout(PATIENCE_S):
            while told != "taken" and key not in talk.refused and talk.goodbye is None:
                await asyncio.sleep(0.005)
        if talk.goodbye is not None:
            assert pb.Goodbye.Reason.Name(talk.goodbye.reason).lower() == told
        else:
            assert talk.refused.pop(key, "taken") == told


async def uploaded(talk: Talk, hand: Hand) -> list[str | None]:
    """What an upload hears, message by message."""
    try:
        replies = await talk.hand_in(hand.messages())
    except grpc.aio.AioRpcError as error:
        return ["malformed" if error.code() is grpc.StatusCode.INVALID_ARGUMENT else error.code().name]
    return [reply.refused.reason or reply.WhichOneof("what") for reply in replies]


SCRIPTS = {
    "honestly": ["honest"],
    "at once": ["bad"],
    "again": ["honest", "pause", "bad"],
    "after a bad one": ["spoilt", "pause", "better"],
    "in the next round": ["that_of_the_last_round", "honest"],
    "in the next run": ["that_of_the_last_run", "honest"],
    "after a restart": ["that_of_the_last_run", "honest"],
    "late": ["closed", "bad"],
    "a round late": ["that_of_the_last_round"],
}


@pytest.mark.parametrize("bad", cases(BadUpdate, "updates"))
def test_a_bad_update_is_refused_with_its_reason_and_costs_nothing_else(
    place: Place, alone: fedkit.Result, together: fedkit.Result, bad: BadUpdate
) -> None:
    first = Bad(BadUpdate(why="", reason="", when="honestly"))
    if bad.when in ("in the next run", "after a restart"):
        place.run(*first.answers)
    if bad.when == "after a restart":
        place.restart()
    client = Bad(bad, first.handed)
    result = place.run(*client.answers, hello=bad.hello, **bad.participation)
    assert client.acts >= 1
    if bad.reason == Reason.LOST:
        lost_once(result, alone)
    elif bad.reason:
        cost_nothing_else(result, alone, bad.reason)
    else:
        assert refusals(result) == []
        assert result.weights == together.weights


@pytest.mark.filterwarnings("ignore::fedkit.errors.RefusalWarning")
@pytest.mark.parametrize("bad", cases(BadAnswer, "answers"))
def test_a_bad_answer_is_refused_with_its_reason_and_costs_nothing_else(
    place: Place, alone: fedkit.Result, together: fedkit.Result, bad: BadAnswer
) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        await talk.stream.write(Laden(bad.message(asked.id)))

    if bad.to == "fit":
        cost_nothing_else(place.run((MAL, trains(act))), alone, bad.reason)
        return
    result = place.run((MAL, trains(honest, otherwise=act)))
    assert result.weights == together.weights
    assert result.test == alone.test != together.test
    assert [(refusal.client, refusal.reason) for refusal in result.refusals] == [(MAL, bad.reason)]


@pytest.mark.parametrize("bad", cases(BadHello, "hellos"))
def test_a_bad_hello_is_answered_with_goodbye(place: Place, bad: BadHello) -> None:
    async def talk() -> pb.Goodbye:
        one = Talk(place.address, MAL, **bad.fields())
        answer = await one.begin()
        assert (await one.hear()).WhichOneof("what") is None
        await one.vanish()
        return answer.goodbye

    goodbye = place.do(talk())
    assert pb.Goodbye.Reason.Name(goodbye.reason) == bad.goodbye
    assert goodbye.detail.isprintable()
    assert len(goodbye.detail) < 200
    assert place.coordinator.attendance.sessions == {}


@pytest.mark.parametrize("bad", cases(BadMessage, "messages"))
def test_a_bad_message_ends_the_session_and_nothing_else(
    place: Place, alone: fedkit.Result, bad: BadMessage, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        await talk.stream.write(bad.message())

    lost_once(place.run((MAL, trains(act)), raw=True), alone)
    assert caplog.records == []


@pytest.mark.parametrize("bad", cases(BadRequest, "requests"))
def test_a_bad_request_ends_with_its_code(
    place: Place, alone: fedkit.Result, bad: BadRequest, caplog: pytest.LogCaptureFixture
) -> None:
    method = METHODS[bad.rpc]
    before = runs(place)
    with grpc.insecure_channel(place.address) as channel:
        kind = message_factory.GetMessageClass(method.input_type)
        code, details = ended(channel, method, bad.messages(kind))
    assert code.name == bad.code, details
    assert details.isprintable()
    assert runs(place) == before
    assert caplog.records == []


def runs(place: Place) -> list[str]:
    return [run.name for run in place.coordinator.database.runs()]


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.stem)
def test_a_model_with_a_bad_header_is_refused_where_it_is_stored(place: Place, path: Path) -> None:
    fields = tensors_pb2.Header(
        manifest=path.read_bytes().decode("utf-8", "replace"), payload_bytes=8, digest=bytes(32)
    )
    piece = tensors_pb2.Piece(header=fields).SerializeToString()
    with grpc.insecure_channel(place.address) as channel:
        code, details = ended(channel, METHODS["Operators.StoreModel"], [piece, frame(bytes(8))])
    assert code is grpc.StatusCode.INVALID_ARGUMENT, details


def test_there_are_enough_bad_inputs() -> None:
    assert len(list(FOLDER.rglob("*.toml"))) >= 150


def test_nothing_is_left_in_the_folder_of_runs_that_are_over(place: Place, alone: fedkit.Result) -> None:
    assert [path for path in (place.folder / "spool").rglob("*") if path.is_file()] == []
    assert not [path for path in place.folder.rglob("*") if "owned" in path.name or "passwd" in path.name]
