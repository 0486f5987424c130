"""The run's key reaches every member and nobody else, or nobody uses it: keyholders and coordinators that lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto import bfv, ckks
from fedkit.crypto.ceremony import LETTER_BYTES, BoxKey, Ceremony, Handover, Recipient, deliver
from fedkit.crypto.encrypted import SecretKey
from fedkit.crypto.masks import packed
from fedkit.errors import PayloadError, Reason, Refused
from fedkit.trust.signing import public_of

NAMES = ("ada", "bea", "cyd", "dee")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i, name in enumerate((*NAMES, "mal"), 1)}
ROSTER = {name: public_of(KEYS[name]) for name in NAMES}
SCHEME = bfv.Parameters(4).scheme
CEREMONY = Ceremony("heart", 0, "ada", SCHEME)


@cache
def secret(which: int) -> SecretKey:
    return SecretKey.make(SCHEME)


def recipients(names: Iterable[str] = NAMES, ceremony: Ceremony = CEREMONY) -> dict[str, Recipient]:
    return {name: Recipient(ceremony, name, KEYS[name], ROSTER, least=3) for name in names}


def delivered(members: dict[str, Recipient], which: int = 0) -> tuple[Handover, dict[str, bytes]]:
    boxes = [one.offer() for one in members.values()]
    return deliver(CEREMONY, secret(which), boxes, key=KEYS["ada"], members=ROSTER, least=3)


def refused(text: str) -> pytest.RaisesExc:
    return pytest.raises(Refused, match=f"encryption: .*{text}", check=lambda error: error.reason is Reason.ENCRYPTION)


def box(name: str, key: bytes, ceremony: Ceremony = CEREMONY, signer: str = "") -> BoxKey:
    return BoxKey.sign(ceremony.digest, name, key, KEYS[signer or name])


def resigned(handover: Handover, signer: str = "ada") -> Handover:
    return replace(handover, signature=KEYS[signer].sign(handover.body(CEREMONY)))


def test_every_member_gets_the_same_key_and_uses_it_when_all_have_signed_for_it() -> None:
    members = recipients()
    handover, letters = delivered(members)
    signatures = {name: one.receive(handover, letters[name]) for name, one in members.items()}
    for one in members.values():
        with refused("not confirmed"):
            _ = one.secret
    assert {one.conclude(signatures).data for one in members.values()} == {secret(0).data}
    assert {len(letter) for letter in letters.values()} == {LETTER_BYTES}
    assert all(secret(0).data[:64] not in letter for letter in letters.values())


def test_members_go_on_after_every_step_from_what_they_have_written_down() -> None:
    def again(one: Recipient) -> Recipient:
        return Recipient.restore(one.to_bytes(), CEREMONY, one.name, KEYS[one.name], ROSTER, least=3)

    members = recipients()
    offers = {name: one.offer() for name, one in members.items()}
    members = {name: again(one) for name, one in members.items()}
    assert {name: one.offer() for name, one in members.items()} == offers
    handover, letters = delivered(members)
    signatures = {name: one.receive(handover, letters[name]) for name, one in members.items()}
    members = {name: again(one) for name, one in members.items()}
    assert {name: one.receive(handover, b"") for name, one in members.items()} == signatures
    for one in members.values():
        one.conclude(signatures)
        assert again(one).secret == secret(0)


def test_values_come_back_from_their_bytes() -> None:
    handover, _ = delivered(recipients())
    assert Handover.from_bytes(handover.to_bytes()) == handover
    assert BoxKey.from_bytes(handover.boxes[0].to_bytes()) == handover.boxes[0]
    for data in (b"", b"\1", packed(b"a", b"b"), handover.to_bytes()[:-1], handover.to_bytes() + packed(b"x")):
        with pytest.raises(PayloadError):
            Handover.from_bytes(data)


# -- a coordinator that lies -------------------------------------------------------------------------------------------


def test_a_key_that_the_coordinator_puts_under_a_members_name_gets_no_letter() -> None:
    members = recipients()
    offers = [one.offer() for one in members.values()]
    mine = Recipient(CEREMONY, "mal", KEYS["mal"], ROSTER, least=3).offer()
    swapped = [*offers[:-1], box("dee", mine.value, signer="mal")]
    with refused("not signed: dee"):
        deliver(CEREMONY, secret(0), swapped, key=KEYS["ada"], members=ROSTER, least=3)
    with refused("roster: mal"):
        deliver(CEREMONY, secret(0), [*offers, mine], key=KEYS["ada"], members=ROSTER, least=3)


def test_a_key_from_another_ceremony_gets_no_letter() -> None:
    offers = [one.offer() for one in recipients().values()]
    for other in (
        replace(CEREMONY, run="lungs"),
        replace(CEREMONY, attempt=1),
        replace(CEREMONY, keyholder="bea"),
        replace(CEREMONY, scheme=ckks.Parameters(4).scheme),
    ):
        stale = box("dee", offers[-1].value, other)
        with refused("not signed: dee"):
            deliver(CEREMONY, secret(0), [*offers[:-1], stale], key=KEYS["ada"], members=ROSTER, least=3)


def test_the_keyholder_gives_nothing_to_too_few_to_itself_left_out_or_under_other_parameters() -> None:
    offers = [one.offer() for one in recipients().values()]
    with refused("2 members get the key, and the least is 3"):
        deliver(CEREMONY, secret(0), offers[:2], key=KEYS["ada"], members=ROSTER, least=3)
    with refused("keyholder ada is not among"):
        deliver(CEREMONY, secret(0), offers[1:], key=KEYS["ada"], members=ROSTER, least=3)
    with refused("other parameters"):
        other = replace(CEREMONY, scheme=bfv.Parameters(5).scheme)
        deliver(other, secret(0), offers, key=KEYS["ada"], members=ROSTER, least=3)
    with pytest.raises(PayloadError, match="once"):
        deliver(CEREMONY, secret(0), [*offers, offers[0]], key=KEYS["ada"], members=ROSTER, least=3)
    weak = [*offers[:-1], box("dee", bytes(32))]
    with refused("nobody can agree with a key of dee"):
        deliver(CEREMONY, secret(0), weak, key=KEYS["ada"], members=ROSTER, least=3)


def test_a_handover_that_the_keyholder_has_not_signed_is_refused() -> None:
    members = recipients()
    handover, letters = delivered(members)
    fewer = replace(handover, boxes=handover.boxes[:3])
    for false in (
        replace(handover, fingerprint=bytes(32)),
        resigned(handover, "mal"),
        resigned(handover, "bea"),
        fewer,
    ):
        with refused("ada has not signed"):
            members["bea"].receive(false, letters["bea"])


def test_another_members_letter_and_an_altered_one_do_not_open() -> None:
    members = recipients()
    handover, letters = delivered(members)
    altered = bytes([letters["bea"][0] ^ 1]) + letters["bea"][1:]
    for false in (letters["cyd"], altered, letters["bea"][:-1] + b"\0", bytes(32) + letters["bea"][32:]):
        with refused("does not open|agree"):
            members["bea"].receive(handover, false)
    with refused("57392 bytes"):
        members["bea"].receive(handover, letters["bea"][:-1])
    assert members["bea"].receive(handover, letters["bea"])


def test_members_who_were_told_of_different_members_use_no_key() -> None:
    members = recipients()
    everybody = delivered(members)
    fewer = delivered({name: members[name] for name in NAMES[:3]})
    signatures = {
        name: one.receive(told[0], told[1][name])
        for name, one in members.items()
        for told in [fewer if name == "cyd" else everybody]
    }
    with refused("same key: cyd"):
        members["bea"].conclude(signatures)
    with refused("another key before, or told of other members"):
        members["cyd"].receive(*((everybody[0], everybody[1]["cyd"])))


def test_no_key_is_used_while_a_signature_is_missing_or_false() -> None:
    members = recipients()
    handover, letters = delivered(members)
    with refused("no key was handed over"):
        members["bea"].conclude({})
    signatures = {name: one.receive(handover, letters[name]) for name, one in members.items()}
    for false in ({}, {"dee": bytes(64)}, {"dee": signatures["cyd"]}):
        with refused("same key: dee"):
            members["bea"].conclude({name: signatures[name] for name in NAMES[:3]} | false)


def test_a_member_that_is_left_out_or_has_another_key_in_the_list_takes_no_part() -> None:
    members = recipients()
    handover, letters = delivered({name: members[name] for name in NAMES[:3]})
    with refused("leaves it out"):
        members["dee"].receive(handover, letters["bea"])
    elsewhere = recipients()
    handover, letters = delivered(elsewhere)
    with refused("another key under its name"):
        members["bea"].receive(handover, letters["bea"])


# -- a keyholder that lies ---------------------------------------------------------------------------------------------


def test_a_keyholder_that_gives_members_different_keys_is_found_out() -> None:
    members = recipients()
    one, other = delivered(members, 0), delivered(members, 1)
    signatures = {
        name: member.receive(told[0], told[1][name])
        for name, member in members.items()
        for told in [other if name in ("cyd", "dee") else one]
    }
    with refused("same key: cyd, dee"):
        members["bea"].conclude(signatures)
    with refused("same key: ada, bea"):
        members["cyd"].conclude(signatures)


def test_a_keyholder_that_signs_one_fingerprint_and_seals_another_key_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members, promised = recipients(), secret(0).fingerprint
    monkeypatch.setattr(SecretKey, "fingerprint", property(lambda key: promised))
    handover, letters = delivered(members, 1)
    monkeypatch.undo()
    with refused("another fingerprint"):
        members["bea"].receive(handover, letters["bea"])


def test_a_keyholder_that_seals_no_key_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        scheme, fingerprint, data = SCHEME, bytes(32), b"\xff" * 57344

    members = recipients()
    boxes = [one.offer() for one in members.values()]
    handover, letters = deliver(CEREMONY, Nothing(), boxes, key=KEYS["ada"], members=ROSTER, least=3)
    with refused("modulus"):
        members["bea"].receive(handover, letters["bea"])


def test_a_keyholder_cannot_count_in_members_that_are_on_nobodys_roster() -> None:
    members = recipients()
    mine = Recipient(CEREMONY, "mal", KEYS["mal"], ROSTER, least=3).offer()
    boxes = [*(one.offer() for one in members.values()), mine]
    wide = ROSTER | {"mal": public_of(KEYS["mal"])}
    handover, letters = deliver(CEREMONY, secret(0), boxes, key=KEYS["ada"], members=wide, least=3)
    with refused("roster: mal"):
        members["bea"].receive(handover, letters["bea"])


# -- state -------------------------------------------------------------------------------------------------------------


def test_a_state_that_is_none_or_of_another_ceremony_is_refused() -> None:
    one = recipients()["bea"]
    good = one.to_bytes()
    for data in (b"", good[:-1], good + b"\0", good[:-1] + b"\1", good.replace(b"bea", b"cyd")):
        with pytest.raises(PayloadError):
            Recipient.restore(data, CEREMONY, "bea", KEYS["bea"], ROSTER, least=3)
    with pytest.raises(PayloadError, match="this ceremony"):
        Recipient.restore(good, replace(CEREMONY, attempt=1), "bea", KEYS["bea"], ROSTER, least=3)


def test_what_no_run_has_is_no_ceremony() -> None:
    for field in ({"run": "x" * 513}, {"attempt": -1}, {"keyholder": "a b"}):
        with pytest.raises(PayloadError):
            replace(CEREMONY, **field)


def test_secrets_are_not_shown() -> None:
    members = recipients()
    handover, letters = delivered(members)
    members["bea"].receive(handover, letters["bea"])
    assert repr(members["bea"]) == "<Recipient bea of the key of heart>"
    assert secret(0).data.hex()[:32] not in repr(members["bea"]._state)
    assert np.frombuffer(secret(0).data, np.uint8).size == 57344
