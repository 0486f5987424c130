"""Which models cannot be trained privately, what is said of them, and what `fix` makes of them."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fedkit
from fedkit.errors import IncompatibleStrategy
from fedkit.privacy import check, fix
from fedkit.privacy.models import require_private
from fedkit.weights import Weights


class OwnBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def of(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), *layers)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "BatchNorm1d": (lambda: of(nn.BatchNorm1d(4)), r"1 \(BatchNorm1d\) makes each row depend on the others", True),
    "BatchNorm2d": (lambda: of(nn.BatchNorm2d(4, affine=False)), "makes each row depend on the others", True),
    "SyncBatchNorm": (lambda: of(nn.SyncBatchNorm(4)), "use GroupNorm; fedkit.privacy.fix", True),
    "InstanceNorm": (lambda: of(nn.InstanceNorm2d(4, track_running_stats=True)), "running statistics", True),
    "in place": (lambda: of(nn.ReLU(inplace=True)), "overwrites its input", True),
    "LSTM": (lambda: of(nn.LSTM(4, 4)), "opacus.layers.DPLSTM; fedkit.privacy.fix", True),
    "GRU": (lambda: of(nn.GRU(4, 4)), "opacus.layers.DPGRU", True),
    "RNN": (lambda: of(nn.RNN(4, 4)), "opacus.layers.DPRNN", True),
    "LSTM with projection": (lambda: of(nn.LSTM(4, 4, proj_size=2)), "leave proj_size out", False),
    "attention": (lambda: of(nn.MultiheadAttention(4, 2)), "write the projections as nn.Linear", False),
    "EmbeddingBag": (lambda: of(nn.EmbeddingBag(4, 2)), "use nn.Embedding", False),
    "renormed": (lambda: of(nn.Embedding(4, 2, max_norm=1.0)), "shows them", False),
    "sparse": (lambda: of(nn.Embedding(4, 2, sparse=True)), "leave both out", False),
    "by frequency": (lambda: of(nn.Embedding(4, 2, scale_grad_by_freq=True)), "leave both out", False),
    "list": (lambda: nn.ParameterList([torch.ones(3)]), r"the model \(ParameterList\) holds parameters", False),
    "spectral": (lambda: of(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))), "spectral_norm", False),
    "own buffer": (lambda: of(OwnBuffer()), "parameters and buffers in one module", False),
    "frozen": (lambda: nn.Linear(4, 4).requires_grad_(False), "no parameter to train", False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stands_in_the_way_is_named_with_its_remedy_and_gone_after_the_fix(name: str) -> None:
    make, said, fixable = REFUSED[name]
    model = make()
    (sentence, *others) = check(model)
    assert said.replace("\\", "") in sentence
    assert not others
    assert check(fix(model)) == ([] if fixable else [sentence])
    assert check(model) == [sentence]  # the model that was given is as it was


def test_models_without_such_layers_are_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.GroupNorm(1, 2), nn.Flatten(), nn.LazyLinear(3))
    model(torch.ones(1, 1, 5, 5))
    assert check(model) == []
    same = fix(model)
    assert same is not model
    assert list(same.state_dict()) == list(model.state_dict())
    assert Weights.from_module(same) == Weights.from_module(model)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.again = self.act
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.act(self.bn(self.conv(x)))).mean((2, 3)))


def test_a_fixed_model_has_the_names_it_had_and_is_the_same_for_everyone() -> None:
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        source = Net()
        source.load_state_dict({**source.state_dict(), "bn.weight": torch.arange(6.0)})
        made.append((source, fix(source)))
        assert torch.equal(made[-1][1].bn.weight.detach(), torch.arange(6.0))
    first, second = made[0][1], made[1][1]
    assert str(first) == str(second)
    assert Weights.from_module(first).manifest == Weights.from_module(second).manifest
    assert list(first.state_dict()) == [
        name for name in Net().state_dict() if "running" not in name and "num" not in name
    ]
    assert (first.bn.num_groups, first.act.inplace, first.again is first.act) == (3, False, True)
    first(torch.ones(2, 1, 5, 5)).sum().backward()


def test_a_fixed_batch_norm_does_something_to_rows_without_further_dimensions() -> None:
    fixed = fix(nn.BatchNorm1d(8))
    assert float(fixed(torch.randn(3, 8)).detach().abs().sum()) > 1.0
    assert [fix(nn.BatchNorm2d(channels)).num_groups for channels in (1, 2, 7, 48, 64, 96, 512)] == [
        1,
        1,
        1,
        24,
        32,
        32,
        32,
    ]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_fixed_recurrent_layer_computes_the_same_and_travels(kind: type[nn.RNNBase]) -> None:
    model = nn.Sequential(kind(3, 4, num_layers=2, batch_first=True, bidirectional=True))
    state = torch.random.get_rng_state()
    fixed = fix(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    names = {entry.name for entry in Weights.from_module(fixed).manifest.entries}
    assert names == set(model.state_dict())
    inputs = torch.randn(5, 6, 3)
    assert torch.allclose(fixed(inputs)[0], model(inputs)[0], atol=1e-6)
    weights = Weights.from_module(fixed)
    (2 * weights).to_module(fixed)
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
    assert torch.allclose(fixed(inputs)[0], model(inputs)[0], atol=1e-6)


def task_of(**fields: Any) -> fedkit.Task:
    settings = {"name": "toy", "model": lambda: nn.Linear(4, 3), "data": lambda c: None, "loss": nn.CrossEntropyLoss()}
    return fedkit.Task(**settings | fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"loss": None, "train": lambda model, batches, site: None}, "its own train loop"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "reduction='sum'"),
        ({"loss": nn.CrossEntropyLoss(weight=torch.ones(3))}, r"CrossEntropyLoss\(weight=...\) divides"),
        ({"model": lambda: of(nn.BatchNorm1d(4), nn.ReLU(inplace=True))}, "BatchNorm1d.*; 2 .ReLU. overwrites"),
    ],
)
def test_a_task_that_cannot_be_trained_privately_is_refused_with_all_reasons(fields: dict[str, Any], said: str) -> None:
    task = task_of(**fields)
    with pytest.raises(IncompatibleStrategy, match=f"toy cannot be trained with example-level privacy: .*{said}"):
        require_private(task, task.build(0))


def test_a_task_that_can_is_not_refused() -> None:
    task = task_of()
    require_private(task, task.build(0))


def test_opacus_is_loaded_late_and_does_not_take_over_the_log() -> None:
    code = (
        "import sys, logging, fedkit, fedkit.privacy; from torch import nn;"
        "fedkit.privacy.check(nn.LSTM(2, 2)); assert 'opacus' not in sys.modules;"
        "fedkit.privacy.fix(nn.LSTM(2, 2)); assert 'opacus' in sys.modules; assert not logging.root.handlers"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    assert not any(handler.__class__ is logging.FileHandler for handler in logging.root.handlers)
