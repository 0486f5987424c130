"""Quantisation-aware training: what layers compute with, what passes back, and what it is good for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import nn
from torch.nn import functional

import fedkit
from fedkit.errors import IncompatibleStrategy
from fedkit.quantization import WEIGHT_LEVELS, quantized, weight_scales
from fedkit.rounds.assignment import Parcel
from fedkit.strategies import CyclicWeightTransfer, FedAvg, SingleWeightTransfer
from fedkit.trainer.quantized import SimulatedInt8
from fedkit.trainer.trainer import Trainer
from fedkit.weights import Weights
from fedkit.work import Fit, Update
from tests.unit.test_trainer import at, load, model_of, task_of

ZERO = torch.zeros(1, dtype=torch.int32)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded_weight(weight: np.ndarray) -> np.ndarray:
    """By hand, channel by channel."""
    scale = np.abs(weight.reshape(len(weight), -1)).max(1).reshape(-1, *[1] * (weight.ndim - 1)) / np.float32(127)
    return np.round(weight / scale) * scale


def rounded_activations(values: np.ndarray) -> np.ndarray:
    """By hand, with the range of the batch, which holds 0."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (high - low) / 255
    zero_point = np.round(-low / scale)
    return ((np.clip(np.round(values / np.float32(scale)) + zero_point, 0, 255) - zero_point) * scale).astype(
        np.float32
    )


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2), (2, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect"), (2, 3, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_with_what_its_8_bit_weights_and_inputs_stand_for(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, inputs = make(), drawn(*shape)
    with SimulatedInt8(layer):
        found = layer(inputs)
    by_hand = make()
    by_hand.load_state_dict(layer.state_dict())
    by_hand.weight.data = torch.from_numpy(rounded_weight(layer.weight.detach().numpy()))
    assert torch.allclose(found, by_hand(torch.from_numpy(rounded_activations(inputs.numpy()))), atol=1e-5)
    assert not torch.allclose(found, layer(inputs), atol=1e-4)


def test_a_transposed_convolution_has_its_channels_along_the_second_axis_of_its_weights() -> None:
    layer, inputs = nn.ConvTranspose2d(3, 4, 2), drawn(2, 3, 5, 5)
    with SimulatedInt8(layer):
        found = layer(inputs)
    turned = rounded_weight(layer.weight.detach().numpy().swapaxes(0, 1)).swapaxes(0, 1)
    layer.weight.data = torch.from_numpy(np.ascontiguousarray(turned))
    assert torch.allclose(found, layer(torch.from_numpy(rounded_activations(inputs.numpy()))), atol=1e-5)


def test_arguments_may_be_named_and_dtypes_stay() -> None:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    inputs = drawn(4, 3).to(torch.bfloat16)
    with SimulatedInt8(layer):
        named = functional.linear(weight=layer.weight, input=inputs, bias=layer.bias)
        assert torch.equal(named, functional.linear(inputs, weight=layer.weight, bias=layer.bias))
        assert torch.equal(named, layer(inputs))
    assert named.dtype == torch.bfloat16


def test_gradients_pass_straight_through_to_weights_and_inputs() -> None:
    layer, inputs, upstream = nn.Linear(6, 4), drawn(5, 6).requires_grad_(), drawn(5, 4, seed=1)
    with SimulatedInt8(layer):
        layer(inputs).backward(upstream)
    weight = torch.from_numpy(rounded_weight(layer.weight.detach().numpy()))
    activations = torch.from_numpy(rounded_activations(inputs.detach().numpy()))
    assert torch.allclose(layer.weight.grad, upstream.T @ activations, atol=1e-5)
    assert torch.allclose(inputs.grad, upstream @ weight, atol=1e-5)
    assert torch.allclose(layer.bias.grad, upstream.sum(0))


def test_values_that_are_not_finite_stay_visible_and_empty_batches_pass() -> None:
    layer = nn.Linear(3, 2)
    with SimulatedInt8(layer):
        assert layer(torch.full((1, 3), torch.nan)).isnan().all()
        assert not layer(torch.tensor([[1.0, torch.inf, 0.0]])).isfinite().any()
        assert layer(torch.zeros(0, 3)).shape == (0, 2)
        assert torch.equal(layer(torch.zeros(1, 3)), layer.bias[None])


def test_only_the_models_own_layers_are_rounded() -> None:
    layer, blur, inputs = nn.Linear(6, 4), drawn(4, 6), drawn(5, 6)
    with SimulatedInt8(layer) as simulated:
        assert torch.equal(functional.linear(inputs, blur), inputs @ blur.T)
        assert torch.equal(functional.linear(inputs, layer.weight.detach()), inputs @ layer.weight.T)
    assert simulated.rounded == 0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_a_folded_batch_norm_leaves_the_whole_numbers_as_they_are(seed: int) -> None:
    weight, factor = drawn(4, 2, 3, 3, seed=seed), drawn(4, seed=seed + 1).view(4, 1, 1, 1)
    mine, folded = (
        quantized(each, weight_scales(each).view(4, 1, 1, 1), ZERO, WEIGHT_LEVELS) for each in (weight, weight * factor)
    )
    apart = (mine * factor.sign() - folded).abs()
    assert apart.max() <= 1  # where a value lies on the edge of two numbers to the last bit
    assert (apart > 0).sum() <= 1


# -- at a client -------------------------------------------------------------------------------------------------------

EVERY = {"lr": 0.1, "steps": 4, "batch_size": 5}
FLOAT = Fit(**EVERY)
INT8 = Fit(**EVERY, quantize_from=3)


def fitted(fit: Fit, round: int, task: fedkit.Task | None = None, returns: str = "update") -> Update:
    task = task or task_of()
    answer, _ = Trainer(task, 7, device="cpu").perform(
        at(fit, round=round, returns=returns), Parcel(model_of(task)), {}
    )
    assert isinstance(answer, Update)
    return answer


def test_it_begins_in_the_round_that_was_said() -> None:
    assert fitted(INT8, 2) == fitted(FLOAT, 2)
    assert fitted(INT8, 3).weights != fitted(FLOAT, 3).weights
    assert [INT8.quantizes_in(at_round) for at_round in (-1, 2, 3, 4)] == [False, False, True, True]
    assert not FLOAT.quantizes_in(9)


def test_the_update_is_that_of_a_loop_over_rounded_layers() -> None:
    task, data = task_of(), load("a").train
    module = task.build(0)
    before = Weights.from_module(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    features, targets = data.tensors
    for _ in range(4):
        optimizer.zero_grad()
        inputs = torch.from_numpy(rounded_activations(features.numpy()))
        weight = (
            module.weight + (torch.from_numpy(rounded_weight(module.weight.detach().numpy())) - module.weight).detach()
        )
        functional.mse_loss(functional.linear(inputs, weight, module.bias), targets).backward()
        optimizer.step()
    found = fitted(INT8.replace(batch_size="all"), 3)
    assert found.weights.manifest.digest == before.manifest.digest
    assert np.allclose(found.weights.vector, (Weights.from_module(module) - before).vector, atol=1e-6)


def test_a_hop_and_a_tasks_own_loop_are_rounded_too() -> None:
    def train(model: nn.Module, batches: Any, site: fedkit.Site) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for features, targets in batches:
            optimizer.zero_grad()
            functional.mse_loss(model(features), targets).backward()
            optimizer.step()

    own = task_of(loss=None, train=train)
    assert fitted(INT8, 3, own).weights == fitted(INT8, 3).weights
    assert fitted(INT8, 3, returns="weights").weights != fitted(FLOAT, 3, returns="weights").weights


def state_of(module: nn.Module) -> list[object]:
    parts = list(module.modules())
    hooks = [{name: len(value) for name, value in vars(part).items() if "hooks" in name} for part in parts]
    return [list(module.state_dict()), [sorted(vars(part)) for part in parts], hooks, [type(part) for part in parts]]


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_as_it_was_before_also_when_training_raises(fails: bool) -> None:
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if fails:
            raise RuntimeError("in the middle of it")
        return functional.mse_loss(outputs, targets)

    trainer, parcel = Trainer(task_of(loss=loss), 7, device="cpu"), Parcel(model_of(task_of()))
    before, probe = state_of(trainer._module), drawn(2, 3)
    if fails:
        with pytest.raises(RuntimeError, match="in the middle of it"):
            trainer.perform(at(INT8, round=3), parcel, {})
    else:
        trainer.perform(at(INT8, round=3), parcel, {})
    assert state_of(trainer._module) == before
    assert torch.equal(trainer._module(probe), probe @ trainer._module.weight.T + trainer._module.bias)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_model_without_a_layer_that_could_be_rounded_is_refused() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 1))

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features @ self.weight

    with pytest.raises(IncompatibleStrategy, match="no linear or convolutional layer of it was used"):
        fitted(INT8, 3, task_of(model=Free))


@pytest.mark.parametrize(
    ("strategy", "rounds"),
    [(FedAvg(rounds=2, local=INT8), "2 rounds"), (SingleWeightTransfer(local=INT8), "1 round here")],
)
def test_what_would_never_begin_is_refused_before_anything_is_trained(strategy: fedkit.Strategy, rounds: str) -> None:
    def nothing(client: str) -> fedkit.Data:
        raise AssertionError("data was touched")

    with pytest.raises(IncompatibleStrategy, match=f"local.quantize_from=3 would never begin: .* {rounds}"):
        fedkit.simulate(task_of(data=nothing), strategy, clients=["a", "b"], seed=1, progress=False)


# -- what it is good for -----------------------------------------------------------------------------------------------


def coarse() -> nn.Module:
    """Two layers, the first with weights of 100 on a feature that is always 0: its 8-bit numbers lie far apart."""
    first, second = nn.Linear(5, 16), nn.Linear(16, 2)
    with torch.no_grad():
        first.weight[:, 4] = 100.0
    return nn.Sequential(first, nn.ReLU(), second)


def separable(client: str) -> fedkit.Data:
    features = drawn(200, 5, seed=len(client))
    features[:, 4] = 0.0
    targets = (features[:, 0] * features[:, 1] > 0.1 * features[:, 2]).long()
    return fedkit.Data((features, targets), (features, targets))


class Rows(CalibrationDataReader):
    """All rows as one batch."""

    def __init__(self, features: np.ndarray) -> None:
        self._left = [{"x": features}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._left.pop() if self._left else None


def on_grid(name: str, array: np.ndarray) -> np.ndarray:
    """Weights as their 8-bit numbers stand for them, so that calibration sees the ranges that there will be."""
    return rounded_weight(array).astype(np.float32) if name.endswith("weight") else array.copy()


def as_onnx(weights: Weights) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gemm", ["x", "0.weight", "0.bias"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "2.weight", "2.bias"], ["y"], transB=1),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in (("x", 5), ("y", 2))
    ]
    held = [numpy_helper.from_array(on_grid(name, array), name) for name, array in weights.arrays()]
    graph = helper.make_graph(nodes, "coarse", ends[:1], ends[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def in_8_bits(weights: Weights, features: np.ndarray, folder: Path) -> np.ndarray:
    """What ONNX Runtime computes with the whole numbers that its own quantiser makes."""
    file = folder / "int8.onnx"
    kinds = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    quantize_static(as_onnx(weights), str(file), Rows(features), per_channel=True, **kinds)
    held = {one.name: one.data_type for one in onnx.load(file).graph.initializer}
    assert held["0.weight_quantized"] == held["2.weight_quantized"] == TensorProto.INT8
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": features})[0]


def test_a_federated_model_that_learned_with_8_bits_is_better_in_8_bits_in_onnx_runtime(tmp_path: Path) -> None:
    task = task_of(name="coarse", model=coarse, data=separable, loss=nn.CrossEntropyLoss())
    features, targets = separable("a").train.tensors
    base = trained(task, CyclicWeightTransfer(rounds=10, local=Fit(epochs=2, lr=0.2))).weights

    def losses(start: int | None) -> tuple[float, float]:
        result = trained(task, FedAvg(rounds=4, local=Fit(epochs=4, lr=0.05, quantize_from=start)), init=base)
        deployed = torch.from_numpy(in_8_bits(result.weights, features.numpy(), tmp_path))
        with SimulatedInt8(result.model), torch.no_grad():
            simulated = result.model(features)
        step = (deployed.max() - deployed.min()) / 255
        assert (simulated - deployed).abs().max() <= 3 * step  # little more than the rounding of the outputs
        exact = result.model(features).detach()
        return float(functional.cross_entropy(exact, targets)), float(functional.cross_entropy(deployed, targets))

    (plain, plain_in_8_bits), (_, learned_in_8_bits) = losses(None), losses(1)
    assert plain_in_8_bits > 1.5 * plain  # so that there is something to learn
    assert learned_in_8_bits < 0.85 * plain_in_8_bits


def trained(task: fedkit.Task, strategy: fedkit.Strategy, init: Weights | None = None) -> fedkit.Result:
    return fedkit.simulate(task, strategy, clients=["a", "bb"], seed=1, threads=1, progress=False, init=init)
