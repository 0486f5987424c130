"""A model that only those can open for whom it was sealed: how it is made, what it looks like, how it is opened.

The values are encrypted under a fresh content key (ChaCha20-Poly1305, RFC 8439) in pieces of 1 MiB, each with its
number and whether it is the last as its nonce (the STREAM construction of Hoang et al. 2015). The content key is
wrapped for each recipient under a key from X25519 (RFC 7748) with a fresh key of the sealer's (HKDF with SHA-256). The
header is signed with the sealer's roster key; it names a key that was made for this one model, with which the
ciphertext is signed. So whoever works out the model needs no roster key.

A sealed model travels as a vector of 32-bit words, which are: the length of the header, the header, zeros up to a
multiple of 4 bytes, the ciphertext, and its signature.

Guarantee: whoever is no recipient learns nothing but the header and the length; whoever is no member can make none.

Does not protect against: a recipient that gives the model away; a member that seals another model than it was asked
for; a roster key that is stolen, which opens all that its owner could ever open.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedkit.crypto.ceremony import BoxKey, agreed, refused
from fedkit.crypto.masks import KEY_BYTES, TAG_BYTES, PrivateKey, derive, digest_of, opened, packed, sealed
from fedkit.crypto.messages import DIGEST_BYTES, SIGNATURE_BYTES, require_names, require_size, unpacked, verifies
from fedkit.errors import PayloadError
from fedkit.weights import SEALED, Entry, Manifest, Vector, Weights

__all__ = [
    "WRAP_BYTES",
    "Header",
    "SealedModel",
    "Stamp",
    "Subject",
    "header_of",
    "manifest_of",
    "seal",
    "sealed_words",
    "unseal",
]

WRAP_BYTES = KEY_BYTES + TAG_BYTES
_PIECE = 1 << 20  # bytes of values that are encrypted at a time
_MOST_HEADER = 64 << 20
_MOST_TEXT = 512
_LENGTH = 4  # bytes that say how long the header is


@dataclass(frozen=True, slots=True)
class Subject:
    """What a sealed model is: the answer of member `sealer` to the assignment `asked` of a round of a run.

    `manifest` is that of the model inside, as JSON. `parents` are the digests (BLAKE3, 32 bytes each) of the one or two
    models that it may have been trained from: nobody compares it with any others. Raises `PayloadError` for what no run
    has.
    """

    run: str
    round: int
    asked: str
    sealer: str
    manifest: str
    parents: bytes = bytes(2 * DIGEST_BYTES)

    def __post_init__(self) -> None:
        """Checks names and lengths."""
        require_names([self.sealer])
        require_size("what a model was trained from", 2 * DIGEST_BYTES, self.parents)
        if max(len(self.run), len(self.asked)) > _MOST_TEXT or not 0 <= self.round < 1 << 63:
            raise PayloadError(f"run and assignment are at most {_MOST_TEXT} characters, and rounds count from 0")

    @property
    def parts(self) -> tuple[bytes, ...]:
        """All of it in bytes."""
        texts = (self.run, self.asked, self.sealer, self.manifest)
        return (*(text.encode() for text in texts), self.round.to_bytes(8, "little"), self.parents)

    def comes_from(self, digest: str) -> bool:
        """Whether the model of that digest (hex) may be what it was trained from."""
        return bytes.fromhex(digest) in (self.parents[:DIGEST_BYTES], self.parents[DIGEST_BYTES:])


@dataclass(frozen=True, slots=True)
class Stamp:
    """What makes one sealed model, to be used once: its content key, and the key that signs the ciphertext."""

    content: bytes = field(repr=False)
    voice: bytes = field(repr=False)

    @classmethod
    def fresh(cls) -> Stamp:
        """A new one."""
        return cls(secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES))

    @property
    def signer(self) -> Ed25519PrivateKey:
        """The key that signs."""
        return Ed25519PrivateKey.from_private_bytes(self.voice)


@dataclass(frozen=True)
class Header:
    """What stands before the ciphertext, for everybody to read: what it is, for whom, and the wrapped keys by name.

    `lock` is the sealer's fresh X25519 key, `voice` the Ed25519 key that has signed the ciphertext, `commitment` a
    digest of the content key: nobody can have two models come out of one ciphertext. Raises `PayloadError` for other
    lengths.
    """

    subject: Subject
    lock: bytes
    voice: bytes
    commitment: bytes
    wraps: Mapping[str, bytes]
    signature: bytes

    def __post_init__(self) -> None:
        """Checks names and lengths."""
        require_names(self.wraps)
        require_size("a key", KEY_BYTES, self.lock, self.voice)
        require_size("a commitment", DIGEST_BYTES, self.commitment)
        require_size("a wrapped key", WRAP_BYTES, *self.wraps.values())
        require_size("a signature", SIGNATURE_BYTES, self.signature)

    @classmethod
    def make(cls, subject: Subject, stamp: Stamp, boxes: Sequence[BoxKey], key: Ed25519PrivateKey) -> Header:
        """The sealer's, under its roster key; `boxes` were checked before. Raises `Refused` for a key that is none."""
        ordered, lock = sorted(boxes, key=lambda one: one.name), PrivateKey(secrets.token_bytes(KEY_BYTES))
        voice = stamp.signer.public_key().public_bytes_raw()
        empty = {one.name: bytes(WRAP_BYTES) for one in ordered}
        bare = cls(subject, lock.public, voice, _commitment(stamp.content), empty, bytes(SIGNATURE_BYTES))
        wraps = {one.name: bare.wrap(one, stamp.content, agreed(lock, one.value, one.name)) for one in ordered}
        unsigned = replace(bare, wraps=wraps)
        return replace(unsigned, signature=key.sign(unsigned.body))

    @cached_property
    def core(self) -> bytes:
        """SHA-256 of all but the wrapped keys and the signature: what every wrapped key and piece is bound to."""
        names = packed(*(name.encode() for name in self.wraps))
        return digest_of(b"fedkit-sealed-1", *self.subject.parts, self.lock, self.voice, self.commitment, names)

    @property
    def body(self) -> bytes:
        """What the sealer signs."""
        return packed(b"fedkit-sealed-header-1", self.core, *self.wraps.values())

    @property
    def names(self) -> frozenset[str]:
        """Who can open it."""
        return frozenset(self.wraps)

    def wrap(self, box: BoxKey, content: bytes, secret: bytes) -> bytes:
        """The content key for one recipient."""
        bound = packed(b"fedkit-sealed-wrap-1", self.core, box.name.encode(), box.value)
        return sealed(derive(secret, bound), content, bound)

    def check(self, run: str, round: int, members: Mapping[str, str]) -> None:
        """Raises `Refused` (encryption) unless a member has sealed it in this run, and in no later round than `round`.

        A `round` below 0 comes after all others.
        """
        about = self.subject
        if about.run != run:
            raise refused("the model was sealed in another run")
        if 0 <= round < about.round:
            raise refused(f"the model was sealed in round {about.round}, which is yet to come")
        if about.sealer not in members:
            raise refused(f"the model was sealed by {about.sealer}, who is not on this site's roster")
        if not verifies(members[about.sealer], self.signature, self.body):
            raise refused(f"{about.sealer} has not signed the model that is said to be its own")

    def content_key(self, name: str, private: PrivateKey) -> bytes:
        """The content key, for the recipient of that name; raises `Refused` (encryption)."""
        wrapped = self.wraps.get(name)
        if wrapped is None:
            raise refused(f"the model is not sealed for {name}")
        bound = packed(b"fedkit-sealed-wrap-1", self.core, name.encode(), private.public)
        secret = agreed(private, self.lock, self.subject.sealer)
        found = opened(derive(secret, bound), wrapped, bound)
        if found is None or _commitment(found) != self.commitment:
            raise refused(f"the key that was wrapped for {name} does not open under its own")
        return found

    def to_bytes(self) -> bytes:
        """The compact form."""
        fixed = (self.lock, self.voice, self.commitment, self.signature)
        wraps = packed(*(part for name, key in self.wraps.items() for part in (name.encode(), key)))
        return packed(packed(*self.subject.parts), *fixed, wraps)

    @classmethod
    def from_bytes(cls, data: bytes) -> Header:
        """What `to_bytes` wrote; raises `PayloadError`."""
        about, lock, voice, commitment, signature, wrapped = unpacked(data, 6)
        *texts, number, parents = unpacked(about, 6)
        entries = unpacked(wrapped)
        if len(number) != 8 or len(entries) % 2:
            raise PayloadError("this is not the header of a sealed model")
        try:
            run, asked, sealer, manifest = (text.decode() for text in texts)
            names = [name.decode("ascii") for name in entries[::2]]
        except UnicodeDecodeError:
            raise PayloadError("this is not the header of a sealed model") from None
        subject = Subject(run, int.from_bytes(number, "little"), asked, sealer, manifest, parents)
        wraps = dict(zip(require_names(names), entries[1::2], strict=True))
        return cls(subject, lock, voice, commitment, wraps, signature)


class SealedModel(Weights):
    """A model that the coordinator cannot read: strategies pass it on, and anything else raises `ModelSealed`."""

    @classmethod
    def of(cls, weights: Weights) -> SealedModel:
        """The sealed model that these words are."""
        return cls(weights.manifest, weights.vector)

    @cached_property
    def header(self) -> Header:
        """What everybody may read of it; raises `PayloadError`."""
        return header_of(self)

    def __repr__(self) -> str:
        about = self.header.subject
        return f"<SealedModel by {about.sealer} in round {about.round}, for {', '.join(sorted(self.header.names))}>"


def sealed_words(vector: Vector) -> SealedModel:
    """A vector of words as the sealed model that it is said to be."""
    return SealedModel(_announced(4 * vector.size), vector)


def header_of(weights: Weights) -> Header:
    """The header of a sealed model, of which no more than that is read; raises `PayloadError`."""
    if not weights.manifest.is_sealed:
        raise PayloadError("this is a model that nobody has sealed")
    return _split(weights)[0]


def _split(weights: Weights) -> tuple[Header, int]:
    """The header, and at which byte the ciphertext begins."""
    total = 4 * weights.manifest.size
    length = int.from_bytes(_bytes(weights, 1), "little") if total else 0
    end = _LENGTH + length
    if not 0 < length <= _MOST_HEADER or _aligned(end) > total:
        raise PayloadError("this is not a sealed model: it ends within its header")
    raw = _bytes(weights, _aligned(end) // 4)
    if any(raw[end:]):
        raise PayloadError("this is not a sealed model: there is something behind its header")
    return Header.from_bytes(raw[_LENGTH:end]), _aligned(end)


def _bytes(weights: Weights, words: int) -> bytes:
    """The first so many words."""
    return weights.block(0, np.empty(words, dtype=np.float32)).tobytes()


def _aligned(length: int) -> int:
    return -(-length // 4) * 4


def _ciphertext_bytes(values: int) -> int:
    return 4 * values + TAG_BYTES * max(-(-4 * values // _PIECE), 1)


def manifest_of(subject: Subject, names: Sequence[str], values: int) -> Manifest:
    """What a model of so many values is announced as, once it is sealed for `names`."""
    wraps = {name: bytes(WRAP_BYTES) for name in sorted(names)}
    key, signature = bytes(KEY_BYTES), bytes(SIGNATURE_BYTES)
    header = len(Header(subject, key, key, bytes(DIGEST_BYTES), wraps, signature).to_bytes())
    return _announced(_aligned(_LENGTH + header) + _ciphertext_bytes(values) + SIGNATURE_BYTES)


def _announced(size: int) -> Manifest:
    return Manifest((Entry(SEALED, (size // 4,)),))


# -- the values --------------------------------------------------------------------------------------------------------


def seal(header: Header, stamp: Stamp, vector: Vector) -> SealedModel:
    """The model under its header, which was made with the same stamp. It takes the memory of one more model."""
    head, plain = header.to_bytes(), np.ascontiguousarray(vector, dtype="<f4").view(np.uint8).data
    start = _aligned(_LENGTH + len(head))
    end = start + _ciphertext_bytes(vector.size)
    out = np.zeros(end + SIGNATURE_BYTES, dtype=np.uint8)
    view = out.data
    view[: _LENGTH + len(head)] = len(head).to_bytes(_LENGTH, "little") + head
    cipher, total, at = ChaCha20Poly1305(stamp.content), blake3(), start
    for nonce, piece in _pieces(len(plain)):
        text = cipher.encrypt(nonce, plain[piece], header.core)
        view[at : at + len(text)] = text
        total.update(text)
        at += len(text)
    view[end:] = stamp.signer.sign(_statement(header, total.digest()))
    return SealedModel(_announced(len(out)), out.view(np.float32))


def unseal(weights: Weights, content: bytes) -> Weights:
    """The model inside, under the content key of its header, which was checked; raises `Refused` (encryption).

    It takes the memory of one more model.
    """
    try:
        header, start = _split(weights)
        manifest = Manifest.from_json(header.subject.manifest)
    except PayloadError as error:
        raise refused(str(error)) from None
    if manifest.is_sealed or 4 * weights.manifest.size != start + _ciphertext_bytes(manifest.size) + SIGNATURE_BYTES:
        raise refused("the sealed model has another length than it says")
    data = weights.vector.view(np.uint8).data
    _require_signed(header, data[start:-SIGNATURE_BYTES], bytes(data[-SIGNATURE_BYTES:]))
    out = np.empty(manifest.size, dtype=np.float32)
    into, cipher = out.view(np.uint8).data, ChaCha20Poly1305(content)
    for nonce, piece in _pieces(len(into)):
        size = piece.stop - piece.start + TAG_BYTES
        try:
            into[piece] = cipher.decrypt(nonce, data[start : start + size], header.core)
        except InvalidTag:
            raise refused("the sealed model was changed, or is another one") from None
        start += size
    return Weights(manifest, out)


def _pieces(size: int) -> Iterator[tuple[bytes, slice]]:
    """The nonce of each piece of so many bytes, and where it lies; there is one at least."""
    count = max(-(-size // _PIECE), 1)
    for i in range(count):
        nonce = i.to_bytes(11, "little") + bytes([i == count - 1])
        yield nonce, slice(i * _PIECE, min((i + 1) * _PIECE, size))


def _require_signed(header: Header, ciphertext: memoryview, signature: bytes) -> None:
    body = _statement(header, blake3(ciphertext).digest())
    try:
        Ed25519PublicKey.from_public_bytes(header.voice).verify(signature, body)
    except (InvalidSignature, ValueError):
        raise refused(f"{header.subject.sealer} has not signed the sealed model that came") from None


def _statement(header: Header, digest: bytes) -> bytes:
    return packed(b"fedkit-sealed-model-1", header.core, digest)


def _commitment(content: bytes) -> bytes:
    return derive(content, b"fedkit-sealed-commitment-1")
