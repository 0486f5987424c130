"""Sums that several processes add up, each some of the chunks."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fedkit.crypto import bfv
from fedkit.crypto.adding import Adding, add_up
from fedkit.crypto.encrypted import SecretKey
from fedkit.crypto.ring import Words
from fedkit.errors import SumSpoiled
from fedkit.server import adder
from fedkit.server.adder import AddingProcesses

PARAMETERS = bfv.Parameters(3)
SCHEME = PARAMETERS.scheme
VALUES = 3 * SCHEME.values + 1  # four chunks
NAMES = ("ada", "bea", "cyd")


@cache
def secret() -> SecretKey:
    return SecretKey.make(SCHEME)


@cache
def vector(name: str) -> Words:
    signed = np.random.default_rng(NAMES.index(name)).integers(-999, 1000, VALUES)
    return PARAMETERS.ring.words(signed)


@cache
def upload(name: str) -> bytes:
    return b"".join(bfv.encrypt(secret(), vector(name)))


@pytest.fixture(scope="module")
def processes() -> Iterator[AddingProcesses]:
    found = AddingProcesses()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even small sums are for all processes."""
    monkeypatch.setattr(adder, "_LEAST_CHUNKS", 1)


def added(processes: AddingProcesses, folder: Path, uploads: Mapping[str, bytes]) -> tuple[bytes, dict[str, str]]:
    paths = {name: folder / name for name in uploads}
    for name, data in uploads.items():
        paths[name].write_bytes(data)
    call = processes.add_up(SCHEME, secret().fingerprint, VALUES, paths, folder / "out.sum")
    total, refused = asyncio.run(call)
    assert not (folder / "out.sum").exists()
    return total.tobytes(), refused


def here(names: tuple[str, ...]) -> bytes:
    """The sum, added in this process alone."""
    out = np.empty(SCHEME.words_of_sum(VALUES), dtype="<u4")
    uploads = {name: np.frombuffer(upload(name), dtype="<u4") for name in names}
    assert not add_up(SCHEME, secret().fingerprint, VALUES, uploads, out)
    return out.tobytes()


def running(processes: AddingProcesses) -> list[int]:
    found = [one._process for one in processes._processes]
    return [process.pid for process in found if process is not None and process.poll() is None]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_parts_are_all_chunks_once_and_none_is_empty(most: int) -> None:
    parts = Adding.parts(SCHEME, bytes(32), VALUES, most)
    assert [index for part in parts for index in range(part.first, part.end)] == [0, 1, 2, 3]
    assert len(parts) == min(most, 4)
    assert all(part.first < part.end for part in parts)


def test_processes_add_up_what_one_does_bit_for_bit(processes: AddingProcesses, tmp_path: Path) -> None:
    total, refused = added(processes, tmp_path, {name: upload(name) for name in NAMES})
    assert (total, refused) == (here(NAMES), {})
    assert len(running(processes)) == min(os.cpu_count() or 1, 4)
    size = SCHEME.full_bytes
    words = bfv.decrypt(secret(), (total[at : at + size] for at in range(0, len(total), size)), VALUES)
    expected = sum(vector(name).astype(np.int64) for name in NAMES) % SCHEME.modulus
    assert np.array_equal(words, expected)


def test_an_upload_with_one_bad_chunk_is_in_no_part_of_the_sum(processes: AddingProcesses, tmp_path: Path) -> None:
    uploads = {name: upload(name) for name in NAMES}
    uploads["bea"] = upload("bea")[:-5] + b"\xff" * 5  # in the last chunk, which another process has
    total, refused = added(processes, tmp_path, uploads)
    assert refused.keys() == {"bea"}
    assert total == here(("ada", "cyd"))


def test_where_all_are_refused_there_is_no_sum(processes: AddingProcesses, tmp_path: Path) -> None:
    with pytest.raises(SumSpoiled, match="none of the uploads"):
        added(processes, tmp_path, {name: bytes(len(upload(name))) for name in NAMES})


def test_a_file_that_is_gone_spoils_one_sum_and_no_process(processes: AddingProcesses, tmp_path: Path) -> None:
    before = running(processes)
    call = processes.add_up(SCHEME, secret().fingerprint, VALUES, {"ada": tmp_path / "ada"}, tmp_path / "out")
    with pytest.raises(SumSpoiled, match="No such file"):
        asyncio.run(call)
    assert running(processes) == before


def test_a_process_that_dies_spoils_the_sum_and_the_next_one_is_added(
    processes: AddingProcesses, tmp_path: Path
) -> None:
    added(processes, tmp_path, {name: upload(name) for name in NAMES})
    os.kill(running(processes)[-1], signal.SIGSTOP)  # so that it is killed with the question before it
    asking = {name: upload(name) for name in NAMES}

    async def killed() -> None:
        paths = {name: tmp_path / name for name in asking}
        call = asyncio.create_task(processes.add_up(SCHEME, secret().fingerprint, VALUES, paths, tmp_path / "out.sum"))
        await asyncio.sleep(0.1)
        os.kill(running(processes)[-1], signal.SIGKILL)
        await call

    with pytest.raises(SumSpoiled, match="died"):
        asyncio.run(killed())
    assert added(processes, tmp_path, asking)[0] == here(NAMES)
