"""Blobs: a file is the value its name says, or an error; a write is whole or not there."""

from __future__ import annotations

import copy
import os
import resource
import stat
import tracemalloc

import numpy as np
import pytest

from fedkit import codec
from fedkit.errors import PayloadError, StorageError
from fedkit.server.blobs import Blobs, StoredModel
from fedkit.weights import Entry, Manifest, Weights

PAIR = Weights(Manifest((Entry("w", (2, 2)), Entry("b", (2,)))), [1, 2, 3, 4, 5, np.nan])
WIDE = Weights(Manifest((Entry("w", (5_000_000,)),)), np.arange(5_000_000))
ABSENT = "0" * 64


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path / "state" / "models")


def test_what_was_put_is_got_by_the_digest_of_the_weights(blobs):
    assert blobs.put(PAIR) == PAIR.digest
    assert blobs.get(PAIR.digest) == PAIR
    assert os.listdir(blobs.folder) == [PAIR.digest]


def test_another_process_finds_what_was_put(blobs):
    blobs.put(PAIR)
    assert Blobs(blobs.folder).get(PAIR.digest) == PAIR


def test_putting_again_writes_nothing(blobs):
    blobs.put(PAIR)
    before = (blobs.folder / PAIR.digest).stat()
    blobs.put(PAIR)
    assert (blobs.folder / PAIR.digest).stat() == before


def test_bytes_are_got_by_their_own_digest(blobs):
    digest = blobs.put_bytes([b"one ", memoryview(b"two")])
    assert blobs.get_bytes(digest) == b"one two"
    assert blobs.put_bytes([b"one two"]) == digest


def test_putting_takes_no_second_copy_of_the_model(blobs):
    tracemalloc.start()
    try:
        blobs.put(WIDE)
        assert tracemalloc.get_traced_memory()[1] < 2 * codec.CHUNK_BYTES
    finally:
        tracemalloc.stop()


def test_the_size_is_that_of_all_files(blobs):
    assert blobs.size_bytes == 0
    blobs.put(PAIR)
    blobs.put_bytes([b"12345"])
    assert blobs.size_bytes == (blobs.folder / PAIR.digest).stat().st_size + 5


def test_only_what_is_kept_stays_and_nothing_that_a_crash_left(blobs):
    blobs.put(PAIR)
    blobs.put(2 * PAIR)
    (blobs.folder / f".{ABSENT}.0123456789abcdef").write_bytes(b"half a mo")
    (blobs.folder / "README").write_text("not ours")
    blobs.keep_only([PAIR.digest, ABSENT])
    assert sorted(os.listdir(blobs.folder)) == sorted([PAIR.digest, "README", ".spare"])


# -- the spare file ----------------------------------------------------------------------------------------------------


def test_a_model_is_written_into_the_file_of_one_that_nobody_needs(blobs):
    for count in range(1, 6):
        blobs.put(count * WIDE)
        blobs.keep_only([(count * WIDE).digest])
    first = (blobs.folder / (5 * WIDE).digest).stat().st_ino
    blobs.put(PAIR)
    blobs.keep_only([PAIR.digest])
    blobs.put(2 * PAIR)
    blobs.keep_only([(2 * PAIR).digest])
    assert (blobs.folder / (2 * PAIR).digest).stat().st_ino == first
    assert sorted(os.listdir(blobs.folder)) == sorted([(2 * PAIR).digest, ".spare"])
    assert Blobs(blobs.folder).get((2 * PAIR).digest) == 2 * PAIR


@pytest.mark.parametrize("name", [".spare", (3 * PAIR).digest])
def test_a_model_whose_name_a_power_loss_took_back_is_found_by_its_content(blobs, name):
    blobs.put(PAIR)
    blobs.put(2 * PAIR)
    os.replace(blobs.folder / PAIR.digest, blobs.folder / name)
    again = Blobs(blobs.folder)
    assert again.get(PAIR.digest) == PAIR
    assert sorted(os.listdir(again.folder)) == sorted([PAIR.digest, (2 * PAIR).digest])


def test_another_model_under_the_name_of_one_that_is_put_is_written_over(blobs):
    blobs.put(PAIR)
    os.replace(blobs.folder / PAIR.digest, blobs.folder / (2 * PAIR).digest)
    again = Blobs(blobs.folder)
    assert again.put(2 * PAIR) == (2 * PAIR).digest
    assert again.get((2 * PAIR).digest) == 2 * PAIR


def test_a_half_written_spare_file_is_nobodys_model(blobs):
    blobs.put(PAIR)
    raw = (blobs.folder / PAIR.digest).read_bytes()
    (blobs.folder / ".spare").write_bytes(raw[:-3])
    (blobs.folder / PAIR.digest).unlink()
    with pytest.raises(StorageError, match="is missing"):
        Blobs(blobs.folder).get(PAIR.digest)
    blobs = Blobs(blobs.folder)
    assert blobs.put(PAIR) == PAIR.digest
    assert os.listdir(blobs.folder) == [PAIR.digest]


@pytest.mark.parametrize(
    "name", ["", "../x", "a" * 63, "A" * 64, "a" * 65, f"/{'a' * 63}", "a" * 64 + "\n", "é" * 64, None]
)
def test_a_name_that_is_no_digest_is_refused_before_it_becomes_a_path(blobs, name):
    with pytest.raises(PayloadError, match="64 hexadecimal"):
        blobs.get(name)
    with pytest.raises(PayloadError, match="64 hexadecimal"):
        blobs.get_bytes(name)


def test_a_file_that_holds_another_model_is_refused(blobs):
    codec.save(blobs.folder / ABSENT, PAIR)
    with pytest.raises(PayloadError, match="not hold the model it is named after"):
        blobs.get(ABSENT)


def test_a_file_with_a_flipped_bit_is_refused(blobs):
    path = blobs.folder / blobs.put(PAIR)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(PayloadError, match="changed on the way"):
        blobs.get(PAIR.digest)


def test_bytes_that_were_changed_are_refused(blobs):
    digest = blobs.put_bytes([b"one"])
    (blobs.folder / digest).write_bytes(b"two")
    with pytest.raises(PayloadError, match="not hold the bytes it is named after"):
        blobs.get_bytes(digest)


def test_a_blob_that_is_gone_is_an_error_that_names_it(blobs):
    with pytest.raises(StorageError, match=f"{ABSENT} is missing"):
        blobs.get(ABSENT)


def test_a_full_disk_is_an_error_that_names_the_folder_and_leaves_nothing(blobs):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StorageError, match=f"{blobs.folder}.*too large; free space"):
            blobs.put(WIDE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(blobs.folder) == []
    assert blobs.put(WIDE) == WIDE.digest


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(StorageError, match="taken"):
        Blobs(tmp_path / "taken")


def test_the_folder_is_nobody_elses(blobs):
    assert stat.S_IMODE(blobs.folder.stat().st_mode) == 0o700


def test_a_stored_model_is_read_when_its_values_are_first_used(blobs):
    model = StoredModel(blobs, PAIR.digest)
    assert model.digest == PAIR.digest
    blobs.put(PAIR)
    assert model == PAIR
    blobs.keep_only([])
    assert model.manifest == PAIR.manifest
    assert 2 * model == 2 * PAIR


def test_a_copy_of_a_stored_model_is_plain_weights_that_need_no_file(blobs):
    blobs.put(PAIR)
    found = copy.copy(StoredModel(blobs, PAIR.digest))
    blobs.keep_only([])
    assert type(found) is Weights
    assert found == PAIR
