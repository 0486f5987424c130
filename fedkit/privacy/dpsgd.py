"""DP-SGD at one client (Abadi et al. 2016): a Poisson sample, clipped gradients, their sum, noise, a step.

`PrivateSteps` says how; accounting and training read the same value, so that they cannot disagree. `NoisyGradients`
puts one noisy gradient after the other into a module.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from fedkit import rng
from fedkit.errors import ConfigError, IncompatibleStrategy, Reason, Refused
from fedkit.privacy.clipping import ClippedGradients
from fedkit.privacy.randomness import Randomness
from fedkit.task import Data
from fedkit.trainer.batches import batches
from fedkit.work import BatchSize, Fit, Gradient, Steps

__all__ = ["Done", "NoisyGradients", "PrivateSteps"]


@dataclass(frozen=True, slots=True)
class PrivateSteps:
    """`steps` steps of DP-SGD on a data set of `rows` rows.

    * `noise_multiplier`: standard deviation of the noise on the sum, in units of `max_grad_norm`
    * `max_grad_norm`: the longest a row's gradient may be, over all trainable parameters together
    * `batch_size`: how many rows a step takes on average; "all" takes every row
    * `rate`: instead, the probability with which a step takes each row. The sum itself leaves, with noise that clients
      share in it, and what it is divided by is the whole cohort's

    Raises `ConfigError` for numbers that mean nothing.
    """

    noise_multiplier: float
    max_grad_norm: float
    batch_size: BatchSize
    steps: int
    rows: int
    rate: float | None = None

    def __post_init__(self) -> None:
        """Checks each number by itself."""
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0.0):
            raise ConfigError(f"noise_multiplier must be a number from 0, got {self.noise_multiplier!r}")
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0.0):
            raise ConfigError(f"max_grad_norm must be a number above 0, got {self.max_grad_norm!r}")
        counts: dict[str, Any] = {"steps": self.steps, "rows": self.rows}
        if self.batch_size != "all":
            counts["batch_size"] = self.batch_size
        for name, value in counts.items():
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number from 1, got {value!r}")

    @classmethod
    def of(cls, work: Fit | Gradient, rows: int, *, noise_multiplier: float, max_grad_norm: float) -> PrivateSteps:
        """What `work` means on `rows` rows: an epoch is as many steps as there are batches in it, the last one full.

        Raises `IncompatibleStrategy` where the work cannot be done privately.
        """
        if isinstance(work, Gradient):
            return cls(noise_multiplier, max_grad_norm, work.batch_size, 1, rows)
        if work.gate is not None:
            raise IncompatibleStrategy("a gate sends what its site's own rows say of a model, which no noise covers")
        if work.mixed_precision:
            raise IncompatibleStrategy("mixed_precision measures gradients in bfloat16, too coarsely for a clip")
        if work.quantize_from is not None:
            raise IncompatibleStrategy("quantize_from ties each row's gradient to the ranges of its batch")
        return cls(noise_multiplier, max_grad_norm, work.batch_size, work.steps_on(rows), rows)

    @property
    def q(self) -> float:
        """With what probability each row takes part in a step."""
        if self.rate is not None:
            return self.rate
        return 1.0 if self.batch_size == "all" else min(self.batch_size / self.rows, 1.0)

    @property
    def expected_rows(self) -> float:
        """How many rows a step takes on average: what sums are divided by, whatever the sample is; 1 for sums."""
        if self.rate is not None:
            return 1.0
        return self.rows if self.batch_size == "all" else min(self.batch_size, self.rows)

    @property
    def cost(self) -> Steps:
        """What accounting has to know of it."""
        return Steps(self.noise_multiplier, self.q, self.steps)

    def require(self, work: Fit | Gradient, rows: int) -> None:
        """Raises `Refused` unless this is what `work` means on `rows` rows: nothing else was reserved."""
        meant = PrivateSteps.of(work, rows, noise_multiplier=self.noise_multiplier, max_grad_norm=self.max_grad_norm)
        for name in ("rows", "batch_size", "steps"):
            mine, theirs = getattr(self, name), getattr(meant, name)
            if mine != theirs:
                raise Refused(Reason.PRIVACY, f"planned for {name} {mine}, but the work has {name} {theirs}")


@dataclass
class Done:
    """What came of it, for the site's own report; it depends on the data, is not noised, and must never be sent.

    `steps` counts those that were begun, `sampled` the rows they drew, `clipped` those whose gradient was longer than
    the clip or not finite.
    """

    steps: int = 0
    sampled: int = 0
    clipped: int = 0


class NoisyGradients:
    """Private gradients of one task on one client's rows, as a context; `write` is one step's.

    Each step draws every row by itself with probability q, clips each drawn row's gradient to `max_grad_norm` over all
    trainable parameters together (also those that do not travel), adds the gradients up, adds Gaussian noise of
    `noise_multiplier * max_grad_norm` to every parameter, and divides by the expected number of rows. A step that draws
    nothing is a step like all others. Rows whose gradient is not finite contribute nothing.

    Guarantee: what is written is the Poisson-sampled Gaussian mechanism with `plan.cost`, for adding or removing one
    row, up to float32 error in the sums (1e-6 of the clip); the noise is drawn and added in float64. What is made of it
    without the data costs nothing more: an optimiser's momentum, FedProx's pull to the received model, SCAFFOLD's
    corrections, of which the client's own come from noisy updates alone. Sample, noise and dropout come from the
    operating system's randomness, and from no seed of the run.

    Does not protect against: what is sent beside the gradients (counts, metrics, verdicts); a state of the client that
    was made without noise; a `step` whose loss is a mean over something else than rows where the first rows do not show
    it, such as over words of rows of equal length; a patient with several rows; timing; the memory of this process.

    | input | what happens |
    |---|---|
    | no row drawn | noise alone |
    | batch_size above rows | every row, each step; divided by rows |
    | NaN or infinity in a row's gradient | the row is left out, and counts as clipped |
    | a layer that is not used | noise alone on its parameters |
    | a pass that changes a buffer, rows that depend on each other | `TaskError` |
    """

    def __init__(
        self, clipped: ClippedGradients, plan: PrivateSteps, data: Data, rows: Dataset[Any], device: torch.device
    ) -> None:
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"private training needs float64, which {device.type} does not have: use cpu or cuda")
        self.done = Done()
        self._clipped = clipped
        self._plan = plan
        self._random = Randomness()
        self._parameters = clipped.parameters
        self._queue: deque[torch.Tensor] = deque()
        self._batches = batches(data, rows, _asked(self._queue), device)

    def __enter__(self) -> NoisyGradients:
        self._clipped.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._clipped.__exit__()

    def write(self) -> None:
        """Samples, and leaves the noisy gradient in each trainable parameter's `grad`."""
        self._clipped.prove(lambda chosen: self._batch(torch.tensor(chosen)), self._plan.rows)
        self.done.steps += 1
        rng.seed_all(self._random.seed())  # dropout: known masks would tell rows apart by their place in the batch
        chosen = self._random.chosen(self._plan.rows, self._plan.q)
        self.done.sampled += len(chosen)
        totals: list[torch.Tensor] = []
        for index in torch.split(chosen, self._clipped.most_rows):
            if len(index):
                self._add(index, totals)
        self._finish(totals or [torch.zeros_like(p) for p in self._parameters])

    def _add(self, index: torch.Tensor, totals: list[torch.Tensor]) -> None:
        """Adds up the rows' clipped gradients, without those that are not finite."""
        found = self._clipped.sums(self._batch(index), len(index), self._plan.max_grad_norm)
        finite = found.norms.isfinite().cpu()
        if not bool(finite.all()):
            self.done.clipped += int((~finite).sum())
            if bool(finite.any()):
                self._add(index[finite], totals)
            return
        self.done.clipped += int((found.norms > self._plan.max_grad_norm).sum())
        if not totals:
            totals += [part.to(_wide(part)) for part in found.sums]
        else:
            for total, part in zip(totals, found.sums, strict=True):
                total += part

    def _finish(self, totals: list[torch.Tensor]) -> None:
        """Noise on all parameters at once, then the mean over the expected rows."""
        sizes = [total.numel() for total in totals]
        flat = torch.cat([total.reshape(-1) for total in totals])
        noise = self._random.normal(len(flat), flat.device)
        share = 1.0 / self._plan.expected_rows
        spread = self._plan.noise_multiplier * self._plan.max_grad_norm
        noisy = noise.mul_(share * spread).add_(flat.to(noise.device), alpha=share)
        for parameter, part in zip(self._parameters, torch.split(noisy.to(flat.dtype), sizes), strict=True):
            parameter.grad = part.view(parameter.shape).to(parameter.dtype)

    def _batch(self, index: torch.Tensor) -> Any:
        self._queue.append(index)
        return next(self._batches)


def _asked(queue: deque[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What has been put there; it holds nothing that holds it, so that the data goes with the work."""
    while True:
        yield queue.popleft()


def _wide(part: torch.Tensor) -> torch.dtype:
    return torch.float64 if part.dtype == torch.float64 else torch.float32
