"""What one bad client does costs its own contribution, on record by reason, and nothing else.

What is bad by itself is in `tests/hostile`; here stands what takes several steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest

import fedkit
from fedkit.errors import Reason, RefusalWarning
from fedkit.protos import agents_pb2 as pb
from fedkit.protos.wire import SESSION_KEY, frame
from fedkit.server import agents as service
from tests.network import scripted
from tests.network.place import HONEST, MAL, Place, cost_nothing_else, lost_once, refusals, trains
from tests.network.scripted import EOF, PATIENCE_S, Answer, Hand, Talk, honest, update

MIB = 1 << 20
MODEL_BYTES = 4 * 75


def test_an_update_that_is_posted_counts_like_one_that_is_uploaded(place: Place, together: fedkit.Result) -> None:
    talks, models, before = set(), [], place.counted("payload_bytes", direction="up")

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        talks.add(talk)
        models.append((talk.payloads[asked.id], (await talk.ask_model(asked.id))[1]))
        await talk.post(await update(talk, asked))

    result = place.run((MAL, trains(act, honest)))
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

    result = place.run((MAL, trains(act, honest)))
    assert result.weights == together.weights
    assert refusals(result) == []


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


def leaving(act: Callable[[Talk, pb.Assignment], Awaitable[None]]) -> Answer:
    """A client that does this in place of its work, and leaves."""

    async def leave(talk: Talk, asked: pb.Assignment) -> None:
        await act(talk, asked)
        await talk.say(leaving=pb.Leaving())

    return trains(leave)


def test_nobody_settles_or_fetches_what_another_client_was_asked(place: Place, alone: fedkit.Result) -> None:
    before = place.counted("refusals", reason="unknown")
    asked_of_ada: asyncio.Queue[str] = asyncio.Queue()
    done = asyncio.Event()

    async def ada(talk: Talk, asked: pb.Assignment) -> None:
        if asked.WhichOneof("work") == "fit":
            asked_of_ada.put_nowait(asked.id)
            await done.wait()
        await honest(talk, asked)

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        key = await asked_of_ada.get()
        await talk.say(sums=pb.Sums(assignment_id=key, reals=pb.Reals(values=[1.0]), examples=1))
        await talk.say(refusal=pb.Refusal(assignment_id=key, reason="failed"))
        await talk.say(progress=pb.Progress(assignment_id=key, done=1 << 63, total=1))
        with pytest.raises(LookupError):
            await talk.ask_model(key)
        while place.counted("refusals", reason="unknown") < before + 2:
            await asyncio.sleep(0.005)
        done.set()

    lost_once(place.run(("ada", ada), (MAL, leaving(act))), alone)


def test_whoever_does_not_read_is_neither_waited_for_nor_kept_messages_for(
    place: Place, alone: fedkit.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 14)]  # of what waits to be read
    monkeypatch.setattr(scripted, "OPTIONS", [*scripted.OPTIONS, *small])
    over = asyncio.Event()

    async def deaf() -> pb.ToAgent:
        await over.wait()
        return pb.ToAgent()

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        monkeypatch.setattr(talk, "hear", deaf)
        session = place.coordinator.attendance.sessions[MAL]
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not session.ended.done():
                    await talk.say(update=pb.Announcement(assignment_id="0" * 32))
                    assert session.outgoing.qsize() <= 512
                while MAL in place.coordinator.attendance.sessions:
                    await asyncio.sleep(0.005)
        finally:
            over.set()
            await talk.vanish()

    lost_once(place.run((MAL, trains(act))), alone)


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

    result = place.run((MAL, trains(act, honest)))
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

    result = place.run((MAL, trains(act, honest)))
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

    result = place.run((MAL, trains(act, honest)))
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

    result = place.run((MAL, trains(act, honest)))
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


OK, UNAUTHENTICATED, BEYOND = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.OUT_OF_RANGE
DOWNLOADS: dict[str, tuple[int, str, grpc.StatusCode]] = {  # from where on, with whose session, and how it ends
    "own": (0, "own", OK),
    "end": (300, "own", OK),
    "beyond": (304, "own", BEYOND),
    "between": (2, "own", BEYOND),
    "without a session": (0, "none", UNAUTHENTICATED),
    "an invented session": (0, "invented", UNAUTHENTICATED),
    "an empty session": (0, "empty", UNAUTHENTICATED),
    "a session that is over": (0, "over", UNAUTHENTICATED),
}


def test_a_model_is_had_only_by_whom_it_is_meant_for(place: Place, alone: fedkit.Result) -> None:
    found: dict[str, grpc.StatusCode] = {}

    async def act(talk: Talk, asked: pb.Assignment) -> None:
        assert asked.model_bytes == MODEL_BYTES == 300
        other = Talk(place.address, "eve")
        await other.begin()
        with pytest.raises(LookupError):
            await other.ask_model(asked.id)
        await other.leave()
        sessions = {"own": talk.welcome.session, "invented": b"x" * 16, "empty": b"", "over": other.welcome.session}
        for case, (offset, whose, _) in DOWNLOADS.items():
            request = pb.DownloadRequest(assignment_id=asked.id, offset=offset)
            found[case] = await download(talk, request, sessions.get(whose))

    lost_once(place.run((MAL, leaving(act))), alone)
    assert found == {case: code for case, (_, _, code) in DOWNLOADS.items()}


# -- attendance --------------------------------------------------------------------------------------------------------


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


def test_a_talkative_client_does_not_fill_the_log(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    async def talk() -> None:
        one = Talk(place.address, MAL, software="\x1b[31m" * 100_000)
        await one.begin()
        await one.leave()

    place.do(talk())
    assert len(capfd.readouterr().out) < 10_000


def test_refusals_bytes_rounds_and_clients_are_there_for_prometheus(place: Place, alone: fedkit.Result) -> None:
    async def act(talk: Talk, asked: pb.Assignment) -> None:
        hand = await update(talk, asked)
        hand.payload = np.full(MODEL_BYTES // 4, np.nan, dtype="<f4").tobytes()
        await talk.hand_in(hand.sign().messages())

    before = place.metrics_page()
    place.run((MAL, trains(act)))
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
