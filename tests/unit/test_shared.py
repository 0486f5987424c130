"""What a client makes of shared noise that it is asked for: a plan and a price where all fits, else refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedkit.client.prospect import prospect
from fedkit.config import DP, Privacy
from fedkit.errors import ConfigError, Refused, RunError
from fedkit.policy import Policy
from fedkit.privacy.shared import Sharing, part_of, planned_for
from fedkit.protos import agents_pb2 as pb
from fedkit.queries import Moments
from fedkit.rounds.assignment import Assignment, Clip, Masking, Private
from fedkit.rounds.layout import Layout
from fedkit.rounds.noise import SharedNoise
from fedkit.runfile import RunFile, RunSection
from fedkit.work import Fit, Gradient, Steps, Summarize

ROWS = 120
DPS = DP(noise_multiplier=3.0, delta=1e-3, noise="shared", dropouts=1, colluders=1)
NOISE = SharedNoise(1, 1, 3.0, 1.0, 0.25)
LAYOUT = Layout("mean", 50, 8, clip=30.0, bits=24, noise=NOISE)
WHOLE = replace(LAYOUT, noise=replace(NOISE, rate=1.0))


def asked(layout: Layout = LAYOUT, **changes: Any) -> Assignment:
    masking = Masking("0" * 32, "vector", layout)
    about: dict[str, Any] = {"work": Gradient(batch_size=30), "private": Private(DPS, 5), "masking": masking}
    return Assignment("1" * 32, "run", 0, 1, "ada", returns="words", **(about | changes))


def whole(layout: Layout = WHOLE, **changes: Any) -> Assignment:
    return asked(layout, **({"work": Fit(steps=1), "private": None, "clip": Clip(1.0)} | changes))


def test_rows_are_drawn_at_the_sums_rate_and_their_gradients_added_up_without_noise() -> None:
    plan = planned_for(asked(), ROWS)
    assert plan is not None
    assert plan.training is not None
    assert (plan.training.q, plan.training.expected_rows, plan.training.noise_multiplier) == (0.25, 1.0, 0.0)
    assert plan.cost == Steps(3.0, 0.25, 1, LAYOUT.parts)
    plan.training.require(Gradient(batch_size=30), ROWS)


def test_a_whole_client_is_trained_as_ever_and_pays_for_taking_part() -> None:
    plan = planned_for(whole(), ROWS)
    assert plan is not None
    assert plan.training is None
    assert plan.cost == Steps(3.0, 1.0, 1, WHOLE.parts)


def test_what_is_not_private_has_no_plan_and_no_part() -> None:
    plain = replace(LAYOUT, noise=None)
    assert planned_for(asked(plain, private=None), ROWS) is None
    assert part_of(plain) is None


def test_statistics_before_are_noised_by_the_client_alone() -> None:
    private = Private(DPS.replace(noise_multiplier=None, epsilon=3.0), 5, 1)
    sums = Layout("integers", 3, 8)
    plan = planned_for(asked(sums, work=Summarize(query=Moments(bounds=[(0.0, 1.0)])), private=private), ROWS)
    assert plan is not None
    assert plan.cost.parts is None
    assert plan.cost.q == 1.0


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        (asked(work=Fit(steps=1)), "covers one gradient"),
        (asked(replace(LAYOUT, noise=None)), "no sum is named"),
        (asked(masking=None), "no sum is named"),
        (
            asked(private=Private(DP(noise_multiplier=3.0, delta=1e-3), 5)),
            "not the one that the run's privacy asks for",
        ),
        (asked(replace(LAYOUT, noise=replace(NOISE, dropouts=0))), "not the one that"),
        (asked(replace(LAYOUT, noise=replace(NOISE, colluders=0))), "not the one that"),
        (asked(replace(LAYOUT, noise=replace(NOISE, norm=2.0))), "not the one that"),
        (asked(private=Private(DPS.replace(delta=0.1), 5)), "more than one over the 120 rows"),
        (asked(private=None), "not for updates of the length"),
        (whole(clip=None), "not for updates of the length"),
        (whole(clip=Clip(2.0)), "not for updates of the length"),
        (whole(clip=Clip(1.0, tells=True)), "not for updates of the length"),
        (whole(LAYOUT), "not for updates of the length"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_data_is_touched(assignment: Assignment, said: str) -> None:
    with pytest.raises(Refused, match=rf"^privacy: .*{said}"):
        planned_for(assignment, ROWS)


def test_all_that_is_asked_of_a_site_is_in_what_its_masks_are_bound_to() -> None:
    told = asked().told(b"m" * 32)
    others = [
        asked(replace(LAYOUT, noise=replace(NOISE, multiplier=2.0))),
        asked(private=Private(DPS.replace(noise_multiplier=2.0), 5)),
        asked(clip=Clip(1.0)),
    ]
    assert told not in [other.told(b"m" * 32) for other in others]


# -- at the coordinator ------------------------------------------------------------------------------------------------


def sharing(bits: int | None = None, **changes: Any) -> Sharing:
    given = {"epsilon": 4.0, "delta": 1e-3, "noise": "shared", "level": "client", "few_clients": True} | changes
    return Sharing(Privacy(dp=DP(**given), aggregation="masked", bits=bits), 10, 0)


def test_however_many_clients_are_drawn_they_bring_the_same_noise_at_the_same_price() -> None:
    every, fewer = (sharing(dropouts=1).of_clients(1000, cohort) for cohort in (2000, 9))
    assert every.bits == fewer.bits
    assert every.noise == fewer.noise
    assert every.parts is not None
    assert fewer.parts is not None
    planned = [2.0 * one.noise_rate * one.parts.honest for one in (every, fewer)]
    assert abs(planned[0] - planned[1]) <= 2 * 2000  # each part is rounded up
    with pytest.raises(ConfigError, match="1 dropouts and 1 colluders of 3 clients"):
        sharing(dropouts=1).of_clients(1000, 3)


def test_a_run_ends_where_rounds_that_were_tried_again_have_cost_its_epsilon() -> None:
    of = sharing()
    layout = of.of_clients(1000, 20)
    assert 3.9 < of.epsilon(layout, 10) <= 4.0
    with pytest.raises(RunError, match="epsilon 4 is spent"):
        of.epsilon(layout, 12)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 24, "clients": 1000}, "does not fit the ring|do not fit"),
        ({"epsilon": None, "noise_multiplier": 1e12}, "do not fit|does not fit"),
        ({"epsilon": 1e-9, "delta": 1e-12}, "cannot be kept over"),
    ],
)
def test_noise_for_which_there_is_no_room_is_an_error(changes: dict[str, Any], said: str) -> None:
    clients = changes.pop("clients", 20)
    with pytest.raises(ConfigError, match=said):
        sharing(changes.pop("bits", None), **changes).of_clients(1000, clients)


def test_noise_is_shared_under_differential_privacy() -> None:
    with pytest.raises(ConfigError, match="give dp"):
        Sharing(Privacy(aggregation="masked"), 1, 0)


# -- before a site joins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["example", "client"])
def test_a_site_is_told_beforehand_that_it_is_to_share_the_noise(level: str) -> None:
    few = {"few_clients": True} if level == "client" else {}
    privacy = Privacy(dp=DPS.replace(level=level, **few), aggregation="masked")
    strategy = {"name": "FedSGD", "lr": 0.1} if level == "example" else {"name": "FedAvg"}
    file = RunFile(run=RunSection(name="shares", task="toy"), strategy=strategy, privacy=privacy)
    described = pb.RunDescription(run_file=file.to_json(), aggregation="masked", state="waiting", clients=5)
    [asks] = [one for one in prospect(described, Policy(), {}).requests if one.kind in ("fit", "gradient")]
    assert "a part of the noise that all sites share: noise 3 at delta 0.001" in asks.what
    assert "noise: a part of it, shared with other sites" in " ".join(map(str, asks.objections))
