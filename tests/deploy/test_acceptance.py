"""Criteria of acceptance: what they ask, and how a passport is judged by them."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkit.config import parse
from fedkit.deploy.acceptance import Criteria, Verdict, read
from fedkit.deploy.passport import Calibrated, ClientFacts, PrivacyFacts
from fedkit.errors import ConfigError
from fedkit.exam import Bound, Questions, number_key
from tests.deploy.passports import EXAMINED, passport

WHOLE = """
[floors]
accuracy = 0.75
[ceilings]
loss = 0.6
[sites]
share = 0.75
answered = 4
floors = { accuracy = 0.7 }
ceilings = { loss = 0.7 }
gap = { accuracy = 0.15 }
[groups]
names = ["female", "male"]
floors = { accuracy = 0.7 }
gap = { accuracy = 0.1 }
[quantization]
drop = { accuracy = 0.005, loss = 0.02 }
agreement = 0.99
[noise]
"0.10" = { accuracy = 0.02 }
[latency_ms]
"1" = 5.0
[privacy]
epsilon = 3.0
delta = 1e-4
aggregation = ["masked", "bfv"]
"""


def judged(values: dict[str, Any], **changes: Any) -> list[Verdict]:
    return parse(Criteria, values).judge(passport(**changes))


def outcomes(values: dict[str, Any], **changes: Any) -> list[str]:
    return [verdict.outcome for verdict in judged(values, **changes)]


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_model_that_keeps_to_a_whole_file_passes_each_of_its_criteria(tmp_path: Path) -> None:
    (tmp_path / "criteria.toml").write_text(WHOLE)
    criteria = read(tmp_path / "criteria.toml")
    found = criteria.judge(passport())
    assert [verdict.criterion for verdict in found if not verdict.passed] == []
    assert len(found) == 17
    assert criteria.questions() == Questions(
        criteria=("accuracy>=0.7", "loss<=0.7"), groups=("female", "male"), noise=(0.1,), batches=(1,)
    )


def test_of_a_model_that_nobody_examined_nothing_of_it_passes_and_the_words_say_how(tmp_path: Path) -> None:
    values = {"floors": {"accuracy": 0.1}, "noise": {"0.1": {"accuracy": 1}}, "latency_ms": {"1": 99}}
    values |= {"sites": {"answered": 2, "floors": {"accuracy": 0.1}}}
    values |= {"groups": {"names": ["female", "male"], "floors": {"accuracy": 0.1}, "gap": {"accuracy": 1}}}
    for examined in (None, EXAMINED.replace(variant="fp32")):  # of another file than the one shipped
        found = judged(values, examined=examined)
        assert {verdict.outcome for verdict in found} == {"not measured"}
        assert all("fedkit export --acceptance FILE" in verdict.found for verdict in found)
        assert not any(verdict.passed for verdict in found)
        assert len(found) == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the criteria ask for nothing"),
        ("[sites]\nshare = 0.5", "the criteria ask for nothing"),
        ('[groups]\nnames = ["x"]', "the criteria ask for nothing"),
        ("[flors]\naccuracy = 1", "flors: there is no such setting; did you mean 'floors'?"),
        ("[sites]\nshares = 1", "sites.shares: there is no such setting; did you mean 'share'?"),
        ("[floors]\naccuracy = 'high'", "floors.accuracy: should be a valid number"),
        ("[floors]\naccuracy = nan", "floors.accuracy: should be a finite number"),
        ("[floors]\n'a b' = 1", "should match pattern"),
        ("[floors]\naccuracy = 0.7\n[sites]\nceilings = { accuracy = 1 }", "more is better, and less of it is"),
        ("[floors]\nloss = 0.7", "loss: a floor says that more is better"),
        ("[sites]\nshare = 0", "sites.share: should be greater than 0"),
        ("[groups]\nfloors = { accuracy = 0.7 }", "name the groups"),
        ('[groups]\nnames = ["a"]\ngap = { accuracy = 0.7 }', "name two or more"),
        ("[noise]\nmuch = { accuracy = 0.1 }", "a standard deviation, as in \"0.1\", got 'much'"),
        ('[noise]\n"-1" = { accuracy = 0.1 }', "should be greater than 0"),
        ('[noise]\n"0.1" = { accuracy = 0.1 }\n"0.10" = { accuracy = 0.1 }', "noise: each one once"),
        ('[noise]\n"0.1" = {}', "noise"),
        ('[latency_ms]\n"1.5" = 2', "a batch size, as in \"64\", got '1.5'"),
        ('[privacy]\naggregation = ["none"]', "should be 'plain', 'masked', 'bfv' or 'ckks', got 'none'"),
        ("[floors", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_field_that_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "criteria.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"criteria\.toml") as told:
        read(tmp_path / "criteria.toml")
    assert said in str(told.value)


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read(Path("none.toml"))


# -- each criterion ----------------------------------------------------------------------------------------------------

PASSES = [
    {"floors": {"accuracy": 0.8}},
    {"ceilings": {"loss": 0.5}},
    {"sites": {"answered": 4}},
    {"sites": {"share": 0.75, "floors": {"accuracy": 0.7}}},
    {"sites": {"ceilings": {"loss": 0.7}}},
    {"sites": {"gap": {"accuracy": 0.1}}},
    {"groups": {"names": ["female", "male"], "gap": {"accuracy": 0.06}}},
    {"groups": {"names": ["female", "male"], "gap": {"loss": 0.2}}},
    {"quantization": {"drop": {"loss": 0.01}}},
    {"quantization": {"agreement": 0.995}},
    {"floors": {"accuracy": 0.1}, "quantization": {"drop": {"accuracy": 0.003}}},
    {"noise": {"0.1": {"loss": 0.02}}},
    {"noise": {"0.1": {"mae": 0.1}}},
    {"ceilings": {"mae": 9}, "noise": {"0.1": {"mae": 0}}},
    {"latency_ms": {"1": 4}},
    {"privacy": {"epsilon": 2.95}},
    {"privacy": {"delta": 1.2e-5}},
    {"privacy": {"aggregation": ["masked"]}},
]
MISSES = [
    {"floors": {"accuracy": 0.81}},
    {"ceilings": {"loss": 0.49}},
    {"sites": {"answered": 5}},
    {"sites": {"share": 0.8, "floors": {"accuracy": 0.7}}},
    {"sites": {"gap": {"accuracy": 0.09}}},
    {"groups": {"names": ["female", "male"], "gap": {"accuracy": 0.05}}},
    {"quantization": {"drop": {"loss": 0.009}}},
    {"quantization": {"drop": {"accuracy": 0.002}}},
    {"quantization": {"agreement": 0.996}},
    {"noise": {"0.1": {"loss": 0.01}}},
    {"noise": {"0.1": {"mae": 0.09}}},  # it fell, and nothing says that less of it is better
    {"latency_ms": {"64": 19}},
    {"privacy": {"epsilon": 2.94}},
    {"privacy": {"delta": 1.05e-5}},
    {"privacy": {"aggregation": ["bfv", "ckks"]}},
]
UNMEASURED = [
    ({"floors": {"f1": 0.1}}, "f1 is not measured; measured are accuracy, auroc, loss, mae"),
    ({"floors": {"auroc": 0.1}}, "auroc is undefined on these rows"),
    ({"sites": {"floors": {"accuracy": 0.71}}}, "fedkit export --acceptance FILE"),
    ({"sites": {"gap": {"auroc": 0.5}}}, "a: auroc is undefined"),
    ({"groups": {"names": ["female", "diverse"], "gap": {"accuracy": 1}}}, "diverse: fedkit export --acceptance FILE"),
    ({"groups": {"names": ["female", "male"], "gap": {"auroc": 1}}}, "female: auroc is undefined"),
    ({"quantization": {"drop": {"auroc": 0.1}}}, "auroc is not measured"),
    ({"noise": {"0.2": {"accuracy": 0.5}}}, "after: fedkit export --acceptance FILE"),
    ({"latency_ms": {"2": 99}}, "fedkit export --acceptance FILE"),
]


@pytest.mark.parametrize("values", PASSES, ids=str)
def test_what_keeps_to_a_criterion_passes_it(values: dict[str, Any]) -> None:
    assert set(outcomes(values)) == {"passed"}


@pytest.mark.parametrize("values", MISSES, ids=str)
def test_what_is_beyond_a_criterion_misses_it(values: dict[str, Any]) -> None:
    assert outcomes(values) == ["missed"]


@pytest.mark.parametrize(("values", "said"), UNMEASURED, ids=str)
def test_what_was_not_measured_does_not_pass_and_says_why(values: dict[str, Any], said: str) -> None:
    (verdict,) = judged(values)
    assert verdict.outcome == "not measured"
    assert said in verdict.found


def test_a_float32_file_has_lost_nothing_by_quantisation() -> None:
    (drop, agreement) = judged(
        {"quantization": {"drop": {"accuracy": 0}, "agreement": 1}}, shipped="fp32", gate=[], calibration=None
    )
    assert drop.passed
    assert agreement.found == "float32 is shipped"


def test_one_site_that_keeps_its_scores_leaves_the_gap_unmeasured() -> None:
    hidden = [ClientFacts(pseudonym="a", rounds=1, test={"accuracy": 1.0}), ClientFacts(pseudonym="b", rounds=1)]
    (verdict,) = judged({"sites": {"gap": {"accuracy": 1}}}, clients=hidden)
    assert verdict.outcome == "not measured"
    assert "1 of 2 sites release no scores" in verdict.found
    assert outcomes({"sites": {"gap": {"accuracy": 1}}}, clients=hidden[:1]) == ["not measured"]


@pytest.mark.parametrize(("sites", "passing"), [(0, 0), (2, 3), (4, -1)])
def test_counts_that_cannot_be_are_not_taken_for_a_pass(sites: int, passing: int) -> None:
    exam = EXAMINED.replace(sites=sites, passing={"accuracy>=0.7": passing})
    assert outcomes({"sites": {"floors": {"accuracy": 0.7}}}, examined=exam) == ["not measured"]


@pytest.mark.parametrize(
    ("changes", "outcome", "said"),
    [
        ({"privacy": PrivacyFacts(aggregation="masked")}, "missed", "no differential privacy"),
        ({"calibration": None}, "passed", "2.85"),
        ({"calibration": Calibrated(method="noise", clients=0, rows=0)}, "passed", "2.85"),
        ({"calibration": Calibrated(method="mean", clients=3, rows=9)}, "missed", "ranges are not noised"),
        ({"clients": [ClientFacts(pseudonym="a", rounds=1)]}, "missed", "3.1, of which 0.1 for calibration"),
        (
            {
                "clients": [ClientFacts(pseudonym="a", rounds=1)],
                "privacy": PrivacyFacts(aggregation="plain", dp={"epsilon": "3"}),
            },
            "not measured",
            "not known of each client",
        ),
        ({"clients": []}, "not measured", "not known of each client"),
    ],
)
def test_epsilon_is_that_of_the_client_it_cost_most_with_calibration(
    changes: dict[str, Any], outcome: str, said: str
) -> None:
    (verdict,) = judged({"privacy": {"epsilon": 3}}, **changes)
    assert verdict.outcome == outcome
    assert said in verdict.found


# -- bounds and questions ----------------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["accuracy", "f1/macro", "top-5"]))
def test_a_bound_is_read_back_as_it_was_written(number: float, metric: str) -> None:
    for way in (">=", "<="):
        bound = Bound(metric, way, number)
        assert Bound.parse(str(bound)) == bound
    assert float(number_key(number)) == number


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_floor_and_a_ceiling_of_one_number_are_not_both_missed(number: float, score: float) -> None:
    floor, ceiling = Bound("x", ">=", number), Bound("x", "<=", number)
    assert floor.holds(score) or ceiling.holds(score)
    assert (floor.holds(score) and ceiling.holds(score)) == (abs(score - number) <= 1e-6 * max(abs(number), 1.0))


@pytest.mark.parametrize(
    "text", ["accuracy", "accuracy=0.7", "accuracy>=x", "a>=1e999", ">=1", "a b>=1", "a>=nan", "a>=1>=2"]
)
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a bound is written"):
        Bound.parse(text)


def test_nan_and_nothing_keep_to_no_bound_and_float32_costs_nobody_a_pass() -> None:
    bound = Bound.parse(" accuracy >= 0.7 ")
    assert not bound.holds(math.nan)
    assert not bound.passes({"accuracy": None})
    assert not bound.passes({"loss": 1.0})
    assert bound.passes({"accuracy": float(np.float32(0.7))})
    assert not bound.passes({"accuracy": 0.6999})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"criteria": ["accuracy>=.7"]}, "write 'accuracy>=0.7'"),
        ({"criteria": ["accuracy"]}, "a bound is written"),
        ({"groups": ["a", "a"]}, "groups: each one once"),
        ({"groups": [""]}, "at least 1 character"),
        ({"noise": [0.0]}, "greater than 0"),
        ({"batches": [0]}, "greater than or equal to 1"),
        ({"criteria": [f"a>={n}" for n in range(33)]}, "at most 32"),
    ],
)
def test_questions_are_few_plain_and_asked_once(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(Questions, values)


def test_questions_travel_as_plain_values() -> None:
    asked = Questions(criteria=("loss<=0.5",), groups=("x",), noise=(0.1,), batches=(64,))
    assert parse(Questions, asked.to_dict()) == asked
    assert asked.bounds == (Bound("loss", "<=", 0.5),)


def test_the_criteria_in_the_guide_are_criteria() -> None:
    text = (Path(__file__).parents[2] / "docs" / "registry.md").read_text()
    criteria = parse(Criteria, tomllib.loads(text.split("```toml\n")[1].split("```")[0]))
    exam = EXAMINED.replace(passing=dict.fromkeys(criteria.questions().criteria, 4))
    assert [one for one in criteria.judge(passport(examined=exam)) if not one.passed] == []
