"""The way to deployment: a float32 ONNX file that takes raw inputs, checked against PyTorch before it is kept."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedkit import rng
from fedkit.codec import write_atomically
from fedkit.errors import ConfigError, ExportError
from fedkit.task import Task, Tensor

__all__ = ["TOLERANCE", "Exported", "export"]

TOLERANCE = 1e-5  # largest difference between ONNX Runtime and PyTorch, relative to the largest output
_BATCHES = (1, 2, 64)
_FREE_DIM = 8  # the size that a dimension without one takes in checks


@dataclass(frozen=True, slots=True)
class Exported:
    """A checked model file: where it is, how large, and how far ONNX Runtime is from PyTorch at most (relative)."""

    path: Path
    size_bytes: int
    difference: float


def export(module: nn.Module, task: Task, folder: Path | str, *, quantize: str = "none") -> Exported:
    """Writes `folder/model.onnx` with a dynamic batch and the task's names, once ONNX Runtime agrees with PyTorch.

    Raises `ConfigError` where the task declares no inputs, `ExportError` where the file cannot be made or computes
    something else; then nothing is written.
    """
    if quantize != "none":
        raise ConfigError(f'quantize must be "none", got {quantize!r}: this version exports float32')
    if not task.inputs:
        raise ConfigError(f'{task.name}: export needs inputs={{"name": fedkit.Tensor("float32", (count,))}}')
    content = _converted(module.cpu().eval(), task)
    difference = _difference(content, module, task)
    if not difference <= TOLERANCE:
        raise ExportError(f"ONNX Runtime differs from PyTorch by {difference:.2e}, at most {TOLERANCE:.0e} is allowed")
    path = Path(folder) / "model.onnx"
    write_atomically(path, content)
    return Exported(path, len(content), difference)


def _converted(module: nn.Module, task: Task) -> bytes:
    import onnx

    arguments = tuple(torch.from_numpy(array) for array in _inputs(task, 2).values())
    with tempfile.TemporaryDirectory() as folder, _quiet():
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
            model = onnx.load(file)
            onnx.checker.check_model(model, full_check=True)
        except Exception as error:  # the converter raises whatever its passes raise
            raise ExportError(f"{task.name} cannot be converted to ONNX: {error}") from error
    onnx.helper.set_model_props(model, {"fedkit.task": task.name})
    return bytes(model.SerializeToString())


def _dynamic(tensor: Tensor) -> dict[int, Any]:
    free = [0, *(i for i, dim in enumerate(tensor.shape, start=1) if dim is None)]
    return dict.fromkeys(free, torch.export.Dim.DYNAMIC)


def _inputs(task: Task, batch: int) -> dict[str, npt.NDArray[Any]]:
    """Random inputs of the declared shapes: normal numbers, or 0 and 1 for whole ones."""
    draw = rng.generator(0, "export", batch)
    found = {}
    for name, tensor in task.inputs.items():
        shape = (batch, *(_FREE_DIM if dim is None else dim for dim in tensor.shape))
        values = draw.normal(size=shape) if tensor.torch_dtype.is_floating_point else draw.integers(0, 2, size=shape)
        found[name] = torch.from_numpy(values).to(tensor.torch_dtype).numpy()
    return found


def _difference(content: bytes, module: nn.Module, task: Task) -> float:
    """The largest difference at several batch sizes, relative to the largest output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in _BATCHES:
        feed = _inputs(task, batch)
        with torch.inference_mode():
            expected = module(*(torch.from_numpy(array) for array in feed.values()))
        outputs = [expected] if isinstance(expected, torch.Tensor) else list(expected)
        for got, want in zip(session.run(None, feed), outputs, strict=True):
            worst = max(worst, _relative(got, want.numpy()))
    return worst


def _relative(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    if got.shape != want.shape:
        raise ExportError(f"ONNX Runtime gives shape {got.shape} where PyTorch gives {want.shape}")
    scale = max(float(np.abs(want).max(initial=0.0)), 1e-6)
    return float(np.abs(got - want).max(initial=0.0)) / scale


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converter's own progress and deprecation notes are not for the person who exports."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
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
