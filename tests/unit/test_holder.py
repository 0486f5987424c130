"""An encrypted sum's key reaches members and nobody else, and opens one sum: keyholders and coordinators that lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto import bfv, ckks
from fedkit.crypto.ceremony import LETTER_BYTES, BoxKey, Ceremony, Delivery, Handed, Handover
from fedkit.crypto.encrypted import SecretKey
from fedkit.crypto.holder import Announced, Holder, enough
from fedkit.crypto.masks import packed
from fedkit.crypto.member import LEAST_COHORT
from fedkit.crypto.messages import Session, Told
from fedkit.errors import PayloadError, Reason, Refused
from fedkit.trust.signing import public_of

NAMES = ("ada", "bea", "cyd", "dee", "eve")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i, name in enumerate((*NAMES, "mal"), 1)}
ROSTER = {name: public_of(KEYS[name]) for name in NAMES}
SCHEME = bfv.Parameters(5).scheme
CEREMONY = Ceremony(Session("heart", 3, "call"), SCHEME)
TOLD = Told(bytes(32), b"\1" * 32)
SUM = b"\7" * 32


@cache
def secret(which: int) -> SecretKey:
    return SecretKey.make(SCHEME)


def holders(names: Iterable[str] = NAMES, ceremony: Ceremony = CEREMONY) -> dict[str, Holder]:
    return {name: Holder(ceremony, name, KEYS[name], ROSTER) for name in names}


def delivered(members: dict[str, Holder], which: int = 0, keyholder: str = "ada") -> Delivery:
    return members[keyholder].deliver([one.offer() for one in members.values()], secret(which))


def with_key() -> tuple[dict[str, Holder], dict[str, bytes]]:
    """Members who all have the key, and their signatures for it."""
    members = holders()
    delivery = delivered(members)
    return members, {name: one.receive(delivery.to(name)) for name, one in members.items()}


def encrypted(names: Iterable[str] = NAMES) -> dict[str, Holder]:
    """Members who have the key, of whom `names` have encrypted."""
    members, signatures = with_key()
    for name in names:
        members[name].encrypting(signatures, TOLD)
    return members


def refused(text: str) -> pytest.RaisesExc:
    return pytest.raises(Refused, match=f"encryption: .*{text}", check=lambda error: error.reason is Reason.ENCRYPTION)


def box(name: str, key: bytes, ceremony: Ceremony = CEREMONY, signer: str = "") -> BoxKey:
    return BoxKey.sign(ceremony.digest, name, key, KEYS[signer or name])


def resigned(handover: Handover, signer: str = "ada") -> Handover:
    return replace(handover, signature=KEYS[signer].sign(handover.body(CEREMONY)))


def test_every_member_gets_the_same_key_encrypts_once_and_opens_the_sum_that_all_have_signed() -> None:
    members, signatures = with_key()
    assert {one.encrypting(signatures, TOLD).data for one in members.values()} == {secret(0).data}
    announced = Announced(NAMES, SUM)
    attested = {name: one.attest(announced) for name, one in members.items()}
    assert {one.opening(attested, SUM).data for one in members.values()} == {secret(0).data}
    assert members["bea"].facts() == {
        "run": "heart",
        "round": 2,
        "call": "call",
        "key": secret(0).fingerprint.hex()[:16],
        "clients": 5,
        "names": "ada bea cyd dee eve",
        "sum": SUM.hex(),
    }


def test_nobody_who_passes_the_key_on_can_read_it() -> None:
    delivery = delivered(holders())
    assert {len(letter) for letter in delivery.letters.values()} == {LETTER_BYTES}
    for start in range(0, 57_000, 4096):
        assert secret(0).data[start : start + 32] not in delivery.to_bytes()


def test_members_go_on_after_every_step_from_what_they_have_written_down() -> None:
    def again(members: dict[str, Holder]) -> dict[str, Holder]:
        return {
            name: Holder.restore(one.to_bytes(), CEREMONY, name, KEYS[name], ROSTER) for name, one in members.items()
        }

    members = holders()
    offers = {name: one.offer() for name, one in members.items()}
    members = again(members)
    assert {name: one.offer() for name, one in members.items()} == offers
    delivery = delivered(members)
    members = again(members)
    signatures = {name: one.receive(delivery.to(name)) for name, one in members.items()}
    members = again(members)
    assert {name: one.receive(delivery.to(name)) for name, one in members.items()} == signatures
    for one in members.values():
        one.encrypting(signatures, TOLD)
    members = again(members)
    attested = {name: one.attest(Announced(NAMES, SUM)) for name, one in members.items()}
    members = again(members)
    assert {name: one.attest(Announced(NAMES, SUM)) for name, one in members.items()} == attested
    with refused("another sum was announced"):
        members["bea"].attest(Announced(NAMES, bytes(32)))
    with refused("encrypted for that sum before"):
        members["bea"].encrypting(signatures, TOLD)
    with refused("handed out a key for that sum before"):
        delivered(members, 1)
    assert again(members)["bea"].opening(attested, SUM) == secret(0)


def test_values_come_back_from_their_bytes() -> None:
    delivery = delivered(holders())
    handover, handed, announced = delivery.handover, delivery.to("bea"), Announced(NAMES, SUM)
    assert Handover.from_bytes(handover.to_bytes()) == handover
    assert Delivery.from_bytes(delivery.to_bytes()) == delivery
    assert Handed.from_bytes(handed.to_bytes()) == handed
    assert Announced.from_bytes(announced.to_bytes()) == announced
    for kind, good in ((Handover, handover), (Delivery, delivery), (Handed, handed), (Announced, announced)):
        data = good.to_bytes()
        for bad in (b"", b"\1", packed(b"a", b"b"), data[:-1], data + packed(b"x")):
            with pytest.raises(PayloadError):
                kind.from_bytes(bad)


# -- a coordinator that lies about the key -----------------------------------------------------------------------------


def test_a_key_that_the_coordinator_puts_under_a_members_name_gets_no_letter() -> None:
    members = holders()
    offers = [one.offer() for one in members.values()]
    mine = Holder(CEREMONY, "mal", KEYS["mal"], ROSTER).offer()
    with refused("not signed: eve"):
        members["ada"].deliver([*offers[:-1], box("eve", mine.value, signer="mal")], secret(0))
    with refused("roster: mal"):
        members["ada"].deliver([*offers, mine], secret(0))


def test_a_box_from_another_sum_gets_no_letter() -> None:
    members = holders()
    offers = [one.offer() for one in members.values()]
    for other in (
        replace(CEREMONY, session=replace(CEREMONY.session, run="lungs")),
        replace(CEREMONY, session=replace(CEREMONY.session, round=4)),
        replace(CEREMONY, session=replace(CEREMONY.session, call="another")),
        replace(CEREMONY, scheme=ckks.Parameters(5).scheme),
    ):
        with refused("not signed: eve"):
            members["ada"].deliver([*offers[:-1], box("eve", offers[-1].value, other)], secret(0))


def test_the_keyholder_gives_nothing_to_too_few_to_itself_left_out_or_under_other_parameters() -> None:
    members = holders()
    offers = [one.offer() for one in members.values()]
    with refused("2 members get the key, and the least is 3"):
        members["ada"].deliver(offers[:2], secret(0))
    with refused("keyholder ada is not among"):
        members["ada"].deliver(offers[1:], secret(0))
    other = replace(CEREMONY, scheme=bfv.Parameters(6).scheme)
    with refused("other parameters"):
        holders(ceremony=other)["ada"].deliver([one.offer() for one in holders(ceremony=other).values()], secret(0))
    with pytest.raises(PayloadError, match="once"):
        members["ada"].deliver([*offers, offers[0]], secret(0))
    with refused("nobody can agree with a key of eve"):
        members["ada"].deliver([*offers[:-1], box("eve", bytes(32))], secret(0))


def test_a_handover_that_the_keyholder_has_not_signed_is_refused() -> None:
    members = holders()
    delivery = delivered(members)
    handover = delivery.handover
    for false in (
        replace(handover, fingerprint=bytes(32)),
        resigned(handover, "mal"),
        resigned(handover, "bea"),
        replace(handover, boxes=handover.boxes[:3]),
        replace(handover, keyholder="cyd"),
    ):
        with refused(f"{false.keyholder} has not signed"):
            members["bea"].receive(replace(delivery.to("bea"), handover=false))


def test_another_members_letter_another_parcel_and_altered_ones_do_not_open() -> None:
    members = holders()
    delivery = delivered(members)
    good = delivery.to("bea")

    def altered(data: bytes, at: int) -> bytes:
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    for letter in (delivery.letters["cyd"], altered(good.letter, 0), altered(good.letter, -2)):
        with refused("does not open|agree"):
            members["bea"].receive(replace(good, letter=letter))
    for parcel in (altered(good.parcel, 0), altered(good.parcel, -2), delivered(holders()).parcel):
        with refused("does not open"):
            members["bea"].receive(replace(good, parcel=parcel))
    for wrong in ({"letter": good.letter[:-1]}, {"parcel": good.parcel[:-1]}):
        with pytest.raises(PayloadError):
            replace(good, **wrong)
    assert members["bea"].receive(good)


def test_members_encrypt_only_for_those_who_were_told_the_same() -> None:
    members = holders()
    everybody = delivered(members)
    part = members["bea"].deliver([members[name].offer() for name in NAMES[:3]], secret(1))
    signatures = {name: one.receive((part if name == "cyd" else everybody).to(name)) for name, one in members.items()}
    with refused("same key: cyd"):
        members["bea"].encrypting(signatures, TOLD)
    with refused("another key before, or told of other members"):
        members["cyd"].receive(everybody.to("cyd"))


def test_a_signature_that_is_false_or_of_somebody_without_the_key_stops_all() -> None:
    members, signatures = with_key()
    fresh = holders()["bea"]
    with refused("no key was handed over"):
        fresh.encrypting(signatures, TOLD)
    mal = KEYS["mal"].sign(b"anything")
    for false in ({"dee": bytes(64)}, {"dee": signatures["cyd"]}, {"mal": mal}):
        with refused("same key: (dee|mal)"):
            members["bea"].encrypting(signatures | false, TOLD)
    for few in (["ada", "bea"], ["ada", "cyd", "dee"]):
        with refused("members have the key with this one"):
            members["bea"].encrypting({name: signatures[name] for name in few}, TOLD)
    assert members["bea"].encrypting({name: signatures[name] for name in ("ada", "bea", "cyd")}, TOLD) == secret(0)


def test_a_member_that_is_left_out_or_has_another_box_in_the_list_takes_no_part() -> None:
    members = holders()
    delivery = delivered({name: members[name] for name in NAMES[:3]})
    with refused("leaves it out"):
        members["dee"].receive(delivery.to("bea"))
    with refused("another box under its name"):
        members["bea"].receive(delivered(holders()).to("bea"))


# -- a coordinator that lies about the sum -----------------------------------------------------------------------------


def test_a_member_signs_one_sum_that_has_its_own_values_and_enough_members_with_the_key() -> None:
    with refused("nothing was encrypted"):
        encrypted(["ada"])["bea"].attest(Announced(NAMES, SUM))
    members = encrypted()
    with refused("leaves this site out"):
        members["bea"].attest(Announced(("ada", "cyd", "dee"), SUM))
    with refused("have not got the same key"):
        members["bea"].attest(Announced((*NAMES, "mal"), SUM))
    with refused("2 members, and the least is 3"):
        members["bea"].attest(Announced(("ada", "bea"), SUM))
    assert members["bea"].attest(Announced(NAMES, SUM))
    for other in (Announced(NAMES, bytes(32)), Announced(NAMES[:4], SUM)):
        with refused("another sum was announced before"):
            members["bea"].attest(other)


def test_what_is_vowed_of_an_update_is_what_was_encrypted_whatever_is_said_later() -> None:
    """Also by other calls of the same round; of scores nothing is."""
    vows = []
    for call in ("call", "another"):
        ceremony = replace(CEREMONY, session=replace(CEREMONY.session, call=call))
        members = holders(ceremony=ceremony)
        delivery = delivered(members)
        signatures = {name: one.receive(delivery.to(name)) for name, one in members.items()}
        for name, one in members.items():
            one.encrypting(signatures, TOLD, is_update=name != "bea")
        with refused("no sum was announced"):
            _ = members["ada"].vow
        for one in members.values():
            one.attest(Announced(NAMES, SUM))
        again = Holder.restore(members["ada"].to_bytes(), ceremony, "ada", KEYS["ada"], ROSTER)
        assert again.vow == members["ada"].vow == members["cyd"].vow
        assert members["bea"].vow is None
        vows.append(again.vow)
    (question, statement), (same, other) = vows
    assert question == same
    assert statement != other


def test_of_two_sums_that_members_are_told_of_none_is_opened_by_both_halves() -> None:
    """Whatever way a coordinator splits five members over two sums, at most one of these is ever opened."""
    for half in (1, 2, 3, 4):
        members = encrypted()
        announced = {name: Announced(NAMES, SUM if i < half else bytes(32)) for i, name in enumerate(NAMES)}
        attested = {name: one.attest(announced[name]) for name, one in members.items()}
        opened = set()
        for name, one in members.items():
            try:
                one.opening(attested, announced[name].digest)
            except Refused:
                continue
            opened.add(announced[name].digest)
        assert opened == ({SUM} if half >= 3 else {bytes(32)})


def test_two_groups_that_differ_by_one_member_cannot_both_have_enough_signatures_of_members_who_sign_once() -> None:
    assert all(max(enough(n), LEAST_COHORT) + max(enough(n - 1), LEAST_COHORT) > n for n in range(4, 1000))


def test_a_sum_is_opened_only_as_it_was_announced_and_signed_by_most_of_those_who_have_the_key() -> None:
    members = encrypted()
    with refused("no sum was announced"):
        members["bea"].opening({}, SUM)
    attested = {name: one.attest(Announced(NAMES, SUM)) for name, one in members.items()}
    with refused("not the sum that was announced"):
        members["bea"].opening(attested, bytes(32))
    few = {name: attested[name] for name in ("ada", "bea")}
    for signatures in ({}, few, few | {"cyd": attested["dee"]}, few | {"mal": KEYS["mal"].sign(b"x")}):
        with refused("and 3 are needed"):
            members["bea"].opening(signatures, SUM)
    assert members["bea"].opening(few | {"cyd": attested["cyd"]}, SUM) == secret(0)
    assert [enough(members) for members in (3, 4, 5, 6)] == [2, 3, 3, 4]


def test_members_who_were_asked_other_things_do_not_sign_the_same_sum() -> None:
    members, signatures = with_key()
    for i, one in enumerate(members.values()):
        one.encrypting(signatures, TOLD if i else Told(b"\3" * 32, TOLD.work))
    attested = {name: one.attest(Announced(NAMES, SUM)) for name, one in members.items()}
    with refused("1 members have signed this sum"):
        members["ada"].opening(attested, SUM)


# -- a keyholder that lies ---------------------------------------------------------------------------------------------


def test_a_keyholder_that_gives_members_different_keys_is_found_out() -> None:
    members = holders()
    one, other = delivered(members, 0), delivered(members, 1, "bea")
    signatures = {
        name: member.receive((other if name in ("cyd", "dee") else one).to(name)) for name, member in members.items()
    }
    with refused("same key: cyd, dee"):
        members["bea"].encrypting(signatures, TOLD)
    with refused("same key: ada, bea, eve"):
        members["cyd"].encrypting(signatures, TOLD)


def test_a_keyholder_that_signs_one_fingerprint_and_seals_another_key_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members, promised = holders(), secret(0).fingerprint
    monkeypatch.setattr(SecretKey, "fingerprint", property(lambda key: promised))
    delivery = delivered(members, 1)
    monkeypatch.undo()
    with refused("another fingerprint"):
        members["bea"].receive(delivery.to("bea"))


def test_a_keyholder_that_seals_no_key_is_found_out() -> None:
    class Nothing:
        scheme, fingerprint, data = SCHEME, bytes(32), b"\xff" * SCHEME.key_bytes

    members = holders()
    delivery = members["ada"].deliver([one.offer() for one in members.values()], Nothing())
    with refused("modulus"):
        members["bea"].receive(delivery.to("bea"))


def test_a_keyholder_cannot_count_in_members_that_are_on_nobodys_roster() -> None:
    members = holders()
    mine = Holder(CEREMONY, "mal", KEYS["mal"], ROSTER).offer()
    keyholder = Holder(CEREMONY, "ada", KEYS["ada"], ROSTER | {"mal": public_of(KEYS["mal"])})
    offers = [keyholder.offer(), *(members[name].offer() for name in NAMES[1:]), mine]
    delivery = keyholder.deliver(offers, secret(0))
    with refused("roster: mal"):
        members["bea"].receive(delivery.to("bea"))


# -- state -------------------------------------------------------------------------------------------------------------


def test_a_state_that_is_none_or_of_another_sum_is_refused() -> None:
    one = holders()["bea"]
    good = one.to_bytes()
    for data in (
        b"",
        good[:-1],
        good + b"\0",
        good.replace(b"bea", b"cyd"),
        good.replace(b"\1\0\0\0\0", b"\1\0\0\0\2"),
    ):
        with pytest.raises(PayloadError):
            Holder.restore(data, CEREMONY, "bea", KEYS["bea"], ROSTER)
    other = replace(CEREMONY, session=replace(CEREMONY.session, call="another"))
    with pytest.raises(PayloadError, match="this sum"):
        Holder.restore(good, other, "bea", KEYS["bea"], ROSTER)


def test_secrets_are_not_shown() -> None:
    members, _ = with_key()
    assert repr(members["bea"]) == "<Holder bea in a sum of heart>"
    assert secret(0).data.hex()[:32] not in repr(members["bea"]._state)
    assert repr(secret(0).data[:8])[2:-1] not in repr(delivered(holders()))
    assert np.frombuffer(secret(0).data, np.uint8).size == SCHEME.key_bytes
