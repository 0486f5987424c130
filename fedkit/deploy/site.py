"""What a client does for a hand-over: it converts the model it was sent by itself, and runs the result on its own rows.

No graph travels: the client has the task's code, the weights it was sent, and where int8 is asked for, the ranges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

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

Kind: TypeAlias = Literal["classes", "logits", "numbers"] | None

_CLOSE = 0.01  # of the largest output: what numbers may differ by and still agree


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
            text = "this site converts the model to another graph: use the versions of torch, onnx, onnxscript and "
            raise Refused(Reason.FAILED, f"{text}onnxruntime that the export uses")
        return self._converted

    def extremes(self, graph: str, batches: Iterable[tuple[Any, int]]) -> Extremes:
        """The least and largest value of each tensor for each row of (batch, its rows), shape (rows, tensors, 2)."""
        watching = Watching(self._module, self.converted(graph))
        with torch.inference_mode():
            for batch, rows in batches:
                self._task.scored(watching, batch, with_outputs=True)
                watching.end_batch(rows)
        return watching.extremes()

    def variant(self, graph: str, variant: Variant, ranges: npt.NDArray[Any] | None, noise: float = 0.0) -> Deployed:
        """The exported model as a module; `ranges` is a vector of (low, high) pairs."""
        pairs = None if ranges is None else np.reshape(ranges, (-1, 2))
        try:
            return Deployed(self._module, build(self.converted(graph), variant, pairs), noise, self._task)
        except ExportError as error:
            raise Refused(Reason.FAILED, str(error)[:200]) from None


class Deployed(nn.Module):
    """An ONNX file that answers like the module it was made from; `tally` says on how many rows it does.

    Its inputs carry normal noise of `noise` times their own standard deviation over the batch; PyTorch's do not.
    """

    def __init__(self, module: nn.Module, content: bytes, noise: float = 0.0, task: Task | None = None) -> None:
        super().__init__()
        self._session = session(content, torch.get_num_threads())
        self._names = [one.name for one in self._session.get_inputs()]
        self._reference = [module]  # in a list, so that it is no part of this module
        self._noise = noise
        self._kind = _kind(task)
        self.tally = Tally()

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The ONNX file's outputs, as the module would give them."""
        feed = {name: self._noisy(one).numpy() for name, one in zip(self._names, inputs, strict=True)}
        got = [torch.from_numpy(array) for array in self._session.run(None, feed)]
        wanted = self._reference[0](*inputs)
        agree = _agreeing(got, [one.cpu() for one in as_outputs(wanted)], self._kind)
        self.tally.agreeing += int(agree.sum())
        self.tally.rows += len(agree)
        return got[0] if isinstance(wanted, torch.Tensor) else type(wanted)(got)

    def _noisy(self, one: torch.Tensor) -> torch.Tensor:
        one = one.detach().cpu()
        if not self._noise or not one.is_floating_point():
            return one
        spread = one.std(dim=0, keepdim=True) if len(one) > 1 else torch.zeros_like(one)
        return one + self._noise * spread * torch.randn_like(one)


def _kind(task: Task | None) -> Kind:
    """What a task's outputs are, by its loss: classes in dimension 1, logits, or numbers. None: nobody can tell."""
    if task is None or task.loss is None:
        return None
    if isinstance(task.loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return "classes"
    return "logits" if isinstance(task.loss, nn.BCEWithLogitsLoss) else "numbers"


def _agreeing(got: list[torch.Tensor], wanted: list[torch.Tensor], kind: Kind) -> torch.Tensor:
    """For each row whether all answers are the same: the class, the sign of each logit, each number nearly.

    Where nobody can tell what outputs are, several numbers in the last dimension are classes.
    """
    same = torch.ones(len(got[0]), dtype=torch.bool)
    for one, other in zip(got, wanted, strict=True):
        same &= torch.isfinite(one).reshape(len(one), -1).all(1) & _equal(one, other, kind).reshape(len(one), -1).all(1)
    return same


def _equal(one: torch.Tensor, other: torch.Tensor, kind: Kind) -> torch.Tensor:
    if kind == "classes" and one.dim() > 1:
        return one.argmax(1) == other.argmax(1)
    if kind is None and one.dim() > 1 and one.shape[-1] > 1:
        return one.argmax(-1) == other.argmax(-1)
    if kind == "logits":
        return (one > 0) == (other > 0)
    return (one - other).abs() <= _CLOSE * max(float(other.abs().max()), 1e-6)


class Watching(nn.Module):
    """The module, beside which the ONNX graph runs with all its calibrated tensors as outputs."""

    def __init__(self, module: nn.Module, converted: Converted) -> None:
        super().__init__()
        import onnx

        model = onnx.load_from_string(converted.content)
        there = {one.name for one in model.graph.output}
        extra = [name for name in converted.tensors if name not in there]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
        self._session = session(model.SerializeToString(), torch.get_num_threads())
        self._names = [one.name for one in self._session.get_inputs()]
        self._tensors = list(converted.tensors)
        self._reference = [module]
        self._seen: list[Extremes] = []
        self._ended: list[Extremes] = []

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

    def end_batch(self, rows: int) -> None:
        """What was seen since the last batch are so many rows, each of which counts once, however often it came by."""
        seen, self._seen = self._seen, []
        if any(len(one) != rows for one in seen):  # the task has made other rows of them
            seen = [np.concatenate(seen)]
            seen = [np.repeat(np.stack([seen[0][..., 0].min(0), seen[0][..., 1].max(0)], 1)[None], rows, 0)]
        low, high = np.min([one[..., 0] for one in seen], axis=0), np.max([one[..., 1] for one in seen], axis=0)
        self._ended.append(np.stack([low, high], axis=2))

    def extremes(self) -> Extremes:
        """Those of all batches that have ended."""
        return np.concatenate(self._ended)


def _by_row(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """The values that belong to each row; a tensor without the batch as its first dimension belongs to all of them."""
    if array.ndim and array.shape[0] == rows:
        return array.reshape(rows, -1)
    return np.broadcast_to(array.reshape(1, -1), (rows, array.size))
