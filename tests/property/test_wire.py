"""What is framed by hand is what protobuf writes; what the agents' messages carry comes back, or is refused by type."""

from __future__ import annotations

import contextlib
import json
import math
import random
from pathlib import Path
from typing import Any, get_args

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from fedkit.config import DP
from fedkit.errors import PayloadError, Reason, Refused
from fedkit.gate import Gate
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import operators_pb2, tensors_pb2
from fedkit.protos.convert import (
    assignment_from_proto,
    assignment_to_proto,
    extras_from_proto,
    extras_to_proto,
    header_from_proto,
    header_to_proto,
    refusal_from_proto,
    refusal_to_proto,
    require_name,
    sums_from_proto,
    sums_to_proto,
)
from fedkit.protos.wire import Calls, Laden, _parser, _serializer, frame, load, unframe
from fedkit.queries import Histogram, LabelCounts, Moments, RowCount
from fedkit.rounds.assignment import (
    MASKED_STEPS,
    WORDS_STEPS,
    Assignment,
    Clip,
    Masking,
    MaskStep,
    Parcel,
    Private,
    Returns,
)
from fedkit.rounds.layout import Layout, Secrecy
from fedkit.rounds.noise import SharedNoise
from fedkit.server.database import Database
from fedkit.weights import Entry, Manifest, Weights
from fedkit.work import Evaluate, Fit, Gradient, MetricSums, Summarize, Summary

MIB = 1 << 20
NOISE = random.Random(0).randbytes(MIB + 200)
FRAMED = (tensors_pb2.Piece, pb.UploadPiece)
EDGES = [0, 1, 127, 128, 129, 16_383, 16_384, MIB - 1, MIB, MIB + 1, MIB + 200]


# -- frames ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FRAMED, ids=lambda kind: kind.__name__)
@given(length=st.integers(0, MIB + 200) | st.sampled_from(EDGES))
def test_a_frame_made_by_hand_is_what_protobuf_writes_and_reads(kind: type, length: int) -> None:
    chunk = NOISE[:length]
    raw = frame(memoryview(chunk))
    assert raw == kind(data=chunk).SerializeToString()
    assert kind.FromString(raw).data == chunk
    assert unframe(raw) == chunk


@pytest.mark.parametrize("length", EDGES)
def test_every_length_at_which_the_prefix_grows_is_framed(length: int) -> None:
    assert frame(NOISE[:length]) == pb.UploadPiece(data=NOISE[:length]).SerializeToString()
    assert unframe(frame(NOISE[:length])) == NOISE[:length]


def test_a_chunk_is_framed_and_unframed_without_a_second_copy() -> None:
    raw = frame(NOISE[:MIB])
    assert unframe(raw).obj is raw


varints = st.lists(st.integers(0, 255), max_size=7).map(bytes)
almost = st.builds(lambda tag, length, rest: bytes((tag,)) + length + rest, st.just(0x12), varints, st.binary())


@pytest.mark.parametrize("kind", FRAMED, ids=lambda kind: kind.__name__)
@given(raw=st.binary() | almost)
@example(b"\x12")
@example(b"\x12\x80\x00")  # a length of nothing, written with more bytes than it needs
@example(b"\x12\x80\x80\x80\x80\x00")
@example(b"\x12\x80\x80\x80\x80\x10")  # 2^32
@example(b"\x12\xff\xff\xff\xff\x7f")
@example(b"\x12\x80\x80\x80\x80\x80\x80")
def test_only_what_protobuf_takes_for_data_is_unframed_and_nothing_raises(kind: type, raw: bytes) -> None:
    chunk = unframe(raw)
    if chunk is None:
        return
    read = kind.FromString(raw)
    assert read.WhichOneof("part") == "data"
    assert read.data == chunk


@given(st.binary(max_size=300), st.binary(min_size=1, max_size=10))
def test_a_frame_with_anything_after_it_is_not_data(chunk: bytes, more: bytes) -> None:
    assert unframe(frame(chunk) + more) is None


@given(st.binary(min_size=1, max_size=300), st.integers(1, 300))
def test_a_frame_that_was_cut_is_not_data(chunk: bytes, cut: int) -> None:
    assert unframe(frame(chunk)[:-cut]) is None


def test_an_announcement_is_not_data() -> None:
    assert unframe(pb.UploadPiece(announcement=pb.Announcement(examples=1)).SerializeToString()) is None
    assert unframe(tensors_pb2.Piece(header=tensors_pb2.Header(manifest="[]")).SerializeToString()) is None


# -- payloads ----------------------------------------------------------------------------------------------------------

LADEN = (pb.ToAgent, pb.FromAgent)
SHORT = [127, 128, 129, 16_383, 16_384, 16_385, MIB - 1, MIB]
lengths = st.integers(0, 4096) | st.sampled_from(SHORT)
told = {
    pb.ToAgent: st.one_of(
        st.builds(pb.Welcome, session=st.binary(max_size=200), heartbeat_s=st.floats(0, 60)).map(
            lambda one: pb.ToAgent(welcome=one)
        ),
        st.builds(pb.Assignment, id=st.text(max_size=200), manifest=st.text(max_size=300)).map(
            lambda one: pb.ToAgent(assignment=one)
        ),
        st.just(pb.ToAgent(heartbeat=pb.Heartbeat())),
        st.just(pb.ToAgent()),
    ),
    pb.FromAgent: st.one_of(
        st.builds(pb.Announcement, assignment_id=st.text(max_size=200), loss=st.none() | st.floats(0, 9)).map(
            lambda one: pb.FromAgent(update=one)
        ),
        st.builds(pb.Reals, values=st.lists(st.floats(0, 9), max_size=40)).map(
            lambda one: pb.FromAgent(sums=pb.Sums(reals=one))
        ),
        st.just(pb.FromAgent(leaving=pb.Leaving())),
        st.just(pb.FromAgent()),
    ),
}
each_laden = pytest.mark.parametrize("kind", LADEN, ids=lambda kind: kind.__name__)


def parsed(kind: type, raw: bytes) -> Laden:
    """What a receiver gets."""
    return _parser(kind.DESCRIPTOR)(raw)


@each_laden
@given(data=st.data(), length=lengths)
def test_a_message_with_a_payload_made_by_hand_is_what_protobuf_reads(kind: type, data: st.DataObject, length: int):
    message, payload = data.draw(told[kind]), NOISE[:length]
    raw = _serializer(kind.DESCRIPTOR)(Laden(message, load(memoryview(payload))))
    read = kind.FromString(raw)
    assert read.payload == payload
    assert parsed(kind, raw) == (message, payload)
    read.ClearField("payload")
    assert read == message


@each_laden
@given(data=st.data(), length=lengths)
def test_a_payload_that_protobuf_wrote_is_taken_out_of_its_message(kind: type, data: st.DataObject, length: int):
    message, payload = data.draw(told[kind]), NOISE[:length]
    whole = kind(payload=payload)
    whole.MergeFrom(message)
    assert parsed(kind, whole.SerializeToString()) == (message, payload)


@each_laden
def test_a_message_without_a_payload_is_written_as_ever(kind: type) -> None:
    message = kind(refusal=pb.Refusal(reason="late")) if kind is pb.FromAgent else kind(cancel=pb.Cancel())
    raw = _serializer(kind.DESCRIPTOR)(Laden(message))
    assert raw == message.SerializeToString()
    assert parsed(kind, raw) == (message, b"")


@pytest.mark.parametrize("length", [0, 4, 124, 128, 16_380, 16_384, MIB, (2 << 20) - 4])
def test_the_values_of_a_payload_lie_on_whole_words_and_are_not_copied(length: int) -> None:
    head = load(bytes(length))[:4]
    assert head[0] == 0x7A
    raw = head + bytes(length) + pb.FromAgent(update=pb.Announcement(examples=1)).SerializeToString()
    message, payload = parsed(pb.FromAgent, raw)
    assert (message.update.examples, payload.nbytes, payload.obj is raw) == (1, length, True)
    assert np.frombuffer(payload, np.uint8).ctypes.data - np.frombuffer(raw, np.uint8).ctypes.data == 4


fields = st.lists(
    st.builds(
        lambda tag, chunk, more: tag + bytes((len(chunk) | more, *([0] if more else []))) + chunk,
        st.sampled_from([b"\x0a", b"\x1a", b"\x3a", b"\x7a", b"\xfa\x00", b"\x82\x01", b"\x02", b"\x08", b"\x7b"]),
        st.binary(max_size=9) | st.just(b"\x7a\x01x"),
        st.sampled_from([0, 0x80]),
    ),
    max_size=5,
).map(b"".join)


@each_laden
@given(raw=st.binary() | fields | st.tuples(fields, st.binary(max_size=5)).map(b"".join))
@example(b"\x7a")
@example(b"\x7a\x80\x80\x80\x80\x80\x80\x00")
@example(b"\x7a\xff\xff\xff\xff\x0f")
@example(b"\x82\x01\x05\x7a\x03abc\x2a\x03\x12\x01x")  # field 16, in which something looks like a payload
@example(b"\x7a\x01x\x7a\x01y")
def test_no_bytes_give_a_payload_that_protobuf_would_not_and_nothing_else_raises(kind: type, raw: bytes) -> None:
    try:
        message, payload = parsed(kind, raw)
    except DecodeError:
        return
    read = kind.FromString(raw)
    assert payload in (b"", read.payload) or message.payload == read.payload  # the first of several
    assert message.payload in (b"", read.payload)
    read.ClearField("payload")
    message.ClearField("payload")
    assert message.SerializeToString(deterministic=True) == read.SerializeToString(deterministic=True)


# -- calls -------------------------------------------------------------------------------------------------------------


def test_every_method_of_a_service_can_be_called_by_its_name_in_snake_case() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        calls = Calls(channel, operators_pb2.DESCRIPTOR.services_by_name["Operators"])
        assert callable(calls.cancel_run)
        with pytest.raises(AttributeError, match="no method 'cancel_walk'"):
            _ = calls.cancel_walk


# -- assignments -------------------------------------------------------------------------------------------------------

reals = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(1, (1 << 63) - 1)
names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")
sizes = counts | st.just("all")
rates = st.none() | st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
limits = st.fixed_dictionaries(
    {}, optional={"max_norm": positive, "max_ratio": positive, "max_drop": st.just(0.0) | positive}
).filter(bool)
gates = st.builds(lambda given, metric: Gate(**given, metric=metric), limits, st.sampled_from(["loss:min", "auc:max"]))


@st.composite
def fits(draw: st.DrawFn) -> Fit:
    amount = draw(st.sampled_from(["epochs", "steps", "neither"]))
    chosen = {} if amount == "neither" else {amount: draw(counts)}
    proximal = draw(st.floats(min_value=0, allow_nan=False, allow_infinity=False))
    gate = draw(st.none() | gates)
    rest = {
        "gate": gate,
        "control_variates": draw(st.booleans()),
        "mixed_precision": draw(st.booleans()),
        "quantize_from": draw(st.none() | counts),
        "proximal": proximal,
    }
    return Fit(**chosen, batch_size=draw(sizes), lr=draw(rates), **rest)


rising = st.lists(reals, min_size=2, max_size=6, unique=True).map(sorted)
intervals = st.tuples(reals, reals).filter(lambda pair: pair[0] < pair[1] and math.isfinite(pair[1] - pair[0]))
queries = st.one_of(
    st.builds(Moments, bounds=st.none() | st.lists(intervals, min_size=1, max_size=5)),
    st.builds(Histogram, feature=st.integers(0, (1 << 63) - 1), edges=rising),
    st.builds(LabelCounts, classes=counts),
    st.just(RowCount()),
)
works = st.one_of(
    fits(),
    st.builds(Gradient, batch_size=sizes),
    st.builds(Evaluate, split=st.sampled_from(["valid", "test"]), batch_size=counts),
    st.builds(Summarize, query=queries),
)
shares = st.floats(0, 1, exclude_min=True, exclude_max=True)
norms = st.floats(0, exclude_min=True, allow_infinity=False)
noise = st.builds(dict, epsilon=norms) | st.builds(dict, noise_multiplier=norms)
dps = st.builds(lambda noise, delta, norm: DP(**noise, delta=delta, max_grad_norm=norm), noise, shares, norms)
shared_dps = st.builds(
    lambda how, delta, norm, dropouts, colluders: DP(
        **how, delta=delta, max_grad_norm=norm, noise="shared", dropouts=dropouts, colluders=colluders
    ),
    *(noise, shares, norms),
    *(st.integers(0, 1 << 20), st.integers(0, 1 << 20)),
)
small = st.integers(1, 1000)
noises = st.builds(
    SharedNoise,
    *(st.integers(0, 3), st.integers(0, 3)),
    *(st.floats(0.1, 100.0), st.floats(0.1, 10.0), st.floats(0.001, 1.0)),
)
layouts = st.one_of(
    st.builds(Layout, st.just("mean"), small, st.just(10), st.just(10.0), st.integers(16, 20), noise=noises),
    st.builds(
        Layout,
        kind=st.just("mean"),
        size=small,
        cohort=st.integers(1, 100),
        clip=st.floats(1e-3, 1e3),
        bits=st.integers(2, 24),
        cap=st.integers(0, 1000),
        extras=st.lists(st.tuples(st.text(max_size=9), small), max_size=3).map(tuple),
    ),
    st.builds(Layout, kind=st.sampled_from(["reals", "integers"]), size=small, cohort=st.integers(1, 100)),
)
calls = st.binary(min_size=16, max_size=16).map(bytes.hex)
vectors = st.builds(Masking, calls, st.just("vector"), layouts, st.binary(max_size=99))
replies = st.builds(Masking, calls, st.sampled_from(["advertise", "share", "confirm", "unmask"]), layouts, st.binary())
asked_of_one = st.sampled_from([("update", None), ("weights", None), ("sums", None)])
asked_of_all = st.tuples(st.just("words"), vectors) | st.tuples(st.just("reply"), replies)
clips = st.builds(Clip, norms, st.booleans())
assignments = st.builds(
    lambda kind, **more: Assignment(returns=kind[0], masking=kind[1], **more),
    kind=asked_of_one | asked_of_all,
    clip=st.none() | clips,
    id=st.binary(min_size=16, max_size=16).map(bytes.hex),
    run=st.builds("{}.{}".format, names, st.binary(min_size=4, max_size=4).map(bytes.hex)),
    seed=st.integers(0, (1 << 64) - 1),
    round=st.integers(-1, (1 << 63) - 1),
    client=names,
    work=works,
    private=st.none()
    | st.builds(Private, dp=dps | shared_dps, visits=st.integers(1, 1_000_000), questions=st.integers(0, 5)),
)
PARCEL = Parcel(Weights.zeros(Manifest((Entry("w", (2,)),))), {"control": np.ones(3, np.float32)})


def asked(assignment: Assignment) -> pb.Assignment:
    """The message that asks for it, as it arrives."""
    terms = {"task": "heart", "strategy": "FedAvg", "holds_out_valid": True}
    message = assignment_to_proto(assignment, PARCEL, b"d" * 32, **terms)
    return pb.Assignment.FromString(message.SerializeToString())


_LAYOUT = json.loads(Layout("mean", 2, 3).to_json())


def layout(**change: Any) -> str:
    """A layout's text, changed."""
    return json.dumps(_LAYOUT | change)


@pytest.mark.parametrize(
    "change",
    [
        {"returns": pb.UPDATE},
        {"returns": pb.REPLY},
        {"step": "open"},
        {"step": "share"},
        {"call": "x"},
        {"layout": "{}"},
        {"layout": "[" * 100_000},
        {"layout": layout(cap=-1)},
        {"layout": layout(kind="all")},
        {"layout": layout(scheme="rot13")},
        {"layout": layout(scheme="bfv")},
        {"layout": layout(cohort=9999, bits=24)},
        {"step": "encrypt", "layout": layout(scheme="bfv", cohort=9999, bits=24)},
        {"step": "encrypt", "layout": layout(scheme="bfv", bits=0)},
    ],
    ids=str,
)
def test_a_sum_in_secret_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    masking = Masking("0" * 32, "vector", Layout("mean", 2, 3))
    message = asked(Assignment("0" * 32, "run", 0, 1, "ada", Fit(), "words", masking=masking))
    assert assignment_from_proto(message, "ada").masking == masking
    for name, value in change.items():
        setattr(message if name == "returns" else message.masking, name, value)
    with pytest.raises(PayloadError):
        assignment_from_proto(message, "ada")


@pytest.mark.parametrize("step", get_args(MaskStep))
def test_every_step_of_a_sum_in_secret_comes_back_the_same(step: MaskStep) -> None:
    scheme: Secrecy = "masked" if step in MASKED_STEPS else "bfv"
    returns: Returns = "words" if step in WORDS_STEPS else "reply"
    masking = Masking("0" * 32, step, Layout("mean", 2, 3, scheme=scheme), b"told")
    assignment = Assignment("0" * 32, "run", 0, 1, "ada", Fit(), returns, masking=masking)
    assert assignment_from_proto(asked(assignment), "ada") == assignment


@given(assignments)
def test_an_assignment_of_any_kind_comes_back_the_same(assignment: Assignment) -> None:
    assert assignment_from_proto(asked(assignment), assignment.client) == assignment


def test_an_assignment_says_what_travels_with_it() -> None:
    message = asked(Assignment("0" * 32, "run", 0, 1, "ada", Fit(), "update"))
    assert message.model_bytes == PARCEL.payload_bytes == 4 * (2 + 3)
    assert message.manifest_digest.hex() == PARCEL.model.manifest.digest
    assert extras_from_proto(message.extras, 2) == {"control": 3}


@given(works)
def test_the_settings_of_any_work_come_back_bit_by_bit(work: Fit | Gradient | Evaluate | Summarize) -> None:
    assignment = Assignment("0" * 32, "run", 0, 1, "ada", work, "update")
    back = assignment_from_proto(asked(assignment), "ada").work
    assert back.to_dict() == work.to_dict()
    assert repr(back) == repr(work)


numbers = st.integers(0, (1 << 64) - 1)
any_text = st.text(max_size=120)
any_float = st.floats()
hostile_fit = st.builds(
    pb.Fit,
    epochs=st.none() | numbers,
    steps=st.none() | numbers,
    batch_size=numbers,
    lr=st.none() | any_float,
    proximal=any_float,
)
hostile_query = st.one_of(
    st.builds(pb.Interval, low=any_float, high=any_float).map(
        lambda one: pb.Summarize(moments=pb.Moments(bounds=[one, one]))
    ),
    st.builds(pb.Histogram, feature=numbers, edges=st.lists(any_float, max_size=4)).map(
        lambda one: pb.Summarize(histogram=one)
    ),
    st.builds(pb.LabelCounts, classes=numbers).map(lambda one: pb.Summarize(label_counts=one)),
    st.just(pb.Summarize()),
)
hostile_work = st.one_of(
    st.just({}),
    hostile_fit.map(lambda work: {"fit": work}),
    st.builds(pb.Gradient, batch_size=numbers).map(lambda work: {"gradient": work}),
    st.builds(pb.Evaluate, split=any_text, batch_size=numbers).map(lambda work: {"evaluate": work}),
    hostile_query.map(lambda work: {"summarize": work}),
)


@given(
    work=hostile_work,
    id=st.just("0" * 32) | any_text,
    run=st.just("run") | any_text,
    task=st.just("heart") | any_text,
    strategy=any_text,
    seed=numbers,
    round=st.integers(-(1 << 63), (1 << 63) - 1),
    returns=st.integers(0, 3) | st.integers(-(1 << 31), (1 << 31) - 1),
)
def test_an_assignment_that_makes_no_sense_is_refused_by_type(work: dict, **fields: object) -> None:
    message = pb.Assignment.FromString(pb.Assignment(**fields, **work).SerializeToString())
    try:
        found = assignment_from_proto(message, "ada")
    except PayloadError:
        return
    assert assignment_from_proto(asked(found), "ada") == found


@given(st.binary(max_size=200))
def test_bytes_that_happen_to_be_an_assignment_raise_nothing_but_payload_errors(raw: bytes) -> None:
    with contextlib.suppress(DecodeError, PayloadError):
        assignment_from_proto(pb.Assignment.FromString(raw), "ada")


@pytest.mark.parametrize("id", ["", "0" * 31, "0" * 33, "G" * 32, "A" * 32, "0" * 31 + "\n", "../" + "0" * 29])
def test_an_id_that_could_be_a_path_is_refused(id: str) -> None:
    message = asked(Assignment(id, "run", 0, 1, "ada", Fit(), "update"))
    with pytest.raises(PayloadError, match="32 hexadecimal characters"):
        assignment_from_proto(message, "ada")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "a b", "-a", "ä", "a\n", "\na", "a\0", "x" * 101]
)
def test_a_name_that_could_be_a_path_or_an_option_is_refused(name: str) -> None:
    with pytest.raises(PayloadError, match="a client's name must be 1 to 100"):
        require_name(name, "a client's name")


def test_a_run_of_the_longest_name_can_be_asked_for(tmp_path: Path) -> None:
    run = Database(tmp_path / "coordinator.db").add_run("r" * 100, {}).id
    message = asked(Assignment("0" * 32, run, 0, 1, "ada", Fit(), "update"))
    assert assignment_from_proto(message, "ada").run == run


# -- headers and extras ------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
manifests = st.lists(shapes, max_size=4).map(
    lambda found: Manifest(tuple(Entry(f"layer.{i}", shape) for i, shape in enumerate(found)))
)
extra_sizes = st.dictionaries(
    st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20).filter(str.isprintable),
    st.integers(0, 50),
    max_size=4,
)


@given(manifests, extra_sizes)
def test_a_header_comes_back_the_same(manifest: Manifest, extras: dict[str, int]) -> None:
    parcel = Parcel(Weights.zeros(manifest), {name: np.zeros(size, np.float32) for name, size in extras.items()})
    raw = header_to_proto(parcel, b"\x01" * 32).SerializeToString()
    found, sizes = header_from_proto(tensors_pb2.Header.FromString(raw))
    assert found == manifest
    assert sizes == dict(sorted(extras.items()))


extra = st.builds(tensors_pb2.Extra, name=any_text | st.just("control"), length=numbers | st.integers(0, 5))
MANIFEST = '[["w",[2],"float32",true]]'


@given(
    manifest=st.just(MANIFEST) | any_text,
    extras=st.lists(extra, max_size=20),
    payload_bytes=numbers | st.just(8),
    digest=st.just(b"d" * 32) | st.binary(max_size=64),
)
def test_a_header_that_makes_no_sense_is_refused_by_type(**fields: object) -> None:
    message = tensors_pb2.Header(**fields)
    try:
        manifest, extras = header_from_proto(message)
    except PayloadError:
        return
    assert message.payload_bytes == 4 * (manifest.size + sum(extras.values()))
    assert len(message.digest) == 32


@given(st.lists(extra, max_size=20), st.integers(0, 1000))
def test_extras_that_make_no_sense_are_refused_by_type(extras: list, model_size: int) -> None:
    message = tensors_pb2.Header(extras=extras)
    try:
        found = extras_from_proto(message.extras, model_size)
    except PayloadError:
        return
    assert extras_to_proto(found) == list(message.extras)
    assert sum(found.values()) <= max(4 * model_size, MIB)


@pytest.mark.parametrize(
    "extras",
    [
        [("b", 1), ("a", 1)],
        [("a", 1), ("a", 1)],
        [("", 1)],
        [("\x1b[31m", 1)],
        [("n" * 101, 1)],
        [("a", (1 << 64) - 1)],
        [("a", MIB + 1)],
        [("a", MIB), ("b", 1)],
        [(f"{i:02}", 1) for i in range(17)],
    ],
    ids=["unsorted", "twice", "nameless", "unprintable", "long", "endless", "large", "together", "many"],
)
def test_extras_that_no_strategy_sends_are_refused(extras: list[tuple[str, int]]) -> None:
    message = tensors_pb2.Header(extras=[tensors_pb2.Extra(name=name, length=length) for name, length in extras])
    with pytest.raises(PayloadError):
        extras_from_proto(message.extras, 10)


# -- sums and refusals -------------------------------------------------------------------------------------------------

vectors = st.lists(st.floats(), max_size=20).map(lambda found: np.array(found, dtype=np.float64))
whole = st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=20).map(lambda found: np.array(found, dtype=np.int64))
rows = st.integers(0, (1 << 63) - 1)
summarize = Summarize(query=LabelCounts(classes=2))
answers = st.one_of(
    st.tuples(st.builds(MetricSums, vectors, rows), st.just(Evaluate())),
    st.tuples(st.builds(Summary, vectors | whole, rows), st.just(summarize)),
)


@given(answers)
def test_sums_come_back_bit_by_bit(pair: tuple) -> None:
    answer, work = pair
    found = sums_from_proto(pb.Sums.FromString(sums_to_proto("0" * 32, answer).SerializeToString()), work)
    assert type(found) is type(answer)
    assert found.vector.dtype == answer.vector.dtype
    assert found.vector.tobytes() == answer.vector.tobytes()
    assert found.examples == answer.examples


@given(vectors | whole, works)
def test_sums_that_were_not_asked_for_are_refused(vector: np.ndarray, work: object) -> None:
    message = sums_to_proto("0" * 32, Summary(vector, 1))
    if isinstance(work, Fit | Gradient) or (isinstance(work, Evaluate) and vector.dtype == np.int64):
        with pytest.raises(Refused, match="shape"):
            sums_from_proto(message, work)
    else:
        assert isinstance(sums_from_proto(message, work), MetricSums) == isinstance(work, Evaluate)


def test_sums_of_nothing_at_all_are_refused() -> None:
    with pytest.raises(Refused, match="shape"):
        sums_from_proto(pb.Sums(examples=1), Evaluate())


@given(st.sampled_from(list(Reason)), st.text(max_size=400))
def test_a_refusal_comes_back_short_and_printable(reason: Reason, detail: str) -> None:
    message = refusal_to_proto("0" * 32, Refused(reason, detail))
    found = refusal_from_proto(pb.Refusal.FromString(message.SerializeToString()))
    assert len(found.detail) <= 200
    assert found.detail.isprintable()
    assert found.detail == "".join(c for c in detail[:200] if c.isprintable())


@given(any_text)
def test_a_reason_that_clients_cannot_have_counts_as_failed(reason: str) -> None:
    found = refusal_from_proto(pb.Refusal(reason=reason))
    assert found.reason.value == reason or found.reason is Reason.FAILED


@pytest.mark.parametrize("reason", [Reason.DEADLINE, Reason.LATE, Reason.NORM, Reason.NOT_FINITE, Reason.SURPLUS])
def test_a_client_does_not_speak_for_the_coordinator(reason: Reason) -> None:
    assert refusal_from_proto(pb.Refusal(reason=reason.value)).reason is Reason.FAILED
