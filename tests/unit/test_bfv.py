"""Encrypted sums of whole numbers: exact, bounded in noise, and closed to every byte that does not belong."""

from __future__ import annotations

import os
import stat
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from signal import SIGSEGV

import numpy as np
import pytest

from fedkit.crypto import bfv, ckks, seal
from fedkit.crypto.chunks import DEGREE, TAG_BYTES, numbers_to
from fedkit.crypto.encrypted import Adder, SecretKey, encrypt, noise_budget
from fedkit.crypto.ring import FULL_WEIGHT, FixedPoint, Integers, Reals, Ring, Words
from fedkit.errors import ConfigError, PayloadError, SumSpoiled

THREE = bfv.Parameters(3)
SCHEME = THREE.scheme
PRIME, BYTES = max(SCHEME.primes), SCHEME.number_bytes
HALF = SCHEME.polynomial_bytes


@cache
def key_for(parameters: bfv.Parameters, which: int = 0) -> SecretKey:
    return SecretKey.make(parameters.scheme)


def added(key: SecretKey, uploads: list[list[bytes]], values: int) -> list[bytes]:
    with Adder(key.scheme, key.fingerprint, values) as adder:
        for upload in uploads:
            for index, chunk in enumerate(upload):
                adder.add(index, chunk)
        return list(adder.sums(len(uploads)))


def encrypted_sum(parameters: bfv.Parameters, vectors: list[Words]) -> Words:
    key = key_for(parameters)
    uploads = [list(bfv.encrypt(key, words)) for words in vectors]
    return bfv.decrypt(key, added(key, uploads, vectors[0].size), vectors[0].size)


@pytest.fixture
def untouchable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code sees no ciphertext, or the test fails."""
    monkeypatch.setattr(seal.Engine, "ciphertext", lambda engine, chunk: pytest.fail("native code saw it"))


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cohort", "bits", "size"), [(1, 20, 1), (2, 24, 8192), (3, 20, 8193), (7, 8, 18000)])
def test_encrypted_and_masked_sums_decode_to_the_same_bits(cohort: int, bits: int, size: int) -> None:
    draw, parameters = np.random.default_rng(cohort), bfv.Parameters(cohort, bits)
    vectors = [draw.normal(size=size).astype(np.float32) for _ in range(cohort)]
    weights = [int(weight) for weight in draw.integers(1, FULL_WEIGHT + 1, cohort)]
    masked, ours = (FixedPoint(ring, 0.7, bits) for ring in (Ring(cohort), parameters.ring))
    total = np.sum([masked.encode(*one) for one in zip(vectors, weights, strict=True)], axis=0, dtype=np.uint32)
    words = encrypted_sum(parameters, [ours.encode(*one) for one in zip(vectors, weights, strict=True)])
    assert masked.decode(total, cohort).tobytes() == ours.decode(words, cohort).tobytes()


def test_whole_numbers_and_floats_come_back_as_the_masked_ones_do() -> None:
    parameters, draw = bfv.Parameters(4), np.random.default_rng(1)
    whole = [draw.integers(-(1 << 60), 1 << 60, 5) for _ in range(4)]
    floats = [draw.normal(size=5) * 1e6 for _ in range(4)]
    integers, reals = Integers(parameters.ring), Reals(parameters.ring)
    found = integers.decode(encrypted_sum(parameters, [integers.encode(one) for one in whole]), 4)
    assert found.tolist() == np.sum(whole, axis=0).tolist()
    total = np.sum([Reals(Ring(4)).encode(one) for one in floats], axis=0, dtype=np.uint32)
    sums = reals.decode(encrypted_sum(parameters, [reals.encode(one) for one in floats]), 4)
    assert sums.tobytes() == Reals(Ring(4)).decode(total, 4).tobytes()


def test_the_order_in_which_chunks_arrive_changes_no_bit_of_a_sum() -> None:
    key, draw = key_for(THREE), np.random.default_rng(2)
    uploads = [list(bfv.encrypt(key, draw.integers(0, 99, 9000, dtype=np.uint32))) for _ in range(3)]
    assert added(key, uploads, 9000) == added(key, uploads[::-1], 9000)


def test_the_same_words_are_never_encrypted_alike() -> None:
    words = np.zeros(1, dtype=np.uint32)
    assert len({next(iter(bfv.encrypt(key_for(THREE), words))) for _ in range(5)}) == 5


def test_an_upload_is_a_quarter_larger_than_the_floats() -> None:
    size = 100 * SCHEME.values
    with Adder(THREE.scheme, bytes(32), size) as adder:
        assert adder.upload_bytes / (4 * size) == pytest.approx(1.2525, abs=1e-3)


# -- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cohort", "bits"), [(28, 24), (182, 20), (1160, 16)])
def test_a_whole_cohort_leaves_ten_bits_of_noise_budget_even_where_all_noise_has_one_sign(
    cohort: int, bits: int
) -> None:
    parameters = bfv.Parameters(cohort, bits)
    most, size = parameters.ring.largest // cohort, parameters.scheme.values
    signed = np.random.default_rng(3).integers(-most, most + 1, size)
    key, words = key_for(parameters), parameters.ring.words(signed)
    upload = list(bfv.encrypt(key, words))  # the same noise as often as there are clients
    sums = added(key, [upload] * cohort, size)
    assert noise_budget(key, sums[0]) >= parameters.budget >= bfv.LEAST_BUDGET
    assert np.array_equal(bfv.decrypt(key, sums, size), parameters.ring.words(signed * cohort))


@pytest.mark.parametrize("cohort", [2, 3, 100])
def test_two_values_share_a_coefficient_and_never_touch(cohort: int) -> None:
    parameters = bfv.Parameters(cohort, 8)
    key, size, largest = key_for(parameters), parameters.scheme.values, parameters.ring.largest
    signed = np.array([-(largest // cohort), largest // cohort])
    limbs = np.array([0, (1 << Integers(parameters.ring).limb_bits) - 1])  # whose sums reach the modulus, all but 1
    values = np.concatenate([signed, limbs])
    low, high = np.meshgrid(values, values)
    words = np.zeros(size, dtype=np.uint32)
    words[:16], words[size // 2 : size // 2 + 16] = (parameters.ring.words(one.ravel()) for one in (low, high))
    sums = added(key, [list(bfv.encrypt(key, words))] * cohort, size)
    expected = words.astype(np.uint64) * np.uint64(cohort) % np.uint64(parameters.modulus)
    assert np.array_equal(bfv.decrypt(key, sums, size), expected)


def test_parameters_refuse_cohorts_whose_noise_or_sums_would_not_fit() -> None:
    for cohort, bits in ((183, 20), (29, 24), (1161, 16), (10**6, 2), (0, 20), (3, 25), (3, 1)):
        with pytest.raises(ConfigError, match="bfv"):
            bfv.Parameters(cohort, bits)
    with pytest.raises(ConfigError, match="do not fit"):
        bfv.Parameters.fitting(10**5)


def test_as_many_bits_are_taken_as_a_cohort_can_have() -> None:
    assert [bfv.Parameters.fitting(cohort).bits for cohort in (2, 28, 29, 182)] == [24, 24, 23, 20]


@pytest.mark.parametrize("cohort", [1, 3, 100, 180])
def test_the_largest_sums_of_a_cohort_come_back_with_their_sign(cohort: int) -> None:
    parameters = bfv.Parameters(cohort)
    point = FixedPoint(parameters.ring, 1.0, 20)
    key = key_for(parameters)
    upload = list(bfv.encrypt(key, point.encode(np.array([1, -1, 0], dtype=np.float32), FULL_WEIGHT)))
    total = bfv.decrypt(key, added(key, [upload] * cohort, 4), 4)
    assert point.decode(total, cohort).tolist() == [1, -1, 0]


# -- what does not belong ----------------------------------------------------------------------------------------------


def hostile_uploads() -> dict[str, bytes]:
    key = key_for(THREE)
    good = next(iter(bfv.encrypt(key, np.arange(DEGREE, dtype=np.uint32))))
    large = numbers_to(np.full(2 * DEGREE, PRIME, dtype=np.uint64), BYTES)
    return {
        "empty": b"",
        "truncated": good[:-1],
        "longer": good + b"\0",
        "zeros": bytes(SCHEME.seeded_bytes),
        "random": np.random.default_rng(4).bytes(SCHEME.seeded_bytes),
        "tag with a bit flipped": bytes([good[0] ^ 1]) + good[1:],
        "coefficients at the modulus": good[:-HALF] + large,
        "one coefficient beyond it": good[:-5] + b"\xff" * 5,
        "another key": next(iter(bfv.encrypt(key_for(THREE, 1), np.arange(3, dtype=np.uint32)))),
        "other parameters": next(iter(bfv.encrypt(key_for(bfv.Parameters(4)), np.arange(3, dtype=np.uint32)))),
        "a sum": added(key, [[good]], DEGREE)[0],
        "a file of SEAL's": b"\x5e\xa1\x10\x04\x03\x02\0\0" + bytes(SCHEME.seeded_bytes - 8),
    }


HOSTILE = hostile_uploads()


@pytest.mark.usefixtures("untouchable")
@pytest.mark.parametrize("which", HOSTILE)
def test_a_chunk_that_does_not_belong_is_refused_before_native_code_sees_it(which: str) -> None:
    key, chunk = key_for(THREE), HOSTILE[which]
    with Adder(key.scheme, key.fingerprint, DEGREE) as adder:
        with pytest.raises(PayloadError):
            adder.add(0, chunk)
        with pytest.raises(SumSpoiled):
            adder.sums(1)


def test_any_bytes_with_the_right_tag_are_a_ciphertext_and_spoil_the_sum_at_most() -> None:
    key, draw = key_for(THREE), np.random.default_rng(5)
    coefficients = draw.integers(0, min(SCHEME.primes), 2 * DEGREE, dtype=np.uint64)
    chunk = key.tag + draw.bytes(64) + numbers_to(coefficients, BYTES)
    with pytest.raises(SumSpoiled, match="another key"):
        bfv.decrypt(key, added(key, [[chunk]], DEGREE), DEGREE)


def test_a_ciphertext_of_another_key_under_a_copied_tag_spoils_the_sum_and_is_seen() -> None:
    key, other = key_for(THREE), key_for(THREE, 1)
    words = np.arange(DEGREE, dtype=np.uint32)
    mine, foreign = (next(iter(bfv.encrypt(one, words))) for one in (key, other))
    sums = added(key, [[mine], [key.tag + foreign[TAG_BYTES:]]], DEGREE)
    with pytest.raises(SumSpoiled, match="another key"):
        bfv.decrypt(key, sums, DEGREE)


def test_a_vector_longer_than_announced_is_seen() -> None:
    key = key_for(THREE)
    sums = added(key, [list(bfv.encrypt(key, np.ones(10, dtype=np.uint32)))], 10)
    with pytest.raises(SumSpoiled, match="behind the last"):
        bfv.decrypt(key, sums, 9)


def test_a_sum_that_does_not_belong_is_refused_before_native_code_sees_it(request: pytest.FixtureRequest) -> None:
    key = key_for(THREE)
    good = added(key, [list(bfv.encrypt(key, np.ones(10, dtype=np.uint32)))], 10)
    request.getfixturevalue("untouchable")
    naked, beyond = good[0][:-HALF] + bytes(HALF), good[0][:-BYTES] + b"\xff" * BYTES
    for chunk in (b"", good[0][:-1], good[0] + b"\0", bytes(SCHEME.full_bytes), beyond, naked):
        with pytest.raises(PayloadError):
            bfv.decrypt(key, [chunk], 10)
    with pytest.raises(PayloadError, match="1 chunks, not 0"):
        bfv.decrypt(key, [], 10)


def test_a_sum_has_as_many_chunks_as_its_vector() -> None:
    key = key_for(THREE)
    good = added(key, [list(bfv.encrypt(key, np.ones(10, dtype=np.uint32)))], 10)
    with pytest.raises(PayloadError, match="not more"):
        bfv.decrypt(key, good * 2, 10)
    with pytest.raises(PayloadError, match="not 1"):
        bfv.decrypt(key, good, SCHEME.values + 1)


def test_no_more_than_a_cohort_is_added_and_every_chunk_counts_the_same_clients() -> None:
    key = key_for(THREE)
    chunk = next(iter(bfv.encrypt(key, np.ones(1, dtype=np.uint32))))
    with Adder(key.scheme, key.fingerprint, SCHEME.values + 1) as adder:
        for _ in range(3):
            adder.add(0, chunk)
        with pytest.raises(PayloadError, match="3 clients already"):
            adder.add(0, chunk)
        for index in (-1, 2):
            with pytest.raises(PayloadError, match="of 2"):
                adder.add(index, chunk)
        with pytest.raises(SumSpoiled, match="0 to 3 of 3"):
            adder.sums(3)


def test_words_that_are_none_are_refused_before_they_are_encrypted() -> None:
    key = key_for(THREE)
    beyond = np.full(3, key.scheme.modulus, dtype=np.uint32)
    for words in (beyond, np.ones(3), np.ones((1, 3), dtype=np.uint32), np.ones(0, dtype=np.uint32)):
        with pytest.raises(ConfigError, match="uint32 below"):
            bfv.encrypt(key, words)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_comes_back_from_its_bytes_and_other_bytes_are_none() -> None:
    key = key_for(THREE)
    again = SecretKey(key.scheme, key.data)
    assert (again, again.fingerprint) == (key, key.fingerprint)
    for data in (b"", key.data[:-1], key.data + b"\0", b"\xff" * SCHEME.key_bytes, bytes(SCHEME.key_bytes)):
        with pytest.raises(PayloadError):
            SecretKey(key.scheme, data)
    assert key_for(THREE, 1).fingerprint != key.fingerprint
    assert SecretKey(bfv.Parameters(4).scheme, key.data).fingerprint != key.fingerprint


def test_a_secret_key_is_not_shown() -> None:
    assert repr(key_for(THREE)) == f"SecretKey(scheme={THREE.scheme!r})"


def test_nothing_that_passes_through_a_file_can_be_opened_by_others_or_is_left() -> None:
    with seal.Engine(THREE.scheme) as engine:
        mode, path = os.stat(engine._scratch.path).st_mode, engine._scratch.path
        assert not stat.S_IMODE(mode) & 0o077 or path.startswith("/proc/self/fd/")
        engine.make_key()
        assert engine._scratch.read() == b""
    assert not os.path.exists(path)


def test_where_there_are_no_nameless_files_a_private_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    key = SecretKey.make(THREE.scheme)
    with seal.Engine(THREE.scheme) as engine:
        path = engine._scratch.path
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        engine.use_key(key.numbers)
        engine.encrypt(np.zeros(SCHEME.values, dtype=np.uint32))
    assert not os.path.exists(path)


# -- the library -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["tenseal.sealapi", "zstandard"])
def test_where_the_library_is_missing_the_error_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'fedkit\[he\]'.*ARM Linux"):
        SecretKey.make(THREE.scheme)


def test_what_native_code_refuses_is_a_typed_error() -> None:
    floats = ckks.Parameters(3).scheme
    with seal.Engine(floats) as engine, pytest.raises(PayloadError, match="not to be encrypted"):
        engine.use_key(SecretKey.make(floats).numbers)
        engine.encrypt(np.full(floats.values, 1e300))
    with seal.Engine(SCHEME) as engine, pytest.raises(PayloadError, match="not a secret key"):
        engine.use_key(np.full(3 * DEGREE, PRIME, dtype=np.uint64))


def _crash(data: bytes) -> None:
    key = SecretKey(THREE.scheme, data)
    next(encrypt(key, np.ones(1, dtype=np.uint32)))
    os.kill(os.getpid(), SIGSEGV)


def _encrypted(data: bytes) -> list[bytes]:
    return list(bfv.encrypt(SecretKey(THREE.scheme, data), np.arange(9, dtype=np.uint32)))


def test_native_code_that_crashes_ends_its_worker_and_the_next_one_goes_on() -> None:
    key, spawn = key_for(THREE), get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as worker, pytest.raises(BrokenProcessPool):
        worker.submit(_crash, key.data).result()
    with ProcessPoolExecutor(1, mp_context=spawn) as worker:
        upload = worker.submit(_encrypted, key.data).result()
    assert bfv.decrypt(key, added(key, [upload], 9), 9).tolist() == list(range(9))
