"""What masked sums cost and whether they are exact: dropouts at every step, CPU time, bytes, a thousand clients."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.rehearsal import rehearse
from bench.table import Figure, show
from fedkit.crypto.graph import Assumptions, plan
from fedkit.crypto.masked_sum import Step, Sum
from fedkit.crypto.member import Member
from fedkit.crypto.messages import Session, Told, Unmasking
from fedkit.crypto.ring import FULL_WEIGHT, FixedPoint, Ring, Words
from fedkit.crypto.shamir import SHARE_BYTES
from fedkit.trust.signing import public_of

__all__ = ["masking"]

TOLD = Told(bytes(32), bytes(32))
MILLION = 1_000_000
TRIALS = 200


def _members(session: Session, count: int) -> dict[str, Member]:
    keys = {f"client-{i:04}": Ed25519PrivateKey.generate() for i in range(count)}
    roster = {name: public_of(key) for name, key in keys.items()}
    return {name: Member(session, name, key, roster) for name, key in keys.items()}


def _is_exact(session: Session, count: int, size: int, leaving: int, draw: np.random.Generator) -> bool:
    """Whether the sum is that of the survivors, with so many members silent from a random step on."""
    members = _members(session, count)
    gone = {str(name): Step(draw.integers(5)) for name in draw.permutation(list(members))[:leaving]}
    vectors: dict[str, Words] = {name: draw.integers(0, 1 << 32, size, dtype=np.uint32) for name in members}
    masked = Sum(session, TOLD)
    total = rehearse(masked, members, vectors, gone)
    plain = np.sum([vectors[name] for name in masked.survivors], axis=0, dtype=np.uint32)
    return bool(np.array_equal(total, plain))


def exactness(trials: int = TRIALS) -> list[Figure]:
    """100 clients of which 20 drop out, each at a random step; then 1,000 of which 200 do, in a sparse graph."""
    draw = np.random.default_rng(0)
    exact = sum(_is_exact(Session("bench", i, "mean"), 100, 1000, 20, draw) for i in range(trials))
    found = [Figure(f"exact sums of {trials}, 100 clients, 20 drop out", exact, f"== {trials}", _numbers(100))]
    began = time.process_time()
    good = _is_exact(Session("bench", trials, "mean"), 1000, 1000, 200, draw)
    note = f"{time.process_time() - began:.0f} s of CPU time for all of them; {_numbers(1000)}"
    return [*found, Figure("exact sums of 1, 1,000 clients, 200 drop out", good, "== 1", note)]


def cost(count: int = 10) -> list[Figure]:
    """A million parameters in a cohort of ten, at one client."""
    point, vector = FixedPoint(Ring(count), 1.0), np.random.default_rng(1).normal(size=MILLION).astype(np.float32)
    words = np.empty(MILLION + 1, dtype=np.uint32)
    encoding = min(_cpu(lambda: point.encode(vector, FULL_WEIGHT, words)) for _ in range(9))
    masking = min(_masking(count, words) for _ in range(9))
    note = f"encode {encoding * 1e3:.1f} ms, all steps of masking {masking * 1e3:.1f} ms; cohort of {count}, best of 9"
    return [
        Figure("CPU s a million parameters, encode and mask", encoding + masking, "<= 0.025", note),
        Figure("upload beyond plain, %", 100 * (_upload(count) / vector.nbytes - 1), "<= 0.1", "all its messages"),
    ]


def _cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _ready(count: int) -> tuple[Sum, Member]:
    """A session in which all have shared, and one of its members."""
    session = Session("bench", 0, "mean")
    members, masked = _members(session, count), Sum(session, TOLD)
    for member in members.values():
        masked.advertise(member.advertise())
    cohort = masked.close_adverts()
    for member in members.values():
        masked.share(member.name, member.share(cohort))
    masked.close_shares()
    return masked, next(iter(members.values()))


def _masking(count: int, words: Words) -> float:
    """CPU seconds of one member's own steps: keys, shares and the masks."""
    masked, member = _ready(count)
    inbox = masked.inbox(member.name)
    fresh = Member(member.session, member.name, Ed25519PrivateKey.generate(), {})
    return (
        _cpu(fresh.advertise)
        + _cpu(lambda: member.share(masked.cohort))
        + _cpu(lambda: member.mask(masked.sharers, inbox, TOLD, words))
    )


def _upload(count: int) -> int:
    masked, member = _ready(count)
    words = np.zeros(MILLION + 1, dtype=np.uint32)
    shares = member.share(masked.cohort)
    member.mask(masked.sharers, masked.inbox(member.name), TOLD, words)
    signature = member.confirm(masked.sharers)
    given = Unmasking({name: bytes(SHARE_BYTES) for name in masked.sharers}, {})
    small = (member.advertise().to_bytes(), shares.to_bytes(), signature, given.to_bytes())
    return words.nbytes + sum(map(len, small))


def _numbers(size: int) -> str:
    found = plan(size)
    odds = [f"2^{math.log2(one):.1f}" if one else "0" for one in map(float, (found.collusion, found.failure))]
    return f"degree {found.degree}, threshold {found.threshold}; read {odds[0]}, stuck {odds[1]}"


def masking(trials: int = TRIALS) -> list[Figure]:
    """All of it."""
    return [*cost(), *exactness(trials)]


def main() -> None:
    """Measures and prints; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=TRIALS, help="sessions of 100 clients")
    given = parser.parse_args()
    for size in (3, 10, 100, 200, 201, 1000, 10_000):
        print(plan(size))
    print(plan(1000, Assumptions(0.1, 0.2)))
    sys.exit(not show("Masked sums", masking(given.trials)))


if __name__ == "__main__":
    main()
