"""Fashion-MNIST with differential privacy: a linear model on fixed scattering features, FedSGD over ten clients.

Each client keeps each of its images private by itself, with its own noise (Tramer and Boneh 2021, "Differentially
Private Learning Needs Better Features (or Much More Data)"). With --shared, answers are masked and the clients share
one noise in their sum, which holds with one client missing and one that tells its part.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from idx import CLASSES, find, load, parsed
from scattering import CHANNELS, PLACES, scattered
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import fedkit
from fedkit.simulation import splits
from fedkit.strategies import FedSGD

FEATURES = CHANNELS * PLACES**2
GROUPS = 27
LENGTH = 10.0  # of each image's features, so that the bias is a small part of its gradient
DELTA = 1e-5
SETTINGS = {1.0: (60, 3.0), 3.0: (100, 5.0), 8.0: (200, 5.0)}  # rounds and lr for each epsilon, found by trying
SHARED = {1.0: (100, 6.0), 3.0: (200, 10.0), 8.0: (200, 16.0)}  # the same where the clients share the noise
CLIPS = {1.0: 0.5, 3.0: 1.0, 8.0: 1.0}  # and there, how long an image's gradient may be

Rows = tuple[torch.Tensor, torch.Tensor]


def features(images: torch.Tensor) -> torch.Tensor:
    """[rows, 3969] of images from 0 to 1: scattered, then each group of an image's channels set to mean 0, variance 1.

    A function of one image at a time that knows no other, so that it costs no privacy.
    """
    normal = nn.functional.group_norm(scattered(images), GROUPS).flatten(1)
    return normal * (LENGTH / FEATURES**0.5)


def read(folder: Path, part: str, rows: int | None = None) -> Rows:
    """Features and labels of the first `rows` images of a part; raises `DataError`."""
    images, labels = load(folder, part)
    batches = torch.from_numpy(images[:rows]).split(128)
    return torch.cat([features(batch) for batch in batches]), torch.from_numpy(labels[:rows])


def deal(train: Rows, test: Rows, clients: int, seed: int) -> dict[str, fedkit.Data]:
    """Each client's data: training and test rows in equal parts."""
    names = [f"client-{i:02}" for i in range(clients)]
    mine, asked = splits.iid(len(train[0]), names, seed), splits.iid(len(test[0]), names, seed)
    return {
        name: fedkit.Data(
            train=tuple(column[mine[name]] for column in train), test=tuple(column[asked[name]] for column in test)
        )
        for name in names
    }


def task(data: Mapping[str, fedkit.Data]) -> fedkit.Task:
    """A linear model of the features."""
    return fedkit.Task(
        name="private-fashion",
        model=lambda: nn.Linear(FEATURES, CLASSES),
        data=data.__getitem__,
        loss=nn.CrossEntropyLoss(),
        metrics={"accuracy": lambda: MulticlassAccuracy(CLASSES, average="micro")},
        inputs={"features": fedkit.Tensor("float32", (FEATURES,))},
        outputs=["garment"],
    )


def train(
    data: Mapping[str, fedkit.Data], epsilon: float, rounds: int | None = None, seed: int = 0, *, shared: bool = False
) -> fedkit.Result:
    """FedSGD with momentum, where each client draws a quarter of its rows a round."""
    usual, lr = (SHARED if shared else SETTINGS)[epsilon]
    clip = CLIPS[epsilon] if shared else 1.0
    rows = min(len(held.train) for held in data.values())
    strategy = FedSGD(
        rounds=rounds or usual,
        lr=lr / clip,
        server_optimizer=functools.partial(torch.optim.SGD, momentum=0.9),
        local=fedkit.Gradient(batch_size=max(rows // 4, 1)),
    )
    dp = fedkit.DP(epsilon=epsilon, delta=DELTA, max_grad_norm=clip)
    privacy = fedkit.Privacy(dp=dp)
    if shared:
        privacy = fedkit.Privacy(dp=dp.replace(noise="shared", dropouts=1, colluders=1), aggregation="masked")
    return fedkit.simulate(task(data), strategy, clients=list(data), seed=seed, threads=1, privacy=privacy)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", type=float, choices=sorted(SETTINGS), default=3.0, help="of each image")
    parser.add_argument("--rows", type=int, default=60_000, help="how many of the 60,000 training images to use")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, help="instead of those that suit epsilon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", action="store_true", help="mask answers, and let clients share one noise")
    return parsed(parser)


def main() -> None:
    """Prints the accuracy on the test images, and what the run has cost each client."""
    arguments = parse()
    try:
        folder = find(Path(arguments.data))
        data = deal(read(folder, "train", arguments.rows), read(folder, "test"), arguments.clients, arguments.seed)
        result = train(data, arguments.epsilon, arguments.rounds, arguments.seed, shared=arguments.shared)
    except fedkit.FedkitError as error:
        raise SystemExit(f"error: {error}") from None
    spent = max(result.history[-1].epsilon.values())
    print(f"scattering features, linear model, FedSGD: {len(data)} clients, {len(result.history)} rounds")
    print(f"test accuracy {result.test['accuracy']:.3f} at epsilon {spent:.2f}, delta {DELTA:g}")


if __name__ == "__main__":
    main()
