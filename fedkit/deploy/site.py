"""What a client does for a hand-over: it converts the model it was sent by itself, and runs the result on its own rows.

No graph travels: the client has the task's code, the weights it was sent, and where int8 is asked for, the ranges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedkit.deploy.convert import Converted, as_outputs, convert
from fedkit.deploy.quantize import build
from fedkit.deploy.runtime import session
from fedkit.errors import ExportError, Reason, Refused
from fedkit.exam import Variant
from fedkit.ranges import Extremes
from fedkit.task import Task

__all__ = ["Deployed", "SiteModel", "Tally", "Watching"]

_CLOSE = 0.01  # of the largest output: what answers that are no classes may differ by and still agree


@dataclass
class Tally:
    """On how many rows a deployed model has answered as PyTorch does, of how many."""

    agreeing: int = 0
    rows: int = 0


class SiteModel:
    """A model at a client, on the CPU, with its conversion; raises `Refused` where the graph is not the one meant."""

    def __init__(self, module: nn.Module, task: Task) -> None:
        self._module, self._task = module.eval(), task
        self._converted: Converted | None = None

    def converted(self, graph: str) -> Converted:
        """The conversion, made once."""
        if self._converted is None:
            try:
                self._converted = convert(self._module, self._task)
            except ExportError as error:
                raise Refused(Reason.FAILED, str(error)[:200]) from None
        if self._converted.graph != graph:
            text = "this site converts the model to another graph: use the versions of torch, onnx and onnxscript "
            raise Refused(Reason.FAILED, f"{text}that the export uses")
        return self._converted

    def extremes(self, graph: str, batches: Iterable[Any]) -> Extremes:
        """The least and largest value of each tensor for each row, shape (rows, tensors, 2)."""
        watching = Watching(self._module, self.converted(graph))
        with torch.inference_mode():
            for batch in batches:
                self._task.scored(watching, batch, with_outputs=True)
        return watching.extremes()

    def variant(self, graph: str, variant: Variant, ranges: npt.NDArray[Any] | None, noise: float = 0.0) -> Deployed:
        """The exported model as a module; `ranges` is a vector of (low, high) pairs."""
        pairs = None if ranges is None else np.reshape(ranges, (-1, 2))
        try:
            return Deployed(self._module, build(self.converted(graph), variant, pairs), noise)
        except ExportError as error:
            raise Refused(Reason.FAILED, str(error)[:200]) from None


class Deployed(nn.Module):
    """An ONNX file that answers like the module it was made from; `tally` says on how many rows it does.

    Its inputs carry normal noise of `noise` times their own standard deviation over the batch; PyTorch's do not.
    """

    def __init__(self, module: nn.Module, content: bytes, noise: float = 0.0) -> None:
        super().__init__()
        self._session = session(content)
        self._names = [one.name for one in self._session.get_inputs()]
        self._reference = [module]  # in a list, so that it is no part of this module
        self._noise = noise
        self.tally = Tally()

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The ONNX file's outputs, as the module would give them."""
        feed = {name: self._noisy(one).numpy() for name, one in zip(self._names, inputs, strict=True)}
        got = [torch.from_numpy(array) for array in self._session.run(None, feed)]
        wanted = self._reference[0](*inputs)
        agree = _agreeing(got[0], as_outputs(wanted)[0])
        self.tally.agreeing += int(agree.sum())
        self.tally.rows += len(agree)
        return got[0] if isinstance(wanted, torch.Tensor) else type(wanted)(got)

    def _noisy(self, one: torch.Tensor) -> torch.Tensor:
        one = one.detach().cpu()
        if not self._noise or not one.is_floating_point():
            return one
        spread = one.std(dim=0, keepdim=True) if len(one) > 1 else torch.zeros_like(one)
        return one + self._noise * spread * torch.randn_like(one)


def _agreeing(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """For each row whether the answers are the same: the class of each position, the sign of a logit, or nearly equal.

    Outputs of several classes have them in the last dimension; one number a row counts as a logit.
    """
    got = got.reshape(len(got), -1, got.shape[-1] if got.dim() > 1 else 1)
    wanted = wanted.cpu().reshape(got.shape)
    if got.shape[2] > 1:
        return (got.argmax(2) == wanted.argmax(2)).all(1)
    near = (got - wanted).abs() <= _CLOSE * max(float(wanted.abs().max()), 1e-6)
    return (((got > 0) == (wanted > 0)) | near).all(2).all(1)


class Watching(nn.Module):
    """The module, beside which the ONNX graph runs with all its calibrated tensors as outputs."""

    def __init__(self, module: nn.Module, converted: Converted) -> None:
        super().__init__()
        import onnx

        model = onnx.load_from_string(converted.content)
        there = {one.name for one in model.graph.output}
        extra = [name for name in converted.tensors if name not in there]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
        self._session = session(model.SerializeToString())
        self._names = [one.name for one in self._session.get_inputs()]
        self._tensors = list(converted.tensors)
        self._reference = [module]
        self._seen: list[Extremes] = []

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The module's outputs."""
        feed = {name: one.detach().cpu().numpy() for name, one in zip(self._names, inputs, strict=True)}
        rows = len(inputs[0])
        found = np.empty((rows, len(self._tensors), 2))
        for at, array in enumerate(self._session.run(self._tensors, feed)):
            flat = _by_row(array, rows)
            found[:, at, 0], found[:, at, 1] = flat.min(axis=1), flat.max(axis=1)
        self._seen.append(found)
        return self._reference[0](*inputs)

    def extremes(self) -> Extremes:
        """Those of all rows so far."""
        return np.concatenate(self._seen)


def _by_row(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """The values that belong to each row; a tensor without the batch as its first dimension belongs to all of them."""
    if array.ndim and array.shape[0] == rows:
        return array.reshape(rows, -1)
    return np.broadcast_to(array.reshape(1, -1), (rows, array.size))
