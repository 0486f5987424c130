"""Small signed bundles in no time: one linear layer, written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper

from fedkit.deploy.bundle import write_bundle
from fedkit.deploy.probe import Probe
from fedkit.trust.signing import public_of
from tests.deploy.passports import EXAMINED, passport

KEY = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
SIGNER = public_of(KEY)


def small_bundle(folder: Path, weight: float, key: Ed25519PrivateKey = KEY, **changes: Any) -> Path:
    """A bundle whose float32 network gives `weight` times the sum of 13 features; its passport with `changes`."""
    weights = np.full((13, 1), weight, np.float32)
    rows = np.arange(26, dtype=np.float32).reshape(2, 13)
    probe = Probe.of({"features": rows}, {"risk": rows @ weights})
    examined = EXAMINED.replace(variant="fp32")
    facts = passport(shipped="fp32", examined=examined, calibration=None).replace(**changes)
    return write_bundle(folder, {"model.onnx": _network(weights)}, facts, key, probe=probe)


def _network(weights: np.ndarray) -> bytes:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["features", "weights"], ["risk"])],
        "small",
        [value("features", TensorProto.FLOAT, ["batch", 13])],
        [value("risk", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(onnx.ModelProto.SerializeToString(model))
