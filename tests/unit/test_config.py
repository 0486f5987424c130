"""Settings: checked when they are made, and errors that name the field, what was given, and what would be right."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import cloudpickle
import pytest
import torch

from fedkit.config import Evaluation, Participation, Settings, parse
from fedkit.errors import ConfigError, FedkitError
from fedkit.queries import Histogram, Moments
from fedkit.strategies import FedAvg, FedBuff, FedSGD, StochasticWeightTransfer
from fedkit.work import Evaluate, Fit, Gradient, Summarize


def said(make) -> str:
    with pytest.raises(ConfigError) as caught:
        make()
    return str(caught.value)


class Inner(Settings):
    """Settings inside settings."""

    depth: int = 1


class Outer(Settings):
    """Settings that hold others, by name, or one of several."""

    inner: Inner = Inner()
    named: dict[str, Inner] = dataclasses.field(default_factory=dict)
    several: list[Inner] = dataclasses.field(default_factory=list)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Participation(fraction=0), "Participation.fraction: should be greater than 0, got 0"),
        (lambda: Participation(fraction=1.5), "Participation.fraction: should be less than or equal to 1, got 1.5"),
        (lambda: Participation(fraction=math.nan), "Participation.fraction: "),
        (lambda: Participation(over_select=math.nan), "Participation.over_select: "),
        (
            lambda: Participation(over_select=0.5),
            "Participation.over_select: should be greater than or equal to 1, got 0.5",
        ),
        (lambda: Participation(quorum=0), "Participation.quorum: should be greater than or equal to 1, got 0"),
        (lambda: Participation(quorum=2.5), "Participation.quorum: should be a valid integer, got 2.5"),
        (lambda: Participation(quorum=True), "Participation.quorum: should be a valid integer, got True"),
        (lambda: Participation(deadline_s=0), "Participation.deadline_s: should be greater than 0, got 0"),
        (lambda: Participation(deadline_s=math.inf), "Participation.deadline_s: should be a finite number, got inf"),
        (lambda: Participation(max_update_norm=-1), "Participation.max_update_norm: should be greater than 0, got -1"),
        (lambda: Participation(attempts=0), "Participation.attempts: should be greater than or equal to 1, got 0"),
        (lambda: Evaluation(every=0), "Evaluation.every: should be greater than or equal to 1, got 0"),
        (lambda: Evaluation(best="auroc"), "Evaluation.best: .* got 'auroc'"),
        (lambda: Evaluation(best="auroc:up"), "Evaluation.best: .* got 'auroc:up'"),
        (lambda: Evaluation(best="a:b:max"), "Evaluation.best: .* got 'a:b:max'"),
        (lambda: Evaluation(best="auroc:max\n"), "Evaluation.best: "),
        (lambda: Evaluation(patience=3), 'Evaluation: patience needs best, for example best="loss:min"'),
        (lambda: Fit(epochs=1, steps=1), "Fit: give epochs or steps, not both"),
        (lambda: Fit(steps=0), "Fit.steps: should be greater than or equal to 1, got 0"),
        (lambda: Fit(steps="100"), "Fit.steps: should be a valid integer, got '100'"),
        (lambda: Fit(lr=0.0), "Fit.lr: should be greater than 0, got 0.0"),
        (lambda: Fit(lr=math.nan), "Fit.lr: "),
        (lambda: Fit(proximal=-0.1), "Fit.proximal: should be greater than or equal to 0, got -0.1"),
        (lambda: Fit(proximal=math.inf), "Fit.proximal: should be a finite number, got inf"),
        (lambda: Fit(batch_size=0), "Fit.batch_size: should be greater than or equal to 1, got 0"),
        (lambda: Fit(batch_size="most"), "Fit.batch_size: should be 'all', got 'most'"),
        (lambda: Gradient(batch_size=-1), "Gradient.batch_size: should be greater than or equal to 1, got -1"),
        (lambda: Evaluate(split="train"), "Evaluate.split: should be 'valid' or 'test', got 'train'"),
        (lambda: FedAvg(rounds=0), "FedAvg.rounds: should be greater than or equal to 1, got 0"),
        (lambda: FedAvg(local=3), "FedAvg.local: should be a dictionary or an instance of Fit, got 3"),
        (lambda: FedAvg(local={"steps": 0}), "FedAvg.local.steps: should be greater than or equal to 1, got 0"),
        (lambda: FedSGD(), "FedSGD.lr: must be given"),
        (lambda: FedSGD(lr=1, server_optimizer="SDG"), "FedSGD.server_optimizer: .* got 'SDG'"),
        (lambda: StochasticWeightTransfer(), "StochasticWeightTransfer.clients_per_round: must be given"),
        (lambda: Moments(bounds=[(1.0, 1.0)]), r"Moments: bounds\[0\]: the lower bound 1.0 is not below"),
        (lambda: Histogram(edges=[0.0]), "Histogram.edges: "),
        (lambda: Summarize(query={"kind": "moment"}), "Summarize.query: .*'moment'.*'moments'"),
    ],
)
def test_an_error_names_the_field_what_was_given_and_what_would_be_right(make, says):
    message = said(make)
    assert re.search(says if ".*" in says or "\\" in says else re.escape(says), message), message


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Fit(learning_rate=1), "Fit.learning_rate: there is no such setting"),
        (lambda: Fit(stepz=1), "Fit.stepz: there is no such setting; did you mean 'steps'?"),
        (lambda: Fit(batchsize=1), "Fit.batchsize: there is no such setting; did you mean 'batch_size'?"),
        (lambda: Participation(deadline=1), "did you mean 'deadline_s'?"),
        (
            lambda: Participation(xyz=1),
            "known are attempts, deadline_s, fraction, max_update_norm, over_select, quorum",
        ),
        (lambda: FedAvg(round=1), "FedAvg.round: there is no such setting; did you mean 'rounds'?"),
        (lambda: FedAvg(local={"stepz": 1}), "FedAvg.local.stepz: there is no such setting; did you mean 'steps'?"),
        (lambda: FedAvg(participation={"quorom": 1}), "FedAvg.participation.quorom: .*did you mean 'quorum'?"),
        (lambda: Outer(inner={"dept": 1}), "Outer.inner.dept: there is no such setting; did you mean 'depth'?"),
        (lambda: Fit().replace(stepz=1), "Fit.stepz: there is no such setting; did you mean 'steps'?"),
    ],
)
def test_a_typo_is_told_the_right_name_at_the_top_and_inside(make, says):
    message = said(make)
    before, _, after = says.partition(".*")
    assert before in message
    assert after in message


@pytest.mark.parametrize("name", ["batch-size", "batch size", "1st", ""])
def test_a_typo_that_is_no_python_name_is_told_the_right_one(name):
    expected = "did you mean 'batch_size'?" if "batch" in name else "known are batch_size"
    assert expected in said(lambda: parse(Fit, {name: 3}))
    message = said(lambda: FedAvg(local={name: 3}))
    assert f"FedAvg.local.{name}: there is no such setting" in message
    assert expected in message


def test_a_typo_in_one_of_several_kinds_is_told_the_names_of_that_kind():
    message = said(lambda: Summarize(query={"kind": "histogram", "edgs": [0.0, 1.0]}))
    assert "did you mean 'edges'?" in message


def test_a_typo_inside_a_list_or_a_table_is_told_the_right_name():
    assert "Outer.several.0.dept: " in said(lambda: Outer(several=[{"dept": 1}]))
    assert "did you mean 'depth'?" in said(lambda: Outer(several=[{"dept": 1}]))
    assert "did you mean 'depth'?" in said(lambda: Outer(named={"a": {"dept": 1}}))


def test_every_problem_is_told_at_once_each_on_its_line():
    lines = said(lambda: Participation(fraction=2, quorum=0, deadlin_s=1)).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "Participation.fraction",
        "Participation.quorum",
        "Participation.deadlin_s",
    ]


@pytest.mark.parametrize(
    "make", [lambda: Fit(3), lambda: Participation(0.5), lambda: FedAvg(15), lambda: Gradient("all")]
)
def test_settings_are_given_by_name_and_a_value_without_one_is_refused(make):
    assert "nexpected positional argument" in said(make)


def test_a_config_error_is_a_value_error_and_a_fedkit_error():
    with pytest.raises(ValueError, match=r"Fit\.steps"):
        Fit(steps=0)
    assert issubclass(ConfigError, FedkitError)


# -- values ------------------------------------------------------------------------------------------------------------


def test_settings_cannot_be_changed_but_a_strategys_own_attributes_can():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Fit().steps = 3
    strategy = FedAvg()
    strategy.velocity = 1.0
    assert strategy.state_dict() == {"velocity": 1.0}


def test_equal_settings_are_equal_and_hash_alike():
    assert Fit(steps=3) == Fit(steps=3) != Fit(steps=4)
    assert len({Participation(), Participation(fraction=1), Participation(quorum=2)}) == 2
    assert Gradient() != Evaluate()


def test_settings_survive_the_way_to_another_process():
    for value in (Fit(steps=3), Participation(quorum=2), FedAvg(local=Fit(lr=0.1)), Moments(bounds=[(0.0, 1.0)])):
        assert cloudpickle.loads(cloudpickle.dumps(value)) == value


def test_the_text_of_settings_can_be_read_as_python():
    assert eval(repr(Fit(steps=3, lr=0.5)), {"Fit": Fit}) == Fit(steps=3, lr=0.5)


def test_fit_is_one_epoch_unless_it_says_otherwise():
    assert (Fit().epochs, Fit().steps) == (1, None)
    assert (Fit(steps=5).epochs, Fit(steps=5).steps) == (None, 5)
    assert (Fit(epochs=5).epochs, Fit(epochs=5).steps) == (5, None)


def test_replacing_epochs_by_steps_drops_the_epochs_and_the_reverse():
    assert Fit(epochs=3, lr=0.5).replace(steps=7) == Fit(steps=7, lr=0.5)
    assert Fit(steps=7, lr=0.5).replace(epochs=3) == Fit(epochs=3, lr=0.5)
    assert Fit(steps=7).replace(lr=0.5) == Fit(steps=7, lr=0.5)
    assert Fit(steps=7).replace(steps=None) == Fit()
    assert "not both" in said(lambda: Fit(steps=7).replace(epochs=1, steps=2))


def test_replacing_checks_again_and_leaves_the_original_as_it_was():
    rule = Participation(fraction=0.5)
    assert rule.replace(quorum=2) == Participation(fraction=0.5, quorum=2)
    assert rule == Participation(fraction=0.5)
    assert "Participation.quorum" in said(lambda: rule.replace(quorum=0))
    assert type(FedBuff(buffer=2).replace(rounds=3)) is FedBuff


def test_a_replaced_strategy_begins_without_the_state_of_the_other():
    strategy = FedAvg()
    strategy.velocity = 1.0
    assert strategy.replace(rounds=3).state_dict() == {}


def test_a_default_holds_no_state_that_two_instances_would_share():
    one, other = Outer(), Outer()
    one.several.append(Inner(depth=7))
    assert other.several == []


# -- plain values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        Fit(),
        Fit(steps=3, batch_size="all", lr=0.1, proximal=0.5, control_variates=True, quantize_from=2),
        Gradient(batch_size=8),
        Evaluate(split="test"),
        Summarize(query=Moments(bounds=[(0.0, 1.0), (-5.0, 5.0)])),
        Summarize(query=Histogram(edges=[0.0, 0.5, 1.0], feature=2)),
        Participation(fraction=0.5, quorum=2, over_select=1.5, deadline_s=10, max_update_norm=3, attempts=7),
        Evaluation(every=2, best="auroc:max", patience=3),
        FedAvg(rounds=3, local=Fit(steps=7), participation=Participation(quorum=2)),
        FedSGD(lr=0.1, server_optimizer="Adam"),
    ],
)
def test_settings_survive_the_way_to_plain_values_and_back(value):
    plain = json.loads(json.dumps(value.to_dict(), allow_nan=False))
    again = parse(type(value), plain)
    assert again == value
    assert again.to_dict() == value.to_dict()


def test_settings_that_hold_code_cannot_be_written_down():
    message = said(lambda: FedSGD(lr=0.1, server_optimizer=torch.optim.SGD).to_dict())
    assert message.startswith("FedSGD: a setting cannot be written down")


def test_state_is_not_among_the_plain_values_of_a_strategy():
    strategy = FedAvg(rounds=3)
    strategy.velocity = 1.0
    assert set(strategy.to_dict()) == {"rounds", "local", "participation"}


def test_parsing_names_where_in_the_file_the_value_stands():
    with pytest.raises(ConfigError, match=r"^run\.local\.steps: should be greater than or equal to 1, got 0$"):
        parse(Fit, {"steps": 0}, where="run.local")
    with pytest.raises(ConfigError, match=r"^strategy\.local\.stepz: .* did you mean 'steps'\?$"):
        parse(FedAvg, {"local": {"stepz": 0}}, where="strategy")


def test_parsing_leaves_what_it_was_given_as_it_was():
    values = {"local": {"steps": 3}, "rounds": 2}
    parse(FedAvg, values)
    assert values == {"local": {"steps": 3}, "rounds": 2}


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_best_is_a_metric_and_a_direction():
    assert (Evaluation(best="auroc:max").metric, Evaluation(best="auroc:max").direction) == ("auroc", "max")
    assert (Evaluation(best="loss:min").metric, Evaluation(best="loss:min").direction) == ("loss", "min")
    assert Evaluation().metric is None


def test_only_a_strictly_better_score_is_better_and_nan_never_is():
    up, down = Evaluation(best="auroc:max"), Evaluation(best="loss:min")
    assert up.better(0.8, 0.7)
    assert not up.better(0.7, 0.7)
    assert down.better(0.6, 0.7)
    assert not down.better(0.7, 0.7)
    for rule in (up, down):
        assert rule.better(0.5, None)
        assert not rule.better(math.nan, None)
        assert not rule.better(math.nan, 0.5)
