"""A gate judges by numbers alone; what a client says of a hop is checked like anything else it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedkit.config import Evaluation, parse, worsening
from fedkit.errors import ConfigError, Reason, Refused
from fedkit.gate import VERDICT, Gate, Verdict
from fedkit.strategies import CyclicWeightTransfer
from fedkit.weights import Entry, Manifest, Weights

MANIFEST = Manifest((Entry("w", (3,)),))
BEFORE = Weights(MANIFEST, [3.0, 4.0, 0.0])
AFTER = Weights(MANIFEST, [3.0, 4.0, 2.0])


def no_score(model: Weights) -> float:
    raise AssertionError("nobody asked for a score")


def scores(before: float, after: float):
    return lambda model: before if model == BEFORE else after


@pytest.mark.parametrize(
    ("gate", "broken"),
    [
        (Gate(max_norm=2.0), None),
        (Gate(max_norm=1.99), "max_norm"),
        (Gate(max_ratio=0.4), None),
        (Gate(max_ratio=0.39), "max_ratio"),
        (Gate(max_norm=9.0, max_ratio=0.1), "max_ratio"),
        (Gate(max_norm=1.0, max_ratio=0.1, max_drop=0.0), "max_norm"),
    ],
)
def test_norms_are_judged_before_any_score_is_asked_for(gate: Gate, broken: str | None) -> None:
    verdict = gate.judge(AFTER, BEFORE, no_score)
    assert verdict == Verdict(broken, 2.0)


@pytest.mark.parametrize(
    ("metric", "before", "after", "holds"),
    [
        ("loss:min", 0.5, 0.625, True),
        ("loss:min", 0.5, 0.64, False),
        ("loss:min", 0.5, 0.1, True),
        ("auroc:max", 0.75, 0.625, True),
        ("auroc:max", 0.75, 0.6, False),
        ("auroc:max", 0.75, 0.9, True),
        ("loss:min", 0.5, math.nan, False),
        ("loss:min", 0.5, math.inf, False),
        ("loss:min", math.nan, math.nan, True),
        ("loss:min", math.nan, 0.5, True),
    ],
)
def test_a_score_may_be_worse_by_as_much_as_is_stated(metric: str, before: float, after: float, holds: bool) -> None:
    verdict = Gate(max_drop=0.125, metric=metric).judge(AFTER, BEFORE, scores(before, after))
    assert (verdict.broken is None) == holds


def test_a_change_that_is_too_large_for_a_float_is_too_large_for_a_gate() -> None:
    largest = float(np.finfo(np.float32).max)
    low, high = Weights(MANIFEST, [-largest] * 3), Weights(MANIFEST, [largest] * 3)
    verdict = Gate(max_norm=1.0).judge(high, low, no_score)
    assert verdict.broken == "max_norm"
    assert np.isfinite(verdict.to_vector()).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Gate(), "give max_norm, max_ratio or max_drop"),
        (lambda: Gate(max_norm=0), "Gate.max_norm: should be greater than 0, got 0"),
        (lambda: Gate(max_drop=-0.1), "Gate.max_drop: should be greater than or equal to 0, got -0.1"),
        (lambda: Gate(max_drop=math.inf), "Gate.max_drop: should be a finite number, got inf"),
        (lambda: Gate(max_drop=0.1, metric="auroc"), "Gate.metric: "),
        (lambda: Evaluation(max_drop=0.1), 'max_drop needs best, for example best="loss:min"'),
        (lambda: Evaluation(max_drop=-1, best="loss:min"), "Evaluation.max_drop: should be greater than or equal to 0"),
        (lambda: Evaluation(max_drop=0.1, best="loss:min", every=2), "so every must be 1, got 2"),
        (lambda: parse(CyclicWeightTransfer, {"gate": {"max_nrm": 1}}, where="strategy"), "did you mean 'max_norm'?"),
    ],
)
def test_a_wrong_limit_is_named(make, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert says in str(caught.value)


def test_a_gate_can_be_read_from_a_run_file() -> None:
    found = parse(CyclicWeightTransfer, {"gate": {"max_drop": 0.1, "metric": "auroc:max"}})
    assert found == CyclicWeightTransfer(gate=Gate(max_drop=0.1, metric="auroc:max"))
    assert parse(CyclicWeightTransfer, found.to_dict()) == found


@pytest.mark.parametrize(
    "verdict",
    [Verdict(None, 0.5), Verdict("max_norm", 2.5), Verdict("max_ratio", 0.0), Verdict("max_drop", 1.0, (0.5, 0.25))],
)
def test_a_verdict_comes_back_from_what_travels(verdict: Verdict) -> None:
    gate = Gate(max_norm=1, max_ratio=1, max_drop=1)
    assert Verdict.from_extra({VERDICT: verdict.to_vector()}, gate) == verdict


def test_scores_that_are_not_finite_do_not_travel() -> None:
    assert Verdict("max_drop", 1.0, (0.5, math.nan)).to_vector().tolist() == [3.0, 1.0]


def test_a_site_may_keep_its_scores_to_itself() -> None:
    extra = {"control": AFTER.vector, VERDICT: Verdict("max_drop", 1.0, (0.5, 0.25)).to_vector()}
    told = Verdict.without_scores(extra)
    assert Verdict.from_extra(told, Gate(max_drop=0.1)) == Verdict("max_drop", 1.0)
    assert told["control"] is AFTER.vector


@pytest.mark.parametrize(
    "vector", [None, [], [0], [0, 1, 2], [4, 1], [-1, 1], [0.5, 1], [2, 1], [3, 1, 0.5, 0.4], [math.nan, 1]]
)
def test_a_verdict_that_makes_no_sense_is_refused(vector: list[float] | None) -> None:
    extra = {} if vector is None else {VERDICT: np.array(vector, dtype=np.float32)}
    with pytest.raises(Refused, match="does not say what became of the hop before") as caught:
        Verdict.from_extra(extra, Gate(max_norm=1.0))
    assert caught.value.reason is Reason.SHAPE


def test_a_broken_limit_is_explained_with_its_numbers() -> None:
    gate = Gate(max_norm=1, max_ratio=0.5, max_drop=0.1, metric="auroc:max")
    told = [
        Verdict("max_norm", 2.5),
        Verdict("max_ratio", 2.5),
        Verdict("max_drop", 1, (0.75, 0.5)),
        Verdict("max_drop", 1),
    ]
    assert [verdict.explain(gate) for verdict in told] == [
        "the change has norm 2.5, max_norm is 1",
        "the change has norm 2.5, max_ratio to the model before is 0.5",
        "its auroc on validation data went from 0.75 to 0.5, max_drop is 0.1",
        "its auroc on validation data got worse, max_drop is 0.1",
    ]


def test_worse_is_what_the_criterion_says() -> None:
    assert worsening("auroc:max", 0.75, 0.5) == 0.25
    assert worsening("loss:min", 0.75, 0.5) == -0.25
