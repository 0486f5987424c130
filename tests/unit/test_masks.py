"""Masks: both sides make the same one, it comes off without a trace, and another context makes another."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedkit.crypto import masks
from fedkit.errors import PayloadError

KEYS = [bytes([i]) * 32 for i in range(1, 6)]


def mask(key: bytes, size: int) -> np.ndarray:
    vector = np.zeros(size, dtype=np.uint32)
    masks.apply_masks(vector, [key])
    return vector


def test_two_members_agree_on_a_secret_that_their_public_keys_do_not_tell() -> None:
    one, other, third = (masks.PrivateKey(key) for key in KEYS[:3])
    shared = one.agree(other.public)
    assert shared == other.agree(one.public)
    assert shared != third.agree(one.public)


@pytest.mark.parametrize("public", [bytes(32), (1).to_bytes(32, "little"), b"short"])
def test_a_public_key_that_gives_everybody_the_same_secret_is_refused(public: bytes) -> None:
    with pytest.raises(PayloadError):
        masks.PrivateKey(KEYS[0]).agree(public)


def test_a_context_is_told_from_every_other() -> None:
    contexts = [(), (b"",), (b"ab",), (b"a", b"b"), (b"", b"ab"), (b"ab", b"")]
    assert len({masks.derive(KEYS[0], *context) for context in contexts}) == len(contexts)
    assert len({masks.digest_of(*context) for context in contexts}) == len(contexts)


def test_words_are_aes_256_in_counter_mode_from_zero_read_little_endian() -> None:
    stream = Cipher(algorithms.AES256(KEYS[0]), modes.CTR(bytes(16))).encryptor().update(bytes(40))
    assert mask(KEYS[0], 10).tolist() == [int.from_bytes(stream[i : i + 4], "little") for i in range(0, 40, 4)]


@pytest.mark.parametrize("size", [1, 3, (1 << 16) - 1, 1 << 16, (1 << 17) + 5])
def test_masks_add_up_and_come_off_whatever_the_size(size: int) -> None:
    vector = np.arange(size, dtype=np.uint32)
    masks.apply_masks(vector, KEYS[:3], KEYS[3:])
    expected = np.arange(size, dtype=np.uint32)
    for key in KEYS[:3]:
        expected += mask(key, size)
    for key in KEYS[3:]:
        expected -= mask(key, size)
    assert np.array_equal(vector, expected)
    masks.apply_masks(vector, KEYS[3:], KEYS[:3])
    assert np.array_equal(vector, np.arange(size, dtype=np.uint32))


def test_a_mask_begins_the_same_whatever_its_length() -> None:
    assert np.array_equal(mask(KEYS[0], 70_000)[:9], mask(KEYS[0], 9))


def test_many_masks_at_once_are_the_same_as_one_after_the_other() -> None:
    keys = [masks.derive(KEYS[0], bytes([i])) for i in range(150)]
    vector, expected = np.zeros(5, dtype=np.uint32), np.zeros(5, dtype=np.uint32)
    masks.apply_masks(vector, keys)
    for key in keys:
        expected += mask(key, 5)
    assert np.array_equal(vector, expected)


def test_what_was_sealed_opens_under_its_key_and_for_what_it_was_bound_to_and_nothing_else() -> None:
    closed = masks.sealed(KEYS[0], b"shares", b"ada to bea")
    assert len(closed) == len(b"shares") + masks.TAG_BYTES
    assert masks.opened(KEYS[0], closed, b"ada to bea") == b"shares"
    for key, text, bound in (
        (KEYS[1], closed, b"ada to bea"),
        (KEYS[0], closed, b"ada to cyd"),
        (KEYS[0], closed[:-1], b"ada to bea"),
        (KEYS[0], bytes(len(closed)), b"ada to bea"),
        (KEYS[0], b"", b"ada to bea"),
    ):
        assert masks.opened(key, text, bound) is None
