"""ONNX Runtime, with errors of ours for what it refuses and for what it dies of."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy.typing as npt

from fedkit.deploy.probe import Arrays
from fedkit.errors import ExportError

__all__ = ["Array", "aside", "run", "session"]

Array: TypeAlias = npt.NDArray[Any]


def session(content: bytes, threads: int = 0) -> Any:
    """The network on the CPU, on so many threads (0: as ONNX Runtime likes); raises `ExportError` where it is none."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except _refusals() as error:
        raise ExportError(f"ONNX Runtime does not take the file: {error}") from None


def run(running: Any, inputs: Arrays) -> dict[str, Array]:
    """The outputs by name; raises `ExportError` where ONNX Runtime does not come to an end."""
    try:
        found = running.run(None, dict(inputs))
    except _refusals() as error:
        raise ExportError(f"ONNX Runtime does not run the file: {error}") from None
    return dict(zip((one.name for one in running.get_outputs()), found, strict=True))


def aside(program: Sequence[str], given: str = "", *, within_s: float) -> str:
    """What a Python program prints that runs ONNX Runtime in a process of its own, which may die of a file.

    `program` are Python's arguments, `given` is its standard input. Raises `ExportError` where it fails, dies or takes
    longer than it may.
    """
    command = [sys.executable, "-I", *program]
    about: Any = {"input": given, "capture_output": True, "text": True, "timeout": within_s}
    try:
        done = subprocess.run(command, check=False, **about)  # noqa: S603 - ours, or ONNX Runtime's own
    except subprocess.TimeoutExpired:
        raise ExportError(f"ONNX Runtime has not come to an end within {within_s:g} seconds") from None
    if done.returncode < 0:
        raise ExportError(f"ONNX Runtime dies of it (signal {-done.returncode})")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
        raise ExportError(f"ONNX Runtime does not take it: {last[:200]}")
    printed: str = done.stdout
    return printed


@functools.cache
def _refusals() -> tuple[type[Exception], ...]:
    """Its errors, which have no class of their own in common."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (kind for kind in vars(state).values() if isinstance(kind, type))
    return (RuntimeError, ValueError, *(kind for kind in kinds if issubclass(kind, Exception)))
