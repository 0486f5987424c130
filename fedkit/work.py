"""What a client can be asked to do, and what it answers.

The questions are settings (`Fit`, `Gradient`, `Evaluate`, `Summarize`); the answers are values (`Update`, `MetricSums`,
`Summary`) that hold nothing but vectors and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedkit.config import PositiveFloat, PositiveInt, Settings
from fedkit.exam import Exam
from fedkit.gate import Gate
from fedkit.queries import Query, RowCount
from fedkit.weights import Vector, Weights

__all__ = [
    "Answer",
    "BatchSize",
    "Evaluate",
    "Fit",
    "Gradient",
    "MetricSums",
    "Parts",
    "Reply",
    "Steps",
    "Summarize",
    "Summary",
    "Update",
    "Work",
    "counts_rows",
]

BatchSize: TypeAlias = PositiveInt | Literal["all"]


class Fit(Settings):
    """Local training: passes over the client's data (`epochs`) or a number of optimiser steps (`steps`), never both.

    `lr` overrides the rate of the task's optimiser. `proximal` is FedProx's mu: the loss gains mu/2 ||w - received||²
    (Li et al. 2020, eq. 2). `control_variates` corrects each gradient by c - c_i (SCAFFOLD, Karimireddy et al. 2020).
    `mixed_precision` trains in bfloat16 autocast on CUDA and changes nothing elsewhere. From round `quantize_from` on,
    the model learns with the rounding of 8-bit weights and activations (quantisation-aware training,
    `fedkit.trainer.quantized`); what travels stays float32. `gate` is set by `Federation.hop`: what the received model
    must keep to before it is trained on.
    """

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    batch_size: BatchSize = 32
    lr: PositiveFloat | None = None
    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    control_variates: bool = False
    mixed_precision: bool = False
    quantize_from: PositiveInt | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        """One pass over the data, unless either is given."""
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1)

    def steps_on(self, rows: int) -> int:
        """How many steps it makes on so many rows: a pass has one a batch, of which the last may be short."""
        size = rows if self.batch_size == "all" else self.batch_size
        return self.steps or (self.epochs or 1) * -(-rows // max(size, 1))

    def quantizes_in(self, round: int) -> bool:
        """Whether 8-bit numbers are simulated in that round."""
        return self.quantize_from is not None and round >= self.quantize_from

    def replace(self, **changes: object) -> Fit:
        """The same work with `changes`; naming `steps` drops `epochs`, and the reverse."""
        if changes.get("steps") is not None:
            changes.setdefault("epochs", None)
        if changes.get("epochs") is not None:
            changes.setdefault("steps", None)
        return super().replace(**changes)


class Gradient(Settings):
    """One gradient of the mean loss at the received model, over one batch or all of the client's data."""

    batch_size: BatchSize = "all"


@dataclass(frozen=True, slots=True)
class Parts:
    """That a step's noise is whole numbers which the clients of one sum add in parts (`fedkit.privacy.skellam`).

    Of `cohort` clients `dropouts` may be missing and `colluders` may tell others their own parts: those of the rest,
    the `honest` ones, come to what is planned. A clip is `unit` steps of the grid long; `size` elements are added.
    """

    cohort: int
    dropouts: int
    colluders: int
    unit: float
    size: int

    @property
    def honest(self) -> int:
        """How many parts can be counted on."""
        return self.cohort - self.dropouts - self.colluders


@dataclass(frozen=True, slots=True)
class Steps:
    """`count` steps of a Poisson-sampled mechanism: each row takes part in one with probability `q`.

    Its noise is Gaussian, or where there are `parts` a sum of whole numbers.
    """

    noise_multiplier: float
    q: float
    count: int
    parts: Parts | None = None

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Steps:
        """What `to_dict` gave."""
        parts = fields.get("parts")
        return cls(**{**fields, "parts": None if parts is None else Parts(**parts)})


class Evaluate(Settings):
    """Loss and metrics of the received model on validation or test data, as sums; with `exam`, of its ONNX file."""

    split: Literal["valid", "test"] = "valid"
    batch_size: PositiveInt = 512
    exam: Exam | None = None


class Summarize(Settings):
    """One query about the client's training data, answered as sums."""

    query: Query


Work: TypeAlias = Fit | Gradient | Evaluate | Summarize


def counts_rows(work: Work) -> bool:
    """Whether only the number of rows is asked, which every mean over clients tells anyway."""
    return isinstance(work, Summarize) and isinstance(work.query, RowCount)


@dataclass(frozen=True, slots=True)
class Update:
    """What a `Fit` changed (trained minus received), the trained weights of a hop, or a gradient.

    `examples` is the number of training rows; `extra` holds the strategy's own named vectors; `loss` is the mean
    training loss, or None where the task's own loop reports none, or privacy forbids. `epsilon` is what the run has
    cost this client's data so far, by its own ledger, where the work was differentially private.
    """

    weights: Weights
    examples: int
    loss: float | None = None
    extra: Mapping[str, Vector] = field(default_factory=dict)
    epsilon: float | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each extra vector, without reading any that lies in a file."""
        known: Mapping[str, int] | None = getattr(self.extra, "sizes", None)
        return dict(known) if known is not None else {name: len(vector) for name, vector in self.extra.items()}

    @property
    def payload_bytes(self) -> int:
        """The size of the vectors."""
        return 4 * (self.weights.manifest.size + sum(self.sizes.values()))


@dataclass(frozen=True, slots=True)
class MetricSums:
    """Sums of metric states over `examples` rows: a float64 vector that only the task's metrics can read.

    `released` says that the client's own scores may be shown, not only the sum over clients.
    """

    vector: npt.NDArray[np.float64]
    examples: int
    released: bool = True

    @property
    def payload_bytes(self) -> int:
        """The size of the vector."""
        return self.vector.nbytes


@dataclass(frozen=True, slots=True)
class Summary:
    """The sums a query asked for, over `examples` rows: integers where the query is bounded, else float64."""

    vector: npt.NDArray[np.int64] | npt.NDArray[np.float64]
    examples: int

    @property
    def payload_bytes(self) -> int:
        """The size of the vector."""
        return self.vector.nbytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client says in one step of a masked sum; only `fedkit.crypto` can read it."""

    message: bytes = field(repr=False)
    examples: int = 0

    @property
    def payload_bytes(self) -> int:
        """The size of the message."""
        return len(self.message)


Answer: TypeAlias = Update | MetricSums | Summary | Reply
