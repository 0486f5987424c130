"""Bytes give back exactly the weights they were made of, or a PayloadError, whatever happens to them on the way."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkit import codec
from fedkit.errors import PayloadError
from fedkit.weights import DTYPES, Entry, Manifest, Weights

NAMES = st.text(min_size=1, max_size=8).filter(str.isprintable).filter(lambda name: "" not in name.split("."))


@st.composite
def weights(draw: st.DrawFn) -> Weights:
    """Any weights, NaN and infinity included: the codec carries bits."""
    names = draw(st.lists(NAMES, max_size=4, unique=True))
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    entries = [Entry(name, draw(shapes), draw(st.sampled_from(DTYPES)), draw(st.booleans())) for name in names]
    manifest = Manifest(tuple(entries))
    bits = draw(hnp.arrays(np.uint32, manifest.size))
    return Weights(manifest, bits.view(np.float32))


def encoded(value: Weights) -> tuple[codec.Header, bytes]:
    header, chunks = codec.encode(value)
    return header, b"".join(chunks)


def cut(draw: st.DrawFn, payload: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=5)))
    ends = [*cuts, len(payload)]
    return [payload[start:end] for start, end in zip([0, *cuts], ends, strict=True)]


@given(weights(), st.data())
def test_any_weights_cut_anywhere_come_back_bit_by_bit(value, data):
    header, payload = encoded(value)
    decoder = codec.Decoder(codec.Header.from_bytes(header.to_bytes()), value.manifest)
    for chunk in cut(data.draw, payload):
        decoder.feed(decoder.offset, chunk)
    assert decoder.finish() == value


@given(weights(), st.data())
def test_chunks_out_of_order_twice_or_missing_are_refused_and_the_rest_may_still_come(value, data):
    header, payload = encoded(value)
    decoder = codec.Decoder(header)
    for chunk in cut(data.draw, payload):
        wrong = data.draw(st.integers(-4, len(payload) + 4))
        if wrong != decoder.offset:
            with pytest.raises(PayloadError):
                decoder.feed(wrong, chunk)
        decoder.feed(decoder.offset, chunk)
    assert decoder.finish() == value


@given(weights(), st.data())
def test_a_payload_with_any_bit_flipped_is_refused(value, data):
    header, payload = encoded(value)
    assume(payload)
    changed = flip(payload, data.draw(st.integers(0, 8 * len(payload) - 1)))
    decoder = codec.Decoder(header)
    decoder.feed(0, changed)
    with pytest.raises(PayloadError):
        decoder.finish()


@given(weights(), st.data())
def test_a_payload_cut_short_or_extended_is_refused(value, data):
    header, payload = encoded(value)
    changed = data.draw(st.integers(0, len(payload) - 1).map(lambda n: payload[:n]) if payload else st.just(b"\0"))
    changed = data.draw(st.sampled_from([changed, payload + b"\0", payload + payload + b"\1"]))
    decoder = codec.Decoder(header)
    with pytest.raises(PayloadError):
        decoder.feed(0, changed)
        decoder.finish()


def flip(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_a_payload_error(raw):
    try:
        header = codec.Header.from_bytes(raw)
    except PayloadError:
        return
    assert header.to_bytes() == raw


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(
    st.lists(ODD | st.sampled_from(["w", "float32", True]) | st.lists(st.integers()), max_size=5), max_size=3
)


@given(
    st.dictionaries(
        st.sampled_from(["manifest", "payload_bytes", "digest", "extra"]), ODD | ROWS | ROWS.map(json.dumps)
    )
)
def test_any_fields_are_a_header_or_a_payload_error(fields):
    raw = json.dumps(fields).encode()
    try:
        header = codec.Header.from_bytes(raw)
    except PayloadError:
        return
    assert header.to_bytes() == raw


@given(weights(), st.data())
def test_a_changed_header_is_refused_or_is_exactly_what_it_says(value, data):
    raw = encoded(value)[0].to_bytes()
    start, length = data.draw(st.integers(0, len(raw))), data.draw(st.integers(0, 3))
    changed = raw[:start] + data.draw(st.binary(max_size=3)) + raw[start + length :]
    try:
        header = codec.Header.from_bytes(changed)
    except PayloadError:
        return
    assert header.to_bytes() == changed


def read(raw: bytes) -> Weights:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fedkit"
        path.write_bytes(raw)
        return codec.load(path)


def written(value: Weights) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        codec.save(Path(folder) / "model.fedkit", value)
        return (Path(folder) / "model.fedkit").read_bytes()


@given(weights())
def test_a_file_gives_back_the_weights_bit_by_bit(value):
    assert read(written(value)) == value


@given(weights(), st.data())
def test_a_file_with_any_bit_flipped_is_refused(value, data):
    raw = written(value)
    with pytest.raises(PayloadError):
        read(flip(raw, data.draw(st.integers(0, 8 * len(raw) - 1))))


@given(weights(), st.data())
def test_a_file_cut_short_or_extended_is_refused(value, data):
    raw = written(value)
    with pytest.raises(PayloadError):
        read(
            data.draw(
                st.integers(0, len(raw) - 1).map(lambda n: raw[:n]) | st.binary(min_size=1).map(lambda b: raw + b)
            )
        )


@given(st.binary(max_size=100), st.booleans())
def test_a_file_of_any_bytes_is_refused(raw, with_magic):
    with pytest.raises(PayloadError):
        read(b"FEDKIT1\n" + raw if with_magic else raw)


def test_a_header_that_says_another_manifest_of_the_same_size_is_refused():
    value = Weights(Manifest((Entry("w", (2, 3)),)), np.arange(6))
    raw = written(value).replace(b"[2,3]", b"[3,2]")
    with pytest.raises(PayloadError):
        read(raw)
