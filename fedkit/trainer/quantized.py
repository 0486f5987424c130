"""Quantisation-aware training: a model learns with the rounding that 8-bit numbers will bring at deployment.

Where a parameter of the model is the weight of a linear or convolutional layer, the layer sees what its weights and
inputs stand for as the 8-bit numbers of `fedkit.quantization`: weights with one scale for each output channel, inputs
with the range of the batch. Gradients pass straight through the rounding to the float32 weights (Bengio et al. 2013;
Jacob et al. 2018, section 3), which stay what is trained and what travels: nothing is added to the model.

**BatchNorm** after a convolution is folded into its weights at export: channel c is multiplied by gamma_c / sigma_c.
Its scale is multiplied by the same amount, and weights have the same levels on both sides of 0, so the folded weights
become the same whole numbers, or their negatives: what was trained with is what is deployed.

**Activations** are rounded where a layer takes them, so after BatchNorm and ReLU, which ONNX Runtime joins to the layer
before. What no such layer takes (the model's outputs, the terms of a residual sum, what is pooled) stays exact in
training. So do embeddings, recurrent layers, the projections inside of `nn.MultiheadAttention`, weights that a task
computes from other parameters (weight norm), and what `torch.utils.checkpoint` computes again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedkit.errors import IncompatibleStrategy
from fedkit.quantization import (
    ACTIVATION_LEVELS,
    WEIGHT_LEVELS,
    Levels,
    activation_params,
    dequantized,
    quantized,
    weight_scales,
)
from fedkit.work import Fit

__all__ = ["SimulatedInt8", "as_asked"]

_CHANNELS: dict[Callable[..., Any], int] = {  # the axis of the weights along which each slice has its scale
    functional.linear: 0,
    functional.conv1d: 0,
    functional.conv2d: 0,
    functional.conv3d: 0,
    functional.conv_transpose1d: 1,
    functional.conv_transpose2d: 1,
    functional.conv_transpose3d: 1,
}


@contextmanager
def as_asked(fit: Fit, round: int, module: nn.Module) -> Iterator[None]:
    """8-bit numbers are simulated within, if `fit` asks for that in this round.

    Raises `IncompatibleStrategy` where no layer of `module` has computed anything that could be rounded.
    """
    if not fit.quantizes_in(round):
        yield
        return
    with SimulatedInt8(module) as simulated:
        yield
    if not simulated.rounded:
        raise IncompatibleStrategy(
            f"quantize_from={fit.quantize_from} and this model: no linear or convolutional layer of it was used in "
            "training, so there is nothing to round to 8 bits"
        )


class SimulatedInt8(TorchFunctionMode):
    """While this context is open, layers of `module` compute with what their 8-bit weights and inputs stand for.

    The module itself is not touched: it has the same parameters, names and hooks within as before and after, however
    the context is left. What others compute meanwhile, such as a transform of the data, stays exact. `rounded` counts
    the calls of such layers.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.rounded = 0
        self._weights = {id(parameter) for parameter in module.parameters()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        axis = _CHANNELS.get(func)
        if axis is None:
            return func(*args, **named)
        named |= zip(("input", "weight"), args, strict=False)
        inputs, weight = named.pop("input"), named.pop("weight")
        if id(weight) in self._weights:
            inputs, weight = _activations(inputs), _weight(weight, axis)
            self.rounded += 1
        return func(inputs, weight, *args[2:], **named)


def _weight(weight: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
    scales = weight_scales(weight, axis).view(shape)
    return _rounded(weight, scales, torch.zeros_like(scales, dtype=torch.int32), WEIGHT_LEVELS)


def _activations(values: torch.Tensor) -> torch.Tensor:
    if values.numel() == 0:
        return values
    scale, zero_point = activation_params(*torch.aminmax(values.detach()))
    return _rounded(values, scale, zero_point, ACTIVATION_LEVELS)


def _rounded(values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, levels: Levels) -> torch.Tensor:
    rounded: torch.Tensor = _StraightThrough.apply(values, scale, zero_point, levels)  # type: ignore[no-untyped-call]
    return rounded


class _StraightThrough(torch.autograd.Function):
    """Rounds forward and passes gradients as they are; no value lies outside of the levels, so none is cut off."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ARG004
        values: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        levels: Levels,
    ) -> torch.Tensor:
        return dequantized(quantized(values, scale, zero_point, levels), scale, zero_point).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # noqa: ARG004
        return gradient, None, None, None
