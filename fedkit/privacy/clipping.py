"""Each row's gradient, clipped, and summed over the rows of a batch.

Two ways to the same numbers. `BookKeeping` needs one backward pass and never holds a gradient a row where that would be
large; it takes every model whose trainable layers have a recipe in `fedkit.privacy.layers` and are used once a pass.
`Hooks` leaves the gradients of each row to Opacus and takes the others. `ClippedGradients` picks the way, and proves on
a few rows that it computes what a loop over single rows would.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from fedkit import rng
from fedkit.errors import TaskError
from fedkit.privacy.layers import is_kept, part_of
from fedkit.privacy.models import quietly_loaded
from fedkit.task import Task

__all__ = ["BookKeeping", "Clipped", "ClippedGradients", "Hooks", "Loss", "NotKept", "Way", "row_losses"]

Loss: TypeAlias = Callable[[Any, int], torch.Tensor]  # (batch, how many rows it has) -> the sum of its rows' losses

_SAMPLE = "grad_sample"  # where Opacus leaves a parameter's gradient of each row
_KEPT_FLOATS = 1 << 26  # 256 MB of what has to be remembered of the rows of one physical batch
_MOST_ROWS = 256
_PROOF_ROWS = 4
_TOLERANCE = 0.02  # of the gradients' length: TensorFloat-32 keeps three digits; a mistake is of the order of one


class NotKept(Exception):
    """A layer is not used as book-keeping needs it; Opacus' hooks may do."""


@dataclass(frozen=True, slots=True)
class Clipped:
    """Of one batch: for each trainable parameter the sum of the rows' clipped gradients, and each row's own length.

    `norms` [rows] are those before clipping, float64, over all trainable parameters together. `kept_floats` is how many
    numbers had to be remembered.
    """

    sums: list[torch.Tensor]
    norms: torch.Tensor
    kept_floats: int


class Way(Protocol):
    """One way to clipped sums; attached to its module between `__enter__` and `__exit__` alone."""

    def __enter__(self) -> Way: ...

    def __exit__(self, *_: object) -> None: ...

    def sums(self, loss: Loss, batch: Any, rows: int, clip: float) -> Clipped:
        """The rows' gradients of `loss`, each clipped to `clip`, added up; raises `NotKept` where this cannot be."""
        ...


def _factors_of(norms: torch.Tensor, clip: float) -> torch.Tensor:
    """What each row's gradient is multiplied by: min(1, clip / norm), and 0 where there is no finite norm."""
    return torch.where(norms.isfinite(), (clip / norms).clamp(max=1.0), 0.0)


# -- book-keeping ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Page:
    """What is kept of one call of one layer: its input, and where in the graph its output's gradient comes."""

    layer: nn.Module
    inputs: torch.Tensor
    version: int
    edge: torch.autograd.graph.GradientEdge


class BookKeeping:
    """One forward and one backward pass; see `fedkit.privacy.layers` for the formulas."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = {name: part for name, part in module.named_modules() if _trains(part)}
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._pages: dict[str, _Page] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether every trainable layer has a recipe, and no two of them have a parameter in common."""
        layers = [part for part in module.modules() if _trains(part)]
        owned = [id(p) for part in layers for p in part.parameters(recurse=False) if p.requires_grad]
        return all(is_kept(part) for part in layers) and len(owned) == len(set(owned))

    def __enter__(self) -> BookKeeping:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._keeper(name)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _keeper(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def keep(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self._pages is None:
                return
            if name in self._pages:
                raise NotKept(f"{name} is used more than once a pass")
            if len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor):
                raise NotKept(f"{name} is called with something else than one tensor")
            edge = torch.autograd.graph.get_gradient_edge(output)
            self._pages[name] = _Page(layer, inputs[0].detach(), inputs[0]._version, edge)  # noqa: SLF001

        return keep

    def sums(self, loss: Loss, batch: Any, rows: int, clip: float) -> Clipped:
        """One pass; raises `NotKept` where a layer is used twice, changed in place, or not row by row."""
        pages = self._read(loss, batch, rows)
        with torch.no_grad():
            return self._contracted(pages, rows, clip)

    def _contracted(self, pages: list[tuple[_Page, torch.Tensor]], rows: int, clip: float) -> Clipped:
        parts = [part for page, grads in pages for part in part_of(page.layer, page.inputs, grads)]
        zeros = torch.zeros(rows, dtype=torch.float64, device=self._parameters[0].device)
        norms = sum((part.squares for part in parts), zeros).sqrt()
        factors = _factors_of(norms, clip)
        found = {id(parameter): total for part in parts for parameter, total in part.contract(factors)}
        sums = [found[id(p)] if id(p) in found else torch.zeros_like(p) for p in self._parameters]
        return Clipped(sums, norms, sum(page.inputs.numel() + grads.numel() for page, grads in pages))

    def _read(self, loss: Loss, batch: Any, rows: int) -> list[tuple[_Page, torch.Tensor]]:
        """Each layer that was used with the gradients of its outputs."""
        self._pages = {}
        try:
            total = loss(batch, rows)
        finally:
            pages, self._pages = self._pages, None
        if not pages or not total.requires_grad:
            return []
        grads = torch.autograd.grad(total, [page.edge for page in pages.values()], allow_unused=True)
        found = [(page, grad) for page, grad in zip(pages.values(), grads, strict=True) if grad is not None]
        for page, grad in found:
            if len(page.inputs) != rows or len(grad) != rows:
                raise NotKept(f"{type(page.layer).__name__} does not have the rows of a batch in its first dimension")
            if page.inputs._version != page.version:  # noqa: SLF001
                raise NotKept(f"the input of {type(page.layer).__name__} is changed in place later on")
        return found


def _trains(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


# -- Opacus' hooks -----------------------------------------------------------------------------------------------------


class Hooks:
    """Opacus computes the gradient of each row (`GradSampleHooks`: its rules a layer, functorch for all others).

    Nothing of Opacus is left on the module afterwards, so that it can be attached again. Needs memory for one model a
    row. Layers that are used twice and tied weights are added up as they should be.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Hooks:
        with quietly_loaded():
            from opacus.grad_sample import GradSampleHooks

        hooks = GradSampleHooks(self._module, loss_reduction="sum", strict=False)
        self._stack.callback(hooks.cleanup)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for layer in self._module.modules():
            for left in ("activations", "max_batch_len"):
                layer.__dict__.pop(left, None)

    def sums(self, loss: Loss, batch: Any, rows: int, clip: float) -> Clipped:
        """One pass with a gradient a row and parameter."""
        try:
            total = loss(batch, rows)
            with warnings.catch_warnings():  # of the first layer: its inputs need no gradient, as Opacus knows
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
            return _contracted(self._parameters, rows, clip)
        finally:
            for parameter in self._parameters:
                parameter.grad = None
                setattr(parameter, _SAMPLE, None)


def _contracted(parameters: Sequence[nn.Parameter], rows: int, clip: float) -> Clipped:
    found = {i: getattr(p, _SAMPLE) for i, p in enumerate(parameters) if getattr(p, _SAMPLE, None) is not None}
    for i, sample in found.items():
        if not isinstance(sample, torch.Tensor) or sample.shape != (rows, *parameters[i].shape):
            raise NotKept("a layer does not have the rows of a batch in its first dimension")
    flat = {i: sample.reshape(rows, -1) for i, sample in found.items()}
    zeros = torch.zeros(rows, dtype=torch.float64, device=parameters[0].device)
    norms = sum((torch.linalg.vector_norm(s, dim=1).double().square() for s in flat.values()), zeros).sqrt()
    factors = _factors_of(norms, clip)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for i, sample in flat.items():
        sums[i] = (factors.to(sample.dtype) @ sample).view(parameters[i].shape)
    return Clipped(sums, norms, sum(sample.numel() for sample in flat.values()))


# -- losses ------------------------------------------------------------------------------------------------------------


def row_losses(task: Task, module: nn.Module) -> Loss:
    """The sum of the losses of a batch's rows, none of which depends on any other row.

    With `task.loss`, each row's loss is what the criterion says of this row alone. With `task.step`, it is a share of
    the mean, which only `ClippedGradients.prove` can tell from something else.
    """

    def of_step(batch: Any, rows: int) -> torch.Tensor:
        return rows * task.mean_loss(module, batch)

    def of_loss(batch: Any, rows: int) -> torch.Tensor:
        features, targets = task.columns(batch)
        return _one_by_one(task.loss, module(features), targets, rows)

    return of_step if task.step is not None else of_loss


def _one_by_one(criterion: Any, outputs: Any, targets: Any, rows: int) -> torch.Tensor:
    plain = _plain_losses(criterion, outputs, targets, rows)
    if plain is not None:
        return plain

    def one(output: Any, target: Any) -> torch.Tensor:
        loss: torch.Tensor = criterion(_as_batch(output), _as_batch(target))
        return loss.reshape(())

    try:
        return torch.vmap(one, randomness="different")(outputs, targets).sum()
    except (RuntimeError, ValueError):  # the criterion looks at values, or takes more than tensors
        losses = [criterion(_part(outputs, row), _part(targets, row)).reshape(()) for row in range(rows)]
        return torch.stack(losses).sum()


def _plain_losses(criterion: Any, outputs: Any, targets: Any, rows: int) -> torch.Tensor | None:
    """The same for the commonest criteria at less cost: where one row's mean is its own sum over a fixed number."""
    if getattr(criterion, "weight", None) is not None or not isinstance(outputs, torch.Tensor):
        return None
    if type(criterion) is nn.CrossEntropyLoss:
        simple = outputs.dim() == 2
    else:
        simple = type(criterion) in (nn.MSELoss, nn.BCEWithLogitsLoss) and outputs.shape == targets.shape
    if not simple or criterion.reduction != "mean" or len(outputs) != rows or len(targets) != rows:
        return None
    if type(criterion) is nn.CrossEntropyLoss:
        return nn.functional.cross_entropy(
            outputs, targets, reduction="sum", ignore_index=criterion.ignore_index,
            label_smoothing=criterion.label_smoothing,
        )  # fmt: skip
    return rows * criterion(outputs, targets)  # type: ignore[no-any-return]


def _as_batch(row: Any) -> Any:
    """One row as a batch of one."""
    return torch.utils._pytree.tree_map(lambda tensor: tensor.unsqueeze(0), row)  # noqa: SLF001


def _part(batch: Any, row: int) -> Any:
    """The batch of this one row."""
    rows = slice(row, row + 1)
    return torch.utils._pytree.tree_map(lambda part: part[rows] if hasattr(part, "__len__") else part, batch)  # noqa: SLF001


# -- the way that fits -------------------------------------------------------------------------------------------------


class ClippedGradients:
    """The clipped sums of one task and module, by the way that fits: book-keeping, else Opacus' hooks.

    Use as a context; `way` is taken instead of the one that fits. Raises `TaskError` where neither gives what a loop
    over single rows gives, or where a pass changes a buffer: what comes out would depend on other rows, and the clip
    would bound nothing.

    Opacus' ghost clipping is not among the ways: it takes the models that book-keeping takes, and needs a second
    backward pass (`bench/dp_steps.py` measures both).
    """

    def __init__(self, task: Task, module: nn.Module, way: Callable[[nn.Module], Way] | None = None) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._task = task
        self._module = module
        self._loss = row_losses(task, module)
        self._way: Way = (way or (BookKeeping if BookKeeping.takes(module) else Hooks))(module)
        self._proved = False
        self._most_rows = 1

    @property
    def way(self) -> str:
        """Which one it is at the moment."""
        return type(self._way).__name__

    @property
    def most_rows(self) -> int:
        """How many rows fit into one physical batch; one, until something was computed."""
        return self._most_rows

    def __enter__(self) -> ClippedGradients:
        self._way.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._way.__exit__()

    def sums(self, batch: Any, rows: int, clip: float) -> Clipped:
        """One physical batch."""
        before = [(buffer, buffer._version) for buffer in self._module.buffers()]  # noqa: SLF001
        try:
            found = self._way.sums(self._loss, batch, rows, clip)
        except NotKept as error:
            found = self._otherwise(error, batch, rows, clip)
        self._require_still(before)
        self._most_rows = min(max(_KEPT_FLOATS * rows // max(found.kept_floats, 1), 1), _MOST_ROWS)
        return found

    def _otherwise(self, error: NotKept, batch: Any, rows: int, clip: float) -> Clipped:
        if isinstance(self._way, Hooks):
            raise TaskError(f"{self._task.name}: no gradient for each row by itself can be had: {error}") from None
        self._switch()
        return self.sums(batch, rows, clip)

    def _switch(self) -> None:
        self._way.__exit__()
        self._way = Hooks(self._module)
        self._proved = False
        self._way.__enter__()

    def _require_still(self, before: list[tuple[torch.Tensor, int]]) -> None:
        after = [(buffer, buffer._version) for buffer in self._module.buffers()]  # noqa: SLF001
        same = len(before) == len(after) and all(
            a is b and m == n for (a, m), (b, n) in zip(before, after, strict=True)
        )
        if not same:
            names = ", ".join(name for name, _ in self._module.named_buffers())
            raise TaskError(
                f"{self._task.name}: a pass changes one of the buffers ({names}), which no clip bounds and no noise "
                "covers; use layers without running statistics, as fedkit.privacy.fix does"
            )

    # -- the proof -----------------------------------------------------------------------------------------------------

    def prove(self, batch_of: Callable[[list[int]], Any], rows: int) -> None:
        """Compares the first rows in one batch with each of them alone; raises `TaskError` where they differ.

        Once it has shown something, it returns at once. To be called inside the context. A model, loss and collate
        function that treat each row by itself never fail, whatever the rows are, so that nothing about them comes out.
        Dropout is off meanwhile, and what a data set draws at random is the same for both.
        """
        if self._proved:
            return
        chosen = list(range(min(rows, _PROOF_ROWS)))
        batch_of(chosen[:1])  # a loader that starts may draw something
        with rng.seeded(0):
            single = [batch_of([row]) for row in chosen]
        with rng.seeded(0):
            together = batch_of(chosen)
        with _still(self._module):
            agrees = self._agree(single, together)
        if not agrees:
            raise TaskError(
                f"{self._task.name}: rows in one batch do not have the gradients that each has alone, so no clip "
                "bounds what one row can do. The loss must be the mean over the rows of a batch, no layer and no "
                "collate function may mix rows, and parameters must be used through their own layers"
            )

    def _agree(self, single: list[Any], together: Any) -> bool:
        with self._detached():
            expected = [self._alone(batch) for batch in single]
        if self._agrees(expected, together):
            return True
        if isinstance(self._way, BookKeeping):
            self._switch()
            return self._agrees(expected, together)
        return False

    @contextlib.contextmanager
    def _detached(self) -> Iterator[None]:
        self._way.__exit__()
        try:
            yield
        finally:
            self._way.__enter__()

    def _alone(self, batch: Any) -> list[torch.Tensor]:
        loss = self._task.mean_loss(self._module, batch)
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, grads, strict=True)]

    def _agrees(self, expected: list[list[torch.Tensor]], batch: Any) -> bool:
        found = self.sums(batch, len(expected), float("inf"))
        norms = torch.stack([_length(grads) for grads in expected])
        total = [torch.stack(grads).sum(0) for grads in zip(*expected, strict=True)]
        apart = _length([a - b for a, b in zip(found.sums, total, strict=True)])
        scale = float(norms.sum())
        if not 0.0 < scale < float("inf"):
            return True  # nothing follows from it, so the next rows are asked
        self._proved = max(float(apart), float((found.norms - norms).abs().max())) <= _TOLERANCE * scale
        return self._proved


def _length(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.linalg.vector_norm(tensor).double() for tensor in tensors]).square().sum().sqrt()


@contextlib.contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Modules without parameters of their own, as dropout, do as in evaluation; Opacus needs the others in training."""
    changed = [part for part in module.modules() if part.training and not _trains(part)]
    for part in changed:
        part.training = False
    try:
        yield
    finally:
        for part in changed:
            part.training = True
