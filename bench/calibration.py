"""Where the ranges of int8 come from: five clients whose images differ in contrast and brightness.

    python bench/calibration.py --data DIR

A CNN is trained over them, and quantised with ranges from the clients, from all rows pooled, and from no data at all.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "fashion"))

import numpy as np
import torch
from idx import CLASSES, find, load
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import fedkit
from bench.table import Figure, show
from fedkit.deploy.convert import convert
from fedkit.deploy.gate import noise_ranges
from fedkit.exam import Questions
from fedkit.simulation import splits
from fedkit.strategies import FedAvg, HandOver

__all__ = ["calibration"]

SKEWS = {"dark": (0.4, 0.0), "dim": (0.7, 0.0), "plain": (1.0, 0.0), "bright": (1.0, 0.3), "glaring": (1.8, 0.2)}
ROWS, ROUNDS, SEED = 20_000, 8, 1
POOL = "pool"  # the client that has all rows


def deal(folder: Path) -> dict[str, fedkit.Data]:
    """Each client's images, times its contrast and plus its brightness; and all of them at one client."""
    (images, labels), (tests, answers) = load(folder, "train"), load(folder, "test")
    mine, asked = splits.iid(ROWS, list(SKEWS), SEED), splits.iid(len(answers), list(SKEWS), SEED)
    found = {}
    for name, (contrast, brightness) in SKEWS.items():
        train = (images[mine[name]] * contrast + brightness, labels[mine[name]])
        test = (tests[asked[name]] * contrast + brightness, answers[asked[name]])
        found[name] = fedkit.Data(train=train, test=test)
    parts = [(data.train.tensors, data.test.tensors) for data in found.values()]
    pooled = [tuple(torch.cat(columns) for columns in zip(*some, strict=True)) for some in zip(*parts, strict=True)]
    return found | {POOL: fedkit.Data(train=pooled[0], test=pooled[1])}


def model() -> nn.Module:
    """Three convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 1, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(64 * 49, 64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def task(data: Mapping[str, fedkit.Data]) -> fedkit.Task:
    """The skewed images."""
    return fedkit.Task(
        name="skewed-fashion",
        model=model,
        data=data.__getitem__,
        loss=nn.CrossEntropyLoss(),
        optimizer=functools.partial(torch.optim.SGD, momentum=0.9),
        metrics={"accuracy": lambda: MulticlassAccuracy(CLASSES, average="micro")},
        inputs={"image": fedkit.Tensor("float32", (1, 28, 28))},
        outputs=["garment"],
    )


def calibration(folder: Path) -> list[Figure]:
    """Accuracy over all test rows of int8, by where its ranges come from."""
    data = deal(find(folder))
    chosen, local = task(data), fedkit.Fit(epochs=1, batch_size=32, lr=0.03)
    about = {"seed": SEED, "threads": 1, "progress": False}
    trained = fedkit.simulate(chosen, FedAvg(rounds=ROUNDS, local=local), clients=list(SKEWS), **about)
    converted = convert(trained.model, chosen)
    noise = noise_ranges(converted, trained.model, chosen)
    plan = HandOver(
        graph=converted.graph, bounds=(16 * np.abs(noise).max(axis=1)).tolist(), variants=("int8",), rows=4000,
        criterion="accuracy:max", max_drop=1.0, least_agreement=0.0, exam=Questions(),
    )  # fmt: skip

    def scored(clients: list[str], **changes: object) -> float:
        found = fedkit.simulate(chosen, plan.replace(**changes), clients=clients, init=trained.weights, **about)
        return found.strategy.examined["pooled"]["accuracy"]

    given = [(low, high) for low, high in noise.tolist()]
    fp32 = trained.test["accuracy"]
    pooled = scored([POOL])
    found = {
        "mean of the clients' ranges": scored(list(SKEWS)),
        "clipped ranges of the clients": scored(list(SKEWS), method="clipped"),
        "ranges of normal inputs": scored(list(SKEWS), given=given),
    }
    figures = [Figure("fp32", fp32, "", "accuracy"), Figure("int8, ranges of pooled rows", pooled, "", "accuracy")]
    for name, accuracy in found.items():
        target = "" if "normal" in name else ">= -0.002"
        figures.append(Figure(f"int8, {name} - pooled", accuracy - pooled, target, f"accuracy {accuracy:.4f}"))
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("FEDKIT_DATA"), required=False)
    sys.exit(0 if show("Calibration", calibration(parser.parse_args().data)) else 1)
