"""Bytes that claim to be a model: refused for what they say before memory is taken, for what they are afterwards."""

from __future__ import annotations

import os
import resource
import stat
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fedkit import codec
from fedkit.errors import PayloadError
from fedkit.weights import Entry, Manifest, Weights

HEADERS = sorted((Path(__file__).parent.parent / "hostile" / "headers").glob("*.json"))
PAIR = Weights(Manifest((Entry("w", (2, 2)), Entry("b", (2,)))), [1, 2, 3, 4, 5, 6])
SMALL = 5_000_000  # bytes that may be taken while a hostile header is refused


def header_of(weights: Weights) -> codec.Header:
    return codec.encode(weights)[0]


def payload_of(weights: Weights) -> bytes:
    return b"".join(codec.encode(weights)[1])


def file_of(header: bytes, payload: bytes, claimed: int | None = None) -> bytes:
    return b"FEDKIT1\n" + struct.pack("<I", len(header) if claimed is None else claimed) + header + payload


# -- headers -----------------------------------------------------------------------------------------------------------


def test_there_are_enough_hostile_headers():
    assert len(HEADERS) >= 25


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.stem)
def test_a_hostile_header_is_refused_before_memory_is_taken(path):
    raw = path.read_bytes()
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            codec.Header.from_bytes(raw)
        assert tracemalloc.get_traced_memory()[1] < SMALL
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.stem)
def test_a_file_with_a_hostile_header_is_refused(path, tmp_path):
    (tmp_path / "model.fedkit").write_bytes(file_of(path.read_bytes(), b"\0" * 8))
    with pytest.raises(PayloadError):
        codec.load(tmp_path / "model.fedkit")


def test_an_honest_header_is_taken_and_comes_back_as_it_was():
    header = header_of(PAIR)
    assert codec.Header.from_bytes(header.to_bytes()) == header


def test_a_header_of_the_largest_payload_taken_costs_no_memory_before_bytes_arrive():
    limits = codec.Limits()
    manifest = Manifest((Entry("w", (limits.payload_bytes // 4,)),))
    raw = codec.Header(manifest, limits.payload_bytes, "0" * 64).to_bytes()
    tracemalloc.start()
    try:
        decoder = codec.Decoder(codec.Header.from_bytes(raw))
        decoder.feed(0, b"\0" * 1000)
        assert tracemalloc.get_traced_memory()[1] < SMALL
    finally:
        tracemalloc.stop()


def test_a_header_beyond_the_limits_of_the_receiver_is_refused():
    raw = header_of(PAIR).to_bytes()
    with pytest.raises(PayloadError, match=f"the header has {len(raw)} bytes, at most 10 are taken"):
        codec.Header.from_bytes(raw, codec.Limits(header_bytes=10))
    with pytest.raises(PayloadError, match="24 bytes are announced, at most 23 are taken"):
        codec.Header.from_bytes(raw, codec.Limits(payload_bytes=23))
    assert codec.Header.from_bytes(raw, codec.Limits(payload_bytes=24)).payload_bytes == 24


# -- payloads ----------------------------------------------------------------------------------------------------------


def test_a_payload_comes_in_chunks_that_are_views_of_the_vector():
    wide = Weights.zeros(Manifest((Entry("w", (600_000,)),)))
    chunks = list(codec.encode(wide)[1])
    assert [len(chunk) for chunk in chunks] == [1 << 20, 1 << 20, 2_400_000 - (2 << 20)]
    assert all(np.shares_memory(np.frombuffer(chunk, dtype=np.uint8), wide.vector) for chunk in chunks)


def test_a_payload_is_little_endian_float32():
    assert payload_of(PAIR) == struct.pack("<6f", 1, 2, 3, 4, 5, 6)


def test_a_model_of_no_tensor_is_encoded_and_decoded():
    nothing = Weights.zeros(Manifest(()))
    assert payload_of(nothing) == b""
    assert codec.Decoder(header_of(nothing)).finish() == nothing


def test_a_payload_for_another_model_than_the_expected_one_is_refused_at_once():
    with pytest.raises(PayloadError, match="another model"):
        codec.Decoder(header_of(PAIR), Manifest((Entry("w", (6,)),)))
    assert codec.Decoder(header_of(PAIR), PAIR.manifest).offset == 0


def test_a_truncated_payload_is_refused():
    decoder = codec.Decoder(header_of(PAIR))
    decoder.feed(0, payload_of(PAIR)[:-1])
    with pytest.raises(PayloadError, match="23 of 24 bytes arrived"):
        decoder.finish()


def test_an_extended_payload_is_refused_and_none_of_the_chunk_is_kept():
    decoder = codec.Decoder(header_of(PAIR))
    with pytest.raises(PayloadError, match="more than the announced 24 bytes"):
        decoder.feed(0, payload_of(PAIR) + b"\0")
    assert decoder.offset == 0


def test_the_length_of_a_chunk_is_counted_in_bytes_whatever_its_items_are():
    decoder = codec.Decoder(header_of(PAIR))
    with pytest.raises(PayloadError, match="more than the announced"):
        decoder.feed(0, memoryview(np.zeros(7, dtype=np.float32)))


@pytest.mark.parametrize("offset", [-1, 1, 8, 10**30])
def test_a_chunk_that_begins_elsewhere_is_refused_and_the_right_one_is_still_taken(offset):
    decoder = codec.Decoder(header_of(PAIR))
    with pytest.raises(PayloadError, match=f"begins at byte 0, got one at {offset}"):
        decoder.feed(offset, b"\0" * 4)
    decoder.feed(0, payload_of(PAIR))
    assert decoder.finish() == PAIR


# -- files -------------------------------------------------------------------------------------------------------------


def test_what_save_wrote_load_reads(tmp_path):
    codec.save(tmp_path / "new" / "folder" / "model.fedkit", PAIR)
    assert codec.load(tmp_path / "new" / "folder" / "model.fedkit") == PAIR


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"FEDKIT1",
        b"FEDKIT1\n",
        b"FEDKIT1\n\1\0",
        b"FEDKIT2\n" + file_of(header_of(PAIR).to_bytes(), payload_of(PAIR))[8:],
        b"PK\x03\x04archive/data.pkl",
        b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        file_of(b"", b""),
        file_of(header_of(PAIR).to_bytes(), payload_of(PAIR), claimed=(1 << 32) - 1),
        file_of(header_of(PAIR).to_bytes(), payload_of(PAIR), claimed=1),
        file_of(header_of(PAIR).to_bytes(), payload_of(PAIR)[:-1]),
        file_of(header_of(PAIR).to_bytes(), payload_of(PAIR) + b"\0"),
        file_of(header_of(PAIR).to_bytes(), b""),
    ],
)
def test_any_other_file_is_refused(content, tmp_path):
    (tmp_path / "model.fedkit").write_bytes(content)
    with pytest.raises(PayloadError):
        codec.load(tmp_path / "model.fedkit")


def test_a_file_beyond_the_limits_of_the_reader_is_refused(tmp_path):
    codec.save(tmp_path / "model.fedkit", PAIR)
    with pytest.raises(PayloadError, match="at most 23"):
        codec.load(tmp_path / "model.fedkit", codec.Limits(payload_bytes=23))


def test_a_short_file_that_claims_the_longest_header_costs_no_memory(tmp_path):
    (tmp_path / "model.fedkit").write_bytes(file_of(b"{}", b"", claimed=codec.Limits().header_bytes))
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            codec.load(tmp_path / "model.fedkit")
        assert tracemalloc.get_traced_memory()[1] < SMALL
    finally:
        tracemalloc.stop()


def test_saving_again_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "model.fedkit"
    codec.save(path, PAIR)
    codec.save(str(path), 2 * PAIR)
    assert codec.load(path) == 2 * PAIR
    assert os.listdir(tmp_path) == ["model.fedkit"]


def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "model.fedkit"
    codec.save(path, PAIR)
    large = Weights.zeros(Manifest((Entry("w", (100_000,)),)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            codec.save(path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert codec.load(path) == PAIR
    assert os.listdir(tmp_path) == ["model.fedkit"]


def test_a_name_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path):
    taken = tmp_path / "model.fedkit"
    (taken / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        codec.save(taken, PAIR)
    assert os.listdir(tmp_path) == ["model.fedkit"]
    assert os.listdir(taken) == ["inside"]


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    path = tmp_path / "model.fedkit"
    codec.save(path, PAIR)
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        codec.save(path, 2 * PAIR)
    assert codec.load(path) == PAIR
    assert os.listdir(tmp_path) == ["model.fedkit"]


def test_a_folder_that_is_a_file_is_an_error_that_changes_nothing(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OSError, match="taken"):
        codec.save(tmp_path / "taken" / "model.fedkit", PAIR)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_saved_model_may_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        codec.save(tmp_path / "model.fedkit", PAIR)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.fedkit").stat().st_mode) == 0o644
