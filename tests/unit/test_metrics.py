"""Metrics that leave a client as sums give what torchmetrics gives on the pooled data, and others are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torchmetrics import classification

import fedkit
from fedkit.errors import MetricNotSummable, TaskError
from fedkit.metrics import MetricSet

SPLITS = [[60], [20, 20, 20], [1, 58, 1], [7, 13, 31, 9], [1] * 60]


def task_of(loss: Callable[..., Any], outputs: int = 1, **more: Any) -> fedkit.Task:
    return fedkit.Task(name="scored", model=lambda: nn.Linear(3, outputs), data=lambda client: None, loss=loss, **more)


def rows(kind: str, count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(7)
    features = torch.randn(count, 3, generator=source)
    if kind == "binary":
        return features, (torch.rand(count, 1, generator=source) < 0.4).float()
    if kind == "classes":
        return features, torch.randint(0, 4, (count,), generator=source)
    return features, torch.randn(count, 2, generator=source)


BINARY = ("binary", nn.BCEWithLogitsLoss(), 1)
CLASSES = ("classes", nn.CrossEntropyLoss(), 4)
NUMBERS = ("numbers", nn.MSELoss(), 2)

METRICS = [
    (BINARY, classification.BinaryAccuracy),
    (BINARY, lambda: classification.BinaryAUROC(thresholds=200)),
    (BINARY, lambda: classification.BinaryAveragePrecision(thresholds=200)),
    (BINARY, classification.BinaryF1Score),
    (BINARY, classification.BinaryConfusionMatrix),
    (BINARY, classification.BinaryMatthewsCorrCoef),
    (CLASSES, lambda: classification.MulticlassAccuracy(4)),
    (CLASSES, lambda: classification.MulticlassAccuracy(4, average="micro")),
    (CLASSES, lambda: classification.MulticlassAccuracy(4, average=None)),
    (CLASSES, lambda: classification.MulticlassAccuracy(4, top_k=2)),
    (CLASSES, lambda: classification.MulticlassF1Score(4)),
    (CLASSES, lambda: classification.MulticlassConfusionMatrix(4)),
    (CLASSES, lambda: classification.MulticlassAUROC(4, thresholds=200)),
    (NUMBERS, torchmetrics.MeanSquaredError),
    (NUMBERS, lambda: torchmetrics.MeanSquaredError(squared=False)),
    (NUMBERS, lambda: torchmetrics.MeanSquaredError(num_outputs=2)),
    (NUMBERS, torchmetrics.MeanAbsoluteError),
]


def flat(name: str, value: torch.Tensor) -> dict[str, float]:
    if value.numel() == 1:
        return {name: float(value)}
    return {f"{name}_{i}": float(part) for i, part in enumerate(value.reshape(-1))}


def sums_over(task: fedkit.Task, module: nn.Module, clients: list[tuple[torch.Tensor, ...]], size: int) -> np.ndarray:
    total = None
    for columns in clients:
        metrics = MetricSet(task)
        for batch in zip(*(column.split(size) for column in columns), strict=True):
            metrics.update(module, batch, len(batch[0]))
        total = metrics.sums() if total is None else total + metrics.sums()
    return total


@pytest.mark.parametrize("sizes", SPLITS, ids=lambda sizes: "-".join(map(str, sizes[:4])))
@pytest.mark.parametrize(("setting", "factory"), METRICS)
def test_sums_over_any_split_give_torchmetrics_own_value_on_the_pooled_rows(setting, factory, sizes):
    kind, loss, outputs = setting
    features, targets = rows(kind)
    task = task_of(loss, outputs, metrics={"m": factory})
    module = task.build(0).eval()
    with torch.inference_mode():
        clients = list(zip(features.split(sizes), targets.split(sizes), strict=True))
        scores = MetricSet(task).compute(sums_over(task, module, clients, size=8))
        pooled = factory()
        pooled.update(module(features), targets.long() if kind == "binary" else targets)
        expected = flat("m", pooled.compute())
        assert scores.pop("loss") == pytest.approx(float(loss(module(features), targets)), rel=1e-5)
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_several_metrics_share_one_vector_and_each_keeps_its_name():
    features, targets = rows("binary")
    metrics = {"auroc": lambda: classification.BinaryAUROC(thresholds=200), "accuracy": classification.BinaryAccuracy}
    task = task_of(nn.BCEWithLogitsLoss(), metrics=metrics)
    module = task.build(0).eval()
    one = MetricSet(task)
    with torch.inference_mode():
        one.update(module, (features, targets), len(features))
    scores = MetricSet(task).compute(one.sums())
    assert list(scores) == ["loss", "auroc", "accuracy"]
    assert {name: len(one.metrics[name]._defaults) > 0 for name in metrics} == {"auroc": True, "accuracy": True}
    for name in metrics:
        alone = task_of(nn.BCEWithLogitsLoss(), metrics={name: metrics[name]})
        single = MetricSet(alone)
        with torch.inference_mode():
            single.update(module, (features, targets), len(features))
        assert single.compute(single.sums())[name] == scores[name]


def test_the_vector_begins_with_the_summed_loss_and_the_number_of_rows():
    features, targets = rows("numbers")
    task = task_of(nn.MSELoss(), 2)
    module = task.build(0).eval()
    metrics = MetricSet(task)
    with torch.inference_mode():
        metrics.update(module, (features[:10], targets[:10]), 10)
        metrics.update(module, (features[10:13], targets[10:13]), 3)
        mean = float(nn.MSELoss()(module(features[:13]), targets[:13]))
    assert metrics.sums()[1] == 13
    assert metrics.sums()[0] == pytest.approx(13 * mean, rel=1e-6)


def test_a_loss_over_no_rows_is_nan_and_no_division_by_zero():
    task = task_of(nn.MSELoss(), 2, metrics={"mse": torchmetrics.MeanSquaredError})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(MetricSet(task).compute(MetricSet(task).sums())["loss"])


def test_computing_does_not_remember_the_last_vector():
    task = task_of(nn.MSELoss(), 2, metrics={"mse": torchmetrics.MeanSquaredError})
    scorer = MetricSet(task)
    vector = np.array([2.0, 4.0, 8.0, 4.0])
    assert scorer.compute(vector) == {"loss": 0.5, "mse": 2.0}
    assert scorer.compute(vector * [1, 1, 3, 1]) == {"loss": 0.5, "mse": 6.0}
    assert scorer.compute(vector) == {"loss": 0.5, "mse": 2.0}
    assert vector.tolist() == [2.0, 4.0, 8.0, 4.0]


@pytest.mark.parametrize("vector", [np.zeros(3), np.zeros(5), np.zeros((2, 2)), np.zeros(0)])
def test_a_vector_of_another_length_is_refused_and_both_lengths_are_named(vector):
    task = task_of(nn.MSELoss(), 2, metrics={"mse": torchmetrics.MeanSquaredError})
    with pytest.raises(TaskError, match=r"expected 4 metric sums, got shape"):
        MetricSet(task).compute(vector)


def test_step_and_predict_are_scored_where_batches_are_no_pairs():
    task = fedkit.Task(
        name="dicts",
        model=lambda: nn.Linear(3, 1),
        data=lambda client: None,
        step=lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(),
        predict=lambda model, batch: (model(batch["x"]), batch["y"]),
        metrics={"mse": torchmetrics.MeanSquaredError},
    )
    source = torch.Generator().manual_seed(1)
    batch = {"x": torch.randn(5, 3, generator=source), "y": torch.randn(5, 1, generator=source)}
    metrics = MetricSet(task)
    with torch.inference_mode():
        metrics.update(task.build(0), batch, 5)
    scores = metrics.compute(metrics.sums())
    assert scores["mse"] == pytest.approx(scores["loss"], rel=1e-6)


# -- what does not add up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (classification.BinaryAUROC, r"'m' keeps 'preds' \(raw\).*BinaryAUROC\(thresholds=200\)"),
        (lambda: classification.MulticlassAUROC(4), r"BinaryAUROC\(thresholds=200\)"),
        (torchmetrics.SpearmanCorrCoef, "does not add up"),
        (torchmetrics.CatMetric, r"'value' \(raw\)"),
        (torchmetrics.MaxMetric, r"'max_value' \(max\).*one person's value"),
        (torchmetrics.MinMetric, r"'min_value' \(min\).*one person's value"),
        (torchmetrics.PearsonCorrCoef, "does not add up: use a metric that keeps sums and counts"),
    ],
)
def test_a_metric_that_keeps_more_than_sums_is_refused_and_the_alternative_is_named(factory, says):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns of their memory
        with pytest.raises(MetricNotSummable, match=says):
            MetricSet(task_of(nn.MSELoss(), metrics={"m": factory}))


def test_a_mean_of_values_adds_up():
    task = task_of(nn.MSELoss(), metrics={"m": torchmetrics.MeanMetric})
    one, other = MetricSet(task), MetricSet(task)
    one.metrics["m"].update(torch.tensor([1.0, 2.0]))
    other.metrics["m"].update(torch.tensor([6.0]))
    assert MetricSet(task).compute(one.sums() + other.sums())["m"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    "factory",
    [
        lambda: torchmetrics.MeanSquaredError() + torchmetrics.MeanAbsoluteError(),
        lambda: torchmetrics.MeanSquaredError() * 2,
        lambda: torchmetrics.MinMaxMetric(torchmetrics.MeanSquaredError()),
        lambda: torchmetrics.MultioutputWrapper(torchmetrics.MeanSquaredError(), 2),
        lambda: torchmetrics.ClasswiseWrapper(classification.MulticlassAccuracy(4, average=None)),
        lambda: torchmetrics.BootStrapper(torchmetrics.MeanSquaredError()),
    ],
    ids=["sum", "product", "minmax", "multioutput", "classwise", "bootstrap"],
)
def test_a_metric_made_of_other_metrics_is_refused_because_its_states_are_theirs(factory):
    with pytest.raises(TaskError, match="'m'"):
        MetricSet(task_of(nn.MSELoss(), metrics={"m": factory}))


@pytest.mark.parametrize(
    "factory",
    [
        lambda: 3,
        lambda: nn.Linear(1, 1),
        lambda: torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()]),
        torchmetrics.MeanSquaredError(),
        "auroc",
    ],
    ids=["number", "module", "collection", "instance", "text"],
)
def test_what_makes_no_metric_is_refused_and_the_metric_is_named(factory):
    with pytest.raises(TaskError, match="metric 'm'"):
        MetricSet(task_of(nn.MSELoss(), metrics={"m": factory}))


def test_a_metric_may_not_be_called_loss_because_the_loss_is():
    with pytest.raises(TaskError, match="loss"):
        MetricSet(task_of(nn.MSELoss(), metrics={"loss": torchmetrics.MeanAbsoluteError}))


def test_a_metric_that_is_undefined_for_few_rows_is_nan_and_ends_no_run():
    task = task_of(nn.MSELoss(), metrics={"r2": torchmetrics.R2Score})
    metrics = MetricSet(task)
    with torch.inference_mode():
        metrics.update(task.build(0), (torch.ones(1, 3), torch.ones(1, 1)), 1)
    scores = metrics.compute(metrics.sums())
    assert np.isnan(scores["r2"])
    assert np.isfinite(scores["loss"])


def test_a_metric_whose_states_grow_with_use_is_refused_by_name():
    class Growing(torchmetrics.MeanAbsoluteError):
        def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
            self.sum_abs_error = self.sum_abs_error + (outputs - targets).abs().sum(0)
            self.total = self.total + len(targets)

    task = task_of(nn.MSELoss(), 2, metrics={"m": Growing})
    metrics = MetricSet(task)
    with torch.inference_mode():
        metrics.update(task.build(0), rows("numbers"), 60)
        with pytest.raises(TaskError, match="'m'"):
            metrics.sums()


def test_a_metric_that_computes_a_table_is_refused():
    class Table(torchmetrics.MeanSquaredError):
        def compute(self) -> dict[str, torch.Tensor]:
            return {"mse": super().compute()}

    task = task_of(nn.MSELoss(), metrics={"m": Table})
    with pytest.raises(TaskError, match="'m' computes dict"):
        MetricSet(task).compute(MetricSet(task).sums() + 1)
