"""A payload becomes a file only as it was announced, wherever it was cut; what comes from the file is what went in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkit.codec import CHUNK_BYTES
from fedkit.errors import PayloadError, Reason, Refused, StorageError
from fedkit.spool import Payload, Room, Spares, Spool, Spooled, SpooledExtras, Stash, Values, payload_digest, reopen
from fedkit.weights import Entry, Manifest, Vector, Weights

MANIFEST = Manifest((Entry("w", (7, 5)), Entry("b", (5,))))
EXTRAS = {"control": 3, "tau": 1}
SIZE = MANIFEST.size + sum(EXTRAS.values())
LARGE = 2.0**59  # which an update may hold
VECTORS = hnp.arrays(np.dtype("<f4"), SIZE, elements=st.floats(-LARGE, LARGE, width=32))
PIECES = st.lists(st.integers(1, SIZE), max_size=6)  # elements of one piece after the other
LENGTHS = st.integers(0, 3 * SIZE)  # bytes of a file that is written over


def digest(payload: bytes) -> bytes:
    return payload_digest(MANIFEST.digest).update(payload).digest()


def spool(folder: Path, payload: bytes, spares: Spares | None = None, *, plausible: bool = True) -> Spool:
    """Where `payload` may go."""
    return Spool(folder / "it", MANIFEST.digest, len(payload), digest(payload), plausible=plausible, spares=spares)


def feed(into: Spool | Stash, payload: bytes, sizes: list[int]) -> None:
    """The next pieces of the payload, as many elements each as `sizes` says."""
    for size in sizes:
        piece = payload[into.have : into.have + 4 * size]
        if piece:
            into.feed(memoryview(piece))


def rest(into: Spool, payload: bytes) -> Path:
    feed(into, payload, [SIZE])
    return into.finish().path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def with_spares(folder: Path, *lengths: int) -> Spares:
    """Spares of these lengths, full of bytes that no payload has."""
    spares = Spares(folder, len(lengths))
    for i, length in enumerate(lengths):
        (folder / f"old{i}").write_bytes(b"\xff" * length)
        spares.give(folder / f"old{i}")
    return spares


# -- taken up again ----------------------------------------------------------------------------------------------------


@given(VECTORS, st.lists(PIECES, max_size=4))
def test_a_payload_cut_anywhere_and_taken_up_by_another_spool_gives_the_same_file(tmp_path_factory, vector, parts):
    folder, payload = tmp_path_factory.mktemp("cut"), vector.tobytes()
    for sizes in parts:
        part = spool(folder, payload)
        feed(part, payload, sizes)
        part.close()
    assert rest(spool(folder, payload), payload).read_bytes() == payload
    assert names(folder) == ["it"]


@given(VECTORS, st.lists(PIECES, min_size=1, max_size=4), st.lists(LENGTHS, min_size=1, max_size=3))
def test_a_payload_that_is_written_over_an_old_file_and_cut_anywhere_is_the_same_file(
    tmp_path_factory, vector, parts, lengths
):
    folder, payload = tmp_path_factory.mktemp("over"), vector.tobytes()
    spares = with_spares(folder, *lengths)
    for sizes in parts:
        part = spool(folder, payload, spares)
        feed(part, payload, sizes)
        part.close()
    assert rest(spool(folder, payload, spares), payload).read_bytes() == payload
    assert [name for name in names(folder) if not name.endswith(".spare")] == ["it"]


@given(VECTORS, PIECES, st.lists(LENGTHS, max_size=2))
def test_a_spool_that_dies_without_a_word_costs_at_most_what_it_had_and_never_leaves_old_bytes(
    tmp_path_factory, vector, sizes, lengths
):
    folder, payload = tmp_path_factory.mktemp("killed"), vector.tobytes()
    dying = spool(folder, payload, with_spares(folder, *lengths))
    feed(dying, payload, sizes)
    os.close(dying._file)  # what a kill does: nothing else is closed, renamed or cut
    next_one = spool(folder, payload, Spares(folder, 1))
    assert next_one.have in (0, dying.have)
    assert rest(next_one, payload).read_bytes() == payload
    assert names(folder) == ["it"]


@given(VECTORS, st.integers(0, 4 * SIZE - 1))
def test_what_is_left_of_a_value_that_was_cut_in_two_is_asked_for_again(tmp_path_factory, vector, length):
    folder, payload = tmp_path_factory.mktemp("torn"), vector.tobytes()
    (folder / "it.part").write_bytes(payload[:length])
    resumed = spool(folder, payload)
    assert resumed.have == length // 4 * 4
    assert rest(resumed, payload).read_bytes() == payload


@given(VECTORS, st.integers(1, 4 * SIZE))
def test_what_is_left_of_a_longer_payload_is_cut_to_the_announced_length(tmp_path_factory, vector, more):
    folder, payload = tmp_path_factory.mktemp("longer"), vector.tobytes()
    (folder / "it.part").write_bytes(payload + b"\x00" * more)
    assert spool(folder, payload).finish().path.read_bytes() == payload


def test_bytes_that_could_not_be_written_do_not_count(tmp_path: Path) -> None:
    payload = np.arange(SIZE, dtype="<f4").tobytes()
    part = spool(tmp_path, payload, with_spares(tmp_path, 4 * SIZE))
    feed(part, payload, [4])
    writable, part._file = part._file, os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        feed(part, payload, [4])
    os.close(part._file)
    part._file = writable
    assert part.have == 16
    part.close()
    assert rest(spool(tmp_path, payload), payload).read_bytes() == payload


# -- refused -----------------------------------------------------------------------------------------------------------


@given(VECTORS, st.integers(0, 4 * SIZE - 1), st.integers(0, 7), st.booleans())
def test_one_changed_bit_is_refused_and_nothing_is_left_of_the_payload(tmp_path_factory, vector, at, bit, is_over):
    folder, payload = tmp_path_factory.mktemp("changed"), vector.tobytes()
    changed = bytearray(payload)
    changed[at] ^= 1 << bit
    into = spool(folder, payload, with_spares(folder, len(payload)) if is_over else None, plausible=False)
    feed(into, bytes(changed), [SIZE])
    with pytest.raises(PayloadError, match="digest"):
        into.finish()
    assert names(folder) == []


@given(VECTORS, PIECES)
def test_an_incomplete_payload_is_no_file(tmp_path_factory, vector, sizes):
    folder, payload = tmp_path_factory.mktemp("short"), vector.tobytes()
    into = spool(folder, payload)
    feed(into, payload[:-4], sizes)
    with pytest.raises(PayloadError, match=f"{into.have} of {len(payload)} bytes"):
        into.finish()
    assert not (folder / "it").exists()
    into.close()


@given(VECTORS, st.integers(0, SIZE - 1), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_value_that_is_not_finite_is_refused_wherever_it_is(tmp_path_factory, vector, at, value):
    folder = tmp_path_factory.mktemp("odd")
    poisoned = vector.copy()
    poisoned[at] = value
    into = spool(folder, poisoned.tobytes())
    with pytest.raises(Refused) as refused:
        feed(into, poisoned.tobytes(), [SIZE])
    assert refused.value.reason is Reason.NOT_FINITE
    assert into.have == 0
    into.discard()
    assert names(folder) == []


def test_values_may_be_as_large_as_no_training_brings_them_and_not_larger(tmp_path: Path) -> None:
    payload = np.full(SIZE, 9.9e17, dtype="<f4").tobytes()
    assert rest(spool(tmp_path, payload), payload).read_bytes() == payload
    for value in (1.1e18, -1e30, 3e38):
        vector = np.zeros(SIZE, dtype="<f4")
        vector[-1] = value
        with pytest.raises(Refused, match=r"values beyond 1e\+18"):
            rest(spool(tmp_path, vector.tobytes()), vector.tobytes())


def test_a_payload_that_is_only_sent_on_may_hold_anything(tmp_path: Path) -> None:
    payload = np.full(SIZE, np.nan, dtype="<f4").tobytes()
    assert rest(spool(tmp_path, payload, plausible=False), payload).read_bytes() == payload


def test_what_is_left_of_an_earlier_upload_is_checked_again(tmp_path: Path) -> None:
    payload = np.full(SIZE, np.inf, dtype="<f4").tobytes()
    (tmp_path / "it.part").write_bytes(payload[:40])
    with pytest.raises(Refused) as refused:
        spool(tmp_path, payload)
    assert refused.value.reason is Reason.NOT_FINITE


@pytest.mark.parametrize("end", ["close", "discard"])
def test_a_spool_that_was_ended_takes_nothing_more(tmp_path: Path, end: str) -> None:
    payload = bytes(4 * SIZE)
    into = spool(tmp_path, payload)
    getattr(into, end)()
    with pytest.raises(PayloadError, match="another connection"):
        into.feed(memoryview(payload))


def test_a_piece_that_lies_askew_in_memory_counts_as_well(tmp_path: Path) -> None:
    payload = np.arange(SIZE, dtype="<f4").tobytes()
    into = spool(tmp_path, payload)
    into.feed(memoryview(b"\x00" + payload)[1:])
    assert into.finish().path.read_bytes() == payload


# -- spares ------------------------------------------------------------------------------------------------------------


def test_spares_are_a_limited_number_of_files(tmp_path: Path) -> None:
    spares = Spares(tmp_path, 2)
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
        spares.give(tmp_path / name)
    assert names(tmp_path) == ["0.spare", "1.spare"]
    assert [spares.take(tmp_path / name) for name in "xyz"] == [True, True, False]
    assert names(tmp_path) == ["x", "y"]


def test_a_file_that_is_not_there_is_no_spare(tmp_path: Path) -> None:
    spares = Spares(tmp_path, 2)
    spares.give(tmp_path / "nobody")
    assert not spares.take(tmp_path / "it")


def test_a_new_process_removes_spares_and_what_was_half_written_over_and_keeps_all_else(tmp_path: Path) -> None:
    for name in ("0.spare", "it.over", "it.part", "other"):
        (tmp_path / name).write_bytes(b"1234")
    spares = Spares(tmp_path, 2)
    assert names(tmp_path) == ["it.part", "other"]
    assert not spares.take(tmp_path / "more")


def test_what_was_left_of_a_payload_goes_before_a_spare_file(tmp_path: Path) -> None:
    payload = np.arange(SIZE, dtype="<f4").tobytes()
    (tmp_path / "it.part").write_bytes(payload[:40])
    resumed = spool(tmp_path, payload, with_spares(tmp_path, 4 * SIZE))
    assert resumed.have == 40
    assert rest(resumed, payload).read_bytes() == payload


# -- in memory ---------------------------------------------------------------------------------------------------------

CHUNKS = st.integers(1, SIZE + 1)  # elements in the largest piece
ROOM = 2 * CHUNK_BYTES


def stash(folder: Path, payload: bytes, room: Room | None = None, *, plausible: bool = True) -> Stash:
    """Where `payload` may go in memory; its room is taken."""
    room = Room(ROOM) if room is None else room
    assert room.take(len(payload))
    return Stash(folder / "it", MANIFEST.digest, len(payload), digest(payload), room, plausible=plausible)


def whole(into: Spool | Stash, payload: bytes, size: int = SIZE) -> Payload:
    """All that is missing, in pieces of that many elements."""
    feed(into, payload, [size] * (SIZE // size + 1))
    return into.finish()


@contextmanager
def chunks_of(elements: int) -> Iterator[None]:
    """Pieces have at most so many elements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedkit.spool.CHUNK_BYTES", 4 * elements)
        yield


@given(VECTORS, CHUNKS, st.data())
def test_a_payload_in_memory_is_that_in_a_file_however_it_was_cut(tmp_path_factory, vector, most, data):
    folder, payload = tmp_path_factory.mktemp("memory"), vector.tobytes()
    sizes = data.draw(st.lists(st.integers(1, min(most, SIZE)), max_size=20))
    with chunks_of(most):
        into, beside = stash(folder, payload), spool(folder, payload)
        for one in (into, beside):
            feed(one, payload, sizes)
        held, filed = (whole(one, payload, min(most, SIZE)) for one in (into, beside))
        assert len(held.pieces) == -(-len(payload) // (4 * most))
        assert all(piece.nbytes == 4 * most for piece in held.pieces[:-1])
        start = data.draw(st.integers(0, SIZE - 1))
        size = data.draw(st.integers(1, SIZE - start))
        assert Values(held, start, size).all().tobytes() == Values(filed, start, size).all().tobytes()
        assert Values(held, start, size).is_at_hand
        assert Spooled(MANIFEST, held).norm() == Spooled(MANIFEST, filed).norm()
        assert Spooled(MANIFEST, held) == Weights(MANIFEST, vector[: MANIFEST.size])


@given(VECTORS, CHUNKS)
def test_many_tiny_pieces_take_no_more_memory_than_large_ones(tmp_path_factory, vector, most):
    payload = vector.tobytes()
    with chunks_of(most):
        held = whole(stash(tmp_path_factory.mktemp("tiny"), payload), payload, 1)
    assert [piece.nbytes for piece in held.pieces] == [
        min(4 * most, len(payload) - start) for start in range(0, len(payload), 4 * most)
    ]
    assert b"".join(held.pieces) == payload


def test_a_whole_piece_is_kept_as_it_came(tmp_path: Path) -> None:
    payload = bytes(2 * CHUNK_BYTES + 8)
    into, view = stash(tmp_path, payload, Room(1 << 22)), memoryview(payload)
    for start in range(0, len(payload), CHUNK_BYTES):
        into.feed(view[start : start + CHUNK_BYTES])
    assert all(piece.obj is payload for piece in into.finish().pieces)


@given(VECTORS, CHUNKS, PIECES, st.booleans())
def test_a_payload_in_memory_that_is_cut_off_goes_on_in_a_file(tmp_path_factory, vector, most, sizes, twice):
    folder, payload, room = tmp_path_factory.mktemp("goes on"), vector.tobytes(), Room(ROOM)
    with chunks_of(most):
        part = stash(folder, payload, room)
        feed(part, payload, [min(size, most) for size in sizes])
        for _ in range(1 + twice):
            part.close()
        assert names(folder) == ["it.part"]
        assert (folder / "it.part").read_bytes() == payload[: part.have]
        assert (folder / "it.part").stat().st_mode & 0o077 == 0
        assert room.left == ROOM
        resumed = spool(folder, payload)
        assert resumed.have == part.have
        assert whole(resumed, payload, min(most, SIZE)).path.read_bytes() == payload
    assert names(folder) == ["it"]


@given(VECTORS, CHUNKS)
def test_a_payload_that_is_saved_reads_the_same_from_its_file_and_gives_its_room_back(tmp_path_factory, vector, most):
    folder, payload, room = tmp_path_factory.mktemp("saved"), vector.tobytes(), Room(ROOM)
    with chunks_of(most):
        held = whole(stash(folder, payload, room), payload, min(most, SIZE))
        values, before = Values(held, 2, SIZE - 2), names(folder)
        assert (before, room.left) == ([], ROOM - len(payload))
        for _ in range(2):
            held.save()
            assert (names(folder), room.left, held.pieces) == (["it"], ROOM, None)
        assert held.path.read_bytes() == payload
        assert values.all().tobytes() == payload[8:]
        assert not values.is_at_hand
        assert reopen(held.path, MANIFEST, EXTRAS) is not None
    del held, values
    assert room.left == ROOM  # and not more


def test_a_payload_that_is_saved_while_it_is_read_reads_the_same(tmp_path: Path) -> None:
    class Sudden(list):
        def __getitem__(self, i):
            held.save()
            return super().__getitem__(i)

    payload = np.arange(SIZE, dtype="<f4").tobytes()
    with chunks_of(8):
        held = whole(stash(tmp_path, payload), payload, 8)
        held.pieces = Sudden(held.pieces)
        with Values(held, 3, SIZE - 3).opened() as values:
            assert values.all().tobytes() == payload[12:]
            assert held.pieces is None
            assert values.all().tobytes() == payload[12:]


def test_a_payload_that_cannot_be_saved_stays_in_memory(tmp_path: Path) -> None:
    payload, room = np.arange(SIZE, dtype="<f4").tobytes(), Room(ROOM)
    held = whole(stash(tmp_path / "nobody", payload, room), payload)
    with pytest.raises(StorageError, match="free space or mend the disk"):
        held.save()
    assert Values(held, 0, SIZE).all().tobytes() == payload
    assert room.left == ROOM - len(payload)


def test_a_payload_that_cannot_be_cut_off_into_a_file_is_ended_all_the_same(tmp_path: Path) -> None:
    payload, room = bytes(4 * SIZE), Room(ROOM)
    into = stash(tmp_path / "nobody", payload, room)
    feed(into, payload, [3])
    with pytest.raises(StorageError, match="free space or mend the disk"):
        into.close()
    into.close()
    with pytest.raises(PayloadError, match="another connection"):
        into.feed(memoryview(payload[into.have :]))
    del into
    assert room.left == ROOM


def test_a_payload_nobody_needs_gives_its_room_back(tmp_path: Path) -> None:
    payload, room = bytes(4 * SIZE), Room(ROOM)
    weights = Spooled(MANIFEST, whole(stash(tmp_path, payload, room), payload))
    assert room.left == ROOM - len(payload)
    del weights
    assert (room.left, names(tmp_path)) == (ROOM, [])


@pytest.mark.parametrize("elements", [0, 3, SIZE])
def test_a_payload_in_memory_that_is_discarded_leaves_nothing(tmp_path: Path, elements: int) -> None:
    payload, room = bytes(4 * SIZE), Room(ROOM)
    into = stash(tmp_path, payload, room)
    feed(into, payload, [elements])
    for end in (into.discard, into.discard, into.close):
        end()
        assert (room.left, names(tmp_path)) == (ROOM, [])
    with pytest.raises(PayloadError, match="another connection"):
        into.feed(memoryview(payload))


def test_a_payload_in_memory_with_another_digest_is_thrown_away(tmp_path: Path) -> None:
    payload, room = bytes(4 * SIZE), Room(ROOM)
    into = stash(tmp_path, payload, room)
    feed(into, b"\x01" + payload[1:], [SIZE])
    with pytest.raises(PayloadError, match="digest"):
        into.finish()
    assert (room.left, names(tmp_path)) == (ROOM, [])


def test_what_ends_after_its_payload_was_taken_leaves_it_alone(tmp_path: Path) -> None:
    payload, room = np.arange(SIZE, dtype="<f4").tobytes(), Room(ROOM)
    into = stash(tmp_path, payload, room)
    held = whole(into, payload)
    into.close()
    into.discard()
    assert Values(held, 0, SIZE).all().tobytes() == payload
    assert (room.left, names(tmp_path)) == (ROOM - len(payload), [])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, SIZE // 2, SIZE - 1])
def test_a_value_that_is_not_finite_is_refused_in_memory_too(tmp_path: Path, value: float, at: int) -> None:
    vector = np.zeros(SIZE, dtype="<f4")
    vector[at] = value
    into = stash(tmp_path, vector.tobytes())
    with pytest.raises(Refused) as refused:
        whole(into, vector.tobytes())
    assert (refused.value.reason, into.have) == (Reason.NOT_FINITE, 0)
    held = whole(stash(tmp_path, vector.tobytes(), plausible=False), vector.tobytes())
    assert Values(held, 0, SIZE).all().tobytes() == vector.tobytes()


@pytest.mark.parametrize("intake", [spool, stash])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, CHUNK_BYTES + 4])
def test_a_piece_that_is_no_piece_is_refused_and_not_counted(tmp_path: Path, intake: Any, length: int) -> None:
    payload = bytes(2 * CHUNK_BYTES)
    into = intake(tmp_path, payload)
    with pytest.raises(PayloadError, match=f"got {length}"):
        into.feed(memoryview(payload[:length]))
    assert into.have == 0
    into.discard()


@pytest.mark.parametrize("intake", [spool, stash])
def test_more_or_less_than_was_announced_is_refused_and_not_counted(tmp_path: Path, intake: Any) -> None:
    payload = bytes(4 * SIZE)
    into = intake(tmp_path, payload)
    feed(into, payload, [SIZE - 1])
    with pytest.raises(PayloadError, match=f"more than the announced {4 * SIZE}"):
        into.feed(memoryview(bytes(8)))
    with pytest.raises(PayloadError, match=f"{4 * SIZE - 4} of {4 * SIZE} bytes arrived"):
        into.finish()
    assert whole(into, payload).path == tmp_path / "it"


def test_there_is_room_until_it_is_taken() -> None:
    room = Room(10)
    assert [room.take(6), room.take(5), room.take(4), room.take(1), room.take(0)] == [True, False, True, False, True]
    room.give(4)
    assert room.left == 4


# -- read again --------------------------------------------------------------------------------------------------------


@given(VECTORS)
def test_spooled_weights_and_extras_are_those_that_were_sent(tmp_path_factory, vector):
    folder, payload = tmp_path_factory.mktemp("read"), vector.tobytes()
    found = reopen(rest(spool(folder, payload), payload), MANIFEST, EXTRAS)
    assert found is not None
    weights, extras = found
    assert weights == Weights(MANIFEST, vector[: MANIFEST.size])
    assert weights.digest == Weights(MANIFEST, vector[: MANIFEST.size]).digest
    assert {name: values.tobytes() for name, values in extras.items()} == {
        "control": vector[40:43].tobytes(),
        "tau": vector[43:].tobytes(),
    }


@given(VECTORS, st.data())
def test_a_block_of_spooled_weights_is_that_part_of_their_vector(tmp_path_factory, vector, data):
    path = tmp_path_factory.mktemp("block") / "it"
    vector.tofile(path)
    start = data.draw(st.integers(0, MANIFEST.size - 1))
    out = np.empty(data.draw(st.integers(1, MANIFEST.size - start)), dtype=np.float32)
    weights = Spooled(MANIFEST, Payload(path))
    assert weights.block(start, out) is out
    assert out.tobytes() == vector[start : start + len(out)].tobytes()
    assert "vector" not in vars(weights)


@given(VECTORS)
def test_spooled_weights_have_the_norm_of_those_in_memory(tmp_path_factory, vector):
    path = tmp_path_factory.mktemp("norm") / "it"
    vector.tofile(path)
    assert Spooled(MANIFEST, Payload(path)).norm() == Weights(MANIFEST, vector[: MANIFEST.size]).norm()


def test_an_open_file_is_read_even_where_its_name_is_gone_and_closed_at_the_end(tmp_path: Path) -> None:
    vector = np.arange(SIZE, dtype="<f4")
    vector.tofile(tmp_path / "it")
    before = len(os.listdir("/proc/self/fd"))
    values = Values(Payload(tmp_path / "it"), 2, 4)
    with values.opened() as one, values.opened() as other:
        (tmp_path / "it").unlink()
        assert one.all().tolist() == other.all().tolist() == [2, 3, 4, 5]
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        values.all()


def test_a_file_that_ends_too_early_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(bytes(4 * MANIFEST.size - 4))
    with pytest.raises(PayloadError, match="ends before its last value"):
        Spooled(MANIFEST, Payload(tmp_path / "it")).vector.sum()


@pytest.mark.parametrize("length", [None, 0, 4 * SIZE - 4, 4 * SIZE + 4])
def test_a_file_that_is_gone_or_of_another_length_is_not_opened_again(tmp_path: Path, length: int | None) -> None:
    if length is not None:
        (tmp_path / "it").write_bytes(bytes(length))
    assert reopen(tmp_path / "it", MANIFEST, EXTRAS) is None


def test_the_lengths_of_spooled_extras_are_known_without_their_file(tmp_path: Path) -> None:
    extras = SpooledExtras(Payload(tmp_path / "nobody"), MANIFEST.size, EXTRAS)
    assert (list(extras), len(extras), extras.sizes) == (["control", "tau"], 2, EXTRAS)
    with pytest.raises(FileNotFoundError):
        extras["tau"]


@settings(max_examples=5, deadline=None)
@given(st.integers(1, CHUNK_BYTES // 4))
def test_payloads_of_many_chunks_are_the_same_file(tmp_path_factory, odd):
    folder = tmp_path_factory.mktemp("large")
    vector = np.arange(CHUNK_BYTES // 2 + odd, dtype="<f4")
    payload = memoryview(vector.tobytes())
    due = payload_digest(MANIFEST.digest).update(payload).digest()
    into = Spool(folder / "it", MANIFEST.digest, len(payload), due, plausible=True)
    for start in range(0, len(payload), CHUNK_BYTES):
        into.feed(payload[start : start + CHUNK_BYTES])
    assert into.finish().path.read_bytes() == payload


def test_the_digest_of_a_payload_without_extras_is_the_weights_own() -> None:
    vector: Vector = np.arange(MANIFEST.size, dtype=np.float32)
    assert digest(vector.tobytes()).hex() == Weights(MANIFEST, vector).digest
    assert digest(b"") == blake3(MANIFEST.digest.encode()).digest()
