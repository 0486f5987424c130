"""Masks that two members can make and nobody else: X25519, HKDF and AES in counter mode over 32-bit words.

Two members agree on a secret (X25519, RFC 7748). A key for one purpose comes from a secret and a context (HKDF with
SHA-256, RFC 5869): whoever has another context has another key, unrelated to it. A key stands for an endless vector of
words, AES-256 in counter mode from 0, read as little-endian uint32. A key serves one purpose and one message, so that
its counter may always begin at 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedkit.crypto.ring import Words
from fedkit.errors import PayloadError

__all__ = [
    "KEY_BYTES",
    "TAG_BYTES",
    "PrivateKey",
    "apply_masks",
    "derive",
    "digest_of",
    "opened",
    "packed",
    "sealed",
]

KEY_BYTES = 32
TAG_BYTES = 16
_BLOCK = 1 << 16  # words that are masked at a time, which stay in the cache of a processor's core
_STREAMS = 64  # keys whose streams are open at a time
_AES_BLOCK = 16
_ONCE = bytes(12)  # the nonce of a key that seals one message


def packed(*parts: bytes) -> bytes:
    """The parts, each behind its length in 4 little-endian bytes: other parts give other bytes."""
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def digest_of(*parts: bytes) -> bytes:
    """SHA-256 of the packed parts, 32 bytes."""
    digest = Hash(SHA256())
    digest.update(packed(*parts))
    return digest.finalize()


def derive(secret: bytes, *context: bytes) -> bytes:
    """The key (32 bytes) for one purpose: `context` names it and all that it depends on."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=packed(*context)).derive(secret)


class PrivateKey:
    """An X25519 private key, of 32 secret bytes."""

    __slots__ = ("_key", "public")

    def __init__(self, raw: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(raw)
        self.public = self._key.public_key().public_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """The secret (32 bytes) that it shares with the holder of a public key.

        Raises `PayloadError` for a public key that leads to the same secret with everybody.
        """
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise PayloadError("this is not a public key that anybody can agree with") from None


def sealed(key: bytes, text: bytes, bound: bytes) -> bytes:
    """`text` encrypted, 16 bytes longer, and bound to `bound` (ChaCha20-Poly1305, RFC 8439); one text for each key."""
    return ChaCha20Poly1305(key).encrypt(_ONCE, text, bound)


def opened(key: bytes, sealed_text: bytes, bound: bytes) -> bytes | None:
    """What was sealed; None where it was not this, or not under this key, or not bound to this."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ONCE, sealed_text, bound)
    except InvalidTag:
        return None


def apply_masks(vector: Words, plus: Iterable[bytes] = (), minus: Iterable[bytes] = ()) -> None:
    """Adds the words of each key in `plus` to `vector`, and takes those of `minus` off, modulo 2^32, in place."""
    for keys, operation in ((iter(plus), np.add), (iter(minus), np.subtract)):
        while streams := [_stream(key) for key in islice(keys, _STREAMS)]:
            _apply(vector, streams, operation)


def _stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(_AES_BLOCK))).encryptor()


def _apply(vector: Words, streams: list[CipherContext], operation: np.ufunc) -> None:
    size = min(_BLOCK, vector.size)
    zeros, out = memoryview(bytes(4 * size)), bytearray(4 * size + _AES_BLOCK - 1)
    for block in _blocks(vector):
        words = np.frombuffer(out, dtype="<u4", count=block.size)
        for stream in streams:
            stream.update_into(zeros[: 4 * block.size], out)
            operation(block, words, out=block)


def _blocks(vector: Words) -> Iterator[Words]:
    for start in range(0, vector.size, _BLOCK):
        yield vector[start : start + _BLOCK]
