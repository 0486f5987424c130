"""The same network in fewer bits: int8 with calibrated ranges, int8 with ranges found as it runs, or float16.

The formula of int8, scale and zero point, stands in `fedkit.quantization`; ONNX Runtime's quantiser writes the graphs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedkit.deploy.convert import Converted, operators, quiet
from fedkit.errors import ExportError
from fedkit.exam import Variant

__all__ = ["build", "operators_in_fewer_bits"]

_FEWER = (2, 3, 10)  # uint8, int8 and float16, of onnx.TensorProto
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "LSTM", "GRU", "RNN"})
_INTEGER = frozenset({"ConvInteger", "MatMulInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul"})


def build(converted: Converted, variant: Variant, ranges: npt.NDArray[Any] | None = None) -> bytes:
    """The variant as an ONNX file. "int8" takes `ranges`, shape (tensors, 2), of `converted.tensors`, in that order.

    "int8" is static: weights in int8, symmetric, per output channel; activations in uint8, per tensor. Raises
    `ExportError` for a network that ONNX Runtime's quantiser does not take.
    """
    if variant == "fp32":
        return converted.content
    import onnx

    model = onnx.load_from_string(converted.content)
    with quiet():
        try:
            found = _tidied(_built(model, converted.tensors, variant, ranges))
            onnx.checker.check_model(found, full_check=True)
        except Exception as error:  # the quantiser raises whatever its passes raise
            raise ExportError(f"{variant}: ONNX Runtime's quantiser does not take this network: {error}") from error
    return bytes(found.SerializeToString())


def _built(model: Any, tensors: tuple[str, ...], variant: Variant, ranges: npt.NDArray[Any] | None) -> Any:
    if variant == "int8-dynamic":
        return _dynamic(model)
    if variant == "fp16":
        return _half(model)
    if ranges is None or np.shape(ranges) != (len(tensors), 2):
        raise ValueError(f"int8 needs the ranges of {len(tensors)} tensors")
    return _static(model, dict(zip(tensors, np.asarray(ranges, dtype=np.float32), strict=True)))


def _static(model: Any, ranges: dict[str, npt.NDArray[np.float32]]) -> Any:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    known = TensorsData(CalibrationMethod.MinMax, {name: (low, high) for name, (low, high) in ranges.items()})
    about: Any = (QuantType.QInt8, QuantType.QUInt8, known, [], [], operators(), {"QuantizeBias": False})
    quantizer = QDQQuantizer(model, True, False, *about)
    quantizer.quantize_model()
    return quantizer.model.model


def _dynamic(model: Any) -> Any:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode
    from onnxruntime.quantization.registry import IntegerOpsRegistry

    about: Any = (QuantType.QInt8, QuantType.QUInt8, None, [], [], list(IntegerOpsRegistry), {"MatMulConstBOnly": True})
    quantizer = ONNXQuantizer(model, False, False, QuantizationMode.IntegerOps, False, *about)
    quantizer.quantize_model()
    return quantizer.model.model


def _half(model: Any) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=True)


def _tidied(model: Any) -> Any:
    """The nodes in an order that ONNX's checker takes, as quantisers append what comes first; and no constant twice.

    Each layer has zero points of its own, which are all 0: of narrow layers they are one byte in a hundred.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel

    found = ONNXModel(model)
    found.topological_sort()
    graph = found.model.graph
    del graph.value_info[:]
    names: dict[bytes, str] = {}
    same: dict[str, str] = {}
    for one in graph.initializer:
        name, one.name = one.name, ""
        same[name] = names.setdefault(one.SerializeToString(deterministic=True), name)
        one.name = name
    kept = [one for one in graph.initializer if same[one.name] == one.name]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = same.get(name, name)
    return found.model


def operators_in_fewer_bits(content: bytes) -> int:
    """How many operators have their weights in int8 or float16, or multiply whole numbers."""
    import onnx

    graph = onnx.load_from_string(content).graph
    few = {one.name for one in graph.initializer if one.data_type in _FEWER}
    few |= {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in few}
    kept = [node for node in graph.node if node.op_type in _WEIGHTED and few & set(node.input)]
    return len(kept) + sum(node.op_type in _INTEGER for node in graph.node)
