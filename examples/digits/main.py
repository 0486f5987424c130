"""Handwritten digits over clients that each know only a few of them: FedAvg against SCAFFOLD at equal rounds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from sklearn.datasets import load_digits
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import fedkit
from fedkit.simulation import splits
from fedkit.strategies import FedAvg, Scaffold

CLASSES = 10
CLIENTS = [f"client-{i}" for i in range(10)]
LOCAL = fedkit.Fit(epochs=4, batch_size=32, lr=0.1)  # the same for both strategies
ROUNDS = 10


def model() -> nn.Module:
    """A small CNN for 8 x 8 grey pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, CLASSES),
    )


def deal(alpha: float, clients: Sequence[str], seed: int) -> dict[str, fedkit.Data]:
    """Each client's rows; a fifth of all is test data, dealt out evenly, so that its pool has no skew."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = (pixels[order] / 16).reshape(-1, 1, 8, 8), labels[order]
    held = len(labels) // 5
    train = splits.dirichlet(labels[held:], clients, alpha, seed, equal_sizes=True)
    test = splits.iid(held, clients, seed)
    return {
        name: fedkit.Data(
            train=(images[held:][train[name]], labels[held:][train[name]]),
            test=(images[test[name]], labels[test[name]]),
        )
        for name in clients
    }


def task(alpha: float = 0.1, clients: Sequence[str] = CLIENTS, seed: int = 0) -> fedkit.Task:
    """Digits over `clients` with label skew."""
    return fedkit.Task(
        name="digits",
        model=model,
        data=deal(alpha, clients, seed).__getitem__,
        loss=nn.CrossEntropyLoss(),
        metrics={"accuracy": lambda: MulticlassAccuracy(CLASSES, average="micro")},
        inputs={"image": fedkit.Tensor("float32", (1, 8, 8))},
        outputs=["digit"],
    )


def compare(alpha: float, rounds: int, seed: int) -> tuple[float, float]:
    """Test accuracy of FedAvg and of SCAFFOLD, from the same start and with the same local work."""
    digits = task(alpha, CLIENTS, seed)
    strategies = FedAvg(rounds=rounds, local=LOCAL), Scaffold(rounds=rounds, local=LOCAL)
    fedavg, scaffold = (fedkit.simulate(digits, strategy, clients=CLIENTS, seed=seed).test for strategy in strategies)
    return fedavg["accuracy"], scaffold["accuracy"]


def table(alpha: float, rounds: int, seeds: int) -> None:
    """Prints one line a seed, and the mean."""
    print(f"{len(CLIENTS)} clients, alpha {alpha:g}, {rounds} rounds: test accuracy")
    print("seed  FedAvg  Scaffold")
    rows = []
    for seed in range(seeds):
        rows.append(compare(alpha, rounds, seed))
        print(f"{seed:4}  {rows[-1][0]:6.3f}  {rows[-1][1]:8.3f}", flush=True)
    if len(rows) > 1:
        fedavg, scaffold = np.mean(rows, axis=0)
        print(f"mean  {fedavg:6.3f}  {scaffold:8.3f}")


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alpha", type=float, default=0.1, help="label skew: 0.1 is strong, 100 is none")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run, from 0")
    arguments = parser.parse_args()
    try:
        table(arguments.alpha, arguments.rounds, arguments.seeds)
    except fedkit.FedkitError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
