"""What one layer adds to each row's gradient, out of its inputs and the gradients of its outputs.

Book-keeping (Bu, Wang, Zha and Karypis 2023, "Differentially Private Optimization on Large Model at Small Cost"): one
backward pass gives the gradient of each layer's outputs; from these and its inputs follow first the length of each
row's gradient, then the sum of all rows' gradients, each times its own factor, without a second pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

__all__ = ["Part", "is_kept", "part_of"]

Sums: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]  # a parameter and a sum of its shape

_CHUNK = 1 << 18  # numbers that are unfolded at a time, so that they stay in the cache


@dataclass(frozen=True, slots=True)
class Part:
    """One layer and one batch: the squared length [rows] of each row's gradient of its parameters, in float64.

    `contract(factors)` gives for each parameter the sum over the rows of factor [rows] times gradient.
    """

    squares: torch.Tensor
    contract: Callable[[torch.Tensor], Sums]


Recipe: TypeAlias = Callable[[nn.Module, torch.Tensor, torch.Tensor], list[Part]]


def part_of(layer: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> list[Part]:
    """What `layer` adds, given its inputs and the gradients of its outputs, whose first dimensions are the rows."""
    return _RECIPES[type(layer)](layer, inputs, grads)


def is_kept(layer: nn.Module) -> bool:
    """Whether there is a recipe for the layer's very type, as it is set up."""
    if isinstance(layer, nn.Embedding):
        return type(layer) is nn.Embedding and not (layer.sparse or layer.scale_grad_by_freq or layer.max_norm)
    return type(layer) in _RECIPES


def _squares(values: torch.Tensor) -> torch.Tensor:
    """The squared length of each row."""
    flat = values.reshape(len(values), -1)
    lengths: torch.Tensor = torch.linalg.vector_norm(flat, dim=1)
    return lengths.double().square()


def _materialised(parameter: torch.Tensor | None, rows: torch.Tensor) -> list[Part]:
    """Each row's gradient is there as it is."""
    if parameter is None or not parameter.requires_grad:
        return []
    flat = rows.reshape(len(rows), -1)

    def contract(factors: torch.Tensor) -> Sums:
        return [(parameter, (factors.to(flat.dtype) @ flat).view(parameter.shape))]

    return [Part(_squares(flat), contract)]


def _contracted(
    weight: torch.Tensor, squares: torch.Tensor, grads: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]
) -> Part:
    """The sum over rows is `of` the outputs' gradients, each row of them times its factor."""

    def contract(factors: torch.Tensor) -> Sums:
        scale = factors.to(grads.dtype).view(-1, *[1] * (grads.dim() - 1))
        return [(weight, of(grads * scale).view(weight.shape))]

    return Part(squares, contract)


def _gram_squares(inputs: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """|sum_t g_t a_t^T|² = sum_ts (a_t . a_s)(g_t . g_s) of [rows, features, positions]; in float64, as it cancels."""
    a, g = inputs.double(), grads.double()
    products = torch.bmm(a.transpose(1, 2), a).mul_(torch.bmm(g.transpose(1, 2), g))
    return products.sum((1, 2)).clamp_(min=0.0)


def _is_long(positions: int, weights: int) -> bool:
    """Whether each row's gradient is smaller than its two Gram matrices (Bu, Mao and Xu 2022, section 4)."""
    return 2 * positions**2 >= weights


# -- layers ------------------------------------------------------------------------------------------------------------


def _linear(layer: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> list[Part]:
    """A row of one position: |g|² |a|² (Goodfellow 2015, "Efficient Per-Example Gradient Computations")."""
    assert isinstance(layer, nn.Linear)
    weight, count = layer.weight, len(inputs)
    a, g = inputs.reshape(count, -1, layer.in_features), grads.reshape(count, -1, layer.out_features)
    parts = _materialised(layer.bias, g.sum(1))
    if not weight.requires_grad:
        return parts
    positions = a.shape[1]
    if positions > 1 and _is_long(positions, weight.numel()):
        return parts + _materialised(weight, torch.bmm(g.transpose(1, 2), a))
    squares = _squares(a) * _squares(g) if positions == 1 else _gram_squares(a.transpose(1, 2), g.transpose(1, 2))
    flat = a.reshape(-1, layer.in_features)
    return [*parts, _contracted(weight, squares, g, lambda g: g.reshape(-1, layer.out_features).T @ flat)]


def _conv(layer: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> list[Part]:
    """A convolution is a linear layer over the windows it looks at (Rochette, Manoel and Tramel 2019)."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    parts, weight = _materialised(layer.bias, grads.flatten(2).sum(2)), layer.weight
    if not weight.requires_grad:
        return parts
    padded = _padded(layer, inputs)
    step = max(_CHUNK * len(padded) // max(_windows_size(layer, padded, grads), 1), 1)
    chunks = zip(torch.split(padded, step), torch.split(grads, step), strict=True)
    if _is_long(grads[0, 0].numel(), weight.numel() // layer.groups):
        return parts + _materialised(weight, torch.cat([_conv_rows(layer, a, g) for a, g in chunks]))
    squares = torch.cat([_conv_gram(layer, a, g) for a, g in chunks])
    return [*parts, _contracted(weight, squares, grads, lambda g: _conv_sum(layer, padded, g))]


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: torch.Tensor) -> torch.Tensor:
    around = layer._reversed_padding_repeated_twice  # noqa: SLF001 - both sides of each dimension, for "same" too
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, around, mode=mode) if any(around) else inputs.contiguous()


def _windows_size(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, padded: torch.Tensor, grads: torch.Tensor) -> int:
    return padded.shape[0] * padded.shape[1] * grads[0, 0].numel() * layer.weight[0, 0].numel()


def _windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, padded: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """[rows * groups, channels of a group * kernel, positions]: a view by strides, then one copy."""
    rows, channels, *_ = padded.shape
    first, second, *along = padded.stride()
    offsets = [step * dilation for step, dilation in zip(along, layer.dilation, strict=True)]
    moves = [step * stride for step, stride in zip(along, layer.stride, strict=True)]
    shape, strides = (*layer.kernel_size, *grads.shape[2:]), (*offsets, *moves)
    view = padded.as_strided((rows, channels, *shape), (first, second, *strides), padded.storage_offset())
    return view.reshape(rows * layer.groups, -1, grads[0, 0].numel())


def _conv_pair(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, padded: torch.Tensor, grads: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows and output gradients, group by group: [rows * groups, features, positions]."""
    positions = grads[0, 0].numel()
    return _windows(layer, padded, grads), grads.reshape(len(grads) * layer.groups, -1, positions)


def _conv_rows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, padded: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    windows, g = _conv_pair(layer, padded, grads)
    return torch.bmm(g, windows.transpose(1, 2)).view(len(grads), -1)


def _conv_gram(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, padded: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    windows, g = _conv_pair(layer, padded, grads)
    return _gram_squares(windows, g).view(len(grads), -1).sum(1)


def _conv_sum(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, padded: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """The weight's gradient as torch computes it."""
    nothing = [0] * (padded.dim() - 2)
    settings = (layer.stride, nothing, layer.dilation, False, nothing, layer.groups, (False, True, False))
    found = torch.ops.aten.convolution_backward(grads, padded, layer.weight, None, *settings)
    return found[1]  # type: ignore[no-any-return]


def _embedding(layer: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> list[Part]:
    """Gradients of one row for the same entry are added up first: their sum is what has a length."""
    assert isinstance(layer, nn.Embedding)
    weight, count, entries = layer.weight, len(inputs), layer.num_embeddings
    g = grads.reshape(-1, layer.embedding_dim)
    rows = torch.arange(count, device=inputs.device).repeat_interleave(inputs[0].numel())
    if layer.padding_idx is not None:
        g = g * (inputs.reshape(-1, 1) != layer.padding_idx)
    places, where = torch.unique(rows * entries + inputs.reshape(-1), return_inverse=True)
    sums = g.new_zeros(len(places), layer.embedding_dim).index_add_(0, where, g)
    of_row, entry = places // entries, places % entries
    squares = torch.zeros(count, dtype=torch.float64, device=g.device).index_add_(0, of_row, _squares(sums))

    def contract(factors: torch.Tensor) -> Sums:
        scaled = sums * factors.to(sums.dtype)[of_row].unsqueeze(1)
        return [(weight, torch.zeros_like(weight).index_add_(0, entry, scaled))]

    return [Part(squares, contract)] if weight.requires_grad else []


def _channel_norm(layer: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> list[Part]:
    """GroupNorm, and InstanceNorm as GroupNorm with a group a channel: one weight a channel."""
    assert isinstance(layer, nn.GroupNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
    groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else layer.num_features
    normal = F.group_norm(inputs, groups, eps=layer.eps)
    flat = (len(grads), grads.shape[1], -1)
    return [
        *_materialised(layer.weight, (normal * grads).reshape(flat).sum(2)),
        *_materialised(layer.bias, grads.reshape(flat).sum(2)),
    ]


def _last_norm(layer: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> list[Part]:
    """LayerNorm and RMSNorm: one weight for each place of the last dimensions."""
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    shape = layer.normalized_shape
    if isinstance(layer, nn.LayerNorm):
        normal, bias = F.layer_norm(inputs, shape, eps=layer.eps), layer.bias
    else:
        normal, bias = F.rms_norm(inputs, shape, eps=layer.eps), None
    flat = (len(grads), -1, *shape)
    return [
        *_materialised(layer.weight, (normal * grads).reshape(flat).sum(1)),
        *_materialised(bias, grads.reshape(flat).sum(1)),
    ]


_RECIPES: dict[type[nn.Module], Recipe] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.GroupNorm: _channel_norm,
    nn.LayerNorm: _last_norm,
    nn.RMSNorm: _last_norm,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _channel_norm),
}
