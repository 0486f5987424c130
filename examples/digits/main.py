"""Handwritten digits over clients that each know only a few of them: FedAvg against SCAFFOLD at equal rounds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import fedkit
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


def split(labels: npt.NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator) -> list[list[int]]:
    """Equally many rows for each client, in class shares drawn from Dirichlet(alpha) (Hsu et al. 2019).

    A small alpha gives each client few classes, a large one all of them.
    """
    pools = [rng.permutation(np.flatnonzero(labels == label)).tolist() for label in range(CLASSES)]
    parts: list[list[int]] = []
    for _ in range(clients):
        shares = rng.dirichlet([alpha] * CLASSES) + 1e-12  # no share is 0, so that only an empty pool ends a class
        part = []
        for _ in range(len(labels) // clients):
            open_shares = shares * [len(pool) > 0 for pool in pools]
            part.append(pools[rng.choice(CLASSES, p=open_shares / open_shares.sum())].pop())
        parts.append(part)
    return parts


def deal(alpha: float, clients: Sequence[str], seed: int) -> dict[str, fedkit.Data]:
    """Each client's rows; a fifth of all is test data, dealt out evenly, so that its pool has no skew."""
    rng = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    images, labels = (pixels[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels[order]
    held = len(labels) // 5
    parts = split(labels[held:], len(clients), alpha, rng)
    return {
        name: fedkit.Data(
            train=(images[held:][part], labels[held:][part]),
            test=(images[place : held : len(clients)], labels[place : held : len(clients)]),
        )
        for place, (name, part) in enumerate(zip(clients, parts, strict=True))
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


def main() -> None:
    """Prints one line a seed, and the mean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alpha", type=float, default=0.1, help="label skew: 0.1 is strong, 100 is none")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run, from 0")
    arguments = parser.parse_args()
    if arguments.alpha <= 0 or arguments.rounds < 1 or arguments.seeds < 1:
        parser.error("--alpha must be above 0, --rounds and --seeds 1 or more")
    print(f"{len(CLIENTS)} clients, alpha {arguments.alpha:g}, {arguments.rounds} rounds: test accuracy")
    print("seed  FedAvg  Scaffold")
    rows = []
    for seed in range(arguments.seeds):
        rows.append(compare(arguments.alpha, arguments.rounds, seed))
        print(f"{seed:4}  {rows[-1][0]:6.3f}  {rows[-1][1]:8.3f}", flush=True)
    if len(rows) > 1:
        fedavg, scaffold = np.mean(rows, axis=0)
        print(f"mean  {fedavg:6.3f}  {scaffold:8.3f}")


if __name__ == "__main__":
    main()
