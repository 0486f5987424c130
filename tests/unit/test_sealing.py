"""What a site seals, and for whom; what it opens, from whom; and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.config import Privacy
from fedkit.crypto.box import Box
from fedkit.crypto.ceremony import BoxKey
from fedkit.crypto.sealing import Header, SealedModel, Stamp, Subject, header_of, manifest_of, seal
from fedkit.errors import ConfigError, Reason, Refused
from fedkit.gate import BEFORE, VERDICT, Gate, Verdict
from fedkit.queries import RowCount
from fedkit.rounds.assignment import Assignment, Parcel, Sealing
from fedkit.rounds.hops import SealedHops
from fedkit.rounds.sealing import Letters, answered_box, letters_for
from fedkit.trust.signing import public_of
from fedkit.weights import Entry, Manifest, Weights
from fedkit.work import Evaluate, Fit, Gradient, Summarize, Update

NAMES = ("ada", "bea", "cyd", "dan", "eve")
KEYS = {name: Ed25519PrivateKey.generate() for name in (*NAMES, "mallory")}
MEMBERS = {name: public_of(KEYS[name]) for name in NAMES}
BOXES = {name: Box(name, key, lambda: MEMBERS) for name, key in KEYS.items()}
RUN, OTHER = "heart-1.0a1b2c3d", "heart-2.4e5f6a7b"
PLAIN = Manifest((Entry("w", (12,)),))
START = Weights(PLAIN, np.arange(12.0))
FIT = Fit(steps=1)


def offers(*names: str, run: str = RUN) -> tuple[BoxKey, ...]:
    return tuple(BOXES[name].offer(run) for name in names)


def sealing(*boxes: BoxKey, by: str = "ada") -> Sealing:
    subject = Subject(RUN, 0, "0" * 32, by, PLAIN.to_json())
    return Sealing(boxes, manifest_of(subject, [one.name for one in boxes], PLAIN.size).size)


def asked(client: str, *boxes: BoxKey, **changes: Any) -> Assignment:
    given = sealing(*boxes, by=client) if boxes else None
    return replace(Assignment("a" * 32, RUN, 1, 2, client, FIT, "weights", sealing=given), **changes)


def hopped(client: str, model: Weights, *to: str, before: Weights | None = None, **changes: Any) -> SealedModel:
    """The model after a visit of `client`, which has added 1 to each value."""
    extra = {} if before is None else {BEFORE: before.vector}
    letters = letters_for(asked(client, *offers(*to), **changes), Parcel(model, extra), BOXES[client])
    start = letters.open(Parcel(model, extra)).model
    after = letters.close(Update(start + 1.0, 12))
    assert isinstance(after, Update)
    return SealedModel.of(after.weights)


def refused(match: str) -> Any:
    return pytest.raises(Refused, match=match)


# -- from site to site -------------------------------------------------------------------------------------------------


def test_a_model_goes_from_site_to_site_and_each_one_reads_only_what_is_for_it() -> None:
    first = hopped("ada", START, "bea", "cyd")
    second = hopped("bea", first, "cyd", "dan")
    assert (second.header.subject.sealer, second.header.names) == ("bea", {"cyd", "dan"})
    assert BOXES["dan"].open(second) == START + 2.0
    with refused("not sealed for dan"):
        hopped("dan", first, "eve")


def test_what_goes_to_the_process_that_trains_holds_no_roster_key_and_shows_nothing() -> None:
    first = hopped("ada", START, "bea")
    letters = letters_for(asked("bea", *offers("cyd")), Parcel(first), BOXES["bea"])
    text = repr(letters) + repr(BOXES["bea"])
    assert Letters.from_dict(letters.to_dict()) == letters
    assert KEYS["bea"].private_bytes_raw() not in str(letters.to_dict()).encode()
    for secret in (letters.contents[""], letters.stamp.content, letters.stamp.voice):  # type: ignore[union-attr]
        assert repr(secret) not in text
        assert secret.hex() not in text


def test_a_plain_run_has_no_letters() -> None:
    assert letters_for(asked("ada"), Parcel(START), None) == Letters()
    assert Letters().open(Parcel(START)).model is START


def test_a_box_key_is_the_same_after_a_restart_and_another_in_another_run() -> None:
    again = Box("ada", KEYS["ada"], lambda: MEMBERS)
    assert again.offer(RUN) == BOXES["ada"].offer(RUN) == BOXES["ada"].offer("heart-1")  # as its owner knows it before
    assert again.offer(OTHER).value != again.offer(RUN).value


# -- recipients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        ((*offers("bea"), *offers("mallory")), "not on the roster: mallory"),
        ((replace(offers("bea")[0], value=offers("mallory")[0].value),), "not signed for this run: bea"),
        ((replace(offers("mallory")[0], name="bea"),), "not signed for this run: bea"),
        (offers("bea", run=OTHER), "not signed for this run: bea"),
        (offers("cyd", "bea"), "sorted"),
        (offers("bea", "bea"), "sorted"),
    ],
    ids=["stranger", "swapped key", "stranger's key", "another run's", "out of order", "twice"],
)
def test_a_site_seals_for_members_alone(boxes: tuple[BoxKey, ...], why: str) -> None:
    assignment = asked("ada", sealing=Sealing(boxes, sealing(*offers("bea", "cyd")[: len(boxes)]).words))
    size = replace(assignment.sealing, words=_words(boxes))  # type: ignore[type-var]
    with refused(why) as caught:
        letters_for(replace(assignment, sealing=size), Parcel(START), BOXES["ada"])
    assert caught.value.reason is Reason.ENCRYPTION


def _words(boxes: tuple[BoxKey, ...]) -> int:
    """As many as it would make, or 1 where such a list makes none."""
    names = [one.name for one in boxes]
    subject = Subject(RUN, 0, "0" * 32, "ada", PLAIN.to_json())
    return manifest_of(subject, names, PLAIN.size).size


def test_a_site_that_is_on_no_roster_takes_no_part() -> None:
    for assignment in (asked("ada", *offers("bea")), asked("ada", returns="reply", sealing=Sealing())):
        with refused("--roster"):
            answered_box(assignment, None) if assignment.returns == "reply" else letters_for(
                assignment, Parcel(START), None
            )


def test_a_model_of_other_tensors_is_not_sealed() -> None:
    wrong = replace(sealing(*offers("bea")), words=99)
    with refused("does not make 99 words"):
        letters_for(asked("ada", sealing=wrong), Parcel(START), BOXES["ada"])
    letters = letters_for(asked("ada", *offers("bea")), Parcel(START), BOXES["ada"])
    with refused("other tensors"):
        letters.close(Update(Weights.zeros(Manifest((Entry("v", (12,)),))), 12))


def test_nothing_leaves_unsealed_beside_a_sealed_model() -> None:
    letters = letters_for(asked("ada", *offers("bea")), Parcel(START), BOXES["ada"])
    with refused("beside the sealed model"):
        letters.close(Update(START, 12, extra={"control": START.vector}))


# -- what comes --------------------------------------------------------------------------------------------------------


def test_models_that_no_member_has_sealed_for_this_run_are_refused() -> None:
    first = hopped("ada", START, "bea")
    by_stranger = _forged("mallory", KEYS["mallory"])
    cases = {
        "sealed in another run": asked("bea", *offers("cyd", run=OTHER), run=OTHER),
        "which is yet to come": asked("bea", *offers("cyd"), round=1),
    }
    for why, assignment in cases.items():
        with refused(why):
            letters_for(assignment, Parcel(first), BOXES["bea"])
    for forged, why in (
        (by_stranger, "not on this site's roster"),
        (_forged("ada", KEYS["mallory"]), "ada has not signed"),
    ):
        with refused(why):
            hopped("bea", forged, "cyd")


def _forged(name: str, key: Ed25519PrivateKey) -> SealedModel:
    """A model of the coordinator's own, under somebody's name."""
    stamp = Stamp.fresh()
    header = Header.make(Subject(RUN, 1, "a" * 32, name, PLAIN.to_json()), stamp, offers("bea"), key)
    return seal(header, stamp, START.vector)


def test_a_ciphertext_is_signed_too_so_no_recipient_can_put_another_in_its_place() -> None:
    first = hopped("ada", START, "bea", "cyd")
    content = BOXES["cyd"].content_key(first, RUN, 2)
    mine = Stamp(content, Stamp.fresh().voice)
    with refused("has not signed the sealed model that came"):
        BOXES["bea"].open(seal(first.header, mine, START.vector * 0.0))


def test_two_models_cannot_come_out_of_one_header() -> None:
    """A sealer that wraps one content key for one recipient and another for the next is found out."""
    one = hopped("ada", START, "bea", "cyd").header
    other = BOXES["cyd"].offer(RUN)
    assert one.content_key("bea", BOXES["bea"]._private(RUN)) == one.content_key("cyd", BOXES["cyd"]._private(RUN))
    wraps = dict(one.wraps) | {"cyd": one.wrap(other, bytes(32), BOXES["cyd"]._private(RUN).agree(one.lock))}
    with refused("does not open"):
        replace(one, wraps=wraps).content_key("cyd", BOXES["cyd"]._private(RUN))


@pytest.mark.parametrize(
    "changes",
    [
        {"work": FIT, "returns": "weights"},
        {"work": FIT, "returns": "update"},
        {"work": Gradient(), "returns": "update"},
        {"work": Summarize(query=RowCount()), "returns": "sums"},
    ],
    ids=["plain hop", "update", "gradient", "summary"],
)
def test_a_sealed_model_is_scored_or_trained_and_sealed_again_and_nothing_else(changes: dict[str, Any]) -> None:
    first = hopped("ada", START, "bea")
    with refused("nothing else"):
        letters_for(asked("bea", **changes), Parcel(first), BOXES["bea"])
    scored = letters_for(asked("bea", work=Evaluate(), returns="sums"), Parcel(first), BOXES["bea"])
    assert scored.open(Parcel(first)).model == START + 1.0


# -- gates -------------------------------------------------------------------------------------------------------------


def test_a_model_is_compared_with_the_one_before_and_with_no_other() -> None:
    first = hopped("ada", START, "bea", "cyd", "dan")
    second = hopped("bea", first, "cyd", "dan", before=START)
    third = hopped("cyd", second, "dan", before=first)
    assert hopped("cyd", second, "dan", before=START).header.names == {"dan"}  # bea may not have accepted the first
    probe = Weights(PLAIN, np.full(12, 0.5))
    for model, before in ((first, probe), (third, probe), (third, START), (START, probe)):
        with refused("not the one before"):
            hopped("dan", model, "eve", before=before)


def test_two_visits_of_one_site_in_a_row_are_compared_as_one() -> None:
    first = hopped("ada", START, "bea")
    second = hopped("bea", first, "bea", "cyd", before=START)
    again = hopped("bea", second, "cyd")
    assert again.header.subject.parents == second.header.subject.parents


def test_a_verdict_on_a_sealed_model_tells_no_numbers() -> None:
    gate = Gate(max_norm=1.0, max_drop=0.1)
    letters = letters_for(asked("ada", *offers("bea")), Parcel(START), BOXES["ada"])
    told = Verdict("max_norm", 3.7, (0.4, 0.5)).to_vector()
    answer = letters.close(Update(START, 12, extra={VERDICT: told}))
    assert isinstance(answer, Update)
    verdict = Verdict.from_extra(answer.extra, gate)
    assert (verdict.broken, verdict.norm, verdict.scores) == ("max_norm", -1.0, None)
    assert verdict.explain(gate) == "the change is above max_norm, 1"


# -- at the coordinator ------------------------------------------------------------------------------------------------


def hops(**changes: Any) -> SealedHops:
    return SealedHops(RUN, PLAIN, MEMBERS, **changes)


def named(sealing: Sealing) -> list[str]:
    return [one.name for one in sealing.boxes]


def test_a_model_is_sealed_for_the_next_three_and_for_all_and_the_owner_near_the_end() -> None:
    given = {name: BOXES[name].offer(RUN) for name in ("ada", "bea", "cyd", "dan")}
    owned = hops(owner="eve", box=BOXES["eve"].offer(RUN))
    assert named(owned.sealing("ada", ["dan", "cyd", "bea", "ada"], given)) == ["bea", "cyd", "dan"]
    assert named(owned.sealing("ada", ["dan", "eve", "cyd", "bea"], given)) == ["bea", "cyd", "dan"]  # eve has no box
    assert named(owned.sealing("ada", ["dan", "cyd"], given)) == ["ada", "bea", "cyd", "dan", "eve"]
    assert named(hops().sealing("ada", [], given)) == ["ada", "bea", "cyd", "dan"]
    with refused("has given no box key"):
        hops().sealing("eve", [], given)
    with refused("its box key was not sent"):
        hops(owner="eve").sealing("ada", [], given)
    assert "eve" in named(hops(owner="eve").sealing("ada", [], given | {"eve": BOXES["eve"].offer(RUN)}))


def test_an_owner_whom_the_roster_does_not_know_or_who_has_not_signed_is_refused() -> None:
    for changes in (
        {"owner": "mallory"},
        {"owner": "eve", "box": BOXES["ada"].offer(RUN)},
        {"owner": "eve", "box": BOXES["eve"].offer(OTHER)},
    ):
        with pytest.raises(ConfigError, match=r"not on the roster|not one that eve has signed"):
            hops(**changes)
    with pytest.raises(ConfigError, match="no signed box key"):
        SealedHops.of(Privacy(sealed=True, owner="eve", owner_box="00"), RUN, PLAIN, MEMBERS)


def test_an_answer_is_the_model_that_was_asked_for_or_it_is_none() -> None:
    given, found = sealing(*offers("bea")), hopped("ada", START, "bea")
    assert hops().taken(found, "ada", "a" * 32, given) == found
    for client, key, boxes, why in (
        ("bea", "a" * 32, given, "not sealed for this hop"),
        ("ada", "b" * 32, given, "not sealed for this hop"),
        ("ada", "a" * 32, sealing(*offers("cyd")), "for others"),
    ):
        with refused(why):
            hops().taken(found, client, key, boxes)
    with refused("ends within its header"):
        hops().taken(Weights(found.manifest, np.zeros(found.manifest.size)), "ada", "a" * 32, given)
    assert hops().boxes({"ada": b"none", "bea": BOXES["cyd"].offer(RUN).to_bytes()}, lambda _: None) == {}


def test_a_model_that_nobody_is_left_for_is_stuck_unless_it_is_sealed_for_all() -> None:
    found = hopped("ada", START, "bea", "cyd")
    every, one = ["ada", "bea", "cyd", "dan"], hops()
    assert not one.is_stuck(found, 2, ["cyd", "dan"], every)
    assert one.is_stuck(found, 2, ["dan"], every)
    assert not one.is_stuck(found, 3, ["dan"], every)  # a round later any of them may be drawn again
    assert one.is_stuck(found, 3, ["dan"], ["ada", "dan"])
    assert not one.is_stuck(found, 2, [], ["bea", "cyd"])
    assert not one.is_stuck(START, 2, [], every)
    assert header_of(found).names == {"bea", "cyd"}
