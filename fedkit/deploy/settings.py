"""How a finished model is handed over: what is tried, where ranges come from, and what a variant must keep to."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from fedkit.config import Criterion, NotNegative, PositiveFloat, Settings
from fedkit.exam import VARIANTS, Variant
from fedkit.ranges import Rows

__all__ = ["Export", "Limits", "Method", "Quantize"]

Method: TypeAlias = Literal["mean", "clipped", "noise"]
Quantize: TypeAlias = Literal["auto", "none", "int8", "int8-dynamic", "fp16"]


class Limits(Settings):
    """What a variant must keep to, to be shipped instead of float32.

    `size`: its file over that of fp32. `cpu`: the CPU time of one call over that of fp32, at each batch size.
    `agreement`: the share of validation rows on which it must answer as PyTorch does. `drop`: by how much the deciding
    metric may be worse than that of fp32, in the metric's own unit: 0.005 of accuracy is half a point.
    """

    size: PositiveFloat = 0.7
    cpu: PositiveFloat = 1.0
    agreement: Annotated[float, Field(ge=0, le=1)] = 0.99
    drop: NotNegative = 0.005


class Export(Settings):
    """`[export]` of a run file: how a finished model is handed over.

    * `quantize`: "auto" tries "int8", "int8-dynamic" and "fp16", and ships the fastest that passes the gate, else
      float32; a variant's own name tries that one, "none" nothing.
    * `calibration`: where int8 has its ranges from: "mean" or "clipped" of the clients' training rows
      (`fedkit.ranges.Ranges`; up to `rows` at each), or "noise": standard normal inputs, no data. None: "mean", or
      "noise" where the run is differentially private and `epsilon` is not given.
    * `epsilon`: what the answer may cost each row, on top of the run; the ranges are noised then, and each client's
      ledger has it.
    * `criterion`: the metric that decides, as in "accuracy:max". None: that of the run's best round, else accuracy
      where the task has it, else the loss.
    """

    quantize: Quantize = "auto"
    calibration: Method | None = None
    rows: Rows = 512
    epsilon: PositiveFloat | None = None
    criterion: Criterion | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        """Noise hides single rows only where there is an answer to hide them in."""
        if self.epsilon is not None and self.calibration in ("clipped", "noise"):
            raise ValueError(f"epsilon is for calibration 'mean', not for {self.calibration!r}")

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What is tried."""
        if self.quantize == "none":
            return ()
        return tuple(one for one in VARIANTS if one == self.quantize or (self.quantize == "auto" and one != "fp32"))
