"""Fashion-MNIST from its four idx files, split over clients in three ways: IID, Dirichlet label skew, shards."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from idx import CLASSES, Labels, find, load, parsed
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import fedkit
from fedkit.simulation import splits
from fedkit.strategies import FedAvg

# -- the clients -------------------------------------------------------------------------------------------------------


def deal(folder: Path, arguments: argparse.Namespace) -> dict[str, fedkit.Data]:
    """Each client's data: the first training images as `--split` says, the test images in equal parts."""
    images, labels = load(folder, "train")
    test_images, test_labels = load(folder, "test")
    clients = [f"client-{i:02}" for i in range(arguments.clients)]
    train = split(labels[: arguments.rows], clients, arguments)
    test = splits.iid(len(test_labels), clients, arguments.seed)
    return {
        name: fedkit.Data(
            train=(images[train[name]], labels[train[name]]),
            test=(test_images[test[name]], test_labels[test[name]]),
        )
        for name in clients
    }


def split(labels: Labels, clients: list[str], arguments: argparse.Namespace) -> dict[str, Labels]:
    """The row numbers of each client."""
    if arguments.split == "iid":
        return splits.iid(len(labels), clients, arguments.seed)
    if arguments.split == "shards":
        return splits.shards(labels, clients, seed=arguments.seed)
    return splits.dirichlet(labels, clients, arguments.alpha, arguments.seed)


# -- the task ----------------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    """A small CNN, without BatchNorm: its running statistics would mix what clients with different labels have seen."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=5, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 5 * 5, CLASSES),
    )


def task(data: Mapping[str, fedkit.Data]) -> fedkit.Task:
    """Fashion-MNIST over the clients of `data`."""
    return fedkit.Task(
        name="fashion",
        model=model,
        data=data.__getitem__,
        loss=nn.CrossEntropyLoss(),
        metrics={"accuracy": lambda: MulticlassAccuracy(CLASSES, average="micro")},
        inputs={"image": fedkit.Tensor("float32", (1, 28, 28))},
        outputs=["garment"],
    )


def parse() -> argparse.Namespace:
    """The command line; ends the program where no folder is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=["iid", "dirichlet", "shards"], default="dirichlet")
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet split: 0.1 is strong skew")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rows", type=int, default=6000, help="how many of the 60,000 training images to use")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parsed(parser)


def main() -> None:
    """Prints what each client holds, then the accuracy on the test images after training."""
    arguments = parse()
    try:
        data = deal(find(Path(arguments.data)), arguments)
        for name, held in data.items():
            counts = np.bincount([int(label) for _, label in held.train], minlength=CLASSES)
            print(f"{name}  {counts.sum():5} images, by class {counts.tolist()}")
        strategy = FedAvg(rounds=arguments.rounds, local=fedkit.Fit(epochs=2, batch_size=32, lr=0.1))
        result = fedkit.simulate(task(data), strategy, clients=list(data), seed=arguments.seed)
    except fedkit.FedkitError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"FedAvg, {arguments.rounds} rounds, {arguments.split}: test accuracy {result.test['accuracy']:.3f}")


if __name__ == "__main__":
    main()
