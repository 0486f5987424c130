"""The formula of 8-bit numbers, against ONNX Runtime's own."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto
from onnxruntime.quantization.quant_utils import compute_scale_zp, quantize_data

from fedkit import quantization
from fedkit.quantization import WEIGHT_LEVELS, activation_params, quantized, weight_scales

NUMBERS = st.floats(-1e6, 1e6, width=32)
SIGNED = (-128, 127)


def test_the_worked_example_holds():
    assert doctest.testmod(quantization).failed == 0
    assert doctest.testmod(quantization).attempted > 3


@given(low=NUMBERS, high=NUMBERS, levels=st.sampled_from([(0, 255), SIGNED]))
@settings(max_examples=200, deadline=None)
def test_ranges_give_the_scale_and_zero_point_that_onnx_runtime_takes(low, high, levels):
    low, high = min(low, high), max(low, high)
    kind = np.uint8 if levels == (0, 255) else np.int8
    theirs = compute_scale_zp(np.float32(low), np.float32(high), *(np.array(level, kind) for level in levels))
    scale, zero_point = activation_params(torch.tensor(low), torch.tensor(high), levels)
    assert (int(zero_point), float(scale)) == (int(theirs[0]), float(theirs[1]))


@given(weight=arrays(np.float32, array_shapes(min_dims=1, max_dims=4, max_side=4), elements=NUMBERS), data=st.data())
@settings(max_examples=100, deadline=None)
def test_weights_become_the_whole_numbers_that_onnx_runtime_makes_of_each_channel(weight, data):
    axis = data.draw(st.integers(-weight.ndim, weight.ndim - 1))
    scales = weight_scales(torch.from_numpy(weight), axis)
    for i, scale in enumerate(scales):
        channel = weight.take(i, axis)
        zero_point, theirs, whole = quantize_data(np.atleast_1d(channel), TensorProto.INT8, symmetric=True)
        mine = quantized(torch.from_numpy(np.atleast_1d(channel)), scale, torch.tensor(0), WEIGHT_LEVELS)
        assert (float(scale), int(zero_point)) == (float(theirs), 0)
        assert mine.numpy().tolist() == whole.tolist()


@pytest.mark.parametrize("levels", [(0, 255), SIGNED])
def test_a_range_of_nothing_but_zero_has_scale_one(levels):
    scale, zero_point = activation_params(torch.tensor(0.0), torch.tensor(0.0), levels)
    assert (float(scale), int(zero_point)) == (1.0, 0)
    assert weight_scales(torch.zeros(2, 3)).tolist() == [1.0, 1.0]


def test_zero_is_exact_whatever_the_range_is():
    for low, high in ((0.3, 2.0), (-7.0, -0.1), (-1e-6, 5.0)):
        scale, zero_point = activation_params(torch.tensor(low), torch.tensor(high))
        assert int(quantized(torch.tensor(0.0), scale, zero_point)) == int(zero_point)
