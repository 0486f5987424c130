"""Manifest, Entry, Weights and Binding: what they hold, what they refuse, what they compute."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fedkit.errors import CastWarning, ManifestMismatch, PayloadError
from fedkit.weights import MAX_ELEMENTS, MAX_NAME, MAX_TENSORS, Binding, Entry, Manifest, Weights

PAIR = Manifest((Entry("w", (2, 2)), Entry("b", (2,), trainable=False)))


def pair(*values: float) -> Weights:
    return Weights(PAIR, values)


class Tied(nn.Module):
    """Two layers that share one weight, as a language model's embedding and head do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight


class Reassigning(nn.Module):
    """Keeps a running mean the way many papers' code does: by assigning a new tensor to the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(2))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.running = 0.5 * self.running + 0.5 * batch.mean(0)
        return batch - self.running


class Expanded(nn.Module):
    """Holds a buffer whose elements share memory, which torch refuses to write into."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 1)
        self.register_buffer("scale", torch.ones(1).expand(3))


class Extra(nn.Linear):
    """Puts something that is no tensor into its state_dict, as torch allows."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 2}


# -- Entry and Manifest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (("", (2,)), "name must be"),
        (("w" * (MAX_NAME + 1), (2,)), "name must be"),
        (("w\0", (2,)), "name must be"),
        ((7, (2,)), "name must be"),
        (("w", (-1,)), "whole numbers from 0"),
        (("w", (2.0,)), "whole numbers from 0"),
        (("w", (True,)), "whole numbers from 0"),
        (("w", (MAX_ELEMENTS + 1,)), "whole numbers from 0"),
        (("w", (1,) * 17), "at most 16"),
        (("w", (2,), "int64"), "dtype must be one of"),
        (("w", (2,), "float32", 1), "trainable must be true or false"),
    ],
)
def test_an_entry_that_no_tensor_could_have_is_refused_and_the_message_says_what_would_be_right(fields, says):
    with pytest.raises(PayloadError, match=says):
        Entry(*fields)


def test_a_scalar_has_one_element_and_an_empty_tensor_none():
    assert Entry("scalar", ()).size == 1
    assert Entry("empty", (3, 0, 2)).size == 0


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(PayloadError, match="same name"):
        Manifest((Entry("w", (1,)), Entry("w", (2,))))


def test_more_tensors_than_a_model_may_have_are_refused():
    with pytest.raises(PayloadError, match=str(MAX_TENSORS)):
        Manifest((Entry("w", (1,)),) * (MAX_TENSORS + 1))


def test_more_elements_than_a_model_may_have_are_refused():
    with pytest.raises(PayloadError, match=str(MAX_ELEMENTS)):
        Manifest((Entry("w", (MAX_ELEMENTS,)), Entry("v", (1,))))


def test_slices_cover_the_vector_in_the_order_of_the_entries():
    assert PAIR.slices == {"w": slice(0, 4), "b": slice(4, 6)}
    assert PAIR.size == 6


def test_the_trainable_mask_is_false_where_no_gradient_changes_the_model():
    assert PAIR.trainable.tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    "text",
    [
        '[["w","","float32",true]]',
        '[["w",{},"float32",true]]',
        '[ ["w",[2],"float32",true]]',
        '[["\\u0077",[2],"float32",true]]',
        '[["w",[-0],"float32",true]]',
        '[["w",[2],"float32",true],]',
        '{"w":[2]}',
        "null",
        "",
    ],
)
def test_text_that_to_json_never_writes_is_not_a_manifest(text):
    with pytest.raises(PayloadError):
        Manifest.from_json(text)


def test_the_digest_changes_with_the_name_the_shape_the_dtype_the_order_and_the_trainable_flag():
    one, other = Entry("w", (2, 3)), Entry("b", (3,))
    variants = [
        (one, other),
        (other, one),
        (Entry("v", (2, 3)), other),
        (Entry("w", (3, 2)), other),
        (Entry("w", (2, 3), "float16"), other),
        (Entry("w", (2, 3), trainable=False), other),
        (one,),
        (),
    ]
    assert len({Manifest(entries).digest for entries in variants}) == len(variants)


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (Manifest((Entry("w", (2, 2)), Entry("bias", (2,)))), r"b float32\[2\].*has bias float32\[2\]"),
        (Manifest((Entry("w", (4,)), Entry("b", (3,)))), r"w float32\[2, 2\].*has w float32\[4\]"),
        (Manifest((Entry("w", (2, 2), "float16"), PAIR.entries[1])), r"has w float16\[2, 2\]"),
        (Manifest((PAIR.entries[0], Entry("b", (2,)))), r"b float32\[2\] \(not trainable\).*has b float32\[2\]$"),
        (Manifest(PAIR.entries[:1]), "2 tensors, but what was received has 1"),
    ],
)
def test_a_mismatch_names_the_first_difference(other, names):
    with pytest.raises(ManifestMismatch, match=names):
        PAIR.require(other, "what was received")


def test_a_manifest_requires_nothing_of_its_equal():
    equal = Manifest(PAIR.entries)
    PAIR.require(equal)
    assert equal.digest == PAIR.digest


# -- Weights as values -------------------------------------------------------------------------------------------------


def test_a_vector_of_another_length_is_refused_and_both_lengths_are_named():
    with pytest.raises(ManifestMismatch, match=r"6 elements, got shape \(5,\)"):
        Weights(PAIR, np.zeros(5))
    with pytest.raises(ManifestMismatch, match=r"6 elements, got shape \(2, 3\)"):
        Weights(PAIR, np.zeros((2, 3)))


def test_any_array_becomes_contiguous_native_float32():
    given = np.arange(12, dtype=">f8")[::2]
    vector = Weights(PAIR, given).vector
    assert vector.dtype == np.float32
    assert vector.dtype.isnative
    assert vector.flags.c_contiguous
    assert vector.tolist() == [0, 2, 4, 6, 8, 10]


def test_arithmetic_is_numpys_in_float32():
    one, other = pair(1, 2, 3, 4, 5, 6), pair(6, 5, 4, 3, 2, 0.1)
    a, b = one.vector, other.vector
    for found, expected in [
        (one + other, a + b),
        (one - other, a - b),
        (one * other, a * b),
        (one / other, a / b),
        (-one, -a),
        (0.1 * one, np.float32(0.1) * a),
        (one * 3, 3 * a),
        (one / 3, a / np.float32(3)),
        (2 + one, 2 + a),
        (one - 1, a - 1),
    ]:
        assert found == Weights(PAIR, expected)
        assert found.vector.dtype == np.float32


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(2), np.array(0.5)[()]])
def test_numbers_of_numpy_scale_weights_from_either_side(number):
    one = pair(1, 2, 3, 4, 5, 6)
    expected = Weights(PAIR, one.vector * np.float32(number))
    assert isinstance(number * one, Weights)
    assert number * one == one * number == expected


def test_a_number_minus_weights_is_weights():
    assert 1 - pair(1, 2, 3, 4, 5, 6) == pair(0, -1, -2, -3, -4, -5)


def test_the_builtin_sum_adds_weights():
    assert sum([pair(1, 1, 1, 1, 1, 1), pair(2, 2, 2, 2, 2, 2)]) == pair(3, 3, 3, 3, 3, 3)


@pytest.mark.parametrize("operator", ["__add__", "__sub__", "__mul__", "__truediv__", "__matmul__"])
def test_weights_of_another_manifest_do_not_mix(operator):
    other = Weights.zeros(Manifest((Entry("w", (6,)),)))
    with pytest.raises(ManifestMismatch):
        getattr(pair(1, 2, 3, 4, 5, 6), operator)(other)


def test_weights_and_text_do_not_mix():
    with pytest.raises(TypeError):
        pair(1, 2, 3, 4, 5, 6) + "1"
    assert pair(1, 2, 3, 4, 5, 6) != "1"


def test_the_inner_product_with_anything_but_weights_is_a_type_error():
    with pytest.raises(TypeError):
        pair(1, 2, 3, 4, 5, 6) @ 3


def test_arithmetic_leaves_its_operands_as_they_were():
    one = pair(1, 2, 3, 4, 5, 6)
    before = one.vector.copy()
    _ = (one + 1) * one - one / 2
    assert np.array_equal(one.vector, before)


def test_the_norm_and_the_inner_product_are_taken_in_float64():
    wide = Manifest((Entry("w", ((1 << 20) + 3,)),))
    ones = Weights(wide, np.full(wide.size, 1e-4))
    exact = float(np.float32(1e-4)) ** 2 * wide.size
    assert ones.norm() == pytest.approx(math.sqrt(exact), rel=1e-12)
    assert ones @ ones == pytest.approx(exact, rel=1e-12)
    huge = pair(3e38, 3e38, 0, 0, 0, 0)
    assert math.isfinite(huge.norm())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_odd_element_makes_weights_not_finite(bad):
    assert pair(1, 2, 3, 4, 5, 6).is_finite()
    assert not pair(1, 2, 3, 4, 5, bad).is_finite()


def test_equality_is_of_bits_so_nan_equals_itself_and_zero_differs_from_minus_zero():
    assert pair(math.nan, 0, 0, 0, 0, 0) == pair(math.nan, 0, 0, 0, 0, 0)
    assert pair(0.0, 0, 0, 0, 0, 0) != pair(-0.0, 0, 0, 0, 0, 0)
    assert pair(0, 0, 0, 0, 0, 0) != Weights.zeros(Manifest((Entry("w", (6,)),)))


def test_equal_weights_have_equal_digests_and_hashes_and_others_have_not():
    one, same, other = pair(1, 2, 3, 4, 5, 6), pair(1, 2, 3, 4, 5, 6), pair(1, 2, 3, 4, 5, 7)
    assert one.digest == same.digest
    assert len({one, same, other}) == 2
    assert one.digest != other.digest
    assert one.digest != Weights(Manifest((Entry("w", (6,)),)), one.vector).digest


def test_a_tensor_is_found_by_name_in_its_own_shape():
    one = pair(1, 2, 3, 4, 5, 6)
    assert one["w"].tolist() == [[1, 2], [3, 4]]
    assert {name: array.shape for name, array in one.arrays()} == {"w": (2, 2), "b": (2,)}


def test_a_name_that_is_not_there_is_a_key_error():
    with pytest.raises(KeyError, match="bias"):
        pair(1, 2, 3, 4, 5, 6)["bias"]


def test_weights_of_no_tensor_have_a_digest_a_norm_and_a_sum():
    nothing = Weights.zeros(Manifest(()))
    assert nothing + nothing == nothing
    assert nothing.norm() == 0.0
    assert len(nothing.digest) == 64


def test_the_text_of_weights_says_how_large_they_are_and_which():
    one = pair(1, 2, 3, 4, 5, 6)
    assert repr(one) == f"<Weights 6 elements in 2 tensors, {one.digest[:12]}>"


# -- to and from modules -----------------------------------------------------------------------------------------------


def test_reading_copies_so_that_later_training_does_not_change_the_value():
    layer = nn.Linear(2, 1, bias=False)
    before = Weights.from_module(layer)
    kept = before.vector.copy()
    with torch.no_grad():
        layer.weight.fill_(9.0)
    assert np.array_equal(before.vector, kept)


def test_writing_copies_so_that_later_training_does_not_change_the_value():
    layer = nn.Linear(2, 1, bias=False)
    given = Weights.from_module(layer)
    kept = given.vector.copy()
    given.to_module(layer)
    with torch.no_grad():
        layer.weight.fill_(9.0)
    assert np.array_equal(given.vector, kept)


def test_values_that_may_not_be_written_to_can_be_copied_into_a_module():
    layer = nn.Linear(2, 1, bias=False)
    received = np.frombuffer(np.array([1.0, 2.0], dtype=np.float32).tobytes(), dtype=np.float32)
    Weights(Weights.from_module(layer).manifest, received).to_module(layer)
    assert layer.weight.tolist() == [[1.0, 2.0]]


def test_integer_buffers_stay_behind():
    norm = nn.BatchNorm1d(2)
    norm.num_batches_tracked.fill_(7)
    binding = Binding(norm)
    assert [entry.name for entry in binding.manifest.entries] == ["weight", "bias", "running_mean", "running_var"]
    assert list(binding.local) == ["num_batches_tracked"]
    fresh = nn.BatchNorm1d(2)
    binding.read().to_module(fresh)
    assert fresh.num_batches_tracked.item() == 0


def test_exchange_says_which_tensors_travel_and_the_others_are_left_alone():
    def without_bias(name: str) -> bool:
        return "bias" not in name

    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    bias = target.bias.detach().clone()
    sent = Weights.from_module(source, without_bias)
    assert list(sent.manifest.slices) == ["weight"]
    sent.to_module(target, without_bias)
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, bias)


def test_a_module_of_which_nothing_travels_is_an_empty_manifest():
    layer = nn.Linear(2, 2)
    nothing = Weights.from_module(layer, lambda name: False)
    assert nothing.manifest.size == 0
    assert nothing.to_module(layer, lambda name: False) is layer


def test_a_tied_tensor_travels_once_under_its_first_name():
    names = list(Weights.from_module(Tied()).manifest.slices)
    assert names == ["first.weight", "first.bias", "second.bias"]


def test_a_frozen_parameter_travels_but_is_not_trainable():
    layer = nn.Linear(2, 1)
    layer.weight.requires_grad_(False)
    assert [entry.trainable for entry in Weights.from_module(layer).manifest.entries] == [False, True]
    assert [position for position, _ in Binding(layer).trainable()] == [1]


def test_other_dtypes_than_float32_are_announced_by_a_warning_that_names_them():
    with pytest.warns(CastWarning, match=r"2 tensors \(weight \.\.\.\) are float64; they travel as float32") as caught:
        Weights.from_module(nn.Linear(2, 1).double())
    assert caught[0].filename == __file__


def test_float32_travels_without_a_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Weights.from_module(nn.Linear(2, 1))
    assert caught == []


def test_a_complex_tensor_is_refused_by_name():
    layer = nn.Module()
    layer.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(PayloadError, match="phase: complex"):
        Weights.from_module(layer)


def test_a_complex_tensor_that_exchange_keeps_back_stays():
    layer = nn.Linear(2, 1)
    layer.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    binding = Binding(layer, lambda name: name != "phase")
    assert list(binding.local) == ["phase"]


def test_a_float8_tensor_is_refused_and_the_dtypes_that_travel_are_named():
    layer = nn.Module()
    layer.register_buffer("scale", torch.zeros(2, dtype=torch.float8_e4m3fn))
    with pytest.raises(PayloadError, match="scale: dtype must be one of float32, float64, float16, bfloat16"):
        Weights.from_module(layer)


def test_what_a_module_keeps_in_its_extra_state_stays_behind():
    names = list(Weights.from_module(nn.Sequential(Extra(2, 1))).manifest.slices)
    assert names == ["0.weight", "0.bias"]


def test_a_module_of_other_tensors_is_refused_before_anything_is_written():
    source = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    target = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 4))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    expected = r"expected 1\.weight float32\[4, 2\], but what was received has 1\.weight float32\[3, 2\]"
    with pytest.raises(ManifestMismatch, match=expected):
        Weights.from_module(source).to_module(target)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_a_tensor_that_cannot_be_written_is_refused_before_anything_is_written():
    target = Expanded()
    before = target.first.weight.detach().clone()
    with pytest.raises((PayloadError, ManifestMismatch)):
        (Weights.from_module(target) + 1).to_module(target)
    assert torch.equal(target.first.weight, before)


def test_missing_gradients_read_as_zero_and_buffers_have_none():
    net = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    net[0](torch.ones(3, 2)).sum().backward()
    gradient = Binding(net).read_gradients()
    assert gradient["0.weight"].tolist() == [[3.0, 3.0]]
    assert not gradient["1.weight"].any()
    assert not gradient["1.running_mean"].any()


def test_sparse_gradients_read_as_dense_ones():
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    assert Binding(table).read_gradients()["weight"].tolist() == [[0, 0], [2, 2], [0, 0]]


def test_a_binding_reads_a_buffer_that_the_module_has_assigned_anew():
    module = Reassigning()
    binding = Binding(module)
    module(torch.ones(4, 2))
    assert binding.read()["running"].tolist() == [0.5, 0.5]


def test_a_binding_writes_a_buffer_that_the_module_has_assigned_anew():
    module = Reassigning()
    binding = Binding(module)
    module(torch.ones(4, 2))
    binding.write(Weights(binding.manifest, [3.0, 4.0]))
    assert module.running.tolist() == [3.0, 4.0]


def test_memory_formats_do_not_change_what_travels():
    plain = nn.Conv2d(3, 4, 2)
    last = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    Weights.from_module(plain).to_module(last)
    assert torch.equal(plain.weight, last.weight)
    assert Weights.from_module(last) == Weights.from_module(plain)
