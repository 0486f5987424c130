"""Whoever drops out whenever: the sum is exactly that of the survivors' vectors, or nothing can be read at all."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.rehearsal import rehearse
from fedkit.crypto.graph import Assumptions
from fedkit.crypto.masked_sum import Step, Sum
from fedkit.crypto.member import Member
from fedkit.crypto.messages import Session, Told
from fedkit.crypto.ring import FixedPoint, Ring
from fedkit.errors import BelowThreshold
from fedkit.trust.signing import public_of

TOLD = Told(bytes(32), b"\1" * 32)
NEVER = Step.DONE


@functools.cache
def key_of(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def members_of(session: Session, count: int, least: int = 2) -> dict[str, Member]:
    names = [f"m{i:03}" for i in range(count)]
    roster = {name: public_of(key_of(name)) for name in names}
    return {name: Member(session, name, key_of(name), roster, least=least) for name in names}


def noise(names: list[str], size: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.integers(0, 1 << 32, size, dtype=np.uint32) for name in names}


def exact(vectors: dict[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    return sum(vectors[name].astype(object) for name in names) % (1 << 32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([NEVER] * 6 + list(Step)[:5]), min_size=2, max_size=9), st.integers(1, 70), st.data())
def test_the_sum_is_that_of_the_survivors_or_stays_closed(leaving: list[Step], size: int, data: st.DataObject) -> None:
    session = Session("run", 3, "call")
    members = members_of(session, len(leaving))
    gone = dict(zip(members, leaving, strict=True))
    vectors = noise(list(members), size, data.draw(st.integers(0, 99)))
    masked = Sum(session, TOLD, {name: public_of(key_of(name)) for name in members})
    left = [sum(step > now for step in leaving) for now in list(Step)[:5]]
    quorum = max(-(-2 * left[0] // 3), 2)
    if left[0] >= 2 and min(left) >= quorum:
        total = rehearse(masked, members, vectors, gone)
        assert masked.survivors == tuple(name for name in members if gone[name] > Step.VECTORS)
        assert total.tolist() == exact(vectors, masked.survivors).tolist()
        assert not masked.suspects
    else:
        with pytest.raises(BelowThreshold):
            rehearse(masked, members, vectors, gone)


@pytest.mark.parametrize("count", [3, 10])
def test_a_masked_mean_has_the_bits_of_the_unmasked_one(count: int) -> None:
    session, point = Session("run", 1, "call"), FixedPoint(Ring(count), 1.0)
    members, draw = members_of(session, count), np.random.default_rng(4)
    vectors = {name: point.encode(draw.normal(size=50).astype(np.float32), 4096) for name in members}
    masked = Sum(session, TOLD)
    total = rehearse(masked, members, vectors, {"m000": Step.VECTORS})
    plain = np.sum([vectors[name] for name in masked.survivors], axis=0, dtype=np.uint32)
    assert point.decode(total, count - 1).tobytes() == point.decode(plain, count - 1).tobytes()


def test_a_sparse_graph_gives_the_exact_sum_with_members_gone_at_every_step() -> None:
    session = Session("run", 1, "call", Assumptions(0.01, 0.05, bits=4))
    members = members_of(session, 204)
    leaving = np.random.default_rng(5).permutation(list(members))[:10].tolist()
    gone = {name: list(Step)[i % 5] for i, name in enumerate(leaving)}
    vectors = noise(list(members), 9, 6)
    masked = Sum(session, TOLD)
    total = rehearse(masked, members, vectors, gone)
    assert not masked.cohort.plan.is_complete
    assert masked.cohort.plan.degree < 40
    assert len(masked.survivors) == 204 - 6
    assert total.tolist() == exact(vectors, masked.survivors).tolist()
