"""What one bad client does costs its own contribution, on record by reason, and nothing else.

One coordinator serves all tests of this file: it has to stay up through everything that is sent to it.
"""

from __future__ import annotations

import asyncio
import itertools
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest

import fedkit
from fedkit.errors import Reason, RefusalWarning
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import tensors_pb2
from fedkit.protos.wire import SESSION_KEY, frame
from fedkit.server import agents as service
from fedkit.server.process import CoordinatorSettings
from fedkit.strategies import FedAvg
from tests.network import tasks
from tests.network.inside import Inside, free_port
from tests.network.scripted import EOF, PATIENCE_S, Agent, Answer, Hand, Talk, honest, update

T = TypeVar("T")

HONEST = ("ada", "bea")
MAL = "mal"
MIB = 1 << 20
MODEL_BYTES = 4 * 75
PARTICIPATION = fedkit.Participation(max_update_norm=1e6)


class Place(Inside):
    """A coordinator with the event loop in which the scripted agents live too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = f"127.0.0.1:{free_port()}"
        self._numbers = itertools.count()
        settings = CoordinatorSettings(
            listen="127.0.0.1:0", state=folder, metrics=self.metrics, heartbeat_s=5.0, rejoin_s=0.1
        )
        super().__init__(settings, {"plain": tasks.plain})

    def run(self, *answers: tuple[str, Answer], rounds: int = 2, raw: bool = False, **changes: Any) -> fedkit.Result:
        """A run with the honest clients and those given; none of them is here afterwards."""
        chosen = [*((name, honest) for name in HONEST), *answers]
        agents = [self.do(self.joined(name, answer, raw=raw and name == MAL)) for name, answer in chosen]
        try:
            strategy = FedAvg(rounds=rounds, participation=PARTICIPATION.replace(**changes))
            with fedkit.connect(self.address) as coordinator:
                name = f"run-{next(self._numbers)}"  # names by chance would meet one day
                return coordinator.run(tasks.plain, strategy, name=name, seed=7, min_clients=2, progress=False)
        finally:
            for agent in agents:
                self.do(agent.stop())

    async def joined(self, name: str, answer: Answer, *, raw: bool = False) -> Agent:
        return await Agent(self.address, name, answer, raw=raw).start()

    def counted(self, name: str, **labels: str) -> float:
        """The value of one of the coordinator's counters."""
        return self.coordinator.metrics.registry.get_sample_value(f"fedkit_{name}_total", labels) or 0.0

    def metrics_page(self) -> dict[str, float]:
        """What Prometheus reads, line by line."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics") as reply:
            lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    running = Place(tmp_path_factory.mktemp("coordinator"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def alone(place: Place) -> fedkit.Result:
    """What the honest clients come to without the bad one."""
    return place.run()


@pytest.fixture(scope="module")
def together(place: Place) -> fedkit.Result:
    """What three honest clients come to."""
    return place.run((MAL, honest))


def trains(act: Callable[[Talk, pb.Assignment], Awaitable[None]]) -> Answer:
    """A client that does this when it is to train, and has no data to score with."""

    async def answer(talk: Talk, asked: pb.Assignment) -> None:
        if asked.WhichOneof("work") == "fit":
            await act(talk, asked)
        else:
            await talk.say(refusal=pb.Refusal(assignment_id=asked.id, reason="no_data"))

    return answer


def scores(act: Callable[[Talk, pb.Assignment], Awaitable[None]]) -> Answer:
    """An honest client but for what it says of the model's scores."""

    async def answer(talk: Talk, asked: pb.Assignment) -> None:
        await (act if asked.WhichOneof("work") == "evaluate" else honest)(talk, asked)

    return answer


def handing(change: Callable[[Hand], Any], *, sign: bool = False, told: str = "refused") -> Answer:
    """A client whose honest update is changed before it is handed in, and what the coordinator says to that."""

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        change(hand)
        replies = await talk.hand_in((hand.sign() if sign else hand).messages())
        assert [reply.WhichOneof("what") for reply in replies] == [told], replies

    return trains(act)


def refusals(result: fedkit.Result) -> list[tuple[str, str]]:
    return [(refusal.client, refusal.reason.value) for record in result.history for refusal in record.refusals]


def cost_nothing_else(result: fedkit.Result, alone: fedkit.Result, reason: Reason) -> None:
    """The model is that of the honest clients alone, and history says of the bad one why."""
    assert result.weights == alone.weights
    assert refusals(result) == [(MAL, reason.value)] * len(result.history)
    assert [record.clients for record in result.history] == [HONEST] * len(alone.history)
    assert result.test == alone.test


# -- updates -----------------------------------------------------------------------------------------------------------


def values(change: Callable[[np.ndarray], Any]) -> Callable[[Hand], None]:
    def apply(hand: Hand) -> None:
        vector = np.frombuffer(hand.payload, dtype="<f4").copy()
        change(vector)
        hand.payload = vector.tobytes()

    return apply


def announced(**fields: Any) -> Callable[[Hand], None]:
    def apply(hand: Hand) -> None:
        for name, value in fields.items():
            setattr(hand.announcement, name, value)

    return apply


def with_extras(*extras: tuple[str, int], grows: bool = True) -> Callable[[Hand], None]:
    def apply(hand: Hand) -> None:
        hand.announcement.extras.extend(tensors_pb2.Extra(name=name, length=length) for name, length in extras)
        if grows:
            hand.payload += bytes(4 * sum(length for _, length in extras))

    return apply


def in_pieces(make: Callable[[bytes], list[bytes]]) -> Callable[[Hand], None]:
    def apply(hand: Hand) -> None:
        hand.pieces = make(hand.payload)

    return apply


def flip(hand: Hand) -> None:
    hand.payload = bytes([hand.payload[0] ^ 1]) + hand.payload[1:]


SIGNED = {
    "NaN": (values(lambda vector: vector.__setitem__(3, np.nan)), Reason.NOT_FINITE),
    "infinity": (values(lambda vector: vector.__setitem__(-1, np.inf)), Reason.NOT_FINITE),
    "minus infinity": (values(lambda vector: vector.fill(-np.inf)), Reason.NOT_FINITE),
    "another model": (lambda hand: setattr(hand, "payload", hand.payload * 2), Reason.SHAPE),
    "no model": (lambda hand: setattr(hand, "payload", b""), Reason.SHAPE),
    "seventeen extras": (with_extras(*((f"e{i:02}", 1) for i in range(17))), Reason.SHAPE),
    "extras out of order": (with_extras(("b", 1), ("a", 1)), Reason.SHAPE),
    "an extra without a name": (with_extras(("", 1)), Reason.SHAPE),
    "an extra with a name for a terminal": (with_extras(("\x1b]0;owned\x07", 1)), Reason.SHAPE),
    "no examples": (announced(examples=0), Reason.EXAMPLES),
    "more examples than declared": (announced(examples=1001), Reason.EXAMPLES),
    "2^63 examples": (announced(examples=1 << 63), Reason.EXAMPLES),
    "2^64 - 1 examples": (announced(examples=(1 << 64) - 1), Reason.EXAMPLES),
}
LATER = {  # whole and as announced, but not fit to be folded
    "1e38 everywhere": (values(lambda vector: vector.fill(1e38)), Reason.NORM),
    "beyond the norm": (values(lambda vector: vector.__setitem__(0, 1.1e6)), Reason.NORM),
    "extras nobody asked for": (with_extras(("control", 3)), Reason.SHAPE),
    "extras as large as the model": (with_extras(("control", 75)), Reason.SHAPE),
    "a loss of NaN": (announced(loss=float("nan")), Reason.NOT_FINITE),
    "an infinite loss": (announced(loss=float("inf")), Reason.NOT_FINITE),
}
UNSIGNED = {
    "other bytes than announced": (flip, Reason.PAYLOAD),
    "a digest of 31 bytes": (lambda hand: announced(digest=hand.announcement.digest[:31])(hand), Reason.PAYLOAD),
    "no digest": (announced(digest=b""), Reason.PAYLOAD),
    "more bytes than the model has": (announced(payload_bytes=1 << 62), Reason.SHAPE),
    "fewer bytes than the model has": (announced(payload_bytes=MODEL_BYTES - 4), Reason.SHAPE),
    "huge extras": (with_extras(("control", 1 << 62), grows=False), Reason.SHAPE),
    "extras whose lengths go round": (with_extras(("a", (1 << 64) - 1), ("b", 1), grows=False), Reason.SHAPE),
    "a short payload": (in_pieces(lambda payload: [frame(payload[:-4])]), Reason.PAYLOAD),
    "no payload at all": (in_pieces(lambda payload: [frame(payload[:4])]), Reason.PAYLOAD),
    "a long payload": (in_pieces(lambda payload: [frame(payload + payload)]), Reason.PAYLOAD),
    "a long last piece": (in_pieces(lambda payload: [frame(payload[:8]), frame(payload)]), Reason.PAYLOAD),
    "half a value": (in_pieces(lambda payload: [frame(payload[:6]), frame(payload[6:])]), Reason.PAYLOAD),
    "an empty piece": (in_pieces(lambda payload: [frame(b""), frame(payload)]), Reason.PAYLOAD),
    "a piece above 1 MiB": (in_pieces(lambda payload: [frame(bytes(MIB + 4))]), Reason.PAYLOAD),
    "garbage for a piece": (in_pieces(lambda payload: [b"\xff" * 100]), Reason.PAYLOAD),
    "nothing for a piece": (in_pieces(lambda payload: [b"", frame(payload)]), Reason.PAYLOAD),
    "a second announcement for a piece": (
        in_pieces(lambda payload: [pb.UploadPiece(announcement=pb.Announcement()).SerializeToString()]),
        Reason.PAYLOAD,
    ),
    "a piece with more behind it": (in_pieces(lambda payload: [frame(payload) + b"\x12\x00"]), Reason.PAYLOAD),
}


@pytest.mark.parametrize(("change", "reason"), SIGNED.values(), ids=SIGNED)
def test_an_update_that_makes_no_sense_costs_nothing_else(
    place: Place, alone: fedkit.Result, change: Callable[[Hand], Any], reason: Reason
) -> None:
    cost_nothing_else(place.run((MAL, handing(change, sign=True))), alone, reason)


@pytest.mark.parametrize(("change", "reason"), LATER.values(), ids=LATER)
def test_an_update_that_does_not_fit_the_others_costs_nothing_else(
    place: Place, alone: fedkit.Result, change: Callable[[Hand], Any], reason: Reason
) -> None:
    cost_nothing_else(place.run((MAL, handing(change, sign=True, told="taken"))), alone, reason)


@pytest.mark.parametrize(("change", "reason"), UNSIGNED.values(), ids=UNSIGNED)
def test_bytes_that_are_not_what_was_announced_cost_nothing_else(
    place: Place, alone: fedkit.Result, change: Callable[[Hand], Any], reason: Reason
) -> None:
    cost_nothing_else(place.run((MAL, handing(change))), alone, reason)


def posting(change: Callable[[Hand], Any], heard: dict[str, Talk]) -> Answer:
    """A client that changes its honest update and posts it; `heard` says over which talk."""

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        change(hand)
        heard[asked.id] = talk
        await talk.post(hand)

    return trains(act)


def signed(change: Callable[[Hand], Any]) -> Callable[[Hand], None]:
    def apply(hand: Hand) -> None:
        change(hand)
        hand.sign()

    return apply


def carrying(make: Callable[[bytes], bytes]) -> Callable[[Hand], None]:
    """Other bytes come along than were announced."""
    return lambda hand: setattr(hand, "payload", make(hand.payload))


POSTED = {
    **{name: (signed(SIGNED[name][0]), SIGNED[name][1]) for name in ("NaN", "infinity", "another model", "no model")},
    **{name: (signed(SIGNED[name][0]), SIGNED[name][1]) for name in ("seventeen extras", "2^63 examples")},
    **{name: UNSIGNED[name] for name in ("other bytes than announced", "no digest", "more bytes than the model has")},
    **{name: UNSIGNED[name] for name in ("fewer bytes than the model has", "huge extras")},
    "no payload": (carrying(lambda payload: b""), Reason.PAYLOAD),
    "a short payload": (carrying(lambda payload: payload[:-4]), Reason.PAYLOAD),
    "a long payload": (carrying(lambda payload: payload + payload), Reason.PAYLOAD),
    "half a value": (carrying(lambda payload: payload[:-2]), Reason.PAYLOAD),
    "a payload above 1 MiB": (carrying(lambda payload: bytes(MIB + 4)), Reason.PAYLOAD),
    "an announced payload above 1 MiB": (signed(carrying(lambda payload: bytes(MIB + 4))), Reason.SHAPE),
}


@pytest.mark.parametrize(("change", "reason"), POSTED.values(), ids=POSTED)
def test_an_update_that_is_posted_and_makes_no_sense_is_refused_and_costs_nothing_else(
    place: Place, alone: fedkit.Result, change: Callable[[Hand], Any], reason: Reason
) -> None:
    heard: dict[str, Talk] = {}
    cost_nothing_else(place.run((MAL, posting(change, heard))), alone, reason)
    assert len(heard) == 2
    assert [talk.refused for talk in heard.values()] == [dict.fromkeys(heard, reason.value)] * 2


@pytest.mark.parametrize(("change", "reason"), LATER.values(), ids=LATER)
def test_an_update_that_is_posted_and_does_not_fit_the_others_costs_nothing_else(
    place: Place, alone: fedkit.Result, change: Callable[[Hand], Any], reason: Reason
) -> None:
    heard: dict[str, Talk] = {}
    cost_nothing_else(place.run((MAL, posting(signed(change), heard))), alone, reason)
    assert [talk.refused for talk in heard.values()] == [{}] * 2  # it was taken, and refused by the round


def test_an_update_that_is_posted_without_the_field_costs_nothing_else(place: Place, alone: fedkit.Result) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        await talk.say(update=(await update(talk, asked)).announcement)

    cost_nothing_else(place.run((MAL, trains(act))), alone, Reason.PAYLOAD)


def test_an_update_that_is_posted_counts_like_one_that_is_uploaded(place: Place, together: fedkit.Result) -> None:
    talks, models, before = set(), [], place.counted("payload_bytes", direction="up")

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        talks.add(talk)
        models.append((talk.payloads[asked.id], (await talk.ask_model(asked.id))[1]))
        await talk.post(await update(talk, asked))

    result = place.run((MAL, honest_but(act)))
    assert result.weights == together.weights
    assert result.test == together.test
    assert refusals(result) == []
    assert [talk.refused for talk in talks] == [{}]
    assert place.counted("payload_bytes", direction="up") == before + 2 * 3 * MODEL_BYTES
    assert models[0][0]
    assert all(along in (b"", asked) for along, asked in models)


async def begun(place: Place, talk: Talk, hand: Hand, data: bytes) -> Any:
    """An upload of which the coordinator has these bytes so far."""
    hand.announcement.at_once = False
    call, before = talk.calls.upload(metadata=talk.metadata), place.counted("payload_bytes", direction="up")
    await call.write(hand.messages()[0])
    assert (await call.read()).have == 0
    await call.write(frame(data))
    while place.counted("payload_bytes", direction="up") < before + len(data):
        await asyncio.sleep(0.005)
    return call


@pytest.mark.parametrize("at_once", [False, True])
def test_an_update_that_is_posted_in_place_of_a_broken_upload_counts(
    place: Place, together: fedkit.Result, *, at_once: bool
) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        await begun(place, talk, hand, bytes(40))  # which are not the announced ones
        hand.announcement.at_once = at_once
        await talk.post(hand)

    result = place.run((MAL, honest_but(act)))
    assert result.weights == together.weights
    assert refusals(result) == []


@pytest.mark.parametrize(
    "key", ["0" * 32, "", "../../etc/passwd", "x" * 100_000], ids=["unknown", "none", "path", "long"]
)
def test_an_update_nobody_asked_for_is_refused_as_unknown_where_it_is_posted(
    place: Place, alone: fedkit.Result, key: str
) -> None:
    heard: dict[str, Talk] = {}

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        await posting(announced(assignment_id=key), heard)(talk, asked)
        await talk.say(leaving=pb.Leaving())

    lost_once(place.run((MAL, trains(act))), alone)
    (talk,) = heard.values()
    assert talk.refused == {key: "unknown"}


def test_an_update_that_is_posted_again_is_a_duplicate(place: Place, together: fedkit.Result) -> None:
    again: list[Hand] = []

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        again.append(await update(talk, asked))
        if asked.round == 2:
            await asyncio.wait_for(settled(talk, 1), PATIENCE_S)
            await talk.post(again[0])
            while not talk.refused:
                await asyncio.sleep(0.005)
            assert talk.refused == {again[0].announcement.assignment_id: "duplicate"}
        await talk.post(again[-1])

    result = place.run((MAL, honest_but(act)))
    assert len(again) == 2
    assert result.weights == together.weights
    assert refusals(result) == []


def test_sums_in_place_of_an_update_cost_nothing_else(place: Place, alone: fedkit.Result) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        await talk.say(sums=pb.Sums(assignment_id=asked.id, reals=pb.Reals(values=[1.0] * 75), examples=10))

    cost_nothing_else(place.run((MAL, trains(act))), alone, Reason.SHAPE)


def test_an_invented_reason_counts_as_failed_and_its_detail_is_cut(place: Place, alone: fedkit.Result) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        detail = "\x1b[31mred\x00\n\r\u202e" * 1000
        await talk.say(refusal=pb.Refusal(assignment_id=asked.id, reason="<script>", detail=detail))

    with pytest.warns(RefusalWarning, match=r"^1 clients failed .*; mal: [^\x1b]*$"):
        result = place.run((MAL, trains(act)))
    cost_nothing_else(result, alone, Reason.FAILED)
    for record in result.history:
        assert len(record.refusals[0].detail) <= 200
        assert record.refusals[0].detail.isprintable()


@pytest.mark.parametrize("reason", ["norm", "deadline", "duplicate", "surplus"])
def test_no_client_speaks_for_the_coordinator(place: Place, alone: fedkit.Result, reason: str) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        await talk.say(refusal=pb.Refusal(assignment_id=asked.id, reason=reason))

    with pytest.warns(RefusalWarning, match="mal"):
        result = place.run((MAL, trains(act)))
    cost_nothing_else(result, alone, Reason.FAILED)


def test_an_update_that_is_announced_and_never_sent_costs_the_deadline(place: Place, alone: fedkit.Result) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        call = talk.calls.upload(metadata=talk.metadata)
        await call.write(hand.messages()[0])
        await call.read()

    result = place.run((MAL, trains(act)), deadline_s=0.5)
    cost_nothing_else(result, alone, Reason.DEADLINE)


def test_the_first_word_on_an_assignment_counts(place: Place, alone: fedkit.Result) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        await talk.say(refusal=pb.Refusal(assignment_id=asked.id, reason="policy"))
        replies = await talk.hand_in(hand.messages())
        assert replies[0].WhichOneof("what") == "refused"

    cost_nothing_else(place.run((MAL, trains(act))), alone, Reason.POLICY)


SCORES = {
    "too many": pb.Sums(reals=pb.Reals(values=[1.0] * 3), examples=4),
    "too few": pb.Sums(reals=pb.Reals(values=[1.0]), examples=4),
    "none": pb.Sums(reals=pb.Reals(), examples=4),
    "whole numbers": pb.Sums(integers=pb.Integers(values=[1, 2]), examples=4),
    "no vector": pb.Sums(examples=4),
}


@pytest.mark.parametrize("sums", SCORES.values(), ids=SCORES)
def test_scores_of_another_shape_cost_nothing_else(
    place: Place, alone: fedkit.Result, together: fedkit.Result, sums: pb.Sums
) -> None:
    result = place.run((MAL, scores(saying(sums))))
    assert result.weights == together.weights
    assert result.test == alone.test != together.test
    assert [(refusal.client, refusal.reason) for refusal in result.refusals] == [(MAL, Reason.SHAPE)]


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        (pb.Sums(reals=pb.Reals(values=[float("nan"), 4.0]), examples=4), Reason.NOT_FINITE),
        (pb.Sums(reals=pb.Reals(values=[1.0, float("inf")]), examples=4), Reason.NOT_FINITE),
        (pb.Sums(reals=pb.Reals(values=[1.0, 4.0]), examples=0), Reason.EXAMPLES),
        (pb.Sums(reals=pb.Reals(values=[1.0, 4.0]), examples=1 << 63), Reason.EXAMPLES),
    ],
    ids=["NaN", "infinity", "no examples", "2^63 examples"],
)
def test_scores_that_make_no_sense_cost_nothing_else(
    place: Place, alone: fedkit.Result, sums: pb.Sums, reason: Reason
) -> None:
    result = place.run((MAL, scores(saying(sums))), rounds=1)
    assert result.test == alone.test
    assert [(refusal.client, refusal.reason) for refusal in result.refusals] == [(MAL, reason)]


def saying(sums: pb.Sums) -> Callable[[Talk, pb.Assignment], Awaitable[None]]:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        message = pb.Sums(assignment_id=asked.id)
        message.MergeFrom(sums)
        await talk.say(sums=message)

    return act


# -- assignments of others ---------------------------------------------------------------------------------------------


def leaving(act: Callable[[Talk, pb.Assignment], Awaitable[None]]) -> Answer:
    """A client that does this in place of its work, and leaves."""

    async def leave(talk: Talk, asked: pb.Assignment) -> None:
        await act(talk, asked)
        await talk.say(leaving=pb.Leaving())

    return trains(leave)


def lost_once(result: fedkit.Result, alone: fedkit.Result) -> None:
    assert result.weights == alone.weights
    assert refusals(result) == [(MAL, Reason.LOST.value)]


@pytest.mark.parametrize(
    "key", ["0" * 32, "", "../../etc/passwd", "x" * 100_000], ids=["unknown", "none", "path", "long"]
)
def test_an_answer_nobody_asked_for_is_refused_as_unknown(place: Place, alone: fedkit.Result, key: str) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        hand.announcement.assignment_id = key
        replies = await talk.hand_in(hand.messages())
        assert [reply.refused.reason for reply in replies] == ["unknown"]
        await talk.say(sums=pb.Sums(assignment_id=key, reals=pb.Reals(values=[1.0]), examples=1))
        await talk.say(refusal=pb.Refusal(assignment_id=key, reason="failed"))
        await talk.say(progress=pb.Progress(assignment_id=key, done=1 << 63, total=1))

    lost_once(place.run((MAL, leaving(act))), alone)
    assert place.counted("refusals", reason="unknown") >= 3


def test_nobody_answers_for_another_client(place: Place, alone: fedkit.Result) -> None:
    asked_of_ada: asyncio.Queue[str] = asyncio.Queue()
    done = asyncio.Event()

    async def ada(talk: Talk, asked: pb.Assignment) -> None:
        if asked.WhichOneof("work") == "fit":
            asked_of_ada.put_nowait(asked.id)
            await done.wait()
        await honest(talk, asked)

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        hand.announcement.assignment_id = await asked_of_ada.get()
        replies = await talk.hand_in(hand.messages())
        await talk.say(refusal=pb.Refusal(assignment_id=hand.announcement.assignment_id, reason="failed"))
        with pytest.raises(LookupError):
            await talk.ask_model(hand.announcement.assignment_id)
        done.set()
        assert [reply.refused.reason for reply in replies] == ["unknown"]

    agents = [place.do(place.joined(*one)) for one in (("ada", ada), ("bea", honest), (MAL, leaving(act)))]
    with fedkit.connect(place.address) as coordinator:
        strategy = FedAvg(rounds=2, participation=PARTICIPATION)
        result = coordinator.run(tasks.plain, strategy, seed=7, min_clients=2, progress=False)
    for agent in agents:
        place.do(agent.stop())
    lost_once(result, alone)


def test_an_update_handed_in_again_is_a_duplicate(place: Place, together: fedkit.Result) -> None:
    before = place.counted("refusals", reason="duplicate")

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        messages = (await update(talk, asked)).messages()
        replies = await talk.hand_in(messages)
        assert [reply.WhichOneof("what") for reply in replies] == ["taken"]
        again.append(messages)
        if asked.round == 2:
            await asyncio.wait_for(settled(talk, 1), PATIENCE_S)
            replies = await talk.hand_in(again[0])
            assert [reply.refused.reason for reply in replies] == ["duplicate"]

    again: list[list[bytes]] = []
    result = place.run((MAL, honest_but(act)))
    assert result.weights == together.weights
    assert refusals(result) == []
    assert place.counted("refusals", reason="duplicate") == before + 1


def honest_but(act: Callable[[Talk, pb.Assignment], Awaitable[None]]) -> Answer:
    async def answer(talk: Talk, asked: pb.Assignment) -> None:
        await (act if asked.WhichOneof("work") == "fit" else honest)(talk, asked)

    return answer


async def settled(talk: Talk, count: int) -> None:
    """Returns when the coordinator has said of so many results that they stand."""
    while len(talk.accepted) < count:
        await asyncio.sleep(0.005)


def test_a_late_update_is_refused_as_late(place: Place, alone: fedkit.Result) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        while asked.id not in talk.dropped:
            await asyncio.sleep(0.005)
        replies = await talk.hand_in(hand.messages())
        assert [reply.refused.reason for reply in replies] == ["late"]

    result = place.run((MAL, trains(act)), deadline_s=0.5)
    cost_nothing_else(result, alone, Reason.DEADLINE)


def test_an_upload_that_breaks_off_goes_on_where_it_stopped(place: Place, together: fedkit.Result) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        call = await begun(place, talk, hand, hand.payload[:40])
        call.cancel()
        call = talk.calls.upload(metadata=talk.metadata)
        await call.write(hand.messages()[0])
        assert (await call.read()).have == 40
        await call.write(frame(hand.payload[40:]))
        assert (await call.read()).WhichOneof("what") == "taken"
        call.cancel()

    result = place.run((MAL, honest_but(act)))
    assert result.weights == together.weights
    assert refusals(result) == []


def test_of_two_uploads_of_one_result_the_newer_one_counts(place: Place, together: fedkit.Result) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        hand.announcement.at_once = False
        older, newer = talk.calls.upload(metadata=talk.metadata), talk.calls.upload(metadata=talk.metadata)
        for call in (older, newer):
            await call.write(hand.messages()[0])
            assert (await call.read()).WhichOneof("what") == "have"
        await older.write(frame(hand.payload[:4]))
        assert (await older.read()).refused.reason == "payload"
        await newer.write(frame(hand.payload))
        assert (await newer.read()).WhichOneof("what") == "taken"
        newer.cancel()

    result = place.run((MAL, honest_but(act)))
    assert result.weights == together.weights
    assert refusals(result) == []


def test_one_upload_call_takes_one_result_after_the_other(place: Place, together: fedkit.Result) -> None:
    calls: list[Any] = []

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        calls.append(calls[0] if calls else talk.calls.upload(metadata=talk.metadata))
        for message in hand.messages():
            await calls[0].write(message)
        assert (await calls[0].read()).WhichOneof("what") == "taken"

    result = place.run((MAL, honest_but(act)))
    assert len(calls) == 2
    assert result.weights == together.weights


# -- calls that are broken off by status -------------------------------------------------------------------------------

BROKEN = {
    "data without an announcement": ([frame(bytes(4))], grpc.StatusCode.INVALID_ARGUMENT),
    "garbage": ([b"\xff\xfe\xfd"], grpc.StatusCode.INVALID_ARGUMENT),
    "an empty message": ([b""], grpc.StatusCode.INVALID_ARGUMENT),
    "a message above 4 MiB": ([frame(bytes(5 * MIB))], grpc.StatusCode.RESOURCE_EXHAUSTED),
}


@pytest.mark.parametrize(("messages", "code"), BROKEN.values(), ids=BROKEN)
def test_an_upload_that_is_none_ends_with_a_status(
    place: Place, alone: fedkit.Result, messages: list[bytes], code: grpc.StatusCode
) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await talk.hand_in(messages)
        assert caught.value.code() is code

    lost_once(place.run((MAL, leaving(act))), alone)


def test_data_after_the_end_of_a_payload_ends_the_call(place: Place, together: fedkit.Result) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await talk.hand_in([*(await update(talk, asked)).messages(), frame(bytes(4))])
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    result = place.run((MAL, honest_but(act)))
    assert result.weights == together.weights  # what was whole before counts


async def download(talk: Talk, request: pb.DownloadRequest, session: bytes | None) -> grpc.StatusCode:
    """How a download ends that is not to be had."""
    metadata = () if session is None else ((SESSION_KEY, session),)
    call = talk.calls.download(metadata=metadata)
    try:
        await call.write(request)
        await call.done_writing()
        while await call.read() is not EOF:
            continue
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass
    return await call.code()


def test_a_model_is_had_only_by_whom_it_is_meant_for(place: Place, alone: fedkit.Result) -> None:
    found: dict[str, Any] = {}

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        own = pb.DownloadRequest(assignment_id=asked.id, offset=0)
        beyond = pb.DownloadRequest(assignment_id=asked.id, offset=asked.model_bytes + 4)
        between = pb.DownloadRequest(assignment_id=asked.id, offset=2)
        other = Talk(place.address, "eve")
        await other.begin()
        found["own"] = await download(talk, own, talk.welcome.session)
        found["end"] = await download(
            talk, pb.DownloadRequest(assignment_id=asked.id, offset=300), talk.welcome.session
        )
        found["beyond"] = await download(talk, beyond, talk.welcome.session)
        found["between"] = await download(talk, between, talk.welcome.session)
        found["without a session"] = await download(talk, own, None)
        found["an invented session"] = await download(talk, own, b"x" * 16)
        found["an empty session"] = await download(talk, own, b"")
        with pytest.raises(LookupError):
            await other.ask_model(asked.id)
        stale = other.welcome.session
        await other.leave()
        found["a session that is over"] = await download(talk, own, stale)

    lost_once(place.run((MAL, leaving(act))), alone)
    ok, unauthenticated, beyond = (
        grpc.StatusCode.OK,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.OUT_OF_RANGE,
    )
    assert found == {
        "own": ok,
        "end": ok,
        "beyond": beyond,
        "between": beyond,
        "without a session": unauthenticated,
        "an invented session": unauthenticated,
        "an empty session": unauthenticated,
        "a session that is over": unauthenticated,
    }


# -- attendance --------------------------------------------------------------------------------------------------------

HELLOS = {
    "a protocol to come": ({"protocol": 99}, pb.Goodbye.PROTOCOL),
    "no protocol": ({"protocol": 0}, pb.Goodbye.PROTOCOL),
    "a path for a name": ({"client": "../x"}, pb.Goodbye.MALFORMED),
    "no name": ({"client": ""}, pb.Goodbye.MALFORMED),
    "a long name": ({"client": "x" * 101}, pb.Goodbye.MALFORMED),
    "a name with a newline": ({"client": "ada\n"}, pb.Goodbye.MALFORMED),
    "a name with a NUL": ({"client": "a\0"}, pb.Goodbye.MALFORMED),
    "an option for a name": ({"client": "--help"}, pb.Goodbye.MALFORMED),
    "three bytes of instance": ({"instance": b"abc"}, pb.Goodbye.MALFORMED),
    "no instance": ({"instance": b""}, pb.Goodbye.MALFORMED),
    "no tasks": ({"tasks": []}, pb.Goodbye.MALFORMED),
    "a path for a task": ({"tasks": ["a/b"]}, pb.Goodbye.MALFORMED),
    "too many tasks": ({"tasks": [f"t{i}" for i in range(1001)]}, pb.Goodbye.MALFORMED),
    "no rows": ({"max_examples": 0}, pb.Goodbye.MALFORMED),
    "2^63 rows": ({"max_examples": 1 << 63}, pb.Goodbye.MALFORMED),
    "too many results": ({"held": ["0" * 32] * 10_001}, pb.Goodbye.MALFORMED),
}


@pytest.mark.parametrize(("hello", "reason"), HELLOS.values(), ids=HELLOS)
def test_a_hello_that_makes_no_sense_is_answered_with_goodbye(place: Place, hello: dict[str, Any], reason: int) -> None:
    async def talk() -> pb.Goodbye:
        one = Talk(place.address, MAL, **hello)
        answer = await one.begin()
        end = await one.hear()
        assert end.WhichOneof("what") is None
        await one.vanish()
        return answer.goodbye

    goodbye = place.do(talk())
    assert goodbye.reason == reason
    assert goodbye.detail.isprintable()
    assert len(goodbye.detail) < 200
    assert place.coordinator.attendance.sessions == {}


def test_a_protocol_nobody_speaks_here_is_answered_with_the_one_that_is(place: Place) -> None:
    async def talk() -> str:
        one = Talk(place.address, MAL, protocol=99)
        answer = await one.begin()
        await one.vanish()
        return answer.goodbye.detail

    assert place.do(talk()) == "the agent speaks protocol 99, this coordinator 1: update the older one"


NOT_HELLO = {
    "a heartbeat": {"heartbeat": pb.Heartbeat()},
    "leaving": {"leaving": pb.Leaving()},
    "sums": {"sums": pb.Sums(assignment_id="0" * 32)},
    "nothing": {},
}


@pytest.mark.parametrize("message", NOT_HELLO.values(), ids=NOT_HELLO)
def test_whoever_does_not_say_hello_first_is_turned_away(place: Place, message: dict[str, Any]) -> None:
    async def talk() -> pb.Goodbye:
        one = Talk(place.address, MAL)
        await one.say(**message)
        answer = await one.hear()
        await one.vanish()
        return answer.goodbye

    assert place.do(talk()).reason == pb.Goodbye.MALFORMED


def test_whoever_hangs_up_before_hello_is_forgotten(place: Place) -> None:
    async def talk() -> pb.Goodbye:
        one = Talk(place.address, MAL)
        await one.stream.done_writing()
        answer = await one.hear()
        await one.vanish()
        return answer.goodbye

    assert place.do(talk()).reason == pb.Goodbye.MALFORMED


def test_whoever_never_says_hello_is_turned_away(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_HELLO_S", 0.2)  # ten seconds otherwise

    async def talk() -> pb.Goodbye:
        one = Talk(place.address, MAL)
        answer = await one.hear()
        await one.vanish()
        return answer.goodbye

    assert place.do(talk()).reason == pb.Goodbye.MALFORMED


MESSAGES = {
    "hello twice": pb.FromAgent(hello=pb.Hello(protocol=1, client="ada")).SerializeToString(),
    "a kind that is not known": b"\xfa\x07\x00",
    "an empty message": b"",
    "garbage": b"\xff\xff\xff\xff",
    "text that is no UTF-8": b"\x1a\x04\x0a\x02\xff\xff",
    "a message above 4 MiB": pb.FromAgent(progress=pb.Progress(assignment_id="x" * 5 * MIB)).SerializeToString(),
}


@pytest.mark.parametrize("raw", MESSAGES.values(), ids=MESSAGES)
def test_a_message_that_makes_no_sense_ends_the_session_and_nothing_else(
    place: Place, alone: fedkit.Result, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        await talk.stream.write(raw)

    lost_once(place.run((MAL, trains(act)), raw=True), alone)
    assert [record for record in caplog.records if "never retrieved" in record.getMessage()] == []


def test_a_talkative_client_does_not_fill_the_log(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    async def talk() -> None:
        one = Talk(place.address, MAL, software="\x1b[31m" * 100_000)
        await one.begin()
        await one.leave()

    place.do(talk())
    assert len(capfd.readouterr().out) < 10_000


def test_refusals_bytes_rounds_and_clients_are_there_for_prometheus(place: Place, alone: fedkit.Result) -> None:
    before = place.metrics_page()
    place.run((MAL, handing(values(lambda vector: vector.fill(np.nan)), sign=True)))
    after = place.metrics_page()

    def grown(line: str) -> float:
        return after.get(line, 0.0) - before.get(line, 0.0)

    assert grown('fedkit_rounds_total{outcome="committed"}') == 2
    assert grown('fedkit_refusals_total{reason="not_finite"}') == 2
    assert grown('fedkit_payload_bytes_total{direction="up"}') >= 2 * 2 * MODEL_BYTES
    assert grown('fedkit_payload_bytes_total{direction="down"}') >= 2 * 3 * MODEL_BYTES
    assert grown('fedkit_phase_seconds_count{phase="commit"}') == 3
    assert {line for line in after if line.startswith("fedkit_clients{")} == {
        f'fedkit_clients{{state="{state}"}}' for state in ("ready", "working", "away", "left")
    }
    assert not any(name in line for line in after for name in (*HONEST, MAL))


def test_nothing_is_left_in_the_folder_of_a_run_that_is_over(place: Place, alone: fedkit.Result) -> None:
    left = [path for path in (place.folder / "spool").rglob("*") if path.is_file()]
    assert left == []
