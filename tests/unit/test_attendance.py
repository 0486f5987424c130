"""Who is here, who may be back in a moment, who is lost; whoever waits for a session hears of it."""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from fedkit.errors import Reason, Refused
from fedkit.protos import agents_pb2 as pb
from fedkit.protos.convert import assignment_to_proto
from fedkit.protos.wire import load
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.server.attendance import Attendance, Away, Session
from fedkit.server.errands import Errand, Published
from fedkit.spool import Room, Spares
from fedkit.weights import Entry, Manifest, Weights
from fedkit.work import Fit, MetricSums, Update

LONG = 3600.0  # a moment that does not pass while a test runs
SHORT = 0.02
PARCEL = Parcel(Weights.zeros(Manifest((Entry("w", (2,)),))))


def in_a_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs the test in an event loop; it fails where it waits for what does not come."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return run


def session(name: str = "ada", *tasks: str) -> Session:
    return Session(name, secrets.token_bytes(16), frozenset(tasks or ("heart",)), 1000)


def errand(folder: Path, key: str = "0" * 32) -> Errand:
    assignment = Assignment(key, "run", 0, 1, "ada", Fit(), "update")
    return Errand(assignment, pb.Assignment(id=key), Published(PARCEL), folder, Spares(folder, 1), Room(0))


async def turns(task: asyncio.Task) -> None:
    """Lets the task go on until it waits for something that nobody has done yet."""
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()


def queued(session: Session) -> list[str | None]:
    """The kinds of messages waiting for the agent; None is the end of its stream."""
    found = [session.outgoing.get_nowait() for _ in range(session.outgoing.qsize())]
    return [None if message is None else message.message.WhichOneof("what") for message in found]


# -- coming and going --------------------------------------------------------------------------------------------------


@in_a_loop
async def test_whoever_arrives_is_present_for_the_tasks_it_knows() -> None:
    attendance = Attendance(LONG)
    for name, tasks in (("bea", ("heart",)), ("ada", ("heart", "digits")), ("cyd", ("digits",))):
        assert attendance.arrive(session(name, *tasks)) is None
    assert attendance.present("heart") == ["ada", "bea"]
    assert attendance.present("digits") == ["ada", "cyd"]
    assert attendance.present("shakespeare") == []


@in_a_loop
async def test_a_new_session_takes_the_place_of_the_one_before() -> None:
    attendance = Attendance(LONG)
    before, after = session(), session()
    attendance.arrive(before)
    assert attendance.arrive(after) is before
    assert before.ended.done()
    assert queued(before) == [None]
    assert attendance.sessions == {"ada": after}
    assert attendance.missing("heart") == {}


@in_a_loop
async def test_the_end_of_a_session_that_was_replaced_changes_nothing() -> None:
    attendance = Attendance(LONG)
    before, after = session(), session()
    attendance.arrive(before)
    attendance.arrive(after)
    assert not attendance.depart(before)
    assert attendance.present("heart") == ["ada"]
    assert attendance.holder(after.token) is after


@in_a_loop
async def test_a_token_dies_with_its_session() -> None:
    attendance = Attendance(LONG)
    before, after = session(), session()
    attendance.arrive(before)
    assert attendance.holder(before.token) is before
    attendance.arrive(after)
    assert attendance.holder(before.token) is None
    attendance.depart(after)
    assert attendance.holder(after.token) is None
    assert attendance.holder(b"") is None


@in_a_loop
async def test_no_two_sessions_have_the_same_token() -> None:
    assert len({session().token for _ in range(100)}) == 100


@in_a_loop
async def test_a_session_that_departs_twice_departs_once() -> None:
    attendance = Attendance(LONG)
    one = session()
    attendance.arrive(one)
    assert attendance.depart(one)
    assert not attendance.depart(one)
    assert queued(one) == [None]


@in_a_loop
async def test_who_went_away_is_missing_for_a_moment_and_then_lost() -> None:
    attendance = Attendance(SHORT)
    one = session("ada", "heart")
    attendance.arrive(one)
    attendance.depart(one)
    assert 0 < attendance.missing("heart")["ada"] <= SHORT
    assert attendance.missing("digits") == {}
    await attendance.change(SHORT)
    assert attendance.missing("heart") == {}
    assert attendance.states() == ["away"]


@in_a_loop
async def test_who_left_on_purpose_is_not_missing() -> None:
    attendance = Attendance(LONG)
    one = session()
    attendance.arrive(one)
    one.left = True
    attendance.depart(one)
    assert attendance.missing("heart") == {}
    assert attendance.states() == ["left"]


@in_a_loop
async def test_who_left_and_came_again_has_not_left() -> None:
    attendance = Attendance(LONG)
    one = session()
    attendance.arrive(one)
    one.left = True
    attendance.depart(one)
    attendance.arrive(session())
    assert attendance.states() == ["ready"]
    assert attendance.left == set()


@in_a_loop
async def test_who_was_here_before_the_coordinator_began_again_is_expected() -> None:
    attendance = Attendance(LONG)
    attendance.expect("ada", frozenset({"heart"}))
    assert set(attendance.missing("heart")) == {"ada"}
    attendance.arrive(session())
    assert attendance.missing("heart") == {}


# -- waiting -----------------------------------------------------------------------------------------------------------


@in_a_loop
async def test_whoever_waits_for_a_client_is_woken_when_it_comes_back() -> None:
    attendance = Attendance(LONG)
    before, after = session(), session()
    attendance.arrive(before)
    attendance.depart(before)
    waiting = [asyncio.create_task(attendance.session("ada")) for _ in range(3)]
    await turns(waiting[0])
    attendance.arrive(after)
    assert await asyncio.gather(*waiting) == [after] * 3


@in_a_loop
async def test_a_session_that_is_here_is_had_at_once() -> None:
    attendance = Attendance(SHORT)
    one = session()
    attendance.arrive(one)
    assert await attendance.session("ada") is one


@in_a_loop
async def test_a_client_that_does_not_come_back_in_time_is_lost() -> None:
    attendance = Attendance(SHORT)
    one = session()
    attendance.arrive(one)
    attendance.depart(one)
    with pytest.raises(Refused, match=r"ada went away and did not come back within 0\.02 s") as caught:
        await attendance.session("ada")
    assert caught.value.reason is Reason.LOST


@in_a_loop
async def test_a_client_that_left_on_purpose_is_not_waited_for() -> None:
    attendance = Attendance(LONG)
    one = session()
    attendance.arrive(one)
    one.left = True
    attendance.depart(one)
    with pytest.raises(Refused) as caught:
        await attendance.session("ada")
    assert caught.value.reason is Reason.LOST


@in_a_loop
async def test_a_client_nobody_has_seen_is_not_waited_for() -> None:
    with pytest.raises(Refused) as caught:
        await Attendance(LONG).session("ada")
    assert caught.value.reason is Reason.LOST


@in_a_loop
async def test_whoever_gives_up_waiting_leaves_nothing_behind() -> None:
    attendance = Attendance(LONG)
    attendance.expect("ada", frozenset({"heart"}))
    waiting = asyncio.create_task(attendance.session("ada"))
    await turns(waiting)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert not any(attendance._waiting.values())


@in_a_loop
async def test_every_coming_and_going_is_a_change() -> None:
    attendance = Attendance(LONG)
    one = session()
    for event in (lambda: attendance.arrive(one), lambda: attendance.depart(one)):
        waiting = [asyncio.create_task(attendance.change(None)) for _ in range(2)]
        await turns(waiting[0])
        assert not any(task.done() for task in waiting)
        event()
        await asyncio.gather(*waiting)


# -- asking ------------------------------------------------------------------------------------------------------------


@in_a_loop
async def test_an_answer_ends_the_question(tmp_path: Path) -> None:
    one, asked, answer = session(), errand(tmp_path), MetricSums([1.0], 1)
    asking = asyncio.create_task(one.ask(asked))
    await turns(asking)
    assert queued(one) == ["assignment"]
    assert list(one.errands) == ["0" * 32]
    asked.settle(answer)
    assert await asking is answer
    assert one.errands == {}


@in_a_loop
async def test_a_refusal_ends_the_question(tmp_path: Path) -> None:
    one, asked = session(), errand(tmp_path)
    asking = asyncio.create_task(one.ask(asked))
    await turns(asking)
    asked.settle(Refused(Reason.NO_DATA))
    with pytest.raises(Refused, match="no_data"):
        await asking


@in_a_loop
async def test_only_the_first_outcome_of_a_question_counts(tmp_path: Path) -> None:
    asked, answer = errand(tmp_path), MetricSums([1.0], 1)
    asked.settle(answer)
    asked.settle(Refused(Reason.FAILED))
    assert await asked.answer is answer


@in_a_loop
async def test_a_question_ends_with_its_session_and_can_be_asked_again(tmp_path: Path) -> None:
    attendance, asked = Attendance(LONG), errand(tmp_path)
    before, after = session(), session()
    attendance.arrive(before)
    asking = asyncio.create_task(before.ask(asked))
    await turns(asking)
    attendance.arrive(after)
    with pytest.raises(Away):
        await asking
    again = asyncio.create_task(after.ask(asked))
    await turns(again)
    asked.settle(MetricSums([1.0], 1))
    assert (await again).examples == 1


@in_a_loop
async def test_a_session_that_is_over_cannot_be_asked(tmp_path: Path) -> None:
    one = session()
    one.end()
    with pytest.raises(Away):
        await one.ask(errand(tmp_path))


@in_a_loop
async def test_an_answer_that_came_before_the_end_of_its_session_counts(tmp_path: Path) -> None:
    one, asked, answer = session(), errand(tmp_path), MetricSums([1.0], 1)
    asking = asyncio.create_task(one.ask(asked))
    await turns(asking)
    asked.settle(answer)
    one.end()
    assert await asking is answer


@in_a_loop
async def test_a_question_nobody_waits_for_any_more_is_called_off(tmp_path: Path) -> None:
    one = session()
    asking = asyncio.create_task(one.ask(errand(tmp_path)))
    await turns(asking)
    asking.cancel()
    await asyncio.wait({asking})
    assert queued(one) == ["assignment", "cancel"]
    assert one.errands == {}


@in_a_loop
async def test_the_last_word_of_a_session_is_sent_before_its_end() -> None:
    one = session()
    one.end(pb.ToAgent(goodbye=pb.Goodbye(reason=pb.Goodbye.STOPPING)))
    one.end(pb.ToAgent(goodbye=pb.Goodbye(reason=pb.Goodbye.REPLACED)))
    assert queued(one) == ["goodbye", None]


def settlement(number: int) -> pb.Settlement:
    return pb.Settlement(accepted=[f"{number:032x}"])


@in_a_loop
async def test_news_of_results_travels_with_the_assignment_that_comes_at_once(tmp_path: Path) -> None:
    one, asked = session(), errand(tmp_path)
    one.tell(settlement(1))
    one.tell(settlement(2))
    asking = asyncio.create_task(one.ask(asked))
    await turns(asking)
    message, _ = await one.outgoing.get()
    assert list(message.assignment.settlement.accepted) == [f"{1:032x}", f"{2:032x}"]
    assert not asked.message.HasField("settlement")  # which may be sent again, over another session
    asking.cancel()
    assert (await one.outgoing.get()).message.WhichOneof("what") == "cancel"


@in_a_loop
async def test_news_of_results_is_told_alone_where_no_assignment_comes() -> None:
    one = session()
    one.tell(settlement(1))
    assert (await one.outgoing.get()).message.settlement == settlement(1)
    one.tell(settlement(2))
    assert (await one.outgoing.get()).message.settlement == settlement(2)


@in_a_loop
async def test_a_session_ends_where_too_many_messages_wait_to_be_read(tmp_path: Path) -> None:
    one = session()
    for i in range(512):
        one.send(pb.ToAgent(settlement=settlement(i)))
    assert not one.ended.done()
    with pytest.raises(Away):
        await one.ask(errand(tmp_path))
    one.send(pb.ToAgent(settlement=settlement(0)))
    assert queued(one) == [None]


@in_a_loop
async def test_nothing_is_told_after_the_end() -> None:
    one = session()
    one.tell(settlement(1))
    one.end()
    one._tell_now()
    assert queued(one) == [None]


@in_a_loop
async def test_clients_are_ready_or_working_away_or_left(tmp_path: Path) -> None:
    attendance = Attendance(LONG)
    ada, bea, cyd, dot = (session(name) for name in ("ada", "bea", "cyd", "dot"))
    for one in (ada, bea, cyd, dot):
        attendance.arrive(one)
    bea.errands["0" * 32] = errand(tmp_path)
    dot.left = True
    attendance.depart(cyd)
    attendance.depart(dot)
    assert attendance.states() == ["ready", "working", "away", "left"]


# -- models that come along --------------------------------------------------------------------------------------------

MIB_VALUES = 1 << 18


def parcel(value: float, name: str = "w", size: int = 2, **extra: np.ndarray) -> Parcel:
    return Parcel(Weights(Manifest((Entry(name, (size,)),)), np.full(size, value, dtype=np.float32)), extra)


def payload(of: Parcel) -> bytes:
    return of.model.vector.tobytes() + b"".join(of.extra[name].tobytes() for name in sorted(of.extra))


async def brought(folder: Path, one: Session, of: Parcel) -> tuple[bytes, str]:
    """The payload and the manifest that the client is sent with an assignment of this model."""
    assignment, published = Assignment(secrets.token_hex(16), "run", 0, 1, "ada", Fit(), "update"), Published(of)
    terms = {"task": "heart", "strategy": "FedAvg", "holds_out_valid": True}
    message = assignment_to_proto(assignment, of, published.digest, **terms)
    asked = Errand(assignment, message, published, folder, Spares(folder, 1), Room(0))
    asking = asyncio.create_task(one.ask(asked))
    sent, along = await one.outgoing.get()
    asked.settle(MetricSums([1.0], 1))
    await asking
    assert not message.manifest  # which may be sent again, over another session
    assert sent.assignment.id == assignment.id
    return bytes(along), sent.assignment.manifest


@in_a_loop
async def test_a_model_comes_along_where_it_is_new_and_its_manifest_once(tmp_path: Path) -> None:
    one, models = session(), [parcel(value) for value in range(3)]
    manifest = models[0].model.manifest.to_json()
    found = [await brought(tmp_path, one, models[i]) for i in (0, 0, 1, 0, 1, 2, 2)]
    assert found == [
        (load(payload(models[0])), manifest),
        (b"", ""),
        (load(payload(models[1])), ""),
        (b"", ""),
        (b"", ""),
        (load(payload(models[2])), ""),
        (b"", ""),
    ]


@in_a_loop
async def test_a_model_that_the_agent_may_have_given_up_comes_along_again(tmp_path: Path) -> None:
    one, models = session(), [parcel(value) for value in range(3)]
    found = [await brought(tmp_path, one, models[i]) for i in (0, 1, 2, 0)]
    assert found[3] == (load(payload(models[0])), "")


@in_a_loop
async def test_extras_come_along_with_their_model(tmp_path: Path) -> None:
    one, control = session(), np.ones(3, dtype=np.float32)
    plain, extended = parcel(1.0), parcel(1.0, control=control, alpha=2 * control)
    assert await brought(tmp_path, one, plain) == (load(payload(plain)), plain.model.manifest.to_json())
    assert await brought(tmp_path, one, extended) == (load(payload(extended)), "")


@in_a_loop
async def test_each_manifest_comes_along(tmp_path: Path) -> None:
    one, other = parcel(1.0), parcel(1.0, "v")
    to = session()
    assert [(await brought(tmp_path, to, of))[1] for of in (one, other, one)] == [
        one.model.manifest.to_json(),
        other.model.manifest.to_json(),
        "",
    ]


@in_a_loop
async def test_a_new_session_is_brought_everything_again(tmp_path: Path) -> None:
    of = parcel(1.0)
    assert await brought(tmp_path, session(), of) == await brought(tmp_path, session(), of) != (b"", "")


@in_a_loop
async def test_a_model_above_one_mib_never_comes_along(tmp_path: Path) -> None:
    one, largest, larger = session(), parcel(1.0, size=MIB_VALUES), parcel(2.0, size=MIB_VALUES + 1)
    of_two = parcel(3.0, size=MIB_VALUES, control=np.ones(1, dtype=np.float32))
    for of in (larger, of_two, larger):
        assert await brought(tmp_path, one, of) == (b"", "")
    along, manifest = await brought(tmp_path, one, largest)
    assert (along == load(payload(largest)), manifest) == (True, largest.model.manifest.to_json())
    assert await brought(tmp_path, one, larger) == (b"", "")
    assert await brought(tmp_path, one, largest) == (b"", "")  # for which the larger ones made no difference


@in_a_loop
async def test_a_model_without_values_does_not_come_along(tmp_path: Path) -> None:
    assert await brought(tmp_path, session(), parcel(1.0, size=0)) == (b"", "")


@in_a_loop
async def test_an_assignment_that_is_answered_takes_no_second_answer_into_the_file_of_the_first(tmp_path: Path) -> None:
    asked = errand(tmp_path)
    model = PARCEL.model
    first, second = (
        model.with_vector(np.full(model.vector.size, 1.0)),
        model.with_vector(np.full(model.vector.size, 2.0)),
    )

    def taken(weights: Weights) -> Update:
        raw = weights.vector.tobytes()
        digest = bytes.fromhex(weights.digest)
        announced = pb.Announcement(assignment_id="0" * 32, examples=1, payload_bytes=len(raw), digest=digest)
        return asked.take_whole(announced, memoryview(raw), 10)

    answer = taken(first)
    asked.settle(answer)
    with pytest.raises(Refused, match="duplicate"):
        taken(second)
    assert answer.weights.vector.tolist() == first.vector.tolist()


@in_a_loop
async def test_an_assignment_whose_answer_was_refused_takes_no_better_one(tmp_path: Path) -> None:
    asked = errand(tmp_path)
    asked.settle(Refused(Reason.NOT_FINITE))
    with pytest.raises(Refused, match="late"):
        asked.receive(pb.Announcement(assignment_id="0" * 32, examples=1), 10)
