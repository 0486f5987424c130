"""The coordinator's side: a bad message costs its sender, false shares are found or the sum stays closed."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto.masked_sum import Step, Sum
from fedkit.crypto.member import Member
from fedkit.crypto.messages import (
    SEALED_BYTES,
    Advertised,
    Cohort,
    Session,
    Shares,
    Told,
    Unmasking,
    mapping_from,
    names_from,
    to_mapping,
    unpacked,
)
from fedkit.crypto.shamir import SHARE_BYTES
from fedkit.errors import BelowThreshold, ConfigError, PayloadError, Reason, Refused, SumSpoiled
from fedkit.rounds.layout import words_manifest
from fedkit.rounds.masked import VectorsFold
from fedkit.spool import reopen
from fedkit.trust.signing import public_of
from fedkit.weights import Weights
from fedkit.work import Update

NAMES = tuple("abcdef")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(name.encode() * 32) for name in NAMES}
ROSTER = {name: public_of(key) for name, key in KEYS.items()}
SESSION, TOLD = Session("heart", 4, "call-1"), Told(b"\1" * 32, b"\2" * 32)
SIZE = 20
VECTORS = {name: np.arange(SIZE, dtype=np.uint32) * (ord(name) << 22) for name in NAMES}
LEFT = NAMES[:5]  # f drops out after it shared; 4 of 6 are enough
EXPECTED = np.sum([VECTORS[name] for name in LEFT], axis=0, dtype=np.uint32).tolist()


def played(until: Step, *, members: dict[str, str] | None = None) -> tuple[Sum, dict[str, Member], np.ndarray]:
    """An honest session of which the steps before `until` are done."""
    people = {name: Member(SESSION, name, KEYS[name], ROSTER) for name in NAMES}
    masked, total = Sum(SESSION, TOLD, members), np.zeros(SIZE, dtype=np.uint32)
    for step in list(Step)[:until]:
        for name in NAMES if step < Step.VECTORS else LEFT:
            _play(step, masked, people[name], total)
        (
            masked.close_adverts,
            masked.close_shares,
            masked.close_vectors,
            masked.close_signatures,
            lambda: None,
        )[step]()
    return masked, people, total


def _play(step: Step, masked: Sum, member: Member, total: np.ndarray) -> None:
    name = member.name
    if step == Step.ADVERTS:
        masked.advertise(member.advertise())
    elif step == Step.SHARES:
        masked.share(name, member.share(masked.cohort))
    elif step == Step.VECTORS:
        words = VECTORS[name].copy()
        member.mask(masked.sharers, masked.inbox(name), TOLD, words)
        masked.deliver(name, SIZE)
        total += words
    elif step == Step.SIGNATURES:
        masked.confirm(name, member.confirm(masked.survivors))
    else:
        masked.unmask(name, member.unmask(masked._signatures))


def falsified(member: Member, masked: Sum, kind: str, of: str) -> Unmasking:
    given = member.unmask(masked._signatures)
    false = {of: bytes(SHARE_BYTES)}
    return Unmasking(
        {**given.seeds, **false} if kind == "seed" else given.seeds,
        {**given.keys, **false} if kind == "key" else given.keys,
    )


@pytest.mark.parametrize(("kind", "of"), [("seed", "b"), ("key", "f")])
def test_a_false_share_is_found_while_there_is_one_to_spare(kind: str, of: str) -> None:
    masked, people, total = played(Step.UNMASKINGS)
    masked.unmask("a", falsified(people["a"], masked, kind, of))
    for name in LEFT[1:]:
        masked.unmask(name, people[name].unmask(masked._signatures))
    masked.open(total)
    assert total.tolist() == EXPECTED
    assert masked.suspects == {"a"}


@pytest.mark.parametrize(("kind", "of"), [("seed", "b"), ("key", "f")])
def test_a_false_share_where_none_is_to_spare_leaves_the_sum_closed_and_names_whose_it_is(kind: str, of: str) -> None:
    masked, people, total = played(Step.UNMASKINGS)
    before = total.copy()
    masked.unmask("a", falsified(people["a"], masked, kind, of))
    for name in LEFT[1:4]:
        masked.unmask(name, people[name].unmask(masked._signatures))
    with pytest.raises(SumSpoiled) as caught:
        masked.open(total)
    assert caught.value.members == (of,)
    assert np.array_equal(total, before)


@pytest.mark.parametrize("false", [b"\xff" * SHARE_BYTES, b"\0" * 32 + b"\1"])
def test_a_share_that_is_none_or_leads_out_of_the_secrets_is_as_false_as_any_other(false: bytes) -> None:
    masked, people, total = played(Step.UNMASKINGS)
    given = people["a"].unmask(masked._signatures)
    masked.unmask("a", Unmasking({**given.seeds, "b": false}, given.keys))
    for name in LEFT[1:]:
        masked.unmask(name, people[name].unmask(masked._signatures))
    masked.open(total)
    assert total.tolist() == EXPECTED


def test_a_member_whose_shares_hardly_anybody_gives_keeps_the_sum_closed() -> None:
    masked, people, total = played(Step.UNMASKINGS)
    for name in LEFT:
        given = people[name].unmask(masked._signatures)
        seeds = {whose: share for whose, share in given.seeds.items() if whose != "b" or name in "abc"}
        masked.unmask(name, Unmasking(seeds, given.keys))
    with pytest.raises(BelowThreshold, match="3 members gave shares of a secret of b"):
        masked.open(total)


def test_shares_that_do_not_open_are_done_without() -> None:
    people = {name: Member(SESSION, name, KEYS[name], ROSTER) for name in NAMES}
    masked, total = Sum(SESSION, TOLD), np.zeros(SIZE, dtype=np.uint32)
    for member in people.values():
        masked.advertise(member.advertise())
    cohort = masked.close_adverts()
    for name, member in people.items():
        shares = member.share(cohort)
        bad = {"b": bytes(SEALED_BYTES)} if name == "a" else {}
        masked.share(name, Shares({**shares.sealed, **bad}))
    masked.close_shares()
    for step, close in ((Step.VECTORS, masked.close_vectors), (Step.SIGNATURES, masked.close_signatures)):
        for name in LEFT:
            _play(step, masked, people[name], total)
        close()
    for name in LEFT:
        given = people[name].unmask(masked._signatures)
        assert ("a" in given.seeds) == (name != "b")
        masked.unmask(name, given)
    masked.open(total)
    assert total.tolist() == EXPECTED


def test_below_the_threshold_each_step_says_so() -> None:
    for step, close in (
        (Step.SHARES, "close_shares"),
        (Step.VECTORS, "close_vectors"),
        (Step.SIGNATURES, "close_signatures"),
    ):
        masked, people, total = played(step)
        for name in NAMES[:3]:
            _play(step, masked, people[name], total)
        with pytest.raises(BelowThreshold, match=r"3 of 6 members .* and it takes 4"):
            getattr(masked, close)()
    masked, people, total = played(Step.UNMASKINGS)
    for name in NAMES[:3]:
        _play(Step.UNMASKINGS, masked, people[name], total)
    with pytest.raises(BelowThreshold, match="3 of 6 members gave their shares"):
        masked.open(total)
    asking, people = Sum(SESSION, TOLD, least=5), played(Step.ADVERTS)[1]
    for name in NAMES[:4]:
        asking.advertise(people[name].advertise())
    with pytest.raises(BelowThreshold, match="4 of 4 members sent keys, and it takes 5"):
        asking.close_adverts()
    with pytest.raises(BelowThreshold, match="1 members sent keys"):
        alone = Sum(SESSION, TOLD)
        alone.advertise(people["a"].advertise())
        alone.close_adverts()


def test_a_coordinator_with_the_roster_turns_bad_signatures_away_itself() -> None:
    masked, people, _ = played(Step.ADVERTS, members=ROSTER)
    posing = dataclasses.replace(people["a"].advertise(), name="b")
    with pytest.raises(Refused, match="masking: b has not signed"):
        masked.advertise(posing)
    masked, people, _ = played(Step.SIGNATURES, members=ROSTER)
    with pytest.raises(Refused, match="a signed something else"):
        masked.confirm("a", people["b"].confirm(masked.survivors))
    _play(Step.SIGNATURES, masked, people["b"], np.zeros(SIZE, dtype=np.uint32))


def test_a_key_that_nobody_can_agree_with_is_turned_away() -> None:
    masked, people, _ = played(Step.ADVERTS)
    with pytest.raises(Refused, match="masking: a: this is not a public key"):
        masked.advertise(dataclasses.replace(people["a"].advertise(), mask_key=bytes(32)))


def reason_of(refused: pytest.ExceptionInfo[Refused]) -> Reason:
    return refused.value.reason


def test_messages_that_come_late_early_twice_or_from_nobody_are_told_apart() -> None:
    masked, people, _total = played(Step.SHARES)
    shares = people["a"].share(masked.cohort)
    masked.share("a", shares)
    masked.share("a", shares)
    with pytest.raises(Refused) as caught:
        masked.share("a", Shares({name: bytes(SEALED_BYTES) for name in NAMES[1:]}))
    assert reason_of(caught) == Reason.DUPLICATE
    with pytest.raises(Refused) as caught:
        masked.advertise(people["a"].advertise())
    assert reason_of(caught) == Reason.LATE
    with pytest.raises(Refused) as caught:
        masked.deliver("a", SIZE)
    assert reason_of(caught) == Reason.MASKING
    with pytest.raises(Refused) as caught:
        masked.share("zoe", shares)
    assert reason_of(caught) == Reason.UNKNOWN
    with pytest.raises(Refused, match="deals to others"):
        masked.share("b", shares)
    with pytest.raises(Refused, match="not known yet"):
        _ = Sum(SESSION, TOLD).cohort


def test_vectors_of_another_length_and_shares_that_nobody_asked_for_are_refused() -> None:
    masked, people, total = played(Step.VECTORS)
    masked.deliver("a", SIZE)
    with pytest.raises(Refused) as caught:
        masked.deliver("b", SIZE + 1)
    assert reason_of(caught) == Reason.SHAPE
    masked, people, total = played(Step.UNMASKINGS)
    share = bytes(SHARE_BYTES)
    for bad in (Unmasking({"f": share}, {}), Unmasking({}, {"a": share}), Unmasking({"zoe": share}, {})):
        with pytest.raises(Refused, match="nobody asked for"):
            masked.unmask("a", bad)
    with pytest.raises(Refused) as caught:
        masked.unmask("f", people["a"].unmask(masked._signatures))
    assert reason_of(caught) == Reason.UNKNOWN
    for name in LEFT:
        _play(Step.UNMASKINGS, masked, people[name], total)
    with pytest.raises(ConfigError, match="has 19 words"):
        masked.open(total[:-1])


@pytest.mark.parametrize("same", ["mask_key", "share_key"])
def test_a_key_that_is_there_twice_costs_its_sender_its_part_only(same: str) -> None:
    masked = Sum(SESSION, TOLD)
    first, second = (played(Step.ADVERTS)[1][name].advertise() for name in NAMES[:2])
    masked.advertise(first)
    other = {"mask_key": "share_key", "share_key": "mask_key"}[same]
    for taken in (first.mask_key, getattr(second, other)):
        with pytest.raises(Refused, match="has a key twice, or another member's"):
            masked.advertise(replace(second, **{same: taken}))
    masked.advertise(first)  # the same again is nothing new
    masked.advertise(second)


def test_vectors_are_added_exactly_from_memory_and_from_files(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    vectors = [draw.integers(0, 1 << 32, 300_003, dtype=np.uint32) for _ in range(3)]
    expected = sum(vector.astype(np.uint64) for vector in vectors) % (1 << 32)
    manifest = words_manifest(300_003)
    in_memory, in_files = VectorsFold("abc"), VectorsFold("abc")
    for name, vector in zip("abc", vectors, strict=True):
        weights = Weights(manifest, vector.view(np.float32))
        in_memory.add(name, Update(weights, 0))
        vector.tofile(tmp_path / name)
        found = reopen(tmp_path / name, manifest, {})
        assert found is not None
        in_files.add(name, Update(found[0], 0))
    assert np.array_equal(in_memory.total(300_003), expected)
    assert np.array_equal(in_files.total(300_003), expected)


# -- messages ----------------------------------------------------------------------------------------------------------


def test_every_message_has_one_form_in_bytes() -> None:
    masked, people, _total = played(Step.UNMASKINGS)
    advert, shares = people["a"].advertise(), people["a"].share(masked.cohort)
    given = people["a"].unmask(masked._signatures)
    assert Advertised.from_bytes(advert.to_bytes()) == advert
    assert Shares.from_bytes(shares.to_bytes()) == shares
    assert Unmasking.from_bytes(given.to_bytes()) == given
    assert Cohort.from_bytes(SESSION, masked.cohort.to_bytes()) == masked.cohort
    for message in (advert, shares, given):
        data = message.to_bytes()
        for bad in (data[:-1], data + b"\0", data + data, b"\xff\xff\xff\xff", data[4:]):
            with pytest.raises(PayloadError):
                type(message).from_bytes(bad)


def test_what_no_message_can_be_is_refused_when_it_is_made() -> None:
    _masked, people, _ = played(Step.SHARES)
    advert = people["a"].advertise()
    for changes in (
        {"name": "../a"},
        {"mask_key": b"1"},
        {"share_key": "text"},
        {"commitment": b""},
        {"signature": b""},
    ):
        with pytest.raises(PayloadError):
            dataclasses.replace(advert, **changes)
    with pytest.raises(PayloadError, match="the same key"):
        Cohort.of(SESSION, [advert, dataclasses.replace(advert, name="b")])
    with pytest.raises(PayloadError, match="holds each once"):
        Cohort.of(SESSION, [advert, advert])
    share = bytes(SHARE_BYTES)
    with pytest.raises(PayloadError):
        Unmasking({"a": share}, {"a": share})
    with pytest.raises(PayloadError):
        Unmasking({"a": share[1:]}, {})
    with pytest.raises(PayloadError):
        Shares({"a": bytes(SEALED_BYTES - 1)})
    with pytest.raises(PayloadError):
        Told(b"", b"")
    with pytest.raises(PayloadError):
        Session("r" * 1000, 1, "c")
    with pytest.raises(PayloadError):
        Session("r", -1, "c")


def test_bytes_that_are_no_list_are_refused() -> None:
    good = to_mapping({"a": b"1", "b": b"2"})
    assert mapping_from(good) == {"a": b"1", "b": b"2"}
    for bad in (good[:-5], to_mapping({"b": b"2"}) + to_mapping({"a": b"1"}), b"\1\0\0\0\xff" * 2, b"\1"):
        with pytest.raises(PayloadError):
            mapping_from(bad)
    with pytest.raises(PayloadError):
        names_from(b"\1\0\0\0a" * 2)
    with pytest.raises(PayloadError, match="of 3 parts has 4"):
        unpacked(good, 3)
