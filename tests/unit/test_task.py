"""A task says at once what is missing or contradictory, builds equal models for equal seeds, and names what travels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import fedkit
from fedkit.errors import DataError, TaskError
from fedkit.queries import MomentsResult
from fedkit.task import Prepared, StandardizeLayer
from fedkit.weights import Weights


def task_of(**fields):
    settings = {
        "name": "toy",
        "model": lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)),
        "data": lambda client: None,
        "loss": nn.MSELoss(),
        "inputs": {"features": fedkit.Tensor("float32", (3,))},
    }
    return fedkit.Task(**settings | fields)


class Squares(Dataset):
    """Rows that are made when they are asked for."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[float, float]:
        return float(index), float(index**2)


# -- construction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": ""}, "a task's name is letters, digits, '-' and '_', got ''"),
        ({"name": "../up"}, r"got '\.\./up'"),
        ({"name": "two words"}, "got 'two words'"),
        ({"name": "--"}, "got '--'"),
        ({"loss": None}, "toy: give loss, step or train; nothing says how to learn"),
        ({"step": lambda model, batch: None}, "toy: give loss .* or step .*, not both"),
        (
            {"loss": None, "step": lambda model, batch: None, "metrics": {"m": torchmetrics.MeanSquaredError}},
            r"toy: metrics need predict\(model, batch\)",
        ),
        ({"prepare": fedkit.Standardize(), "inputs": {}}, "toy: prepare needs inputs="),
        (
            {"prepare": fedkit.Standardize(), "inputs": {"x": fedkit.Tensor("float32", (None, 3))}},
            "prepare needs inputs=",
        ),
        ({"prepare": fedkit.Standardize(bounds=[(0.0, 1.0)])}, "toy: 1 bounds are declared for 3 features"),
    ],
)
def test_what_is_missing_or_contradictory_is_told_at_construction(fields, says):
    with pytest.raises(TaskError, match=says):
        task_of(**fields)


@pytest.mark.parametrize("model", [nn.Linear(3, 1), "linear", None], ids=["instance", "text", "none"])
def test_a_model_that_is_no_factory_is_refused_by_name(model):
    with pytest.raises(TaskError, match="toy: model"):
        task_of(model=model).build(0)


def test_a_factory_that_makes_no_module_is_refused_by_name():
    with pytest.raises(TaskError, match=r"toy: model\(\) must return a torch.nn.Module, got int"):
        task_of(model=lambda: 3).build(0)


def test_a_task_is_a_value_that_cannot_be_changed():
    with pytest.raises(AttributeError):
        task_of().name = "other"


@pytest.mark.parametrize("dtype", ["float", "int64", "bfloat16", "bool"])
def test_an_input_names_a_dtype_of_torch(dtype):
    assert fedkit.Tensor(dtype, (3,)).torch_dtype is getattr(torch, dtype)


@pytest.mark.parametrize("dtype", ["float31", "Tensor", "nn", "", "__name__"])
def test_an_input_of_any_other_dtype_is_refused(dtype):
    with pytest.raises(TaskError, match="is not a torch dtype, such as 'float32' or 'int64'"):
        fedkit.Tensor(dtype, (3,))


# -- data --------------------------------------------------------------------------------------------------------------


def test_columns_may_be_arrays_tensors_or_lists_and_keep_their_dtypes():
    data = fedkit.Data((np.ones((4, 2), dtype=np.float32), torch.arange(4), [0.0, 1.0, 2.0, 3.0]))
    assert [column.dtype for column in data.train.tensors] == [torch.float32, torch.int64, torch.float32]
    assert len(data.train) == 4
    assert (data.test, data.valid) == (None, None)


def test_a_list_of_rows_is_rows_and_a_list_of_columns_is_columns():
    assert [len(fedkit.Data([(0.1, 1.0), (0.2, 0.0), (0.3, 1.0)]).train), len(fedkit.Data([{"x": 1}]).train)] == [3, 1]
    assert fedkit.Data([(0.1, 1.0), (0.2, 0.0)]).train[1] == (0.2, 0.0)
    assert len(fedkit.Data([np.ones((4, 2)), np.ones(4)]).train) == 4


def test_columns_of_float64_become_float32_and_a_data_set_keeps_its_own():
    assert fedkit.Data((np.ones((2, 3)),)).train.tensors[0].dtype == torch.float32
    kept = TensorDataset(torch.ones(2, 3, dtype=torch.float64))
    assert fedkit.Data(kept).train.tensors[0].dtype == torch.float64


def test_a_dataset_is_taken_as_it_is():
    train, test, valid = Squares(), TensorDataset(torch.ones(2)), Squares()
    data = fedkit.Data(train, test, valid)
    assert (data.train, data.test, data.valid) == (train, test, valid)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ((np.ones(3), np.ones(4)), r"train: columns have different lengths: \[3, 4\]"),
        (3, "train: expected a torch Dataset or a tuple of arrays"),
        ((np.array(["a", "b"]),), "train: expected a torch Dataset or a tuple of arrays"),
        ((), "train: "),
        ((1.0, 2.0), "train: "),
        (torch.ones(10, 5), "train: "),
        (np.ones((10, 5)), "train: "),
    ],
)
def test_rows_that_are_no_dataset_and_no_tuple_of_columns_are_refused(rows, says):
    with pytest.raises(DataError, match=says):
        fedkit.Data(rows)


@pytest.mark.parametrize("split", ["test", "valid"])
def test_an_error_names_the_split(split):
    with pytest.raises(DataError, match=f"^{split}: "):
        fedkit.Data((np.ones(3),), **{split: (np.ones(3), np.ones(2))})


def test_a_data_error_is_a_task_error():
    assert issubclass(DataError, TaskError)


# -- building ----------------------------------------------------------------------------------------------------------


def test_equal_seeds_build_equal_models_and_others_do_not():
    task = task_of()
    first = Weights.from_module(task.build(1))
    assert first == Weights.from_module(task.build(1))
    assert first != Weights.from_module(task.build(2))


def test_building_does_not_depend_on_the_global_generators_and_leaves_them_as_they_were():
    task = task_of()
    first = Weights.from_module(task.build(1))
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    assert Weights.from_module(task.build(1)) == first
    assert torch.equal(torch.rand(3), expected)


def test_preprocessing_is_the_first_layer_and_changes_nothing_before_it_is_known():
    plain, prepared = task_of(), task_of(prepare=fedkit.Standardize())
    module = prepared.build(3).eval()
    assert isinstance(module, Prepared)
    rows = torch.randn(5, 3)
    assert torch.equal(module(rows), plain.build(3).eval()(rows))


# -- what travels ------------------------------------------------------------------------------------------------------


def names(task: fedkit.Task) -> list[str]:
    return list(Weights.from_module(task.build(0), task.travels).manifest.slices)


def test_everything_travels_unless_exchange_says_otherwise():
    assert names(task_of()) == [
        *("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "2.weight", "2.bias")
    ]
    assert names(task_of(exchange=lambda name: name.startswith("0."))) == ["0.weight", "0.bias"]


def test_exchange_is_asked_for_the_names_of_the_users_own_model_and_the_preprocessing_always_travels():
    asked: list[str] = []

    def exchange(name: str) -> bool:
        asked.append(name)
        return name == "2.bias"

    task = task_of(prepare=fedkit.Standardize(), exchange=exchange)
    assert names(task) == ["prepare.mean", "prepare.scale", "model.2.bias"]
    assert {name.partition(".")[0] for name in asked} == {"0", "1", "2"}


def test_a_layer_of_the_users_own_that_is_called_prepare_is_asked_for_like_any_other():
    inner = nn.ModuleDict({"prepare": nn.Linear(1, 1), "model": nn.Linear(1, 1)})
    without = task_of(model=lambda: inner, exchange=lambda name: not name.startswith("prepare."))
    assert names(without) == ["model.weight", "model.bias"]
    behind = task_of(
        model=lambda: inner, exchange=lambda name: not name.startswith("prepare."), prepare=fedkit.Standardize()
    )
    assert names(behind) == ["prepare.mean", "prepare.scale", "model.model.weight", "model.model.bias"]


# -- standardisation ---------------------------------------------------------------------------------------------------


def test_the_layer_subtracts_the_mean_and_divides_by_the_deviation_in_any_shape():
    layer = StandardizeLayer((2, 2))
    mean, std = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 0.5, 2.0, 4.0])
    layer.set(MomentsResult(mean, std, 10))
    rows = torch.arange(8.0).reshape(2, 2, 2)
    expected = (rows - torch.tensor(mean).float().reshape(2, 2)) / torch.tensor(std).float().reshape(2, 2)
    assert torch.equal(layer(rows), expected)


def test_a_feature_without_deviation_is_only_centred():
    layer = StandardizeLayer((2,))
    layer.set(MomentsResult(np.array([1.0, 2.0]), np.array([0.0, 3.0]), 10))
    assert layer.scale.tolist() == [1.0, 3.0]
    assert layer(torch.tensor([[1.5, 5.0]])).tolist() == [[0.5, 1.0]]


@given(st.floats(-1e4, 1e4), st.integers(2, 60), st.booleans())
def test_a_feature_that_never_varies_is_only_centred_whatever_its_value(value, count, with_bounds):
    bounds = [(-1e4, 1e4 + 1)] * 3 if with_bounds else None
    prepare = fedkit.Standardize(bounds=bounds)
    layer = prepare.layer(task_of(prepare=prepare))
    column = np.full((count, 3), value)
    layer.set(prepare.query.finish(prepare.query.answer([(column, column)])))
    assert layer.scale.tolist() == [1.0] * 3


def test_statistics_travel_with_the_model():
    task = task_of(prepare=fedkit.Standardize())
    source, target = task.build(0), task.build(1)
    source.prepare.set(MomentsResult(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.5, 2.0]), 10))
    Weights.from_module(source, task.travels).to_module(target, task.travels)
    assert target.prepare.mean.tolist() == [1.0, 2.0, 3.0]
    assert target.prepare.scale.tolist() == [1.0, 0.5, 2.0]


def test_statistics_are_not_trained():
    entries = Weights.from_module(task_of(prepare=fedkit.Standardize()).build(0)).manifest.entries
    assert [entry.trainable for entry in entries[:2]] == [False, False]


# -- losses and batches ------------------------------------------------------------------------------------------------


def test_a_batch_is_features_and_targets_unless_step_and_predict_say_otherwise():
    rows, targets = torch.ones(2, 3), torch.ones(2, 1)
    plain = task_of(model=lambda: nn.Linear(3, 1))
    module = plain.build(0)
    assert plain.mean_loss(module, (rows, targets)).item() == pytest.approx(
        nn.MSELoss()(module(rows), targets).item(), rel=1e-6
    )
    loss, outputs, found = plain.scored(module, [rows, targets], with_outputs=True)
    assert torch.equal(outputs, module(rows))
    assert found is targets
    assert torch.equal(loss, plain.mean_loss(module, (rows, targets)))


@pytest.mark.parametrize("batch", [torch.ones(2, 3), {"x": 1}, (1, 2, 3), ()])
def test_any_other_batch_is_refused_and_the_remedy_is_named(batch):
    with pytest.raises(DataError, match=r"expected batches of \(features, targets\).*give step and predict"):
        task_of().mean_loss(nn.Linear(3, 1), batch)


def test_a_task_with_its_own_loop_only_has_no_loss_to_give():
    task = task_of(loss=None, train=lambda model, batches, site: None)
    with pytest.raises(TaskError, match="only its own train loop"):
        task.mean_loss(nn.Linear(3, 1), (torch.ones(1, 3), torch.ones(1, 1)))
    assert not task.scores()


def test_a_task_with_its_own_loop_is_scored_where_it_can_predict():
    task = task_of(
        loss=None,
        train=lambda model, batches, site: None,
        predict=lambda model, batch: (model(batch[0]), batch[1]),
        metrics={"mse": torchmetrics.MeanSquaredError},
    )
    assert task.scores()
