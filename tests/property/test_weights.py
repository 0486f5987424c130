"""Any module's parameters survive the way to a flat vector and back, and the vector obeys arithmetic."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from fedkit.errors import CastWarning, ManifestMismatch, PayloadError
from fedkit.weights import Binding, Entry, Manifest, Weights

SMALL = st.integers(1, 4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
NUMBERS = st.floats(-1e6, 1e6, width=32)


class Holder(nn.Module):
    """Scalars, empty tensors and lists of parameters beside any other module."""

    def __init__(self, inner: nn.Module, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.inner = inner
        self.several = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
        self.register_buffer("temperature", torch.tensor(0.5))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False]))


def leaves() -> st.SearchStrategy[nn.Module]:
    return st.one_of(
        st.builds(nn.Linear, SMALL, SMALL, bias=st.booleans()),
        st.builds(nn.Conv1d, SMALL, SMALL, SMALL),
        st.builds(nn.Conv2d, SMALL, SMALL, SMALL, bias=st.booleans()),
        st.builds(nn.BatchNorm1d, SMALL, affine=st.booleans()),
        st.builds(nn.BatchNorm2d, SMALL, track_running_stats=st.booleans()),
        st.builds(nn.Embedding, SMALL, SMALL),
        st.builds(nn.LSTM, SMALL, SMALL, num_layers=st.integers(1, 2), bidirectional=st.booleans()),
        st.builds(lambda n: nn.GroupNorm(n, 2 * n), SMALL),
        st.builds(nn.ReLU),
    )


def containers(inner: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    shapes = st.lists(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3), max_size=2)
    return st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: nn.Sequential(*parts)),
        st.lists(inner, max_size=3).map(nn.ModuleList),
        st.dictionaries(st.sampled_from(["encoder", "head", "a_b"]), inner, max_size=2).map(nn.ModuleDict),
        st.builds(Holder, inner, shapes),
    )


@st.composite
def modules(draw: st.DrawFn) -> nn.Module:
    """A module of any kind: nested, of mixed dtypes, with tied and with frozen parameters."""
    module = draw(st.recursive(leaves(), containers, max_leaves=5))
    for child in list(module.modules()):
        if not isinstance(child, nn.RNNBase) and not list(child.children()) and draw(st.integers(0, 3)) == 0:
            child.to(draw(DTYPES))
    _tie(draw, module)
    for parameter in module.parameters():
        parameter.requires_grad_(draw(st.integers(0, 4)) > 0)
    return module


def _tie(draw: st.DrawFn, module: nn.Module) -> None:
    linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
    alike = [(a, b) for a in linears for b in linears if a is not b and a.weight.shape == b.weight.shape]
    if alike and draw(st.booleans()):
        first, second = draw(st.sampled_from(alike))
        second.weight = first.weight


def read(module: nn.Module) -> Weights:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CastWarning)
        return Weights.from_module(module)


def write(weights: Weights, module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CastWarning)
        weights.to_module(module)


def scramble(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in module.state_dict(keep_vars=True).values():
            tensor.fill_(1)


def as_travelled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().to(tensor.dtype) if tensor.is_floating_point() else torch.ones_like(tensor)


@given(modules())
def test_every_floating_tensor_of_any_module_comes_back_as_it_was_and_the_others_are_left_alone(module):
    before = {name: as_travelled(tensor.clone()) for name, tensor in module.state_dict().items()}
    weights = read(module)
    scramble(module)
    write(weights, module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert read(module) == weights


@given(modules())
def test_the_manifest_lists_each_floating_tensor_once_as_the_module_keeps_it(module):
    unique = {id(t): (name, t) for name, t in reversed(list(module.state_dict(keep_vars=True).items()))}
    expected = {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch."), t.requires_grad)
        for name, t in unique.values()
        if t.is_floating_point()
    }
    entries = read(module).manifest.entries
    assert {entry.name: (entry.shape, entry.dtype, entry.trainable) for entry in entries} == expected
    assert [entry.name for entry in entries] == [name for name in module.state_dict() if name in expected]


@given(modules())
def test_there_is_a_cast_warning_exactly_where_something_is_not_float32(module):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = Weights.from_module(module)
    others = [entry for entry in weights.manifest.entries if entry.dtype != "float32"]
    assert [warning.category for warning in caught] == ([CastWarning] if others else [])
    assert all(f"{len(others)} tensors ({others[0].name}" in str(warning.message) for warning in caught)


@given(modules(), st.sampled_from(["bias", "weight", "inner", "0", "running"]))
def test_what_exchange_keeps_back_neither_travels_nor_changes(module, word):
    def travels(name: str) -> bool:
        return word not in name

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CastWarning)
        binding = Binding(module, travels)
        kept = {name: tensor.detach().clone() for name, tensor in binding.local.items()}
        binding.write(binding.read() + 1)
    assert all(travels(entry.name) for entry in binding.manifest.entries)
    assert all(torch.equal(binding.local[name], tensor) for name, tensor in kept.items())
    floating = {name for name, tensor in binding.local.items() if tensor.is_floating_point()}
    assert not any(travels(name) for name in floating)


@given(modules(), modules())
def test_a_module_takes_its_own_manifest_and_no_other(one, other):
    weights, before = read(one), read(other)
    if weights.manifest == before.manifest:
        write(weights, other)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CastWarning)
        try:
            weights.to_module(other)
        except ManifestMismatch:
            assert read(other) == before
        else:
            raise AssertionError("another manifest was written")


@given(modules())
def test_a_manifest_survives_the_way_to_text_and_back(module):
    manifest = read(module).manifest
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.digest == manifest.digest
    assert again.to_json() == manifest.to_json()


@given(st.text())
def test_any_text_is_a_manifest_or_a_payload_error(text):
    try:
        manifest = Manifest.from_json(text)
    except PayloadError:
        return
    assert manifest.to_json() == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("float32"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
)


@given(st.lists(st.tuples(JSON, JSON, JSON | st.just("float32"), JSON), max_size=3))
def test_entries_of_any_values_are_a_manifest_or_a_payload_error(rows):
    try:
        Manifest(tuple(Entry(*row) for row in rows))
    except PayloadError:
        return
    assert all(isinstance(name, str) and flag in (True, False) for name, _, _, flag in rows)


def vectors(count: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, count, elements=NUMBERS)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Weights, Weights]:
    shapes = draw(st.lists(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3), max_size=4))
    manifest = Manifest(tuple(Entry(f"t{i}", shape) for i, shape in enumerate(shapes)))
    return Weights(manifest, draw(vectors(manifest.size))), Weights(manifest, draw(vectors(manifest.size)))


@given(pairs())
def test_sums_commute_and_a_difference_undoes_to_rounding(two):
    a, b = two
    assert a + b == b + a
    assert np.allclose(((a + b) - b).vector, a.vector, atol=0.25)
    assert a - b == a + -b


@given(pairs())
def test_the_norm_is_numpys_and_the_inner_product_is_bounded_by_the_norms(two):
    a, b = two
    assert math.isclose(a.norm(), float(np.linalg.norm(a.vector.astype(np.float64))), rel_tol=1e-12, abs_tol=0.0)
    assert abs(a @ b) <= a.norm() * b.norm() * (1 + 1e-12)
    assert math.isclose(a @ a, a.norm() ** 2, rel_tol=1e-12)


@given(pairs(), st.data())
def test_equality_and_digest_tell_any_single_bit_apart(two, data):
    a = two[0]
    assume(a.vector.size)
    position = data.draw(st.integers(0, a.vector.size - 1))
    bits = a.vector.copy().view(np.uint32)
    bits[position] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    changed = a.with_vector(bits.view(np.float32))
    assert changed != a
    assert changed.digest != a.digest
    assert a.with_vector(a.vector.copy()).digest == a.digest


@given(pairs())
def test_the_arrays_of_weights_lie_one_after_the_other_in_the_vector(two):
    a = two[0]
    parts = [array.reshape(-1) for _, array in a.arrays()]
    assert np.array_equal(np.concatenate([*parts, np.zeros(0, np.float32)]), a.vector)
    assert [name for name, _ in a.arrays()] == [entry.name for entry in a.manifest.entries]
