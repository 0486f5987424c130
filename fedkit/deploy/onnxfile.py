"""An ONNX file as bytes: read with care, held against what a passport says of it, and stamped with facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedkit.deploy.passport import TaskFacts, TensorFacts
from fedkit.errors import PayloadError

__all__ = ["check", "stamp", "stamped"]

PREFIX = "fedkit."
_NAMES = {"float": "float32", "double": "float64"}  # where ONNX's name of a dtype is not numpy's


def stamped(content: bytes, facts: Mapping[str, str]) -> bytes:
    """The same network with `facts`, of keys that begin with `fedkit.`, in place of those it had."""
    model = _parsed(content)
    others = [(one.key, one.value) for one in model.metadata_props if not one.key.startswith(PREFIX)]
    del model.metadata_props[:]
    for key, value in (*others, *facts.items()):
        model.metadata_props.add(key=key, value=value)
    return bytes(model.SerializeToString())


def stamp(content: bytes) -> dict[str, str]:
    """The facts in a file; raises `PayloadError` where one stands twice."""
    found = [(one.key, one.value) for one in _parsed(content).metadata_props if one.key.startswith(PREFIX)]
    if len(dict(found)) < len(found):
        raise PayloadError("the file's metadata says something twice")
    return dict(found)


def check(content: bytes, task: TaskFacts) -> int:
    """The number of operators of a file that is whole, passes ONNX's checker, and takes and gives what the task says.

    Raises `PayloadError`. Tensors in other files are refused before anything would load them.
    """
    import onnx

    model = _parsed(content)
    outside = next((one for one in _tensors(model) if one.data_location or one.external_data), None)
    if outside is not None:
        raise PayloadError(f"tensor {outside.name!r:.100} lies in another file, which no bundle has")
    try:
        onnx.checker.check_model(content, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        raise PayloadError(f"ONNX's checker refuses it: {error}") from None
    constants = {one.name for one in model.graph.initializer}
    _compare("inputs", [one for one in model.graph.input if one.name not in constants], task.inputs)
    _compare("outputs", model.graph.output, task.outputs)
    return len(model.graph.node)


def _parsed(content: bytes) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load_model_from_string(content)
    except DecodeError as error:
        raise PayloadError(f"not an ONNX file: {error}") from None


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor anywhere in a message: of graphs, of their nodes' attributes, of functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(part)


def _compare(what: str, found: Sequence[Any], wanted: Sequence[TensorFacts]) -> None:
    if [one.name for one in found] != [one.name for one in wanted]:
        names = ", ".join(one.name for one in found)
        raise PayloadError(f"its {what} are {names:.200}; the passport says {', '.join(one.name for one in wanted)}")
    for one, facts in zip(found, wanted, strict=True):
        if _dtype(one) != facts.dtype:
            raise PayloadError(f"{one.name} is {_dtype(one)}; the passport says {facts.dtype}")
        dims = _dims(one)
        if len(dims) != len(facts.shape) or any(a != b for a, b in zip(dims, facts.shape, strict=True) if a):
            raise PayloadError(f"{one.name} has shape {dims}; the passport says {facts.shape}")


def _dtype(value: Any) -> str:
    import onnx

    kind = value.type.tensor_type.elem_type
    name = onnx.TensorProto.DataType.Name(kind).lower() if kind in onnx.TensorProto.DataType.values() else str(kind)
    return _NAMES.get(name, name)


def _dims(value: Any) -> list[int | None]:
    return [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
