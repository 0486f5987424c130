"""Attacks on a site's own private training, to be set beside what it claims. What they find is a lower bound.

They go the way of a site's work: its plan, its trainer, its clip, its noise. Nothing of it is sent or written down, and
no ledger is charged; yet what they find depends on the rows without noise, and is for the site's own eyes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit
from scipy.stats import mannwhitneyu
from torch import nn
from torch.utils.data import Dataset

from fedkit.errors import DataError
from fedkit.privacy.dpsgd import PrivateSteps
from fedkit.privacy.onerun import Bound, bound_of
from fedkit.privacy.randomness import Randomness
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.task import Data, Task
from fedkit.trainer.batches import batches, row_count, subset
from fedkit.trainer.trainer import Trainer, Watch
from fedkit.weights import Weights
from fedkit.work import Fit, Gradient, Update, Work

__all__ = ["Inversion", "Members", "Membership", "allowed_advantage", "canaries", "inversion", "membership"]

_LOUD = 100.0  # the length of a canary's gradient before it is clipped, in clips
_FEWEST_ROWS = 20
_RECOVERED = 0.01  # of a row's length: as near as this it is recovered
_CPU = torch.device("cpu")


# -- canaries ----------------------------------------------------------------------------------------------------------


def canaries(plan: PrivateSteps, delta: float, watch: Watch | None = None) -> Bound:
    """Hides `plan.rows` canaries in one piece of private work, each if its coin falls so, and guesses who was there.

    A canary's gradient has a direction of its own and is a hundred clips long; it is zero, as if there were no row,
    where the coin says so. Orthogonal canaries of the full length are the worst case of the mechanism: what a step of
    the plan does to them it does to any row at most. Guesses go by the update that a site would send: the sum of all
    its steps' noisy gradients, which says all there is to know where every row takes part in each step. With sampling
    (q below 1) a single run shows far less than there may be.

    Finds: noise that is left out or several times too small, a clip that does not hold, steps that accounting forgets.
    Does not prove the claim.
    """
    included = _tossed(plan.rows)
    task = _canary_task(included, plan.max_grad_norm)
    work = Fit(steps=plan.steps, batch_size=plan.batch_size, lr=1.0)
    trainer = Trainer(task, 0, device="cpu", watch=watch)
    sent = _sent(trainer, work, "audit", Weights.from_module(task.build(0)), plan)
    return bound_of(sent.vector, included.numpy(), delta)


def _canary_task(included: torch.Tensor, clip: float) -> Task:
    """Row i is the i-th unit vector, and its loss falls along the i-th weight, by nothing where it is not included."""
    loudness = included.float() * _LOUD * clip
    return Task(
        name="canaries",
        model=lambda: _silent(nn.Linear(len(included), 1, bias=False)),
        data=lambda _: Data(train=(torch.eye(len(included)), loudness)),
        loss=lambda outputs, loudness: -(outputs[:, 0] * loudness).mean(),
    )


def _silent(module: nn.Linear) -> nn.Linear:
    nn.init.zeros_(module.weight)
    return module


def _tossed(count: int) -> torch.Tensor:
    """A fair coin for each, from the operating system's randomness."""
    coins = torch.zeros(count, dtype=torch.bool)
    coins[Randomness().chosen(count, 0.5)] = True
    return coins


def _sent(trainer: Trainer, work: Work, client: str, model: Weights, plan: PrivateSteps | None) -> Weights:
    """What a client sends for this work."""
    asked = Assignment("audit", "audit", 0, 1, client, work, "update")
    answer = trainer.perform(asked, Parcel(model), {}, plan)[0]
    assert isinstance(answer, Update)  # the answer to Fit and Gradient
    return answer.weights


# -- membership --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Members:
    """Training rows of one client, and a coin for each [rows, bool] that says whether it is trained on.

    The coin makes those that are and those that are not alike in all but the training, which a task's test rows need
    not be. How many are trained on counts as known.
    """

    task: Task
    data: Data
    rows: Dataset[Any]
    coins: torch.Tensor

    @classmethod
    def of(cls, task: Task, client: str, most: int) -> Members:
        """The client's training rows, of which `most` are drawn where there are more.

        Raises `DataError` where there are too few for an audit.
        """
        data = task.data(client)
        count = row_count(data.train)
        if count < _FEWEST_ROWS:
            raise DataError(f"{client} has {count} training rows; an audit needs {_FEWEST_ROWS} or more")
        drawn = torch.argsort(Randomness().normal(count))[:most].sort().values
        coins = _tossed(len(drawn))
        coins[0], coins[-1] = (True, False) if coins.all() or not coins.any() else (coins[0], coins[-1])
        return cls(task, data, subset(data.train, drawn), coins)

    @property
    def training(self) -> Task:
        """The task with the rows that are trained on, and no others."""
        picked = Data(train=subset(self.rows, self.coins.nonzero().reshape(-1)), collate=self.data.collate)
        return dataclasses.replace(self.task, data=lambda _: picked, metrics={})


@dataclass(frozen=True, slots=True)
class Membership:
    """How well a row's loss tells whether it was trained on.

    `auc` is the chance that a row of the training has less loss than one that was left out; `advantage` the share of
    the training's rows that have no more than its mean loss, minus that share of the others (Yeom et al. 2018); `bound`
    what the rows as canaries show of epsilon.
    """

    rows: int
    trained_on: int
    auc: float
    advantage: float
    bound: Bound


def membership(members: Members, module: nn.Module, delta: float) -> Membership:
    """Guesses from each row's loss in `module`, which `members.training` has made, whether it was trained on."""
    losses, included = _losses(members, module), members.coins.numpy()
    inside, outside = losses[included], losses[~included]
    auc = float(mannwhitneyu(outside, inside).statistic) / (len(inside) * len(outside))
    usual = float(inside.mean())
    advantage = float((inside <= usual).mean() - (outside <= usual).mean())
    return Membership(len(losses), len(inside), auc, advantage, bound_of(-losses, included, delta))


def _losses(members: Members, module: nn.Module) -> npt.NDArray[np.float64]:
    """The loss of each row [rows]; infinite where it is not a number."""
    module.eval()
    with torch.inference_mode():
        single = _one_by_one(members.data, members.rows)
        losses = torch.tensor([float(members.task.mean_loss(module, batch)) for batch in single], dtype=torch.float64)
    found: npt.NDArray[np.float64] = losses.nan_to_num(nan=math.inf, posinf=math.inf).numpy()
    return found


def _one_by_one(data: Data, rows: Dataset[Any]) -> Iterator[Any]:
    return batches(data, rows, iter(torch.split(torch.arange(row_count(rows)), 1)), _CPU)


def allowed_advantage(epsilon: float, delta: float) -> float:
    """The most that anybody can be better than guessing under (epsilon, delta): true minus false positive rate.

    (e^epsilon - 1 + 2 delta) / (e^epsilon + 1), of Kairouz, Oh and Viswanath 2015.
    """
    return math.tanh(epsilon / 2.0) + 2.0 * delta * float(expit(-epsilon))


# -- gradient inversion ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inversion:
    """How many of `rows` rows could be read off the gradient of a batch of one: from a plain one, and a private one.

    `layer` is the one whose inputs are read; None where no linear layer has a bias, so that nothing was tried.
    """

    layer: str | None
    rows: int
    recovered: int
    recovered_private: int


def inversion(members: Members, module: nn.Module, private: PrivateSteps, most: int = 20) -> Inversion:
    """Reads up to `most` rows off the gradients of the first linear layer of `module`.

    For y = W x + b, the gradient of W is the outer product of b's and x: any of its rows over that of b is x (Phong et
    al. 2017). Recovered is what is within 1 % of x. `private` gives noise and clip.

    A smoke test: far less noise than any promise needs is enough to pass it.
    """
    layer = _first_linear(module)
    if layer is None:
        return Inversion(None, 0, 0, 0)
    picked = (subset(members.rows, torch.tensor([row])) for row in range(min(most, row_count(members.rows))))
    single = {str(row): Data(train=one, collate=members.data.collate) for row, one in enumerate(picked)}
    task = dataclasses.replace(members.task, data=single.__getitem__, exchange=None)
    trainer, model = Trainer(task, 0, device="cpu"), Weights.from_module(module)
    plan = PrivateSteps(private.noise_multiplier, private.max_grad_norm, 1, 1, 1)
    near = []
    for client, one in single.items():
        truth = _input_of(task, module, layer, next(_one_by_one(one, one.train)))
        sent = (_sent(trainer, Gradient(batch_size=1), client, model, how) for how in (None, plan))
        near.append([_is_near(_read_off(gradient, layer), truth) for gradient in sent])
    plain, noisy = (sum(column) for column in zip(*near, strict=True))
    return Inversion(layer, len(single), plain, noisy)


def _first_linear(module: nn.Module) -> str | None:
    """The name of the first trainable linear layer with a bias."""
    named: dict[str, nn.Module] = dict(module.named_modules())
    return next((name for name, layer in named.items() if isinstance(layer, nn.Linear) and _gives_away(layer)), None)


def _gives_away(layer: nn.Linear) -> bool:
    return layer.bias is not None and layer.weight.requires_grad and layer.bias.requires_grad


def _input_of(task: Task, module: nn.Module, layer: str, batch: Any) -> npt.NDArray[np.float64]:
    """What the layer is given in a pass of one row, flat."""
    seen: list[torch.Tensor] = []
    handle = module.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with handle, torch.no_grad():
        task.mean_loss(module, batch)
    return torch.cat(seen).double().reshape(-1).numpy() if seen else np.zeros(0)


def _read_off(gradient: Weights, layer: str) -> npt.NDArray[np.float64]:
    """By the output whose bias has the largest gradient."""
    prefix = f"{layer}." if layer else ""
    weight, bias = (gradient[prefix + name].astype(np.float64) for name in ("weight", "bias"))
    loudest = int(np.argmax(np.abs(bias)))
    found: npt.NDArray[np.float64] = weight[loudest] / (bias[loudest] or np.nan)
    return found


def _is_near(found: npt.NDArray[np.float64], truth: npt.NDArray[np.float64]) -> bool:
    """Whether it is the row; a layer that sees several inputs a row gives none of them away so simply."""
    if found.shape != truth.shape or not truth.any():
        return False
    return bool(np.linalg.norm(found - truth) <= _RECOVERED * np.linalg.norm(truth))
