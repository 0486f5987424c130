"""The gate: what each variant of a model costs on this machine, and whether it is one at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedkit.deploy import stopwatch
from fedkit.deploy.convert import Converted, inputs
from fedkit.deploy.passport import Measured
from fedkit.deploy.quantize import build, operators_in_fewer_bits
from fedkit.deploy.runtime import aside
from fedkit.deploy.settings import Limits
from fedkit.deploy.site import Watching
from fedkit.deploy.stopwatch import cpu_seconds
from fedkit.errors import ExportError
from fedkit.exam import Variant
from fedkit.task import Task

__all__ = ["BATCHES", "Seconds", "measured", "noise_ranges", "onnx_seconds", "torch_seconds"]

Seconds = dict[str, float]  # CPU seconds of one call, by batch size

BATCHES = (1, 64)  # of which the CPU time is measured
_NOISE_ROWS = 256
_WITHIN_S = 900


def noise_ranges(converted: Converted, module: nn.Module, task: Task) -> npt.NDArray[np.float64]:
    """The ranges that standard normal inputs make, shape (tensors, 2); no data takes part."""
    watching = Watching(module, converted)
    with torch.inference_mode():
        watching(*(torch.from_numpy(array) for array in inputs(task, _NOISE_ROWS, module).values()))
    watching.end_batch(_NOISE_ROWS)
    found = watching.extremes()
    low, high = found[:, :, 0].min(axis=0), found[:, :, 1].max(axis=0)
    return np.stack([np.minimum(low, 0.0), np.maximum(high, 0.0)], axis=1)


def measured(
    converted: Converted,
    module: nn.Module,
    task: Task,
    ranges: npt.NDArray[np.float64],
    variants: Sequence[Variant],
    limits: Limits,
) -> list[Measured]:
    """fp32 and then each variant, as far as can be told without data: those that `passed` are worth asking clients.

    `ranges` (tensors, 2) are what int8 is built by to be measured. A variant without a single operator in fewer bits is
    none; neither is one that is not smaller, or slower.
    """
    eager = torch_seconds(module, task)
    [fp32] = onnx_seconds([converted.content], module, task)
    base: Any = {"size_bytes": len(converted.content), "cpu_s": fp32, "cpu_ratio": dict.fromkeys(fp32, 1.0)}
    found = [Measured(variant="fp32", passed=True, why="the reference", torch_ratio=_ratio(fp32, eager), **base)]
    for variant in variants:
        try:
            content = build(converted, variant, ranges)
            found.append(_judged(variant, [converted.content, content], eager, module, task, limits))
        except ExportError as error:
            found.append(Measured(variant=variant, passed=False, why=str(error)[:300]))
    return found


def _judged(
    variant: Variant, contents: list[bytes], eager: Seconds, module: nn.Module, task: Task, limits: Limits
) -> Measured:
    fp32, own = onnx_seconds(contents, module, task)
    size, cpu, count = len(contents[1]) / len(contents[0]), _ratio(own, fp32), operators_in_fewer_bits(contents[1])
    why = ""
    if not count:
        why = "no operator has its weights in fewer bits"
    elif size > limits.size:
        why = f"its file is {size:.2f} of fp32, at most {limits.size:g} is allowed"
    elif max(cpu.values()) > limits.cpu:
        batch, slow = max(cpu.items(), key=lambda item: item[1])
        why = f"it takes {slow:.2f} of the CPU time of fp32 at batch {batch}, at most {limits.cpu:g} is allowed"
    costs: Any = {"cpu_s": own, "cpu_ratio": cpu, "torch_ratio": _ratio(own, eager), "size_bytes": len(contents[1])}
    return Measured(variant=variant, passed=not why, why=why, operators=count, size_ratio=size, **costs)


def _ratio(one: Seconds, other: Seconds) -> Seconds:
    return {batch: seconds / max(other[batch], 1e-9) for batch, seconds in one.items()}


def onnx_seconds(
    contents: Sequence[bytes], module: nn.Module, task: Task, batches: Sequence[int] = BATCHES
) -> list[Seconds]:
    """CPU seconds of one call of each file, measured by turns in a process of its own, in one thread.

    Raises `ExportError` where ONNX Runtime refuses a file, or dies of it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked: dict[str, Any] = {"files": [], "inputs": {}}
        for at, content in enumerate(contents):
            (folder / f"{at}.onnx").write_bytes(content)
            asked["files"].append(str(folder / f"{at}.onnx"))
        for batch in batches:
            feed = asked["inputs"][str(batch)] = {}
            for at, (key, array) in enumerate(inputs(task, batch, module).items()):
                path = folder / f"{batch}-{at}"
                array.tofile(path)
                feed[key] = {"path": str(path), "dtype": str(array.dtype), "shape": array.shape}
        return _timed(asked)


def _timed(asked: dict[str, Any]) -> list[Seconds]:
    program = str(Path(stopwatch.__file__))
    found: list[Seconds] = json.loads(aside([program], json.dumps(asked), within_s=_WITHIN_S))
    return found


def torch_seconds(module: nn.Module, task: Task) -> Seconds:
    """CPU seconds of one call of the module in PyTorch, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return {str(batch): _eager(module, task, batch) for batch in BATCHES}
    finally:
        torch.set_num_threads(threads)


def _eager(module: nn.Module, task: Task, batch: int) -> float:
    feed = [torch.from_numpy(array) for array in inputs(task, batch, module).values()]
    [seconds] = cpu_seconds([lambda: module(*feed)])
    return seconds
