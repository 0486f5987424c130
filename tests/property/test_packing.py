"""State comes back bit by bit and type by type, and any other bytes are refused before memory is taken for them."""

from __future__ import annotations

import enum
import json
import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkit.errors import PayloadError, StateError
from fedkit.packing import pack, parts, unpack
from fedkit.weights import Entry, Manifest, Weights

SMALL = 5_000_000  # bytes that may be taken while hostile bytes are refused
SURROGATES = st.text(st.characters(categories=["L", "Cs", "Cc"]), max_size=4)
TEXT = st.text(max_size=6) | SURROGATES | st.sampled_from(["", "l", "t", "d", "a", "n", "w", "f", "i", "s"])
INTEGERS = st.integers() | st.sampled_from([2**63, 2**63 - 1, -(2**63), -(2**63) - 1])
FLOATS = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", bits.to_bytes(8, "little"))[0]) | st.floats()
NUMBERS = ("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16")
DTYPES = st.sampled_from(NUMBERS).map(np.dtype)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Any bits in any shape, empty ones and those of no dimension included."""
    dtype, shape = draw(DTYPES), draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    size = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    raw = bytes(byte & 1 for byte in raw) if dtype.kind == "b" else raw
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


@st.composite
def weights(draw: st.DrawFn) -> Weights:
    shapes = draw(st.lists(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3), max_size=3))
    manifest = Manifest(tuple(Entry(f"w{i}", shape) for i, shape in enumerate(shapes)))
    return Weights(manifest, draw(hnp.arrays(np.uint32, manifest.size)).view(np.float32))


LEAVES = st.none() | st.booleans() | INTEGERS | FLOATS | TEXT | arrays() | weights() | arrays().map(lambda a: a.sum())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(TEXT | INTEGERS | st.booleans(), inner, max_size=4),
    ),
    max_leaves=10,
)


def bits(value: object) -> object:
    """Something that compares equal only for values of the same types and bits."""
    if isinstance(value, np.ndarray | np.generic):
        return type(value), value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, Weights):
        return "weights", value.manifest, value.vector.tobytes()
    if isinstance(value, float):
        return float, struct.pack("<d", value)
    if isinstance(value, list | tuple):
        return type(value), [bits(item) for item in value]
    if isinstance(value, dict):
        return dict, [(type(key), key, bits(item)) for key, item in value.items()]
    return type(value), value


@given(VALUES)
def test_any_state_comes_back_with_the_same_types_and_bits(value):
    assert bits(unpack(pack(value))) == bits(value)


@given(VALUES)
def test_a_value_has_one_spelling(value):
    raw = pack(value)
    assert pack(unpack(raw)) == raw
    assert b"".join(parts(value)) == raw


TREES = st.recursive(
    st.none() | st.booleans() | INTEGERS.filter(lambda n: abs(n) < 2**70) | st.floats() | TEXT,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(TEXT, inner, max_size=2),
        st.lists(inner, max_size=3).flatmap(lambda rest: st.sampled_from("ltdanwfis").map(lambda tag: [tag, *rest])),
    ),
    max_leaves=10,
)


def packed(tree: bytes | object, buffers: bytes = b"") -> bytes:
    text = tree if isinstance(tree, bytes) else json.dumps(tree, separators=(",", ":")).encode()
    return b"FEDPACK1" + struct.pack("<Q", len(text)) + text + buffers


@given(TREES, st.binary(max_size=40))
def test_any_tree_is_a_value_of_this_spelling_or_refused(tree, buffers):
    raw = packed(tree, buffers)
    try:
        value = unpack(raw)
    except PayloadError:
        return
    assert pack(value) == raw


@given(VALUES, st.data())
def test_bytes_that_were_changed_are_another_value_or_refused(value, data):
    raw = pack(value)
    start, length = data.draw(st.integers(0, len(raw))), data.draw(st.integers(0, 3))
    changed = raw[:start] + data.draw(st.binary(max_size=3)) + raw[start + length :]
    try:
        found = unpack(changed)
    except PayloadError:
        return
    assert pack(found) == changed


@given(VALUES, st.data())
def test_bytes_cut_short_or_extended_are_refused(value, data):
    raw = pack(value)
    with pytest.raises(PayloadError):
        unpack(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(PayloadError):
        unpack(raw + data.draw(st.binary(min_size=1, max_size=9)))


HOSTILE = {
    "an array of 2 to the 60 values": (["a", "<f4", [1 << 60]], b"\0" * 8),
    "an array whose dimensions multiply to 2 to the 600": (["a", "<f4", [1 << 60] * 10], b""),
    "an array of nothing that numpy cannot make": (["a", "<f8", [0, 1 << 62, 4]], b""),
    "an array of 33 dimensions": (["a", "<f4", [1] * 33], b"\0" * 4),
    "an array of -1 times -1 values": (["a", "<f4", [-1, -1]], b"\0" * 4),
    "an array of true values": (["a", "<f4", [True]], b"\0" * 4),
    "an array of objects": (["a", "|O", [1]], b"\0" * 8),
    "an array of dates": (["a", "<M8[s]", [1]], b"\0" * 8),
    "an array of text": (["a", "<U4", [1]], b"\xff" * 16),
    "an array of records": (["a", "|V8", [1]], b"\0" * 8),
    "an array in the other order of bytes": (["a", ">f4", [1]], b"\0" * 4),
    "an array whose dtype is a list": (["a", ["<f4"], [1]], b"\0" * 4),
    "booleans that are neither": (["a", "|b1", [2]], b"\1\2"),
    "a number without a dtype": (["n"], b"\0" * 8),
    "weights of 2 to the 36 values": (["w", '[["w",[68719476736],"float32",true]]'], b""),
    "weights whose manifest is none": (["w", "[]x"], b""),
    "weights whose manifest is a list": (["w", []], b""),
    "a key without a value": (["d", "a"], b""),
    "a key twice": (["d", "a", 1, "a", 2], b""),
    "a key twice as another number": (["d", 1, 1, True, 2], b""),
    "a key that is a float": (["d", 1.0, 1], b""),
    "a key that is a list": (["d", ["l"], 1], b""),
    "a key that is nothing": (["d", None, 1], b""),
    "a list without a tag": ([], b""),
    "a list whose tag is a number": ([1, 2], b""),
    "a tag that there is not": (["x", 1], b""),
    "an object": ({"l": 1}, b""),
    "a finite float spelled as another one": (["f", struct.pack("<d", 1.0).hex()], b""),
    "a float of three bytes": (["f", "000000"], b""),
    "a short number spelled as a long one": (["i", "0x1"], b""),
    "a long number spelled as a short one": (1 << 63, b""),
    "a long number with an underscore": (["i", "0x8_000000000000000"], b""),
    "a long number that is none": (["i", [1]], b""),
    "ordinary text spelled as odd text": (["s", "41"], b""),
    "odd text that is none": (["s", "ff"], b""),
    "NaN": (b"NaN", b""),
    "an infinite number": (b"Infinity", b""),
    "a number of 5,000 digits": (b"1" * 5000, b""),
    "spaces": (b"[ ]", b""),
    "100,000 brackets": (b"[" * 100_000, b""),
    "lists 65 deep": (b'["l",' * 65 + b"1" + b"]" * 65, b""),
    "no JSON": (b"\xff", b""),
    "nothing": (b"", b""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_before_memory_is_taken(name):
    raw = packed(*HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            unpack(raw)
        assert tracemalloc.get_traced_memory()[1] < SMALL
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("raw", [b"", b"FEDPACK1", b"FEDPACK2" + b"\0" * 8, b"FEDPACK1" + b"\xff" * 8 + b"1"])
def test_another_beginning_is_refused(raw):
    with pytest.raises(PayloadError):
        unpack(raw)


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"m": {"a": [1, {2}]}}, r"m\['a'\]\[1\] is a set"),
        ({"m": Colour.RED}, "m is a Colour"),
        ({"m": np.array(["ann"])}, "m is an array of <U3"),
        ({"m": np.array([None])}, "m is an array of object"),
        ({"m": np.datetime64("2020")}, "m is an array of datetime64"),
        ({"m": np.ma.masked_array([1.0], [True])}, "m is a MaskedArray"),
        ({"m": {1.5: 1}}, r"m has the key 1\.5"),
        ({"m": {1 << 20_000: b"raw"}}, r"m\[a long number\] is a bytes"),
        (b"raw", "the value is a bytes"),
    ],
)
def test_what_would_not_come_back_as_it_was_is_refused_by_its_place(value, named):
    with pytest.raises(StateError, match=named):
        pack(value)


def test_whole_numbers_longer_than_python_prints_come_back():
    value = {"a": {1 << 20_000: -(1 << 20_000)}}
    assert bool(unpack(pack(value)) == value)


def test_a_list_that_holds_itself_is_refused():
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(StateError, match="nested deeper than 64"):
        pack(endless)


def test_values_in_the_other_order_of_bytes_come_back_as_the_same_values():
    value = np.array([1.5, -2.0], dtype=">f8")
    assert bits(unpack(pack(value))) == bits(value.astype("<f8"))


def test_an_array_in_any_memory_layout_comes_back_in_rows():
    value = np.arange(12.0).reshape(3, 4)
    assert bits(unpack(pack(value.T[::2]))) == bits(np.ascontiguousarray(value.T[::2]))


def test_arrays_that_come_back_can_be_changed_in_place():
    found = unpack(pack({"m": np.zeros(3), "w": Weights.zeros(Manifest((Entry("w", (2,)),)))}))
    found["m"] += 1
    found["w"].vector[0] = 2
    assert found["m"].tolist() == [1, 1, 1]


def test_unpacked_values_hold_on_to_none_of_the_bytes():
    raw = bytearray(pack({"m": np.zeros(1000), "l": [np.float32(1)]}))
    found = unpack(raw)
    raw.clear()  # raises BufferError where anybody still looks at them
    assert found["m"].sum() == 0


def test_packing_piece_by_piece_copies_no_array():
    value = np.zeros(1000)
    assert any(isinstance(piece, memoryview) and np.shares_memory(np.asarray(piece), value) for piece in parts([value]))
