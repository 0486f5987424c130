"""A coordinator that lies to a member is refused, typed, before it learns anything of the member's vector."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.crypto.graph import Assumptions
from fedkit.crypto.masked_sum import Sum
from fedkit.crypto.member import Member, survivors_body
from fedkit.crypto.messages import Advertised, Cohort, Session, Shares, Told
from fedkit.crypto.ring import FixedPoint, Ring
from fedkit.errors import BelowThreshold, ConfigError, PayloadError, Refused, SumSpoiled
from fedkit.trust.signing import public_of

NAMES = ("ada", "bea", "cyd", "dee", "eva")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i, name in enumerate((*NAMES, "mal"), 1)}
ROSTER = {name: public_of(KEYS[name]) for name in NAMES}
SESSION = Session("heart", 4, "call-1")
TOLD = Told(b"\1" * 32, b"\2" * 32)
POINT = FixedPoint(Ring(5), 1.0)
SIZE = 200


def vector_of(name: str) -> np.ndarray:
    update = np.random.default_rng(len(name) + ord(name[0])).normal(scale=0.1, size=SIZE).astype(np.float32)
    return POINT.encode(update, 4096)


class Federation:
    """Honest members of one session, and a coordinator that plays as far as a test lets it."""

    def __init__(
        self,
        names: Iterable[str] = NAMES,
        session: Session = SESSION,
        least: int = 3,
        told: Callable[[str], Told] = lambda _: TOLD,
    ) -> None:
        self.members = {name: Member(session, name, KEYS[name], ROSTER, least=least) for name in names}
        self.masked = Sum(session, TOLD)
        self.told = told
        self.words = {name: vector_of(name) for name in self.members}

    def advertised(self) -> Cohort:
        for member in self.members.values():
            self.masked.advertise(member.advertise())
        return self.masked.close_adverts()

    def shared(self) -> tuple[str, ...]:
        cohort = self.advertised()
        for name, member in self.members.items():
            self.masked.share(name, member.share(cohort))
        return self.masked.close_shares()

    def delivered(self, names: Iterable[str] = NAMES) -> tuple[str, ...]:
        sharers = self.shared()
        for name in names:
            self.mask(name, sharers)
            self.masked.deliver(name, SIZE + 1)
        return self.masked.close_vectors()

    def mask(self, name: str, sharers: tuple[str, ...]) -> None:
        inbox = Shares({k: v for k, v in self.masked.inbox(name).sealed.items() if k in sharers})
        self.members[name].mask(sharers, inbox, self.told(name), self.words[name])

    def signatures(self, survivors: tuple[str, ...]) -> dict[str, bytes]:
        return {name: self.members[name].confirm(survivors) for name in survivors}

    def opened(self, survivors: tuple[str, ...]) -> np.ndarray:
        """The total, with whatever members are ready to give."""
        for name, signature in self.signatures(survivors).items():
            self.masked.confirm(name, signature)
        signatures = self.masked.close_signatures()
        for name in survivors:
            with contextlib.suppress(Refused):
                self.masked.unmask(name, self.members[name].unmask(signatures))
        total = np.sum([self.words[name] for name in survivors], axis=0, dtype=np.uint32)
        self.masked.open(total)
        return total


def refuses(match: str):
    return pytest.raises(Refused, match=rf"^masking: .*{match}")


def test_with_an_honest_coordinator_the_mean_is_read_and_no_vector_leaves_as_it_was() -> None:
    federation = Federation()
    survivors = federation.delivered(NAMES[:4])
    for name in survivors:
        assert (federation.words[name] == vector_of(name)).mean() < 0.05
    total = federation.opened(survivors)
    assert total.tolist() == np.sum([vector_of(name) for name in survivors], axis=0, dtype=np.uint32).tolist()
    assert POINT.weight(total, 4) == 4 * 4096


def test_a_vector_that_is_part_of_a_larger_sum_is_opened_in_no_smaller_one_even_after_a_restart() -> None:
    federation = Federation()
    sharers = federation.shared()
    member, inbox = federation.members["ada"], federation.masked.inbox("ada")
    with refuses("who shared: 4 members, and the least is 5"):
        fewer = Shares({name: text for name, text in inbox.sealed.items() if name != "eva"})
        member.mask_keys(sharers[:4], fewer, TOLD, SIZE + 1, 5)
    member.mask_keys(sharers, inbox, TOLD, SIZE + 1, 5)
    restored = Member.restore(member.to_bytes(), SESSION, "ada", KEYS["ada"], ROSTER)
    with refuses("who delivered: 4 members, and the least is 5"):
        restored.confirm(sharers[:4])
    restored.confirm(sharers)
    for name in NAMES[1:]:
        federation.mask(name, sharers)
    signatures = {name: federation.members[name].confirm(sharers) for name in NAMES[1:]}
    with refuses("4 members agree with it on who delivered, and it takes 5"):
        restored.unmask(signatures)
    assert restored.unmask({**signatures, "ada": restored.confirm(sharers)}).seeds


# -- the cohort --------------------------------------------------------------------------------------------------------


def with_advert(cohort: Cohort, name: str, **changes: object) -> Cohort:
    changed = [dataclasses.replace(one, **changes) if one.name == name else one for one in cohort.adverts]
    return Cohort.of(cohort.session, changed)


@pytest.mark.parametrize("kind", ["mask_key", "share_key", "commitment", "signature"])
def test_keys_that_are_not_as_their_owner_signed_them_are_refused(kind: str) -> None:
    federation = Federation()
    cohort = federation.advertised()
    own = Member(SESSION, "bea", KEYS["mal"], ROSTER).advertise()
    swapped = with_advert(cohort, "bea", **{kind: getattr(own, kind)})
    with refuses("not signed: bea"):
        federation.members["ada"].share(swapped)
    with refuses("other keys under its name"):
        federation.members["bea"].share(swapped)
    federation.members["ada"].share(cohort)  # nothing of the lie is kept


def test_a_member_that_the_coordinator_made_up_is_refused() -> None:
    federation = Federation()
    made_up = Member(SESSION, "mal", KEYS["mal"], ROSTER).advertise()
    with refuses("not on this site's roster: mal"):
        federation.members["ada"].share(Cohort.of(SESSION, [*federation.advertised().adverts, made_up]))


def test_a_member_that_speaks_for_another_is_refused() -> None:
    federation = Federation(NAMES[:4])
    posing = Member(SESSION, "eva", KEYS["mal"], ROSTER).advertise()
    with refuses("not signed: eva"):
        federation.members["ada"].share(Cohort.of(SESSION, [*federation.advertised().adverts, posing]))


@pytest.mark.parametrize("names", [("ada",), ("ada", "bea")])
def test_a_cohort_below_the_members_own_least_is_refused(names: tuple[str, ...]) -> None:
    federation = Federation(names)
    adverts = [member.advertise() for member in federation.members.values()]
    with refuses("cohort of [12]"):
        federation.members["ada"].share(Cohort.of(SESSION, adverts))


def test_a_cohort_without_oneself_is_refused() -> None:
    federation = Federation()
    others = Cohort.of(SESSION, federation.advertised().adverts[1:])
    with refuses("other keys under its name"):
        federation.members["ada"].share(others)


@pytest.mark.parametrize(
    "other",
    [
        Session("heart", 3, "call-1"),
        Session("heart", 4, "call-0"),
        Session("liver", 4, "call-1"),
        Session("heart", 4, "call-1", Assumptions(corrupt=0.1)),
    ],
)
def test_messages_of_an_earlier_round_or_another_run_are_refused(other: Session) -> None:
    before, now = Federation(session=other), Federation()
    old, new = before.advertised(), now.advertised()
    with refuses("another session"):
        now.members["ada"].share(old)
    replayed = Cohort.of(SESSION, [new.by_name["ada"], *old.adverts[1:]])
    with refuses("not signed: bea, cyd, dee, eva"):
        now.members["ada"].share(replayed)


def test_a_second_cohort_is_refused_and_the_first_one_is_answered_the_same_again() -> None:
    federation = Federation()
    cohort = federation.advertised()
    first = federation.members["ada"].share(cohort)
    with refuses("another cohort before"):
        federation.members["ada"].share(Cohort.of(SESSION, cohort.adverts[:4]))
    assert federation.members["ada"].share(cohort) == first


def test_a_key_that_nobody_can_agree_with_is_refused_also_if_its_owner_signed_it() -> None:
    federation = Federation()
    cohort = federation.advertised()
    for kind, step in (("share_key", "share"), ("mask_key", "mask")):
        bad = dataclasses.replace(cohort.by_name["bea"], **{kind: bytes(32)})
        bad = dataclasses.replace(bad, signature=KEYS["bea"].sign(bad.body(SESSION)))
        member = Member(SESSION, "ada", KEYS["ada"], ROSTER)
        others = [member.advertise(), bad, *cohort.adverts[2:]]
        with refuses("agree with a key of bea"):
            member.share(Cohort.of(SESSION, others))
            assert step == "mask"
            sealed = Shares({name: bytes(82) for name in NAMES[1:]})
            member.mask(NAMES, sealed, TOLD, vector_of("ada"))


# -- who shared, who delivered -----------------------------------------------------------------------------------------


def test_too_few_or_other_sharers_are_refused_and_the_vector_stays_as_it_was() -> None:
    federation = Federation()
    federation.shared()
    for names, match in (
        (("ada", "bea", "cyd"), "3 members, and the least is 4"),
        (("bea", "cyd", "dee", "eva"), "leaves it out"),
        ((*NAMES, "mal"), "holds others than before"),
    ):
        with refuses(match):
            federation.mask("ada", names)
    with refuses("other shares than those of its neighbours"):
        federation.members["ada"].mask(NAMES, Shares({}), TOLD, federation.words["ada"])
    assert np.array_equal(federation.words["ada"], vector_of("ada"))


@pytest.mark.parametrize("bad", [NAMES[::-1], (*NAMES, "eva"), ("ada", "../x")])
def test_a_list_that_is_none_is_refused(bad: tuple[str, ...]) -> None:
    federation = Federation()
    federation.shared()
    with pytest.raises(PayloadError):
        federation.members["ada"].mask(bad, federation.masked.inbox("ada"), TOLD, vector_of("ada"))


def test_a_vector_is_masked_once() -> None:
    federation = Federation()
    federation.mask("ada", federation.shared())
    with refuses("masked before"):
        federation.members["ada"].mask(NAMES, federation.masked.inbox("ada"), TOLD, vector_of("ada"))


def test_steps_out_of_turn_are_refused() -> None:
    federation = Federation()
    member = federation.members["ada"]
    with refuses("no cohort"):
        member.mask(NAMES, Shares({}), TOLD, vector_of("ada"))
    with refuses("nothing was masked"):
        member.confirm(NAMES)
    with refuses("no cohort"):
        member.unmask({})
    federation.shared()
    with refuses("no survivors"):
        member.unmask({})


def test_a_split_list_of_survivors_gets_one_signature_of_each_and_no_shares() -> None:
    federation = Federation(least=2)
    federation.delivered()
    one, other = ("ada", "bea", "cyd", "dee"), ("ada", "cyd", "dee", "eva")
    first = {name: federation.members[name].confirm(one) for name in ("ada", "bea")}
    second = {name: federation.members[name].confirm(other) for name in ("cyd", "dee", "eva")}
    for name in ("ada", "bea"):
        with refuses("told other survivors before"):
            federation.members[name].confirm(other)
    for name in NAMES:
        with refuses("[23] members agree with it"):
            federation.members[name].unmask(first | second)


def test_nobody_gives_both_kinds_of_shares_for_the_same_member() -> None:
    federation = Federation()
    survivors = federation.delivered(NAMES[:4])
    signatures = federation.signatures(survivors)
    given = {name: federation.members[name].unmask(signatures) for name in survivors}
    for one in given.values():
        assert set(one.seeds) == set(survivors)
        assert set(one.keys) == {"eva"}
    with refuses("told other survivors before"):
        federation.members["ada"].confirm(NAMES)
    other = {name: KEYS[name].sign(survivors_body(b"x" * 32, NAMES)) for name in NAMES}
    with refuses("0 members agree"):
        federation.members["ada"].unmask(other)
    assert federation.members["ada"].unmask(signatures) == given["ada"]


def test_survivors_below_the_threshold_are_refused() -> None:
    federation = Federation()
    federation.delivered()
    with refuses("3 members, and the least is 4"):
        federation.members["ada"].confirm(("ada", "bea", "cyd"))
    four = Federation(NAMES[:4], least=4)
    four.delivered(NAMES[:4])
    with refuses("3 members, and the least is 4"):
        four.members["ada"].confirm(("ada", "bea", "cyd"))


def test_signatures_that_are_missing_forged_or_of_others_do_not_count() -> None:
    federation = Federation()
    survivors = federation.delivered(NAMES[:4])
    good = federation.signatures(survivors)
    for bad in (
        dict(list(good.items())[:3]),
        good | {"bea": good["cyd"]},
        good | {"bea": b"short"},
        {**dict(list(good.items())[:3]), "eva": KEYS["eva"].sign(b"x")},
        {**dict(list(good.items())[:3]), "mal": KEYS["mal"].sign(b"x")},
    ):
        with refuses("3 members agree with it on who delivered, and it takes 4"):
            federation.members["ada"].unmask(bad)


def test_in_a_sparse_graph_a_member_without_enough_of_its_neighbours_goes_no_further() -> None:
    session = Session("heart", 4, "call-1", Assumptions(0.01, 0.05, bits=4))
    keys = {f"m{i:03}": Ed25519PrivateKey.from_private_bytes(i.to_bytes(32, "big")) for i in range(201)}
    roster = {name: public_of(key) for name, key in keys.items()}
    members = {name: Member(session, name, key, roster) for name, key in keys.items()}
    cohort = Cohort.of(session, [member.advertise() for member in members.values()])
    near, one = cohort.neighbours("m007"), members["m007"]
    assert len(near) < 40
    one.share(cohort)
    gone = set(near[cohort.plan.threshold - 2 :])  # with itself, one fewer than the threshold is left
    left = tuple(name for name in cohort.names if name not in gone)
    few = Shares({name: bytes(82) for name in near if name not in gone})
    with refuses("of those who hold its shares"):
        one.mask(left, few, TOLD, vector_of("m007"))
    one.mask(cohort.names, Shares({name: bytes(82) for name in near}), TOLD, vector_of("m007"))
    with refuses("of those who hold its shares"):
        one.confirm(left)


# -- told different things ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [Told(b"\7" * 32, TOLD.work), Told(TOLD.model, b"\7" * 32)])
def test_a_member_told_another_model_or_work_makes_the_sum_noise_and_gives_no_shares(odd: Told) -> None:
    federation = Federation(told=lambda name: odd if name == "ada" else TOLD)
    survivors = federation.delivered()
    total = federation.opened(survivors)
    assert set(federation.masked._unmaskings) == set(NAMES) - {"ada"}
    with pytest.raises(SumSpoiled):
        POINT.decode(total, 5)
    without = np.sum([vector_of(name) for name in NAMES[1:]], axis=0, dtype=np.uint32)
    assert (total - without == vector_of("ada")).mean() < 0.05


def test_members_told_other_sharers_make_noise_that_is_not_opened() -> None:
    federation = Federation()
    federation.shared()
    for name in NAMES[:4]:
        federation.mask(name, NAMES if name != "ada" else NAMES[:4])
        federation.masked.deliver(name, SIZE + 1)
    survivors = federation.masked.close_vectors()
    signatures = federation.signatures(survivors)
    for name in survivors:
        with refuses("[13] members agree with it"):
            federation.members[name].unmask(signatures)


def test_two_halves_told_different_cohorts_open_nothing() -> None:
    federation = Federation(least=2)
    cohort = federation.advertised()
    split = {name: Cohort.of(SESSION, cohort.adverts[:4] if name < "cyd" else cohort.adverts) for name in NAMES}
    shares = {name: federation.members[name].share(split[name]) for name in NAMES}
    inbox = Shares({name: shares[name].sealed["ada"] for name in NAMES[1:4]})
    federation.members["ada"].mask(NAMES[:4], inbox, TOLD, federation.words["ada"])
    readable = federation.members["ada"]._opened(split["ada"])
    assert set(readable) == {"ada", "bea"}  # what the others dealt to another cohort does not open


# -- nothing leaks by the way ------------------------------------------------------------------------------------------


def test_secrets_are_in_no_repr() -> None:
    federation = Federation()
    survivors = federation.delivered()
    member = federation.members["ada"]
    shown = [repr(member), repr(member._state), repr(member.unmask(federation.signatures(survivors)))]
    secrets = [member._state.seed, member._mask_private, member._own_seed]
    for text in shown:
        assert not any(repr(secret)[2:-1] in text or secret.hex() in text for secret in secrets)


def restart(federation: Federation) -> None:
    """All members are killed, and made again from what they kept."""
    for name, member in list(federation.members.items()):
        federation.members[name] = Member.restore(member.to_bytes(), SESSION, name, KEYS[name], ROSTER)
        assert federation.members[name].to_bytes() == member.to_bytes()


def test_a_member_takes_up_where_it_was_killed_and_answers_the_same() -> None:
    federation = Federation()
    restart(federation)
    cohort = federation.advertised()
    before = {name: member.share(cohort) for name, member in federation.members.items()}
    restart(federation)
    for name, member in federation.members.items():
        assert member.share(cohort) == before[name]
        federation.masked.share(name, before[name])
    federation.masked.close_shares()
    restart(federation)
    for name in NAMES[:4]:
        federation.mask(name, NAMES)
        federation.masked.deliver(name, SIZE + 1)
    survivors = federation.masked.close_vectors()
    restart(federation)
    with refuses("masked before"):
        federation.mask("ada", NAMES)
    signatures = federation.signatures(survivors)
    restart(federation)
    with refuses("told other survivors before"):
        federation.members["ada"].confirm(NAMES)
    assert federation.signatures(survivors) == signatures
    given = federation.members["ada"].unmask(signatures)
    restart(federation)
    assert federation.members["ada"].unmask(signatures) == given
    total = federation.opened(survivors)
    assert total.tolist() == np.sum([vector_of(name) for name in survivors], axis=0, dtype=np.uint32).tolist()


def test_a_state_of_another_member_or_session_or_a_damaged_one_is_not_restored() -> None:
    member = Federation().members["ada"]
    state = member.to_bytes()
    other = Session("heart", 5, "call-1")
    for data, session, name in ((state, other, "ada"), (state, SESSION, "bea"), (state[:-1], SESSION, "ada")):
        with pytest.raises(PayloadError):
            Member.restore(data, session, name, KEYS[name], ROSTER)
    with pytest.raises(PayloadError):
        Member.restore(b"", SESSION, "ada", KEYS["ada"], ROSTER)


def test_settings_and_vectors_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="least is 1"):
        Member(SESSION, "ada", KEYS["ada"], ROSTER, least=1)
    federation = Federation()
    sharers = federation.shared()
    words = vector_of("ada")
    for bad in (words[:0], words[::2], words.astype(np.int64), words.reshape(1, -1)):
        with pytest.raises(ConfigError, match="contiguous"):
            federation.members["ada"].mask(sharers, federation.masked.inbox("ada"), TOLD, bad)


def test_one_of_three_may_drop_out_and_two_may_not() -> None:
    three = Federation(NAMES[:3], least=2)
    survivors = three.delivered(NAMES[:2])
    total = three.opened(survivors)
    assert total.tolist() == (vector_of("ada") + vector_of("bea")).tolist()
    with pytest.raises(BelowThreshold, match="1 of 3 members delivered, and it takes 2"):
        Federation(NAMES[:3], least=2).delivered(NAMES[:1])


def test_an_advert_is_bound_to_its_name() -> None:
    advert = Federation().members["ada"].advertise()
    assert advert.is_signed(SESSION, ROSTER)
    assert Advertised.from_bytes(advert.to_bytes()) == advert
    assert not dataclasses.replace(advert, name="bea").is_signed(SESSION, ROSTER | {"bea": ROSTER["ada"]})
