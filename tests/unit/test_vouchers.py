"""A cohort is counted by the members' own words, and by nothing a coordinator can make."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.client.roster import KnownRoster
from fedkit.trust import vouchers
from fedkit.trust.roster import Chain
from fedkit.trust.signing import public_of
from fedkit.trust.vouchers import LIFETIME_S, Voucher, vouched

KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([i] * 32)) for i, name in enumerate(("ada", "bea", "cyd"), 1)}
CHAIN = Chain.begin("hospitals", {name: public_of(key) for name, key in KEYS.items()})
for one, secret in KEYS.items():
    CHAIN = CHAIN.sign(one, secret)
ROSTER = CHAIN.last
NEXT = CHAIN.propose(add={}, threshold=1).last
GOOD = {name: Voucher.sign(name, key, ROSTER) for name, key in KEYS.items()}
MINTED = Ed25519PrivateKey.generate()


def test_members_are_counted_once_each() -> None:
    assert vouched(GOOD.values(), ROSTER) == {"ada", "bea", "cyd"}
    assert vouched([GOOD["ada"], Voucher.sign("ada", KEYS["ada"], ROSTER), GOOD["ada"]], ROSTER) == {"ada"}
    assert vouched([], ROSTER) == set()


@pytest.mark.parametrize(
    "voucher",
    [
        Voucher.sign("eve", MINTED, ROSTER),
        Voucher.sign("ada", MINTED, ROSTER),
        Voucher.sign("ada", KEYS["bea"], ROSTER),
        Voucher.sign("ada", KEYS["ada"], NEXT),
        dataclasses.replace(GOOD["ada"], name="bea"),
        dataclasses.replace(GOOD["ada"], expires=GOOD["ada"].expires + 1),
        dataclasses.replace(GOOD["ada"], signature=bytes(64)),
        dataclasses.replace(GOOD["ada"], signature=b""),
        dataclasses.replace(GOOD["ada"], expires=(1 << 63) - 1),
    ],
    ids=["no member", "minted key", "other member", "other version", "renamed", "longer", "unsigned", "empty", "ever"],
)
def test_whoever_mints_certificates_mints_no_vouchers(voucher: Voucher) -> None:
    assert vouched([voucher], ROSTER) == set()


@pytest.mark.parametrize(("hours", "holds"), [(0, True), (1, True), (1.5, False), (-1, False), (-0.1, True)])
def test_a_voucher_ends_and_begins_with_some_room_for_slow_clocks(
    monkeypatch: pytest.MonkeyPatch, hours: float, holds: bool
) -> None:
    now = GOOD["ada"].expires - LIFETIME_S
    monkeypatch.setattr(vouchers.time, "time", lambda: now + 3600 * hours)
    assert GOOD["ada"].holds(ROSTER) is holds


def known(folder: Path, name: str, key: Ed25519PrivateKey | None) -> KnownRoster:
    CHAIN.save(folder / "given.json")
    return KnownRoster(folder / "roster.json", folder / "given.json", name, key)


def test_a_member_gives_its_word_anew_before_the_last_one_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roster = known(tmp_path, "ada", KEYS["ada"])
    first = roster.voucher()
    assert first is not None
    assert first.holds(ROSTER)
    assert roster.voucher() is None
    assert roster.voucher(fresh=True) is not None
    later = time.time() + LIFETIME_S / 2 + 1
    monkeypatch.setattr(vouchers.time, "time", lambda: later)
    again = roster.voucher()
    assert again is not None
    assert again.expires > first.expires
    assert roster.hear(CHAIN.propose(add={}, threshold=1).sign("ada", KEYS["ada"]).sign("bea", KEYS["bea"]).to_json())
    newest = roster.voucher()
    assert newest is not None
    assert newest.holds(NEXT)


@pytest.mark.parametrize(("name", "key"), [("ada", None), ("eve", MINTED), ("ada", MINTED)])
def test_who_is_no_member_gives_no_word(tmp_path: Path, name: str, key: Ed25519PrivateKey | None) -> None:
    assert known(tmp_path, name, key).voucher(fresh=True) is None
