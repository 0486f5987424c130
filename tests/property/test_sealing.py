"""Sealed models, as properties: what was sealed opens as it was, and nothing that differs in a byte opens at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.crypto import sealing
from fedkit.crypto.box import Box
from fedkit.crypto.sealing import Header, SealedModel, Subject, header_of, manifest_of, seal, sealed_words, unseal
from fedkit.errors import ModelSealed, PayloadError, Reason, Refused
from fedkit.trust.signing import public_of
from fedkit.weights import Entry, Manifest, Weights

NAMES = ("ada", "bea", "cyd")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32)) for name in NAMES}
MEMBERS = {name: public_of(key) for name, key in KEYS.items()}
BOXES = {name: Box(name, key, lambda: MEMBERS) for name, key in KEYS.items()}
RUN = "heart-1.0a1b2c3d"


def model(values: int, seed: int = 0) -> Weights:
    vector = np.random.default_rng(seed).integers(0, 1 << 32, values, dtype=np.uint32).view(np.float32)
    return Weights(Manifest((Entry("layer.weight", (values,)),)), vector)  # any bits, NaN with a payload among them


def subject_of(weights: Weights, **changes: object) -> Subject:
    return replace(Subject(RUN, 3, "a" * 32, "ada", weights.manifest.to_json()), **changes)


def sealed(weights: Weights, *to: str, **changes: object) -> SealedModel:
    subject = subject_of(weights, **changes)
    header, stamp = BOXES["ada"].address(subject, [BOXES[name].offer(RUN) for name in to or ("bea", "cyd")])
    return seal(header, stamp, weights.vector)


@given(st.integers(0, 2000), st.integers(0, 99), st.sets(st.sampled_from(NAMES), min_size=1))
@settings(max_examples=60, deadline=None)
def test_what_was_sealed_opens_as_it_was_for_each_recipient_and_for_nobody_else(
    size: int, seed: int, to: set[str]
) -> None:
    weights = model(size, seed)
    found = sealed(weights, *sorted(to))
    assert found.manifest == manifest_of(subject_of(weights), sorted(to), size)
    assert header_of(found) == Header.from_bytes(header_of(found).to_bytes())
    assert header_of(found).names == to
    for name in NAMES:
        if name in to:
            assert BOXES[name].open(found) == weights
        else:
            with pytest.raises(Refused, match=f"not sealed for {name}"):
                BOXES[name].open(found)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_byte_that_is_flipped_is_refused(data: st.DataObject) -> None:
    found = sealed(model(data.draw(st.integers(0, 40))))
    raw = bytearray(found.vector.tobytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises((Refused, PayloadError)) as caught:
        BOXES["bea"].open(sealed_words(np.frombuffer(bytes(raw), dtype=np.float32)))
    assert not isinstance(caught.value, Refused) or caught.value.reason is Reason.ENCRYPTION


@given(st.integers(0, 400), st.binary(max_size=64))
@settings(max_examples=100, deadline=None)
def test_what_is_shorter_longer_or_something_else_is_refused(keep: int, more: bytes) -> None:
    raw = sealed(model(20)).vector.tobytes()
    changed = raw[: min(4 * keep, len(raw) - 4)] + more[: len(more) // 4 * 4]
    with pytest.raises(Refused) as caught:
        BOXES["bea"].open(sealed_words(np.frombuffer(changed, dtype=np.float32)))
    assert caught.value.reason is Reason.ENCRYPTION


def test_pieces_keep_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever knows the content key besides the sealer, a recipient, cannot put one piece in another's place either."""
    monkeypatch.setattr(sealing, "_PIECE", 64)
    weights = model(100)
    found = sealed(weights)
    assert BOXES["bea"].open(found) == weights
    monkeypatch.setattr(sealing, "_require_signed", lambda *_: None)
    raw = bytearray(found.vector.tobytes())
    start = sealing._split(found)[1]
    one, other = slice(start, start + 80), slice(start + 80, start + 160)
    raw[one], raw[other] = raw[other], raw[one]
    with pytest.raises(Refused, match="was changed, or is another one"):
        BOXES["bea"].open(sealed_words(np.frombuffer(bytes(raw), dtype=np.float32)))


@given(st.sampled_from([lambda w: w + 1, lambda w: 2 * w, lambda w: w - w, lambda w: -w, lambda w: w / 2]))
def test_nobody_computes_with_a_sealed_model(operation: object) -> None:
    with pytest.raises(ModelSealed, match="fedkit open"):
        operation(sealed(model(20)))  # type: ignore[operator]


def test_nothing_of_a_sealed_model_is_there_to_be_read() -> None:
    found = sealed(model(20))
    for read in (found.norm, lambda: found @ found, lambda: list(found.arrays()), lambda: found["layer.weight"]):
        with pytest.raises(ModelSealed):
            read()
    assert repr(found) == "<SealedModel by ada in round 3, for bea, cyd>"


def test_the_same_model_is_never_sealed_to_the_same_bytes() -> None:
    weights = model(100)
    one, other = sealed(weights), sealed(weights)
    assert len({part.tobytes() for part in (one.vector[-120:], other.vector[-120:])}) == 2
    assert unseal(one, BOXES["bea"].content_key(one, RUN, 3)) == unseal(other, BOXES["cyd"].content_key(other, RUN, 3))
