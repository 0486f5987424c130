"""Numbers in 8 bits: the formula that training simulates and that exported models are made with.

A real number x becomes the whole number q = clip(round(x / scale) + zero_point), and stands for
(q - zero_point) * scale; halves are rounded to the even neighbour (Jacob et al. 2018, eq. 1; ONNX, QuantizeLinear).
Scales are worked out in float64 and kept in float32, as ONNX Runtime's quantiser does, to the last bit.

**Weights**: one scale for each output channel, symmetric: scale = max |w| / 127, zero point 0, q from -127 to 127.
The channel [0.5, -1.27, 0.024] has the scale 1.27 / 127 = 0.01 and becomes [50, -127, 2], which stands for
0.5, -1.27, 0.02.

>>> weight = torch.tensor([[0.5, -1.27, 0.024]])
>>> scale = weight_scales(weight)
>>> quantized(weight, scale[:, None], torch.zeros(1, dtype=torch.int32), WEIGHT_LEVELS)
tensor([[  50., -127.,    2.]])

**Activations**: one scale and zero point for a tensor, asymmetric, with a range [low, high] that always holds 0, so
that 0 (padding, ReLU) is exact: scale = (high - low) / 255, zero_point = round(0 - low / scale), q from 0 to 255.
The range [-1, 3] has the scale 4 / 255 = 0.015686 and the zero point round(63.75) = 64; 0.5 becomes
round(31.875) + 64 = 96, which stands for 32 * 0.015686 = 0.50196.

>>> scale, zero_point = activation_params(torch.tensor(-1.0), torch.tensor(3.0))
>>> float(quantized(torch.tensor(0.5), scale, zero_point)), int(zero_point), round(float(scale), 6)
(96.0, 64, 0.015686)
"""

from __future__ import annotations

from typing import TypeAlias

import torch

__all__ = [
    "ACTIVATION_LEVELS",
    "WEIGHT_LEVELS",
    "Levels",
    "activation_params",
    "dequantized",
    "quantized",
    "weight_scales",
]

Levels: TypeAlias = tuple[int, int]

WEIGHT_LEVELS: Levels = (-127, 127)
ACTIVATION_LEVELS: Levels = (0, 255)
_SMALLEST = torch.finfo(torch.float32).tiny


def weight_scales(weight: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """The scale of each slice along `axis`, float32 [slices]; 1 for a slice that is all zeros."""
    others = [dim for dim in range(weight.dim()) if dim != axis % weight.dim()]
    largest = weight.detach().abs().amax(dim=others) if others else weight.detach().abs()
    return _scale(2.0 * _wide(largest), WEIGHT_LEVELS)[0]


def activation_params(
    low: torch.Tensor, high: torch.Tensor, levels: Levels = ACTIVATION_LEVELS
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale as float32, zero point as int32) of a range, elementwise; (1, 0) for a range of nothing but 0.

    `levels` of (-128, 127) give signed numbers, which stand for the same values.
    """
    low, high = _wide(low).clamp(max=0.0), _wide(high).clamp(min=0.0)
    scale, exact = _scale(high - low, levels)
    zero_point = torch.where(exact < _SMALLEST, 0.0, (levels[0] - low / exact).round())
    return scale, zero_point.to(torch.int32)


def quantized(
    values: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, levels: Levels = ACTIVATION_LEVELS
) -> torch.Tensor:
    """The whole numbers that `values` become, as float32; `scale` and `zero_point` are broadcast over them."""
    return (values.float() / scale).round_().add_(zero_point).clamp_(*levels)


def dequantized(whole: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """The float32 values that whole numbers stand for."""
    return (whole - zero_point) * scale


def _scale(width: torch.Tensor, levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale as it is kept, and before it was rounded to float32) for a range of this width."""
    exact = width / (levels[1] - levels[0])
    return torch.where(exact < _SMALLEST, 1.0, exact).float(), exact


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In float64, where the device has it."""
    return values.detach() if values.device.type == "mps" else values.detach().double()
