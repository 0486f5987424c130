"""A site's policy as a value: what it lets through, what it objects to, and how it says so."""

from __future__ import annotations

import dataclasses
import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from fedkit import policy, registry
from fedkit.client.permits import _about
from fedkit.errors import ConfigError, Reason, Refused
from fedkit.policy import Objection, Policy, TaskRule, Wish, refuse
from fedkit.protos import agents_pb2 as pb
from fedkit.queries import Moments
from fedkit.ranges import Ranges
from fedkit.work import Evaluate, Fit, Gradient, Summarize

FIT = Fit(steps=10, batch_size=16, lr=0.1)
TRAIN = Wish("heart", "FedAvg", FIT, "update", "masked", 3)
PLAIN: dict[str, Any] = {"aggregation": ("plain",)}
HOP = Wish("heart", "CyclicWeightTransfer", FIT, "weights", "plain", 1)
SCORE = Wish("heart", "FedAvg", Evaluate(), "sums", "masked", 3)
ASK = Wish("heart", "FedAvg", Summarize(query=Moments(bounds=[(0.0, 1.0)])), "sums", "masked", 3)
RANGES = dataclasses.replace(ASK, work=Summarize(query=Ranges(graph="0" * 64, bounds=[1.0], method="clipped")))
SOURCE = "ab" * 32


def said(rules: Policy, wish: Wish) -> list[str]:
    return [str(objection) for objection in rules.objections(wish)]


@pytest.mark.parametrize("wish", [TRAIN, SCORE, ASK], ids=lambda wish: wish.kind)
def test_the_defaults_let_ordinary_work_through(wish: Wish) -> None:
    assert said(Policy(), wish) == []


def with_work(**changes: object) -> Wish:
    return dataclasses.replace(TRAIN, work=FIT.replace(**changes))


@pytest.mark.parametrize(
    ("rules", "wish", "expected"),
    [
        ({}, with_work(batch_size=7), "batch size: 7 (allowed: at least 8)"),
        ({"tasks": {"lung": {}}}, TRAIN, "task: heart (allowed: lung)"),
        ({"strategies": ("FedSGD",)}, TRAIN, "strategy: FedAvg (allowed: FedSGD)"),
        ({"work": ("fit", "evaluate"), **PLAIN}, HOP, "work: hop (allowed: fit, evaluate)"),
        ({}, HOP, "aggregation: plain (allowed: masked, bfv)"),
        ({"work": ()}, TRAIN, "work: fit (allowed: nothing)"),
        ({"aggregation": ("bfv",)}, TRAIN, "aggregation: masked (allowed: bfv)"),
        ({"min_cohort": 4}, TRAIN, "members of the roster asked together: 3 (allowed: at least 4)"),
        ({"min_cohort": 4}, SCORE, "members of the roster asked together: 3 (allowed: at least 4)"),
        ({"min_cohort": 4}, ASK, "members of the roster asked together: 3 (allowed: at least 4)"),
        ({"min_steps": 11}, TRAIN, "steps: 10 (allowed: at least 11)"),
        ({"max_lr": 0.05}, TRAIN, "learning rate: 0.1 (allowed: at most 0.05)"),
        ({"ranges": ("noised",)}, RANGES, "ranges: clipped (allowed: noised)"),
        ({"ranges": ()}, RANGES, "ranges: clipped (allowed: nothing)"),
    ],
)
def test_a_wish_beyond_the_policy_is_objected_to_with_both_values(
    rules: dict[str, object], wish: Wish, expected: str
) -> None:
    assert said(Policy(**rules), wish) == [expected]


@pytest.mark.parametrize(
    ("rules", "wish"),
    [
        ({}, with_work(batch_size="all")),  # how many rows that is shows once they are loaded
        ({"min_cohort": 4, **PLAIN}, HOP),
        ({}, dataclasses.replace(HOP, sealed=True)),
        ({"max_lr": 0.1}, TRAIN),
        ({"max_lr": 0.05}, with_work(lr=None)),  # the task's own rate is the site's own code
        ({"min_steps": 10}, TRAIN),
        ({"tasks": {"heart": {"source": SOURCE, "data": "cohort-7"}}}, TRAIN),
    ],
)
def test_what_is_within_the_policy_is_not_objected_to(rules: dict[str, object], wish: Wish) -> None:
    assert said(Policy(**rules), wish) == []


def test_a_single_gradient_is_one_step() -> None:
    wish = dataclasses.replace(TRAIN, work=Gradient(batch_size=4))
    assert said(Policy(min_steps=2), wish) == [
        "batch size: 4 (allowed: at least 8)",
        "steps: 1 (allowed: at least 2)",
    ]


@pytest.mark.parametrize(
    ("work", "rows", "expected"),
    [
        (FIT, 16, []),
        (FIT, 7, ["batch size: 7 (allowed: at least 8)"]),
        (Gradient(), 7, ["batch size: 7 (allowed: at least 8)", "steps: 1 (allowed: at least 3)"]),
        (Fit(epochs=1, batch_size=16), 32, ["steps: 2 (allowed: at least 3)"]),
        (Fit(epochs=1, batch_size=16), 33, []),
        (Fit(epochs=3, batch_size="all"), 8, []),
        (Evaluate(), 1, []),
    ],
)
def test_few_rows_make_small_batches_and_few_steps(work: object, rows: int, expected: list[str]) -> None:
    assert [str(one) for one in Policy(min_steps=3).objections_to_rows(work, rows)] == expected


def test_ranges_are_told_of_enough_rows_or_with_noise() -> None:
    query = RANGES.work.query
    few = Policy().objections_to_rows(RANGES.work, 7)
    assert [str(one) for one in few] == ["rows with ranges: 7 (allowed: at least 8)"]
    assert Policy().objections_to_rows(RANGES.work, 8) == []
    noised = query.replace(method="mean", per_row=True)
    assert Policy().objections_to_rows(Summarize(query=noised), 7) == []


def test_another_model_makes_a_question_about_ranges_another_one() -> None:
    asked = pb.Assignment(model_digest=b"one", summarize=pb.Summarize(ranges=pb.Ranges(rows=64)))
    other = pb.Assignment(model_digest=b"two", summarize=pb.Summarize(ranges=pb.Ranges(rows=64)))
    assert _about(asked) != _about(other)
    assert _about(pb.Assignment(model_digest=b"one", summarize=pb.Summarize(row_count=pb.RowCount()))) == b""


def test_only_the_named_version_of_a_task_is_allowed() -> None:
    rules = Policy(tasks={"heart": TaskRule(source=SOURCE), "lung": TaskRule()})
    assert rules.objection_to_source("heart", SOURCE) is None
    assert rules.objection_to_source("lung", "cd" * 32) is None
    assert rules.objection_to_source("other", SOURCE) is None  # which `objections` has refused by its name
    assert str(rules.objection_to_source("heart", "cd" * 32)) == (f"source of heart: {'cd' * 8} (allowed: {'ab' * 8})")


BUDGETED = {"tasks": {"heart": {"data": "cohort-7"}}, "budgets": {"cohort-7": {"epsilon": 3.0, "delta": 1e-4}}}
SCORED = {**BUDGETED, "budgets": {"cohort-7": {"epsilon": 3.0, "delta": 1e-4, "evaluate": True}}}
SECRET = dataclasses.replace(TRAIN, private=True)


@pytest.mark.parametrize(
    ("rules", "wish", "expected"),
    [
        (BUDGETED, SECRET, []),
        (BUDGETED, SCORE, ["scores: exact ones (allowed: none, as cohort-7 has a budget without evaluate = true)"]),
        (SCORED, SCORE, []),
        (BUDGETED, TRAIN, ["privacy: none (allowed: differential privacy, as cohort-7 has a budget)"]),
        (BUDGETED, ASK, ["privacy: none (allowed: differential privacy, as cohort-7 has a budget)"]),
        ({}, SECRET, ["data set of heart: one without an id (allowed: one that the policy names)"]),
        (
            {"tasks": BUDGETED["tasks"]},
            SECRET,
            ["privacy of cohort-7: a part of its budget (allowed: none, as it has no budget)"],
        ),
    ],
)
def test_a_budget_is_for_private_work_and_private_work_needs_one(
    rules: dict[str, object], wish: Wish, expected: list[str]
) -> None:
    assert said(Policy(**rules), wish) == expected
    assert said(Policy.unrestricted(), SECRET) == []


@pytest.mark.parametrize(
    ("rules", "colluders", "expected"),
    [
        ({}, 1, ["noise: a part of it, shared with other sites (allowed: all of it, without [shared_noise])"]),
        ({"shared_noise": {}}, 1, []),
        ({"shared_noise": {}}, 0, ["colluders that shared noise holds against: 0 (allowed: at least 1)"]),
        ({"shared_noise": {"min_colluders": 0}}, 0, []),
    ],
)
def test_noise_is_shared_only_where_the_policy_says_against_how_many(
    rules: dict[str, object], colluders: int, expected: list[str]
) -> None:
    wish = dataclasses.replace(SECRET, colluders=colluders)
    assert said(Policy(**BUDGETED, **rules), wish) == expected
    assert said(Policy.unrestricted(), wish) == []


def test_a_reply_in_a_masked_sum_tells_nothing_that_a_budget_is_for() -> None:
    assert said(Policy(**BUDGETED), dataclasses.replace(TRAIN, returns="reply")) == []


def test_private_work_may_have_small_batches() -> None:
    wish = dataclasses.replace(SECRET, work=FIT.replace(batch_size=1))
    assert said(Policy(**BUDGETED), wish) == []
    assert Policy().objections_to_rows(wish.work, 3, private=True) == []


def test_a_data_set_goes_by_the_id_the_site_gave_it_or_by_its_task() -> None:
    rules = Policy(tasks={"heart": TaskRule(data="cohort-7"), "lung": TaskRule()})
    assert [rules.data_of(task) for task in ("heart", "lung", "other")] == ["cohort-7", "lung", "other"]


@pytest.mark.parametrize(
    ("hours", "time", "is_allowed"),
    [
        ((), "12:00", True),
        (("20:00-06:00",), "20:00", True),
        (("20:00-06:00",), "05:59", True),
        (("20:00-06:00",), "06:00", False),
        (("20:00-06:00",), "19:59", False),
        (("12:00-13:00", "20:00-06:00"), "12:59", True),
        (("12:00-13:00",), "13:00", False),
        (("00:00-00:00",), "17:00", True),
    ],
)
def test_work_begins_within_the_hours(hours: tuple[str, ...], time: str, is_allowed: bool) -> None:
    now = dt.datetime.fromisoformat(f"2026-03-01T{time}")
    found = Policy(hours=hours).objection_to_time(now)
    assert (found is None) == is_allowed
    if found is not None:
        assert found == Objection("time of day", time, " or ".join(hours))


def test_metrics_that_may_not_leave_are_named() -> None:
    assert Policy().objection_to_metrics(["loss", "auroc"]) is None
    assert Policy(metrics=("loss", "auroc")).objection_to_metrics(["loss", "auroc"]) is None
    found = Policy(metrics=("loss",)).objection_to_metrics(["loss", "auroc", "f1"])
    assert found == Objection("metrics", "auroc, f1", "loss")
    assert Policy(metrics=()).objection_to_metrics(["loss"]) == Objection("metrics", "loss", "none")


def test_an_update_beyond_the_norm_does_not_leave() -> None:
    assert Policy().objection_to_norm(1e9) is None
    assert Policy(max_update_norm=2.0).objection_to_norm(2.0) is None
    assert Policy(max_update_norm=2.0).objection_to_norm(2.5) == Objection("norm of the update", "2.5", "at most 2")


@pytest.mark.parametrize(
    ("shown", "rows", "expected"), [(False, 100, False), (True, 10, True), (True, 9, False), (True, 0, False)]
)
def test_a_sites_own_scores_are_shown_only_for_enough_rows_of_each_class(
    shown: bool, rows: int, expected: bool
) -> None:
    assert Policy(metrics_per_client=shown).releases(rows) is expected


def test_nothing_is_held_back_where_nothing_leaves_the_machine() -> None:
    rules = Policy.unrestricted()
    assert said(rules, with_work(batch_size=1)) == []
    assert rules.objections_to_rows(with_work(batch_size=1).work, 1) == []
    assert rules.releases(1)
    assert (rules.summaries_per_run, rules.evaluations_per_round, rules.rounds_per_day) == (None, None, None)


def test_a_refusal_names_the_first_objection_and_how_many_more_there_are() -> None:
    refuse([])
    refuse([None, None])
    with pytest.raises(Refused) as caught:
        refuse([None, Objection("steps", "1", "at least 2"), Objection("batch size", "1", "at least 8")])
    assert caught.value.reason is Reason.POLICY
    assert caught.value.detail == "steps: 1 (allowed: at least 2) (and 1 more)"


# -- files -------------------------------------------------------------------------------------------------------------

TOML = f"""
strategies = ["FedAvg"]
min_cohort = 3
hours = ["20:00-06:00"]

[tasks.heart]
source = "{SOURCE}"
data = "cohort-7"
"""


def test_a_policy_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(TOML)
    assert policy.read(tmp_path / "policy.toml") == Policy(
        strategies=("FedAvg",),
        min_cohort=3,
        hours=("20:00-06:00",),
        tasks={"heart": TaskRule(source=SOURCE, data="cohort-7")},
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("min_cohort = 0", "policy.toml.min_cohort"),
        ("min_cohrt = 3", "did you mean 'min_cohort'"),
        ('hours = ["25:00-26:00"]', "hours"),
        ('work = ["steal"]', "work"),
        ("max_lr = -1.0", "max_lr"),
        ("[tasks.heart]\nsource = '../x'", "source"),
        ("[tasks.'../x']", "tasks"),
        ("gpu_memory_share = 1.5", "gpu_memory_share"),
        ("min_cohort = ", "not TOML"),
        ("needs_budgets = false", "needs_budgets"),
    ],
)
def test_a_mistake_in_a_policy_is_named(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(ConfigError, match=why.replace("[", r"\[")):
        policy.read(tmp_path / "policy.toml")


def test_a_policy_that_is_not_there_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        policy.read(tmp_path / "policy.toml")


# -- the guide ---------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"
TABLES = ("tasks", "budgets", "shared_noise")
FIELDS = [field.name for field in dataclasses.fields(Policy) if field.name not in TABLES]


@pytest.mark.parametrize("path", sorted((DOCS / "policies").glob("*.toml")), ids=lambda path: path.stem)
def test_the_finished_policies_are_ones_and_allow_ordinary_training(path: Path) -> None:
    rules = policy.read(path)
    wish = dataclasses.replace(TRAIN, work=Fit(epochs=1, batch_size=32, lr=0.05))
    assert said(rules, wish) == []
    assert said(rules, dataclasses.replace(wish, work=Fit(steps=1, batch_size=1, lr=10.0))) != []
    assert said(rules, HOP) != []
    assert set(rules.strategies or ()) <= set(registry.strategies())


def test_the_finished_policies_are_for_hospitals_and_for_devices() -> None:
    hospital, device = (policy.read(DOCS / "policies" / f"{name}.toml") for name in ("hospital", "device"))
    assert hospital.min_cohort >= 3
    assert not hospital.metrics_per_client
    assert (device.only_on_mains, device.only_unmetered, device.only_idle) == (True, True, True)


@pytest.mark.parametrize("field", FIELDS)
def test_every_setting_is_in_the_guide_with_its_default(field: str) -> None:
    rows = [
        line.split("|") for line in (DOCS / "policy.md").read_text().splitlines() if line.startswith(f"| `{field}`")
    ]
    assert len(rows) == 1
    default, told = getattr(Policy(), field), rows[0][3].strip()
    if isinstance(default, bool):
        assert told == str(default).lower()
    elif isinstance(default, int):
        assert told == str(default)
    elif field == "aggregation":
        assert told == ", ".join(default)
    else:
        assert told in ("all", "any", "always", "the agent's")
