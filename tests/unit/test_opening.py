"""A client opens one sum for each question, over enough members of its own roster, whatever it is asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto.masks import packed
from fedkit.crypto.opening import Announced, DecryptOnce, Question, Uploaded, digest_of_chunks
from fedkit.errors import ConfigError, PayloadError, Reason, Refused
from fedkit.trust.signing import public_of

NAMES = ("ada", "bea", "cyd", "dee")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i, name in enumerate((*NAMES, "mal"), 1)}
ROSTER = {name: public_of(KEYS[name]) for name in NAMES}
QUESTION = Question("heart", 3, "mean", b"\7" * 32)
SUM = digest_of_chunks([b"a", b"sum"])


def announced(names: Iterable[str] = NAMES, question: Question = QUESTION, digest: bytes = SUM) -> Announced:
    uploads = [Uploaded.sign(question.digest, name, digest_of_chunks([name.encode()]), KEYS[name]) for name in names]
    return Announced(question, tuple(uploads), digest)


def allowed(once: DecryptOnce, told: Announced, digest: bytes = SUM) -> DecryptOnce:
    return once.allow(told, digest, cohort=NAMES, members=ROSTER)


def refused(text: str) -> pytest.RaisesExc:
    return pytest.raises(Refused, match=f"encryption: .*{text}", check=lambda error: error.reason is Reason.ENCRYPTION)


def test_a_sum_is_opened_once_and_the_same_one_again() -> None:
    once = allowed(DecryptOnce(3), announced())
    assert allowed(once, announced()) == once
    assert len(once.opened) == 1


@pytest.mark.parametrize(
    "other", [announced(digest=bytes(32)), announced(NAMES[:3])], ids=["another sum", "other members"]
)
def test_no_second_sum_of_a_round_is_opened(other: Announced) -> None:
    once = allowed(DecryptOnce(3), announced())
    with refused("another sum of round 3 was opened before"):
        allowed(once, other, other.digest)


def test_other_rounds_questions_runs_and_keys_are_other_questions() -> None:
    once = DecryptOnce(3)
    for change in ({}, {"round": 4}, {"what": "scores"}, {"run": "lungs"}, {"fingerprint": bytes(32)}):
        once = allowed(once, announced(question=replace(QUESTION, **change)))
    assert len(once.opened) == 5


def test_a_sum_other_than_the_announced_one_is_not_opened() -> None:
    with refused("not the sum that was announced"):
        allowed(DecryptOnce(3), announced(), bytes(32))


def test_a_sum_over_too_few_is_not_opened() -> None:
    with refused("2 clients, and the least is 3"):
        allowed(DecryptOnce(3), announced(NAMES[:2]))
    for least in (-1, 0, 1):
        with pytest.raises(ConfigError, match="no sum"):
            DecryptOnce(least)


def test_members_count_only_where_the_cohort_and_the_roster_know_them_and_they_have_signed() -> None:
    once = DecryptOnce(3)
    with refused("roster: mal"):
        allowed(once, announced([*NAMES, "mal"]))
    with refused("cohort.*dee"):
        once.allow(announced(), SUM, cohort=NAMES[:3], members=ROSTER)
    told = announced()
    stale = announced(question=replace(QUESTION, round=2)).uploads[3]
    for false in (replace(told.uploads[3], signature=bytes(64)), replace(told.uploads[3], value=bytes(32)), stale):
        with refused("not signed: dee"):
            allowed(once, replace(told, uploads=(*told.uploads[:3], false)))
    with pytest.raises(PayloadError, match="once"):
        replace(told, uploads=(told.uploads[0],) * 3)


def test_what_was_opened_is_not_forgotten() -> None:
    once = allowed(DecryptOnce(3), announced())
    again = DecryptOnce.from_bytes(once.to_bytes(), 3)
    assert again == once
    assert DecryptOnce.from_bytes(DecryptOnce(3).to_bytes(), 3) == DecryptOnce(3)
    with refused("opened before"):
        allowed(again, announced(NAMES[:3]))
    for data in (b"", once.to_bytes()[:-1], packed(b"other"), once.to_bytes() + packed(b"x" * 32)):
        with pytest.raises(PayloadError):
            DecryptOnce.from_bytes(data, 3)


def test_values_come_back_from_their_bytes() -> None:
    told = announced()
    assert Announced.from_bytes(QUESTION, told.to_bytes()) == told
    for data in (b"", told.to_bytes()[:-1], packed(SUM, b"x")):
        with pytest.raises(PayloadError):
            Announced.from_bytes(QUESTION, data)


def test_the_log_says_which_sum_of_whom_was_opened() -> None:
    facts = announced().facts()
    assert facts == {
        "run": "heart",
        "round": 3,
        "what": "mean",
        "key": "07" * 8,
        "clients": 4,
        "names": "ada bea cyd dee",
        "sum": SUM.hex(),
    }


def test_what_no_run_has_is_no_question() -> None:
    for change in ({"run": "x" * 513}, {"what": "x" * 513}, {"round": -1}, {"fingerprint": b""}):
        with pytest.raises(PayloadError):
            replace(QUESTION, **change)
