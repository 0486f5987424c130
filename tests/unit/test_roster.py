"""A roster changes only by those who are on it, one complete version after the other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedkit.errors import TrustError
from fedkit.trust.roster import Chain, Version, fingerprint_of

NAMES = ("basel", "cleveland", "zurich", "budapest", "hull", "aachen")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([i] * 32)) for i, name in enumerate(NAMES, 1)}
PUBLIC = {name: key.public_key().public_bytes_raw().hex() for name, key in KEYS.items()}
FOUNDERS = NAMES[:4]


def signed(chain: Chain, *names: str) -> Chain:
    for name in names:
        chain = chain.sign(name, KEYS[name])
    return chain


def founded(threshold: int | None = 3) -> Chain:
    return signed(Chain.begin("hospitals", {name: PUBLIC[name] for name in FOUNDERS}, threshold), *FOUNDERS)


def test_a_signature_that_is_not_good_is_not_shown_as_one() -> None:
    chain = founded().propose(add={"hull": PUBLIC["hull"]})
    forged = {"basel": chain.versions[0].signatures["basel"], "eve": "00" * 64}
    chain = Chain((*chain.versions[:-1], dataclasses.replace(chain.last, signatures=forged)))
    assert signed(chain, "hull", "zurich").last.signers(chain.versions[0]) == {"hull", "zurich"}


def test_a_first_version_takes_everybody_it_names() -> None:
    chain = Chain.begin("hospitals", {name: PUBLIC[name] for name in FOUNDERS})
    assert chain.last.threshold == 3  # more than half of four
    with pytest.raises(
        TrustError, match="version 1 of the roster still needs signatures: the new members basel, budapest"
    ):
        chain.check()
    with pytest.raises(TrustError, match="the new member zurich"):
        signed(chain, "basel", "cleveland", "budapest").check()
    assert signed(chain, *FOUNDERS).check().version == 1


@given(st.sets(st.sampled_from(FOUNDERS)), st.booleans(), st.integers(1, 4))
def test_a_change_counts_exactly_when_enough_members_and_the_new_one_sign(
    signers: set[str], is_new_signed: bool, threshold: int
) -> None:
    chain = founded(threshold).propose(add={"hull": PUBLIC["hull"]})
    chain = signed(chain, *sorted(signers), *(["hull"] if is_new_signed else []))
    if len(signers) >= threshold and is_new_signed:
        assert set(chain.check().members) == {*FOUNDERS, "hull"}
    else:
        with pytest.raises(TrustError, match="version 2 of the roster still needs signatures"):
            chain.check()


def test_a_coordinator_that_mints_sites_of_its_own_gets_none_of_them_in() -> None:
    """They can all sign for each other, and it helps them nothing."""
    minted = {f"site{i}": Ed25519PrivateKey.generate() for i in range(5)}
    public = {name: key.public_key().public_bytes_raw().hex() for name, key in minted.items()}
    chain = founded().propose(add=public)
    for name, key in minted.items():
        chain = chain.sign(name, key)
    with pytest.raises(TrustError, match="still needs signatures: 3 of basel, budapest, cleveland, zurich"):
        chain.check()
    with pytest.raises(TrustError, match="still needs signatures"):
        signed(chain, "basel", "zurich").check()
    alone = Chain.begin("hospitals", public)
    for name, key in minted.items():
        alone = alone.sign(name, key)
    alone.check()  # a roster of its own is complete, and no member's
    with pytest.raises(TrustError, match="does not follow from version 1"):
        alone.check(founded().last)


def test_who_is_removed_may_sign_that_and_nothing_after() -> None:
    chain = signed(founded().propose(add={}, remove={"zurich"}), "zurich", "basel", "cleveland")
    assert "zurich" not in chain.check().members
    chain = chain.propose(add={"hull": PUBLIC["hull"]})
    with pytest.raises(TrustError, match="zurich with this key is no member"):
        chain.sign("zurich", KEYS["zurich"])


def test_a_member_that_changes_its_key_shows_that_it_holds_the_new_one() -> None:
    fresh = Ed25519PrivateKey.generate()
    public = fresh.public_key().public_bytes_raw().hex()
    chain = founded().propose(add={"basel": public}, remove={"basel"})
    chain = signed(chain, "cleveland", "zurich", "budapest")
    with pytest.raises(TrustError, match="the new member basel"):
        chain.check()
    assert chain.sign("basel", fresh).check().members["basel"] == public


def test_known_versions_are_not_taken_back() -> None:
    first = founded()
    second = signed(first.propose(add={"hull": PUBLIC["hull"]}), *FOUNDERS, "hull")
    assert second.check(first.last) == second.last
    assert second.check(second.last) == second.last
    with pytest.raises(TrustError, match="does not follow from version 2"):
        first.check(second.last)
    other = signed(first.propose(add={"aachen": PUBLIC["aachen"]}), *FOUNDERS, "aachen")
    with pytest.raises(TrustError, match="does not follow from version 2"):
        other.check(second.last)


def test_a_change_on_top_of_one_that_is_not_complete_is_refused() -> None:
    chain = founded().propose(add={"hull": PUBLIC["hull"]})
    with pytest.raises(TrustError, match="version 2 of the roster still needs signatures"):
        chain.propose(add={"aachen": PUBLIC["aachen"]})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"add": {"basel": PUBLIC["hull"]}}, "basel is one already"),
        ({"add": {}, "remove": {"hull"}}, "hull is no member"),
        ({"add": {}}, "nothing is changed"),
        ({"add": {"hull": PUBLIC["basel"]}}, "the same key"),
        ({"add": {"../hull": PUBLIC["hull"]}}, "names are 1 to 100"),
        ({"add": {"hull": "abc"}}, "64 hexadecimal"),
        ({"add": {}, "threshold": 5}, "1 to 4 members"),
        ({"add": {}, "threshold": 0}, "1 to 4 members"),
        ({"add": {}, "remove": set(FOUNDERS)}, "1 to 10000 members"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(TrustError, match=why):
        founded().propose(**changes)


def test_fewer_members_than_the_threshold_lower_it() -> None:
    assert founded(4).propose(add={}, remove={"basel"}).last.threshold == 3


# -- forgeries ---------------------------------------------------------------------------------------------------------

FORGED = {
    "a member's key": lambda v: v["members"].update(basel=PUBLIC["aachen"]),
    "a member more": lambda v: v["members"].update(aachen=PUBLIC["aachen"]),
    "a member less": lambda v: v["members"].pop("basel"),
    "a lower threshold": lambda v: v.update(threshold=1),
    "another federation": lambda v: v.update(federation="banks"),
    "another's signature": lambda v: v["signatures"].update(basel=v["signatures"]["zurich"]),
    "no signature": lambda v: v["signatures"].pop("basel"),
    "half a signature": lambda v: v["signatures"].update(basel=v["signatures"]["basel"][:64]),
    "a signature that is none": lambda v: v["signatures"].update(basel="zz" * 64),
    "another version before": lambda v: v.update(previous="0" * 64),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("which", [0, 1])
def test_whatever_is_changed_afterwards_is_noticed(change: Any, which: int) -> None:
    chain = signed(founded().propose(add={"hull": PUBLIC["hull"]}), *FOUNDERS[:3], "hull")
    tree = json.loads(chain.to_json())
    before = json.dumps(tree)
    change(tree["versions"][which])
    assert json.dumps(tree) != before
    with pytest.raises(TrustError):
        Chain.from_json(json.dumps(tree)).check()


@given(st.integers(0, 2**16), st.integers(0, 7))
def test_one_changed_bit_of_the_file_is_noticed_or_changes_nothing(at: int, bit: int) -> None:
    chain = signed(founded().propose(add={"hull": PUBLIC["hull"]}), *FOUNDERS, "hull")
    raw = bytearray(chain.to_json().encode())
    raw[at % len(raw)] ^= 1 << bit
    try:
        found = Chain.from_json(bytes(raw)).check()
    except TrustError:
        return
    assert found.body == chain.last.body  # white space, or a signature more than are needed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "nothing",
        '{"fedkit-roster": 2, "versions": []}',
        '{"fedkit-roster": 1, "versions": []}',
        "[" * 100_000,
    ],
)
def test_what_is_not_a_roster_is_refused(text: str) -> None:
    with pytest.raises(TrustError, match=r"not a roster|has a first version"):
        Chain.from_json(text)


@pytest.mark.parametrize("name", ["federation", "version", "threshold", "previous", "members", "signatures"])
@pytest.mark.parametrize("value", [None, True, 1.5, [], "x", {"a": 1}])
def test_a_field_of_another_kind_is_refused(name: str, value: object) -> None:
    tree = json.loads(founded().to_json())
    tree["versions"][0][name] = value
    with pytest.raises(TrustError):
        Chain.from_json(json.dumps(tree)).check()


def test_a_roster_is_saved_and_loaded(tmp_path: Path) -> None:
    chain = founded()
    chain.save(tmp_path / "roster.json")
    assert Chain.load(tmp_path / "roster.json") == chain
    with pytest.raises(TrustError, match="fedkit roster init"):
        Chain.load(tmp_path / "nowhere")
    (tmp_path / "roster.json").write_text("{")
    with pytest.raises(TrustError, match=r"roster\.json: this is not a roster"):
        Chain.load(tmp_path / "roster.json")


def test_the_order_of_members_and_signatures_does_not_count() -> None:
    chain = founded()
    backwards = Chain.begin("hospitals", {name: PUBLIC[name] for name in reversed(FOUNDERS)}, 3)
    assert backwards.last.digest == chain.last.digest
    assert signed(backwards, *reversed(FOUNDERS)).check(chain.last)


def test_signatures_of_one_version_are_of_no_use_under_another() -> None:
    chain = founded()
    moved = dataclasses.replace(chain.propose(add={}, threshold=1).last, signatures=chain.last.signatures)
    with pytest.raises(TrustError, match="still needs signatures"):
        Chain((*chain.versions, moved)).check()


def test_a_fingerprint_is_short_and_of_the_key_alone() -> None:
    assert len(fingerprint_of(PUBLIC["basel"])) == 39
    assert len({fingerprint_of(key) for key in PUBLIC.values()}) == len(PUBLIC)
    assert (
        Version("f", 1, 1, "", {"basel": PUBLIC["basel"]}).digest
        != Version("g", 1, 1, "", {"basel": PUBLIC["basel"]}).digest
    )
