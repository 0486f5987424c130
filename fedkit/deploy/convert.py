"""From a PyTorch module to an ONNX graph with the task's names, raw inputs and a dynamic batch."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import nn

from fedkit import rng
from fedkit.deploy.runtime import session
from fedkit.errors import ConfigError, ExportError
from fedkit.task import Prepared, Task, Tensor

__all__ = [
    "BATCHES",
    "TOLERANCE",
    "Arrays",
    "Converted",
    "as_outputs",
    "checked",
    "convert",
    "difference",
    "inputs",
    "operators",
    "quiet",
]

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

TOLERANCE = 1e-5  # largest difference between ONNX Runtime and PyTorch, relative to the largest output
BATCHES = (1, 2, 64)
_ANY = 1 << 40
_FREE_DIM = 8  # the size that a dimension without one takes in checks
_ALSO = {"Add", "Concat", "GlobalAveragePool"}  # operators that static quantisation keeps between two others
_LEFT = {
    "BatchNormalization",
    "CumSum",
    "GatherElements",
    "InstanceNormalization",
    "LayerNormalization",
    "TopK",
    "Where",
}


@dataclass(frozen=True, slots=True)
class Converted:
    """A float32 ONNX file. `graph` is a digest of everything in it but the values; `tensors` are what int8 calibrates.

    Equal digests say that the same tensors are meant by the same names.
    """

    content: bytes = field(repr=False)
    graph: str
    tensors: tuple[str, ...]


def convert(module: nn.Module, task: Task) -> Converted:
    """The module as ONNX, and checked by ONNX's own checker; it must be on the CPU, in evaluation mode.

    Raises `ConfigError` where the task declares no inputs, `ExportError` where the module cannot be converted.
    """
    if not task.inputs:
        raise ConfigError(f'{task.name}: export needs inputs={{"name": fedkit.Tensor("float32", (count,))}}')
    import onnx

    model = onnx.shape_inference.infer_shapes(_exported(module, task))
    _strip(model)
    return Converted(bytes(model.SerializeToString()), _digest(model), _calibrated(model))


def _exported(module: nn.Module, task: Task) -> Any:
    import onnx
    from onnxscript.optimizer import optimize

    arguments = tuple(torch.from_numpy(array) for array in inputs(task, 2).values())
    with tempfile.TemporaryDirectory() as folder, quiet():
        file = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(
                module,
                arguments,
                file,
                input_names=list(task.inputs),
                output_names=list(task.outputs),
                dynamic_shapes=tuple(_dynamic(tensor) for tensor in task.inputs.values()),
                external_data=False,
                dynamo=True,
                verbose=False,
            )
            model = optimize(onnx.load(file), input_size_limit=_ANY, output_size_limit=_ANY)  # also folds weights
            onnx.checker.check_model(model, full_check=True)
        except Exception as error:  # the converter raises whatever its passes raise
            raise ExportError(f"{task.name} cannot be converted to ONNX: {error}") from error
    return model


def _strip(model: Any) -> None:
    """Takes away the exporter's notes on where things come from, and the types of weights, which have their own."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    values = {one.name for one in graph.initializer}
    infos = [one for one in graph.value_info if one.name not in values]
    del graph.value_info[:]
    graph.value_info.extend(infos)


def _digest(model: Any) -> str:
    """BLAKE3 (hex) of operators, names, attributes, shapes and types, without the values of any tensor.

    And of who will make int8 of it: another version of ONNX Runtime may make another file.
    """
    import onnxruntime

    total = blake3(onnxruntime.__version__.encode())
    for node in model.graph.node:
        attributes = [str(a) for a in node.attribute if not a.HasField("t")]
        total.update("\x1f".join([node.domain, node.op_type, *node.input, "", *node.output, *attributes]).encode())
    for one in model.graph.initializer:
        total.update(f"\x1e{one.name}\x1f{one.data_type}\x1f{list(one.dims)}".encode())
    for one in (*model.graph.input, *model.graph.output):
        total.update(b"\x1e" + one.SerializeToString(deterministic=True))
    return total.hexdigest()


def _calibrated(model: Any) -> tuple[str, ...]:
    """The float32 activations that go in or out of an operator that static quantisation knows, in the graph's order."""
    graph, quantized = model.graph, operators()
    about = (*graph.value_info, *graph.input, *graph.output)
    known = {one.name for one in about if one.type.tensor_type.elem_type == 1}
    known -= {one.name for one in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in quantized]
    return tuple(dict.fromkeys(name for node in nodes for name in (*node.input, *node.output) if name in known))


def operators() -> list[str]:
    """The operators that static quantisation takes: those that work in int8, and those that only pass it on."""
    from onnxruntime.quantization.registry import QDQRegistry

    return sorted({*QDQRegistry, *_ALSO} - _LEFT)


def _dynamic(tensor: Tensor) -> dict[int, Any]:
    free = [0, *(i for i, dim in enumerate(tensor.shape, start=1) if dim is None)]
    return dict.fromkeys(free, torch.export.Dim.DYNAMIC)


def inputs(task: Task, batch: int, module: nn.Module | None = None) -> Arrays:
    """Seeded inputs of the declared shapes: normal numbers, or 0 and 1 for whole ones.

    With a `module` that has preprocessing, such that they are normal behind it.
    """
    draw = rng.generator(0, "export", batch)
    found: Arrays = {}
    for name, tensor in task.inputs.items():
        shape = (batch, *(_FREE_DIM if dim is None else dim for dim in tensor.shape))
        values = draw.normal(size=shape) if tensor.torch_dtype.is_floating_point else draw.integers(0, 2, size=shape)
        if isinstance(module, Prepared) and not found:
            values = module.prepare.mean.cpu().numpy() + values * module.prepare.scale.cpu().numpy()
        found[name] = torch.from_numpy(values).to(tensor.torch_dtype).numpy()
    return found


def as_outputs(found: Any) -> list[torch.Tensor]:
    """A module's output as a list of tensors."""
    return [found] if isinstance(found, torch.Tensor) else list(found)


def difference(content: bytes, module: nn.Module, task: Task, batches: Sequence[int] = BATCHES) -> float:
    """The largest difference to PyTorch at several batch sizes, relative to the largest output."""
    running = session(content)
    worst = 0.0
    for batch in batches:
        feed = inputs(task, batch, module)
        with torch.inference_mode():
            expected = as_outputs(module(*(torch.from_numpy(array) for array in feed.values())))
        for got, want in zip(running.run(None, feed), expected, strict=True):
            worst = max(worst, _relative(got, want.numpy()))
    return worst


def checked(module: nn.Module, task: Task) -> tuple[Converted, float]:
    """The module as float32 ONNX, and its largest relative difference to PyTorch; raises `ExportError` beyond 1e-5."""
    found = convert(module, task)
    worst = difference(found.content, module, task)
    if not worst <= TOLERANCE:
        raise ExportError(f"ONNX Runtime differs from PyTorch by {worst:.2e}, at most {TOLERANCE:.0e} is allowed")
    return found, worst


def _relative(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    if got.shape != want.shape:
        raise ExportError(f"ONNX Runtime gives shape {got.shape} where PyTorch gives {want.shape}")
    scale = max(float(np.abs(want).max(initial=0.0)), 1e-6)
    return float(np.abs(got - want).max(initial=0.0)) / scale


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The progress and deprecation notes of converters are not for the person who exports."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", None)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
