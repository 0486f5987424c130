"""What is learned: the model, the data at each client, the loss, the metrics.

A `Task` is written once and used everywhere: in simulation, at an agent, at the coordinator, at export. Its `data` is
called only where the data is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fedkit import rng
from fedkit.errors import DataError, TaskError
from fedkit.queries import Bounds, Moments, MomentsResult
from fedkit.weights import Exchange, Vector
from fedkit.work import Fit

__all__ = ["Data", "Prepared", "Site", "Standardize", "StandardizeLayer", "Task", "Tensor"]

Rows: TypeAlias = Dataset[Any] | Sequence[Any]
MetricFactory: TypeAlias = Callable[[], Any]  # returns a torchmetrics.Metric; the library is loaded when one is made


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input of the model without its batch dimension; a dimension of None may vary."""

    dtype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        """Refuses a dtype that torch does not have."""
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise TaskError(f"Tensor: {self.dtype!r} is not a torch dtype, such as 'float32' or 'int64'")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


class Data:
    """One client's rows: each of `train`, `test`, `valid` is a torch `Dataset`, a tuple of columns, or a list of rows.

    Columns are arrays or tensors of equal length; float64 ones become float32, which models expect. Rows in a list are
    dicts or tuples, made into batches by `collate` (torch's default where it is None).

    Without `valid`, a seeded tenth of `train` is set aside in runs that evaluate, and only there. `groups` names a
    group per test row, for fairness reports.
    """

    def __init__(
        self,
        train: Rows,
        test: Rows | None = None,
        valid: Rows | None = None,
        groups: Sequence[Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.train = _dataset(train, "train")
        self.test = None if test is None else _dataset(test, "test")
        self.valid = None if valid is None else _dataset(valid, "valid")
        self.groups = groups
        self.collate = collate


class _Listed(Dataset[Any]):
    """Rows of a list."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]


def _column(values: Any) -> torch.Tensor:
    column = torch.as_tensor(values)
    return column.float() if column.dtype == torch.float64 else column


def _dataset(rows: Rows, name: str) -> Dataset[Any]:
    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, list) and all(isinstance(row, dict | tuple) for row in rows):
        return _Listed(rows)
    if hasattr(rows, "shape"):
        raise DataError(f"{name}: expected a tuple of columns, got one array; give (features, targets)")
    try:
        tensors = [_column(column) for column in rows]
        lengths = {len(column) for column in tensors}
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}: expected a torch Dataset or a tuple of arrays: {error}") from None
    if len(lengths) != 1:
        raise DataError(f"{name}: columns have different lengths: {[len(column) for column in tensors]}")
    return TensorDataset(*tensors)


class Standardize:
    """Federated preprocessing: features minus their mean over all clients, divided by their standard deviation.

    The statistics are asked of each client once per run and become the first layer of the model, so that the exported
    model takes raw inputs. `bounds` are public (low, high) limits, one a feature.
    """

    def __init__(self, bounds: Bounds | None = None) -> None:
        self.query = Moments(bounds=bounds)

    def layer(self, task: Task) -> StandardizeLayer:
        """The layer before anything is known: it changes nothing."""
        shape = task.feature_shape
        if self.query.bounds is not None and len(self.query.bounds) != math.prod(shape):
            count = len(self.query.bounds)
            raise TaskError(f"{task.name}: {count} bounds are declared for {math.prod(shape)} features")
        return StandardizeLayer(shape)


class StandardizeLayer(nn.Module):
    """(x - mean) / scale per feature; `mean` and `scale` are buffers that travel with the model."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(*shape))
        self.register_buffer("scale", torch.ones(*shape))

    def set(self, moments: MomentsResult) -> None:
        """Takes the statistics; a feature that never varies is only centred."""
        std = np.where(moments.std > 1e-12, moments.std, 1.0)
        self.mean.copy_(torch.from_numpy(moments.mean).view_as(self.mean))
        self.scale.copy_(torch.from_numpy(std).view_as(self.scale))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Standardised features, shaped as they came."""
        return (features - self.mean) / self.scale


class Prepared(nn.Module):
    """A model behind its preprocessing, as it is trained, evaluated and exported."""

    def __init__(self, prepare: StandardizeLayer, model: nn.Module) -> None:
        super().__init__()
        self.prepare = prepare
        self.model = model

    def forward(self, features: torch.Tensor) -> Any:
        """The model's outputs for raw features."""
        return self.model(self.prepare(features))


class Site(Protocol):
    """What a task's own `train` loop sees of the client it runs at."""

    client: str
    round: int
    fit: Fit
    device: torch.device
    state: MutableMapping[str, npt.NDArray[Any]]
    received: Mapping[str, Vector]

    def send(self, name: str, vector: npt.ArrayLike) -> None:
        """Hands a named float32 vector back along with the update."""
        ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to learn. Exactly one of `loss`, `step` and `train` says how.

    * `model()` makes a fresh `nn.Module`; `data(client)` loads one client's `Data`.
    * `loss(outputs, targets)` is mean-reduced, for rows that are (features, targets).
    * `step(model, batch)` returns the mean loss of any other batch; `predict(model, batch)` the (outputs, targets) that
      metrics see. Without `predict`, binary metrics see the sigmoid of what goes into `BCEWithLogitsLoss`.
    * `train(model, batches, site)` replaces the local loop and may return the mean loss.
    * `exchange(name)` says which parameters travel; the others stay, and are kept, at each client.
    * `metrics` are torchmetrics factories; `inputs` and `outputs` name what the exported model takes and gives.

    Raises `TaskError` at construction where these do not fit together.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[str], Data]
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    metrics: Mapping[str, MetricFactory] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Sequence[str] = ("output",)
    prepare: Standardize | None = None
    step: Callable[[nn.Module, Any], torch.Tensor] | None = None
    predict: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None
    train: Callable[[nn.Module, Iterable[Any], Site], float | None] | None = None
    exchange: Exchange | None = None

    def __post_init__(self) -> None:
        """Names what is missing or contradictory."""
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise TaskError(f"a task's name is letters, digits, '-' and '_', got {self.name!r}")
        self._check_factories()
        self._check_learning()
        if self.prepare is not None:
            self.prepare.layer(self)

    def _check_factories(self) -> None:
        for name, kind in (("model", "a module"), ("data", "the data")):
            if not callable(getattr(self, name)) or isinstance(getattr(self, name), nn.Module):
                raise TaskError(f"{self.name}: {name} must be a function that makes {kind}, not {kind} itself")
        for name, factory in self.metrics.items():
            if not callable(factory) or isinstance(factory, nn.Module):
                raise TaskError(f"{self.name}: metric {name!r} must be a function that makes it: lambda: Metric(...)")

    def _check_learning(self) -> None:
        if self.loss is not None and self.step is not None:
            raise TaskError(f"{self.name}: give loss (for (features, targets) rows) or step (for any batch), not both")
        if self.loss is None and self.step is None and self.train is None:
            raise TaskError(f"{self.name}: give loss, step or train; nothing says how to learn")
        if self.metrics and self.predict is None and self.loss is None:
            raise TaskError(f"{self.name}: metrics need predict(model, batch) -> (outputs, targets)")

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of one row of the first input; raises `TaskError` where it is not declared in full."""
        first = next(iter(self.inputs.values()), None)
        if first is None or None in first.shape:
            raise TaskError(f'{self.name}: prepare needs inputs={{"features": fedkit.Tensor("float32", (count,))}}')
        return tuple(dim for dim in first.shape if dim is not None)

    def build(self, seed: int) -> nn.Module:
        """A freshly initialised module, preprocessing included; equal seeds give equal values."""
        with rng.seeded(rng.seed_for(seed, "init")):
            model = self.model()
        if not isinstance(model, nn.Module):
            raise TaskError(f"{self.name}: model() must return a torch.nn.Module, got {type(model).__name__}")
        return model if self.prepare is None else Prepared(self.prepare.layer(self), model)

    def travels(self, name: str) -> bool:
        """Whether the tensor `name` of the built module is exchanged."""
        if self.exchange is None or (self.prepare is not None and name.startswith("prepare.")):
            return True
        return bool(self.exchange(name.removeprefix("model.") if self.prepare is not None else name))

    def mean_loss(self, module: nn.Module, batch: Any) -> torch.Tensor:
        """The mean loss of one batch, by `step` or by `loss`."""
        return self.scored(module, batch, with_outputs=False)[0]

    def scored(self, module: nn.Module, batch: Any, *, with_outputs: bool) -> tuple[torch.Tensor, Any, Any]:
        """(mean loss, outputs, targets) of one batch; the latter by `predict` where it is given."""
        outputs = targets = None
        if self.step is not None:
            loss = self.step(module, batch)
        elif self.loss is not None:
            features, targets = self.columns(batch)
            outputs = module(features)
            loss = self.loss(outputs, targets)
        elif with_outputs and self.predict is not None:
            loss = torch.zeros(())  # is not counted
        else:
            raise TaskError(f"{self.name}: this work needs loss or step, the task has only its own train loop")
        if with_outputs and self.predict is not None:
            outputs, targets = self.predict(module, batch)
        return loss, outputs, targets

    @property
    def gives_logits(self) -> bool:
        """Whether metrics see raw outputs of which the loss takes the sigmoid itself."""
        return isinstance(self.loss, nn.BCEWithLogitsLoss) and self.predict is None

    def columns(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(features, targets) of a batch; raises `DataError` for any other kind of batch."""
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            kind = type(batch).__name__
            raise DataError(f"{self.name}: expected batches of (features, targets), got {kind}; give step and predict")
        return batch[0], batch[1]

    def scores(self) -> bool:
        """Whether clients can evaluate this task."""
        return self.loss is not None or self.step is not None or bool(self.metrics and self.predict)
