"""Local work: which rows in which order, the loop, what stays at a client, and that nothing is done twice."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import fedkit
from fedkit import rng
from fedkit.errors import CastWarning, ConfigError, DataError, IncompatibleStrategy, Reason, Refused
from fedkit.metrics import MetricSet
from fedkit.queries import LabelCounts, Moments
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.trainer.batches import all_rows, batches, row_count, shuffled, smallest_class, split_valid, to_device
from fedkit.trainer.client import LocalClient, MemoryStore
from fedkit.trainer.trainer import Trainer, pick_device
from fedkit.weights import Weights
from fedkit.work import Evaluate, Fit, Gradient, Summarize, Update, Work

CPU = torch.device("cpu")
Row = namedtuple("Row", ["x", "y"])


def rows_of(client: str, count: int = 20, features: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(sum(map(ord, client)))
    x = torch.randn(count, features, generator=source)
    return x, x.sum(1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=source)


def load(client: str) -> fedkit.Data:
    return fedkit.Data(rows_of(client), rows_of(client, 10))


def task_of(**fields: Any) -> fedkit.Task:
    settings = {"name": "toy", "model": lambda: nn.Linear(3, 1), "data": load, "loss": nn.MSELoss()}
    return fedkit.Task(**settings | fields)


def trainer_of(task: fedkit.Task, **settings: Any) -> Trainer:
    return Trainer(task, 7, device="cpu", **settings)


def model_of(task: fedkit.Task, seed: int = 0) -> Weights:
    return Weights.from_module(task.build(seed), task.travels)


def at(work: Work, client: str = "a", *, id: str = "1", round: int = 1, returns: str = "update") -> Assignment:
    return Assignment(id, "run", 7, round, client, work, returns)


def fitted(task: fedkit.Task, fit: Fit, *, model: Weights | None = None, state: Any = None, **where: Any) -> Update:
    return trainer_of(task).perform(at(fit, **where), Parcel(model or model_of(task)), state or {})[0]


# -- batches -----------------------------------------------------------------------------------------------------------


def drawn(count: int, size: Any, seed: int = 0, **stop: int | None) -> list[list[int]]:
    index = shuffled(count, size, **{"epochs": None, "steps": None, **stop}, seed=seed)
    return [batch.tolist() for batch in index]


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 4))
def test_each_epoch_visits_every_row_once_in_full_batches_and_a_last_one_of_the_rest(count, size, epochs):
    found = drawn(count, size, epochs=epochs)
    per_epoch = -(-count // size)
    assert len(found) == epochs * per_epoch
    for epoch in range(epochs):
        batch_rows = found[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for batch in batch_rows for row in batch) == list(range(count))
        assert [len(batch) for batch in batch_rows[:-1]] == [size] * (per_epoch - 1)


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 50))
def test_steps_go_on_over_as_many_epochs_as_they_need_and_then_stop(count, size, steps):
    found = drawn(count, size, steps=steps)
    assert len(found) == steps
    per_epoch = -(-count // size)
    assert found == drawn(count, size, epochs=-(-steps // per_epoch))[:steps]


def test_epochs_are_shuffled_anew_and_depend_on_the_seed_alone():
    found = drawn(20, 20, epochs=2)
    assert found[0] != found[1]
    assert found == drawn(20, 20, epochs=2)
    assert found != drawn(20, 20, seed=1, epochs=2)


def test_all_is_every_row_in_order():
    assert drawn(4, "all", epochs=2) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert drawn(4, "all", steps=1) == [[0, 1, 2, 3]]


class Dicts(Dataset):
    """Rows as dicts, made one by one."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.full((3,), float(index)), "y": torch.tensor([1.0]), "name": f"row{index}"}


def test_columns_are_indexed_and_a_data_set_is_read_row_by_row():
    columns = fedkit.Data((torch.arange(5), torch.arange(5) * 10))
    (found,) = batches(columns, columns.train, iter([torch.tensor([3, 1])]), CPU)
    assert [column.tolist() for column in found] == [[3, 1], [30, 10]]
    dicts = fedkit.Data(Dicts())
    (batch,) = batches(dicts, dicts.train, iter([torch.tensor([3, 1])]), CPU)
    assert batch["x"][:, 0].tolist() == [3.0, 1.0]
    assert batch["name"] == ["row3", "row1"]


def test_collate_makes_the_batches_of_any_rows():
    data = fedkit.Data((torch.arange(5), torch.arange(5) * 10), collate=lambda found: {"sum": sum(x for x, _ in found)})
    (batch,) = batches(data, data.train, iter([torch.tensor([3, 1])]), CPU)
    assert batch == {"sum": torch.tensor(4)}


def test_all_rows_come_in_order_with_the_size_of_each_batch():
    for data in (fedkit.Data((torch.arange(5),)), fedkit.Data(Dicts())):
        assert [count for _, count in all_rows(data, data.train, 2, CPU)] == [2, 2, 1]


def test_a_data_set_without_a_length_is_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(DataError, match="needs __len__"):
        row_count(Endless())


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(1), torch.ones(1)),
        [torch.ones(1), "text", None],
        {"x": torch.ones(1), "more": [torch.ones(1), 3]},
        OrderedDict(x=torch.ones(1)),
        Row(torch.ones(1), torch.ones(1)),
        "text",
        3,
    ],
    ids=["tuple", "list", "dict", "ordered", "namedtuple", "text", "number"],
)
def test_a_batch_of_any_kind_keeps_its_kind_on_its_way_to_a_device(batch):
    moved = to_device(batch, CPU)
    assert moved == batch
    assert isinstance(moved, type(batch) if isinstance(batch, tuple) else object)


# -- validation rows ---------------------------------------------------------------------------------------------------


@given(st.integers(2, 60), st.integers(0, 5))
def test_a_seeded_tenth_of_train_and_at_least_one_row_is_set_aside(count, seed):
    data = fedkit.Data((torch.arange(count),))
    train, valid = split_valid(data, seed, "a")
    assert len(valid) == max(count // 10, 1)
    together = [*train.tensors[0].tolist(), *valid.tensors[0].tolist()]
    assert sorted(together) == list(range(count))
    again = split_valid(data, seed, "a")[1]
    assert again.tensors[0].tolist() == valid.tensors[0].tolist()


def test_rows_set_aside_differ_by_client_and_by_seed():
    data = fedkit.Data((torch.arange(100),))
    found = [split_valid(data, seed, client)[1].tensors[0].tolist() for seed, client in [(0, "a"), (0, "b"), (1, "a")]]
    assert len({tuple(part) for part in found}) == 3


def test_rows_of_any_data_set_can_be_set_aside():
    train, valid = split_valid(fedkit.Data(Dicts()), 0, "a")
    assert (len(train), len(valid)) == (4, 1)
    assert {row["name"] for row in [*map(train.__getitem__, range(4)), valid[0]]} == {f"row{i}" for i in range(5)}


def test_validation_rows_that_are_given_are_taken_as_they_are():
    data = fedkit.Data((torch.arange(10),), valid=(torch.arange(3),))
    assert split_valid(data, 0, "a") == (data.train, data.valid)


def test_a_single_row_cannot_be_split_and_the_remedy_is_named():
    with pytest.raises(DataError, match=r"a: 1 training rows cannot be split; give Data\(valid=\.\.\.\)"):
        split_valid(fedkit.Data((torch.arange(1),)), 0, "a")


def test_rows_are_set_aside_only_in_runs_that_evaluate():
    task = task_of()
    assert fitted(task, Fit()).examples == 20
    holding = trainer_of(task, holds_out_valid=True)
    assert holding.perform(at(Fit()), Parcel(model_of(task)), {})[0].examples == 18
    assert holding.perform(at(Evaluate()), Parcel(model_of(task)), {})[0].examples == 2
    with pytest.raises(Refused) as refused:
        trainer_of(task).perform(at(Evaluate()), Parcel(model_of(task)), {})
    assert refused.value.reason is Reason.NO_DATA


# -- devices -----------------------------------------------------------------------------------------------------------


def test_the_cpu_is_always_there():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cuda", "mps", "cpu")


@pytest.mark.parametrize("wish", ["tpu", "gpu", "", "CPU", "meta"])
def test_a_device_that_is_not_there_is_refused_and_those_that_are_are_named(wish):
    with pytest.raises(ConfigError, match=f"device '{wish}' is not to be had here; there is .*cpu"):
        pick_device(wish)


def test_a_device_with_a_nonsensical_number_is_refused():
    with pytest.raises(ConfigError, match="cpu:first"):
        pick_device("cpu:first")


# -- fitting -----------------------------------------------------------------------------------------------------------


def by_hand(task: fedkit.Task, fit: Fit, model: Weights, loss_of: Any) -> Weights:
    """The same training with an explicit loss, by autograd alone."""
    module = model.to_module(task.build(0))
    start = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=fit.lr)
    x, y = rows_of("a")
    for index in shuffled(len(x), fit.batch_size, epochs=fit.epochs, steps=fit.steps, seed=rng.seed_for(7, 1, "a")):
        optimizer.zero_grad()
        loss_of(module, start, x[index], y[index]).backward()
        optimizer.step()
    return Weights.from_module(module) - model


def test_a_fit_is_plain_sgd_over_the_seeded_batches():
    task, fit = task_of(), Fit(epochs=2, batch_size=6, lr=0.1)
    model = model_of(task)
    expected = by_hand(task, fit, model, lambda module, start, x, y: nn.MSELoss()(module(x), y))
    assert fitted(task, fit, model=model).weights == expected


@pytest.mark.parametrize("mu", [0.01, 0.5, 3.0])
def test_the_proximal_term_is_mu_halves_times_the_squared_distance_from_the_received_model(mu):
    task = task_of(model=lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    fit, model = Fit(steps=9, batch_size=6, lr=0.1, proximal=mu), model_of(task)

    def loss(module: nn.Module, start: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        pull = sum((p - s).square().sum() for p, s in zip(module.parameters(), start, strict=True))
        return nn.MSELoss()(module(x), y) + mu / 2 * pull

    expected = by_hand(task, fit, model, loss)
    found = fitted(task, fit, model=model).weights
    assert np.abs((found - expected).vector).max() <= 1e-6
    assert found != fitted(task, fit.replace(proximal=0.0), model=model).weights


def test_the_same_assignment_gives_the_same_bits_whatever_was_done_in_between():
    task = task_of(model=lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)))
    model, trainer = model_of(task), trainer_of(task)
    first = trainer.perform(at(Fit(epochs=2)), Parcel(model), {})[0]
    trainer.perform(at(Fit(epochs=1), "b"), Parcel(2 * model), {})
    torch.rand(5)
    assert trainer.perform(at(Fit(epochs=2)), Parcel(model), {})[0].weights == first.weights
    assert fitted(task, Fit(epochs=2), model=model).weights == first.weights
    assert fitted(task, Fit(epochs=2), model=model, round=2).weights != first.weights


def test_data_that_is_drawn_at_loading_is_the_same_whenever_it_is_loaded():
    task = task_of(data=lambda client: fedkit.Data((torch.randn(8, 3), torch.randn(8, 1))))
    few = trainer_of(task, cached_clients=1)
    first = few.load("a")[1].tensors[0].clone()
    few.load("b")
    assert torch.equal(few.load("a")[1].tensors[0], first)
    assert torch.equal(trainer_of(task).load("a")[1].tensors[0], first)
    assert not torch.equal(few.load("b")[1].tensors[0], first)


def test_work_outside_leaves_the_global_generators_to_whoever_seeded_them():
    rng.seed_all(5)
    expected = torch.rand(3)
    rng.seed_all(5)
    with rng.seeded(1):
        fitted(task_of(), Fit())
    assert torch.equal(torch.rand(3), expected)


def test_an_update_is_trained_minus_received_and_a_hop_gives_the_trained_weights():
    task = task_of()
    model = model_of(task)
    update = fitted(task, Fit(lr=0.1), model=model)
    hop = fitted(task, Fit(lr=0.1), model=model, returns="weights")
    assert hop.weights - model == update.weights
    assert update.examples == hop.examples == 20


def test_the_loss_is_the_mean_over_the_steps():
    task = task_of(loss=lambda outputs, targets: 0.0 * outputs.sum() + len(targets))
    assert fitted(task, Fit(epochs=1, batch_size=8)).loss == pytest.approx((8 + 8 + 4) / 3)


def test_a_rate_given_for_the_fit_overrides_that_of_the_task():
    def optimizer(parameters: Any, lr: float = 1.0) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr)

    task = task_of(optimizer=optimizer)
    one, tenth = fitted(task, Fit(steps=1)), fitted(task, Fit(steps=1, lr=0.1))
    assert np.allclose(one.weights.vector, 10 * tenth.weights.vector, rtol=1e-4)


def test_frozen_parameters_do_not_move():
    def frozen() -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        net[0].requires_grad_(False)
        return net

    update = fitted(task_of(model=frozen), Fit(lr=0.1, proximal=0.1))
    assert not update.weights["0.weight"].any()
    assert update.weights["1.weight"].any()


def test_a_loss_of_one_element_is_a_loss_whatever_its_shape():
    task = task_of(loss=lambda outputs, targets: (outputs - targets).square().mean().reshape(1))
    assert fitted(task, Fit(lr=0.1)).weights == fitted(task_of(), Fit(lr=0.1)).weights


@pytest.mark.parametrize("loss", [nn.MSELoss(reduction="none"), lambda outputs, targets: 3.0])
def test_a_loss_that_is_not_one_number_is_refused_and_the_remedy_is_named(loss):
    with pytest.raises(DataError, match=r"the loss must be one number.*reduction='mean'"):
        fitted(task_of(loss=loss), Fit())


def test_batches_of_any_kind_are_trained_by_step_and_scored_by_predict():
    def step(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        return (model(batch["x"]) - batch["y"]).square().mean()

    task = task_of(
        data=lambda client: fedkit.Data(Dicts(), Dicts()),
        loss=None,
        step=step,
        predict=lambda model, batch: (model(batch["x"]), batch["y"]),
        metrics={"mse": torchmetrics.MeanSquaredError},
    )
    assert fitted(task, Fit(lr=0.01, batch_size=2)).weights.vector.any()
    sums = trainer_of(task).perform(at(Evaluate(split="test", batch_size=2)), Parcel(model_of(task)), {})[0]
    assert sums.examples == 5
    assert sums.vector[0] == pytest.approx(sums.vector[1] * sums.vector[2] / sums.vector[3], rel=1e-5)


def test_a_gradient_is_that_of_the_mean_loss_at_the_received_model():
    task = task_of()
    model = model_of(task)
    module = model.to_module(task.build(0))
    x, y = rows_of("a")
    nn.MSELoss()(module(x), y).backward()
    expected = np.concatenate([p.grad.reshape(-1).numpy() for p in module.parameters()])
    answer = trainer_of(task).perform(at(Gradient()), Parcel(model), {})[0]
    assert np.allclose(answer.weights.vector, expected, rtol=1e-6, atol=1e-7)
    assert answer.examples == 20
    part = trainer_of(task).perform(at(Gradient(batch_size=4)), Parcel(model), {})[0]
    assert part.weights != answer.weights


def test_a_summary_is_of_the_training_rows_as_they_are():
    task = task_of(data=lambda client: fedkit.Data((np.arange(12.0).reshape(2, 2, 3), np.array([0, 2]))))
    trainer, parcel = trainer_of(task), Parcel(model_of(task))
    moments = trainer.perform(at(Summarize(query=Moments()), returns="sums"), parcel, {})[0]
    assert (moments.vector[0], moments.examples) == (2, 2)
    assert moments.vector[1:7].tolist() == [6.0, 8.0, 10.0, 12.0, 14.0, 16.0]
    counts = trainer.perform(at(Summarize(query=LabelCounts(classes=3)), returns="sums"), parcel, {})[0]
    assert counts.vector.tolist() == [1, 0, 1]


def test_a_model_is_scored_in_evaluation_mode_and_trained_in_training_mode():
    modes: list[tuple[bool, bool]] = []

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    task = task_of(model=lambda: Watched(3, 1))
    trainer, parcel = trainer_of(task), Parcel(model_of(task))
    for work in (Evaluate(split="test"), Fit(steps=1), Evaluate(split="test"), Gradient()):
        trainer.perform(at(work), parcel, {})
    assert modes == [(False, False), (True, True)] * 2


def test_a_task_with_its_own_loop_is_scored_by_its_metrics_and_has_no_loss():
    task = task_of(
        loss=None,
        train=lambda model, batches, site: None,
        predict=lambda model, batch: (model(batch[0]), batch[1]),
        metrics={"mse": torchmetrics.MeanSquaredError},
    )
    sums = trainer_of(task).perform(at(Evaluate(split="test")), Parcel(model_of(task)), {})[0]
    assert np.isfinite(sums.vector).all()
    scores = MetricSet(task).compute(sums.vector)
    assert scores["mse"] > 0
    assert np.isnan(scores["loss"])


# -- control variates --------------------------------------------------------------------------------------------------


def test_a_control_variate_is_kept_at_the_client_and_its_change_is_sent():
    task, fit = task_of(), Fit(steps=4, batch_size="all", lr=0.1, control_variates=True)
    model = model_of(task)
    server = np.full(4, 0.5, dtype=np.float32)
    trainer = trainer_of(task)
    update, state = trainer.perform(at(fit), Parcel(model, {"control": server}), {})
    expected = -server - update.weights.vector / np.float32(4 * 0.1)
    assert np.allclose(state["control"], expected, atol=1e-6)
    assert np.allclose(update.extra["control"], expected, atol=1e-6)
    again, following = trainer.perform(at(fit, round=2), Parcel(model, {"control": server}), state)
    assert np.allclose(again.extra["control"], following["control"] - state["control"], atol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam,
        lambda p, lr=0.1: torch.optim.SGD(p, lr, momentum=0.9),
        lambda p, lr=0.1: torch.optim.SGD(p, lr, weight_decay=0.1),
    ],
    ids=["adam", "momentum", "decay"],
)
def test_control_variates_with_anything_but_plain_sgd_are_refused(optimizer):
    with pytest.raises(IncompatibleStrategy, match="plain SGD"):
        fitted(task_of(optimizer=optimizer), Fit(lr=0.1, control_variates=True))


# -- the task's own loop -----------------------------------------------------------------------------------------------


def test_the_tasks_own_loop_keeps_state_and_exchanges_vectors():
    def train(model: nn.Module, stream: Any, site: Any) -> float:
        seen = sum(len(x) for x, _ in stream)
        visits = site.state.get("visits", np.zeros(1)) + 1
        site.state["visits"] = visits
        with torch.no_grad():
            model.bias += float(site.received["shift"][0])
        site.send("visits", visits)
        site.send("seen", [[seen, 1]])
        return 0.25

    task = task_of(loss=None, train=train)
    model, trainer = model_of(task), trainer_of(task)
    parcel = Parcel(model, {"shift": np.array([2.0], dtype=np.float32)})
    first, state = trainer.perform(at(Fit(epochs=3, batch_size=8)), parcel, {})
    assert first.weights["bias"].tolist() == [2.0]
    assert {name: vector.tolist() for name, vector in first.extra.items()} == {"visits": [1.0], "seen": [60.0, 1.0]}
    assert all(vector.dtype == np.float32 for vector in first.extra.values())
    assert first.loss == 0.25
    second, state = trainer.perform(at(Fit(), round=2), parcel, state)
    assert second.extra["visits"].tolist() == [2.0]
    assert state["visits"].tolist() == [2.0]


def test_what_was_sent_does_not_change_when_the_loop_goes_on_with_its_array():
    def train(model: nn.Module, stream: Any, site: Any) -> None:
        vector = np.ones(2, dtype=np.float32)
        site.send("v", vector)
        vector[:] = 9

    update = fitted(task_of(loss=None, train=train), Fit())
    assert update.extra["v"].tolist() == [1.0, 1.0]
    assert update.loss is None


def test_a_loop_that_changes_what_it_received_changes_it_for_nobody_else():
    def train(model: nn.Module, stream: Any, site: Any) -> None:
        with contextlib.suppress(ValueError):  # it may be read-only
            site.received["shift"][:] += 1
        site.send("shift", site.received["shift"])

    task = task_of(loss=None, train=train)
    shift = np.zeros(2, dtype=np.float32)
    trainer, parcel = trainer_of(task), Parcel(model_of(task), {"shift": shift})
    answers = [trainer.perform(at(Fit(), client), parcel, {})[0].extra["shift"].tolist() for client in "ab"]
    assert answers[0] == answers[1]
    assert shift.tolist() == [0.0, 0.0]


def test_a_loop_that_changes_its_state_in_place_leaves_the_state_before_it_as_it_was():
    def train(model: nn.Module, stream: Any, site: Any) -> None:
        site.state.setdefault("visits", np.zeros(1))
        site.state["visits"] += 1

    task = task_of(loss=None, train=train)
    before = {"visits": np.zeros(1)}
    _, after = trainer_of(task).perform(at(Fit()), Parcel(model_of(task)), before)
    assert before["visits"].tolist() == [0.0]
    assert after["visits"].tolist() == [1.0]


def test_gradients_that_one_client_leaves_behind_do_not_reach_the_next():
    def train(model: nn.Module, stream: Any, site: Any) -> None:
        x, y = next(iter(stream))
        nn.MSELoss()(model(x), y).backward()
        site.send("gradient", model.weight.grad.reshape(-1).numpy())

    task = task_of(loss=None, train=train)
    trainer, parcel = trainer_of(task), Parcel(model_of(task))
    trainer.perform(at(Fit(batch_size="all"), "b"), parcel, {})
    after_another = trainer.perform(at(Fit(batch_size="all"), "a"), parcel, {})[0]
    alone = fitted(task, Fit(batch_size="all"))
    assert after_another.extra["gradient"].tolist() == alone.extra["gradient"].tolist()


# -- what stays at a client --------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A linear layer behind a batch norm, as FedBN trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.out = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.bn(x))


def fedbn() -> fedkit.Task:
    return task_of(model=Normed, exchange=lambda name: "bn" not in name)


def test_tensors_that_are_not_exchanged_stay_at_each_client_and_never_reach_another():
    task, fit = fedbn(), Fit(epochs=2, batch_size=10, lr=0.1)
    model, trainer = model_of(task), trainer_of(task)
    assert list(model.manifest.slices) == ["out.weight", "out.bias"]
    _, mine = trainer.perform(at(fit, "a"), Parcel(model), {})
    _, theirs = trainer.perform(at(fit, "b"), Parcel(model), {})
    assert mine["local/bn.running_mean"].tolist() != theirs["local/bn.running_mean"].tolist()
    assert mine["local/bn.weight"].tolist() != theirs["local/bn.weight"].tolist()
    alone = trainer_of(task).perform(at(fit, "b"), Parcel(model), {})[1]
    assert all(np.array_equal(alone[name], theirs[name]) for name in theirs)


def test_a_client_goes_on_from_the_tensors_it_kept_and_is_scored_with_them():
    task, fit = fedbn(), Fit(epochs=2, batch_size=10, lr=0.1)
    model, trainer = model_of(task), trainer_of(task)
    _, state = trainer.perform(at(fit, "a"), Parcel(model), {})
    fresh = trainer.perform(at(Evaluate(split="test"), "a"), Parcel(model), {})[0]
    scored, same = trainer.perform(at(Evaluate(split="test"), "a"), Parcel(model), state)
    assert scored.vector[0] != fresh.vector[0]
    assert all(np.array_equal(same[name], state[name]) for name in state)
    _, later = trainer.perform(at(fit, "a", round=2), Parcel(model), state)
    assert later["local/bn.num_batches_tracked"] == 2 * state["local/bn.num_batches_tracked"] == 8


def test_integer_counters_stay_at_each_client_also_where_everything_is_exchanged():
    task, fit = task_of(model=Normed), Fit(epochs=1, batch_size=10)
    model, trainer = model_of(task), trainer_of(task)
    update, state = trainer.perform(at(fit, "a"), Parcel(model), {})
    assert list(state) == ["local/bn.num_batches_tracked"]
    assert state["local/bn.num_batches_tracked"] == 2
    assert update.weights["bn.running_mean"].any()
    _, other = trainer.perform(at(fit, "b"), Parcel(model), {})
    assert other["local/bn.num_batches_tracked"] == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_tensors_of_any_dtype_can_be_kept_back(dtype):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, 1)
            self.register_buffer("offset", torch.tensor([0.3], dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.offset += 1
            return self.out(x) + self.offset.float()

    task = task_of(model=Mixed, exchange=lambda name: name != "offset")
    model, trainer = model_of(task), trainer_of(task)
    _, state = trainer.perform(at(Fit(steps=1)), Parcel(model), {})
    _, state = trainer.perform(at(Fit(steps=1), round=2), Parcel(model), state)
    expected = torch.tensor([0.3], dtype=dtype) + 1 + 1
    assert float(state["local/offset"][0]) == float(expected)


def test_a_buffer_that_is_not_saved_with_the_model_does_not_leak_from_client_to_client():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, 1)
            self.register_buffer("calls", torch.zeros(1), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.out(x) * self.calls

    task = task_of(model=Counting)
    model, trainer = model_of(task), trainer_of(task)
    trainer.perform(at(Fit(steps=3, lr=0.01), "b"), Parcel(model), {})
    after_another = trainer.perform(at(Fit(steps=3, lr=0.01), "a"), Parcel(model), {})[0]
    assert after_another.weights == fitted(task, Fit(steps=3, lr=0.01), model=model).weights


def test_a_buffer_that_the_model_assigns_anew_travels_and_does_not_leak():
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, 1)
            self.register_buffer("running", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.running = 0.5 * self.running + 0.5 * x.mean(0)
            return self.out(x - self.running)

    task = task_of(model=Running)
    model, trainer = model_of(task), trainer_of(task)
    trainer.perform(at(Fit(steps=3), "b"), Parcel(model), {})
    update = trainer.perform(at(Fit(steps=3), "a"), Parcel(model), {})[0]
    assert update.weights["running"].any()
    assert update.weights == fitted(task, Fit(steps=3), model=model).weights


# -- doing nothing twice -----------------------------------------------------------------------------------------------


def counting(model: nn.Module, stream: Any, site: Any) -> float:
    """Counts its visits in the client's state."""
    visits = site.state.get("visits", np.zeros(1)) + 1
    site.state["visits"] = visits
    site.send("visits", visits)
    return 0.0


def client_of(task: fedkit.Task, **settings: Any) -> tuple[LocalClient, MemoryStore, Parcel]:
    store = MemoryStore(**settings)
    return LocalClient("a", trainer_of(task), store), store, Parcel(model_of(task))


def test_an_assignment_asked_for_twice_is_done_once():
    client, _, parcel = client_of(task_of())
    first = client.perform(at(Fit(lr=0.1)), parcel)
    assert client.perform(at(Fit(lr=0.1)), parcel) is first
    assert client.trained == 1


def test_an_assignment_of_a_round_that_is_over_is_refused_as_done():
    client, _, parcel = client_of(task_of())
    client.perform(at(Fit(), id="kept"), parcel)
    client.perform(at(Fit(), id="dropped"), parcel)
    client.settle(["kept"], ["dropped"])
    for key in ("kept", "dropped"):
        with pytest.raises(Refused) as refused:
            client.perform(at(Fit(), id=key), parcel)
        assert refused.value.reason is Reason.DONE
    assert client.trained == 2


def test_settling_twice_or_what_was_never_asked_changes_nothing():
    client, store, parcel = client_of(task_of(loss=None, train=counting))
    client.perform(at(Fit(), id="1"), parcel)
    client.settle(["1"], [])
    client.settle(["1"], ["other"])
    assert store.state()["visits"].tolist() == [1.0]
    assert client.perform(at(Fit(), id="other", round=2), parcel).extra["visits"].tolist() == [2.0]


def test_accepted_work_stands_and_dropped_work_is_undone():
    client, store, parcel = client_of(task_of(loss=None, train=counting))
    client.perform(at(Fit(), id="1"), parcel)
    client.settle(["1"], [])
    client.perform(at(Fit(), id="2", round=2), parcel)
    assert store.state()["visits"].tolist() == [2.0]
    client.settle([], ["2"])
    assert store.state()["visits"].tolist() == [1.0]
    assert client.perform(at(Fit(), id="3", round=2), parcel).extra["visits"].tolist() == [2.0]


def test_two_visits_of_one_round_build_on_each_other():
    client, store, parcel = client_of(task_of(loss=None, train=counting))
    for key in ("1", "2"):
        client.perform(at(Fit(), id=key, returns="weights"), parcel)
    client.settle(["1", "2"], [])
    assert store.state()["visits"].tolist() == [2.0]


def test_dropped_work_is_undone_also_where_the_same_round_was_scored_after_it():
    client, store, parcel = client_of(task_of(train=counting))
    client.perform(at(Fit(), id="late"), parcel)
    client.perform(at(Evaluate(split="test"), id="score", returns="sums"), parcel)
    client.settle(["score"], ["late"])
    assert "visits" not in store.state()


def test_a_store_that_keeps_no_answers_keeps_state():
    client, store, parcel = client_of(task_of(loss=None, train=counting), keeps_answers=False)
    client.perform(at(Fit(), id="1"), parcel)
    assert store.answer("1") is None
    client.settle(["1"], [])
    assert not store.is_settled("1")
    assert store.state()["visits"].tolist() == [1.0]


# -- what goes wrong at a client ---------------------------------------------------------------------------------------


def refusal(task: fedkit.Task, work: Work = Fit(), **where: Any) -> Refused:
    client, store, parcel = client_of(task)
    with pytest.raises(Refused) as refused:
        client.perform(at(work, **where), parcel)
    assert store.answer("1") is None
    return refused.value


def failing(*_: Any) -> Any:
    raise OSError("disk on fire")


@pytest.mark.parametrize("part", ["data", "loss"])
def test_an_error_in_the_tasks_own_code_is_a_refusal_that_says_which(part):
    refused = refusal(task_of(**{part: failing}))
    assert (refused.reason, refused.detail) == (Reason.FAILED, "OSError: disk on fire")
    assert isinstance(refused.__cause__, OSError)


def test_data_of_another_type_is_a_refusal_that_names_it():
    refused = refusal(task_of(data=lambda client: (1, 2)))
    assert (refused.reason, refused.detail) == (Reason.FAILED, "a: data() must return fedkit.Data, got tuple")


def test_a_client_without_rows_refuses_for_that_reason():
    assert (
        refusal(task_of(data=lambda client: fedkit.Data((torch.ones(0, 3), torch.ones(0, 1))))).reason is Reason.NO_DATA
    )
    no_test = task_of(data=lambda client: fedkit.Data(rows_of(client)))
    assert refusal(no_test, Evaluate(split="test"), returns="sums").reason is Reason.NO_DATA


def test_another_model_is_a_refusal_that_names_the_first_difference():
    client, _, _ = client_of(task_of())
    with pytest.raises(
        Refused, match=r"expected weight float32\[1, 3\], but what was received has weight float32\[1, 4\]"
    ):
        client.perform(at(Fit()), Parcel(Weights.from_module(nn.Linear(4, 1))))


def test_a_refused_assignment_may_be_asked_for_again():
    broken = [True]

    def sometimes(client: str) -> fedkit.Data:
        if broken:
            raise OSError(broken.pop())
        return load(client)

    client, _, parcel = client_of(task_of(data=sometimes))
    with pytest.raises(Refused):
        client.perform(at(Fit()), parcel)
    assert client.perform(at(Fit()), parcel).examples == 20


def test_what_cannot_be_trained_at_all_ends_the_run_and_is_no_refusal():
    client, _, parcel = client_of(task_of(optimizer=torch.optim.Adam))
    with pytest.raises(IncompatibleStrategy):
        client.perform(at(Fit(control_variates=True)), parcel)


def test_a_model_of_another_dtype_is_trained_in_its_own_and_travels_as_float32():
    task = task_of(
        model=lambda: nn.Linear(3, 1).double(),
        data=lambda client: fedkit.Data(TensorDataset(*(column.double() for column in rows_of(client)))),
    )
    with pytest.warns(CastWarning):
        update = fitted(task, Fit(lr=0.1))
    assert update.weights.vector.dtype == np.float32
    assert update.weights.vector.any()


def test_a_data_set_is_loaded_once_as_long_as_it_is_cached():
    asked: list[str] = []

    def counted(client: str) -> fedkit.Data:
        asked.append(client)
        return load(client)

    trainer = trainer_of(task_of(data=counted), cached_clients=2)
    for client in "aabcab":
        trainer.load(client)
    assert asked == ["a", "b", "c", "a", "b"]
    assert isinstance(trainer.load("b")[1], TensorDataset)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([[0, 1, 1], [1, 0, 2]], 1),
        ([[0.0, 1.0], [1.0, 0.0, 0.0]], 2),
        ([[1, 1, 1]], 0),  # one class only
        ([[0.5, 1.0, 2.0]], 3),  # no classes
        ([[[0.0], [1.0]], [[1.0]]], 1),
        ([[[0, 1], [1, 1], [1, 1]]], 0),  # of the second label there is one class
    ],
)
def test_the_rarest_class_is_counted(targets: list[object], expected: int) -> None:
    assert smallest_class(torch.tensor(batch) for batch in targets) == expected
