"""A probe comes back as it was written, is the same on every machine, and is never large."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkit.deploy.passport import TaskFacts, TensorFacts
from fedkit.deploy.probe import Probe, apart, drawn
from fedkit.errors import ConfigError, ExportError, PayloadError


def task(dtype: str = "float32", *dims: int | None) -> TaskFacts:
    inputs = [TensorFacts(name="x", dtype=dtype, shape=[None, *dims])]
    return TaskFacts(name="t", source=None, inputs=inputs, outputs=[], metrics=[])


def test_the_same_numbers_are_drawn_everywhere() -> None:
    found = drawn(task("float32", 3), rows=2)["x"]
    assert found.tolist() == [
        [-1.79376220703125, 0.50592041015625, 1.08978271484375],
        [0.0057373046875, 1.9761962890625, 0.897216796875],
    ]
    assert drawn(task("int64", 4), rows=1)["x"].tolist() == [[1, 1, 1, 0]]
    assert drawn(task("float32", None, 2), rows=3)["x"].shape == (3, 8, 2)
    assert not np.array_equal(found, drawn(task("float32", 3), rows=2, seed=1)["x"])
    with pytest.raises(ConfigError, match="x is bfloat16, and a probe can be made of float16"):
        drawn(task("bfloat16", 3))


@given(
    hnp.arrays(
        st.sampled_from(["float32", "float16", "float64", "int64", "bool", "uint8"]),
        hnp.array_shapes(max_dims=3, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False},
    ),
    hnp.arrays("float32", hnp.array_shapes(max_side=4), elements={"allow_nan": False, "allow_infinity": False}),
)
def test_small_inputs_and_outputs_come_back_bit_by_bit(inputs, outputs):
    found = Probe.from_json(Probe.of({"x": inputs}, {"y": outputs}, seed=7).to_json().encode())
    assert found.inputs["x"].dtype == inputs.dtype
    assert found.inputs["x"].tobytes() == inputs.tobytes()
    assert found.apart({"y": outputs}) == 0.0


@given(st.binary(max_size=50))
def test_anything_else_is_a_payload_error(raw):
    with pytest.raises(PayloadError, match="not a probe"):
        Probe.from_json(raw)


def test_large_inputs_are_a_seed_and_a_digest_and_large_outputs_are_thinned() -> None:
    inputs = drawn(task("float32", 3, 224, 224), seed=5)
    outputs = {"y": np.random.default_rng(0).normal(size=(4, 21, 64, 64)).astype(np.float32), "z": np.zeros((4, 2))}
    text = Probe.of(inputs, outputs, seed=5).to_json()
    assert len(text) < 1_000_000
    assert json.loads(text)["inputs"]["x"]["values"] is None
    found = Probe.from_json(text.encode())
    assert np.array_equal(found.inputs["x"], inputs["x"])
    assert found.apart(outputs) == 0.0
    outputs["y"][0, 0, 0, 0] += 1.0
    assert found.apart(outputs) > 0.1
    with pytest.raises(ConfigError, match=r"take those of probe\.drawn"):
        Probe.of({"x": inputs["x"] + 1}, outputs, seed=5).to_json()
    with pytest.raises(PayloadError, match="does not have the digest"):
        Probe.from_json(text.replace('"seed": 5', '"seed": 6').encode())


def test_values_that_were_changed_do_not_have_their_digest() -> None:
    text = Probe.of({"x": np.array([1.0, 2.0])}, {"y": np.array([1.0])}).to_json()
    with pytest.raises(PayloadError, match="does not have the digest"):
        Probe.from_json(text.replace("[1.0, 2.0]", "[1.0, 2.5]").encode())


def test_a_difference_is_relative_to_the_largest_output_and_a_missing_number_is_no_difference_at_all() -> None:
    wanted = {"y": np.array([0.0, -4.0]), "z": np.array([1.0])}
    assert apart({"y": np.array([1.0, -4.0]), "z": np.array([1.0])}, wanted) == 0.25
    assert np.isnan(apart({"y": np.array([np.nan, -4.0]), "z": np.array([1.0])}, wanted))
    with pytest.raises(ExportError, match="the outputs are y, and not y, z"):
        apart({"y": np.zeros(2)}, wanted)
    with pytest.raises(ExportError, match=r"y has shape \(3,\)"):
        apart({"y": np.zeros(3), "z": np.zeros(1)}, wanted)
    with pytest.raises(ExportError, match="not finite"):
        Probe.of({}, {"y": np.array([np.inf])})
