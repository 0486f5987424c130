"""The demo's comparison: each hospital alone, all rows pooled, and the five strategies, on the same test rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import TensorDataset

from fedkit.config import DP, Evaluation, Privacy
from fedkit.crypto.box import Owner
from fedkit.demo.heart import HOSPITALS, load, task
from fedkit.errors import ConfigError
from fedkit.remote import Coordinator
from fedkit.result import Result
from fedkit.rounds.journal import RoundRecord
from fedkit.simulation import simulate
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedSGD, SingleWeightTransfer, StochasticWeightTransfer
from fedkit.strategy import Strategy
from fedkit.task import Data
from fedkit.work import Fit

__all__ = [
    "ALONE",
    "DELTA",
    "EPSILONS",
    "POOLED",
    "PRIVATE",
    "SHOWN_EPSILON",
    "STRATEGIES",
    "Row",
    "alone",
    "pick",
    "pooled",
    "private",
    "private_accuracy",
    "row",
    "train",
]

ALONE = "Each hospital alone"
POOLED = "All rows pooled"
_POOL = "pool"


def _fit(lr: float, steps: int = 100) -> Fit:
    return Fit(steps=steps, batch_size=4, lr=lr)


STRATEGIES: dict[str, Strategy] = {
    "FedAvg": FedAvg(rounds=15, local=_fit(0.003)),
    "FedSGD": FedSGD(rounds=1500, lr=0.1),
    "CyclicWeightTransfer": CyclicWeightTransfer(rounds=15, local=_fit(0.001)),
    "SingleWeightTransfer": SingleWeightTransfer(local=_fit(0.001, steps=1500)),
    "StochasticWeightTransfer": StochasticWeightTransfer(rounds=20, clients_per_round=3, local=_fit(0.001)),
}


SHOWN_EPSILON = 3.0
EPSILONS = (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)
DELTA = 1e-3  # at most one over the rows of the smallest hospital, which has 30
PRIVATE: dict[str, Strategy] = {
    "FedAvg": FedAvg(rounds=20, local=Fit(steps=5, batch_size=64, lr=0.4)),
    "CyclicWeightTransfer": CyclicWeightTransfer(rounds=20, local=Fit(epochs=1, batch_size=32, lr=0.2)),
}
CLIPS = {"FedAvg": 1.0, "CyclicWeightTransfer": 0.5}  # a hop carries the noise of one site alone


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the comparison: accuracy over all test rows, and at each hospital."""

    name: str
    accuracy: float
    per_hospital: dict[str, float]


def pick(names: Sequence[str]) -> dict[str, Strategy]:
    """The demo's strategies of these names, or all; raises `ConfigError` for others."""
    unknown = sorted(set(names) - STRATEGIES.keys())
    if unknown:
        raise ConfigError(f"the demo has no strategy {unknown[0]!r}; it compares {', '.join(STRATEGIES)}")
    return {name: strategy for name, strategy in STRATEGIES.items() if not names or name in names}


def train(
    strategy: Strategy,
    seed: int,
    on_round: Callable[[RoundRecord], None] | None = None,
    coordinator: Coordinator | None = None,
    privacy: Privacy = Privacy(),
    owner: Owner | None = None,
) -> Result:
    """One strategy over the four hospitals, scored on validation rows about fifteen times on the way.

    The hospitals are those that attend `coordinator`, or simulated ones; the result has the same bits.
    """
    evaluate = Evaluation(every=max(strategy.rounds // 15, 1), best="loss:min")
    if coordinator is None:
        return simulate(
            task,
            strategy,
            clients=HOSPITALS,
            seed=seed,
            evaluate=evaluate,
            privacy=privacy,
            threads=1,
            progress=False,
            on_round=on_round,
        )
    return coordinator.run(
        task,
        strategy,
        seed=seed,
        evaluate=evaluate,
        privacy=privacy,
        min_clients=len(HOSPITALS),
        owner=owner,
        progress=False,
        on_round=on_round,
    )


def private(name: str, epsilon: float) -> Privacy:
    """Example-level privacy of one of `PRIVATE` at every hospital, its statistics for standardisation included."""
    return Privacy(dp=DP(epsilon=epsilon, delta=DELTA, max_grad_norm=CLIPS[name]))


def private_accuracy(name: str, epsilon: float | None, seeds: Sequence[int]) -> list[float]:
    """Accuracy over all test rows of one of `PRIVATE`, simulated with each seed; without privacy where it is None."""
    rule = Privacy() if epsilon is None else private(name, epsilon)
    runs = (
        simulate(task, PRIVATE[name], clients=HOSPITALS, seed=seed, privacy=rule, threads=1, progress=False)
        for seed in seeds
    )
    return [result.test["accuracy"] for result in runs]


def row(name: str, result: Result) -> Row:
    """A strategy's line."""
    each = {hospital: scores["accuracy"] for hospital, scores in result.test_per_client.items()}
    return Row(name, result.test["accuracy"], each)


def alone(seed: int) -> Row:
    """Each hospital trains by itself, with its own standardisation, and is scored on its own test rows."""
    strategy = STRATEGIES["FedAvg"]
    each = {}
    for hospital in HOSPITALS:
        result = simulate(task, strategy, clients=[hospital], seed=seed, threads=1, progress=False)
        each[hospital] = result.test["accuracy"]
    return Row(ALONE, _over_all(each), each)


def pooled(seed: int) -> Row:
    """What nobody may do here: all rows in one place, as many steps as the four hospitals make together."""
    strategy = FedAvg(rounds=15, local=_fit(0.003, steps=400))
    result = simulate(
        dataclasses.replace(task, data=_pool), strategy, clients=[_POOL], seed=seed, threads=1, progress=False
    )
    each = {hospital: _accuracy(result, hospital) for hospital in HOSPITALS}
    return Row(POOLED, _over_all(each), each)


def _columns(hospital: str, split: str) -> tuple[torch.Tensor, ...]:
    rows = getattr(load(hospital), split)
    assert isinstance(rows, TensorDataset)  # heart.load makes nothing else
    return rows.tensors


def _pool(client: str) -> Data:
    assert client == _POOL
    parts = {
        split: zip(*(_columns(hospital, split) for hospital in HOSPITALS), strict=True) for split in ("train", "test")
    }
    joined = {split: tuple(torch.cat(columns) for columns in both) for split, both in parts.items()}
    return Data(train=joined["train"], test=joined["test"])


def _accuracy(result: Result, hospital: str) -> float:
    features, labels = _columns(hospital, "test")
    with torch.inference_mode():
        return float(((result.model(features) > 0) == (labels > 0.5)).double().mean())


def _over_all(each: dict[str, float]) -> float:
    counts = [len(_columns(hospital, "test")[0]) for hospital in each]
    return float(np.average(list(each.values()), weights=counts))
