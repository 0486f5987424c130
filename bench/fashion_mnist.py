"""Accuracy on Fashion-MNIST against epsilon: fixed features with a linear model, and a CNN from the pixels on.

`python bench/fashion_mnist.py --data DIR` alone, or `make figures DATA=DIR` with all others.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "fashion"))

import private
import torch
from idx import CLASSES, find, load
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import fedkit
from bench.table import Figure, show
from fedkit.strategies import FedAvg, FedSGD

__all__ = ["accuracy_against_epsilon"]

SEEDS = range(3)
CNN_SEEDS = {1.0: range(1), 3.0: SEEDS, 8.0: range(1)}  # two minutes each on one core
CLIENTS, BATCH = 10, 300
LINEAR, FEDSGD, FEDAVG = "scattering, linear, FedSGD", "CNN, FedSGD", "CNN, FedAvg"
SHARED = "scattering, linear, FedSGD, noise shared"
EPSILONS = (1.0, 3.0, 8.0)
TARGETS = {LINEAR: {1.0: 0.84, 3.0: 0.87, 8.0: 0.88}, SHARED: {1.0: 0.88, 3.0: 0.885, 8.0: 0.888}}

Scores = dict[str, dict[float, list[float]]]


def accuracy_against_epsilon(folder: Path, out: Path) -> list[Figure]:
    """Ten IID clients of 6,000 images, delta 1e-5, each with noise of its own or with a part of one; saves a plot.

    Noise that is shared goes through the masked sums of `fedkit.simulate`, and holds with one client missing and one
    that tells its part.
    """
    linear = [private.read(find(folder), part) for part in ("train", "test")]
    pixels = [_pixels(find(folder), part) for part in ("train", "test")]
    scores: Scores = {LINEAR: {}, SHARED: {}, FEDSGD: {}, FEDAVG: {}}
    for epsilon in EPSILONS:
        scores[LINEAR][epsilon] = [_linear(linear, epsilon, seed) for seed in SEEDS]
        scores[SHARED][epsilon] = [_linear(linear, epsilon, seed, shared=True) for seed in SEEDS]
        for name in (FEDSGD, FEDAVG):
            scores[name][epsilon] = [_cnn(pixels, name, epsilon, seed) for seed in CNN_SEEDS[epsilon]]
    _draw(out / "fashion_mnist.png", scores)
    return [_figure(name, epsilon, found) for name, of in scores.items() for epsilon, found in of.items()]


def _figure(name: str, epsilon: float, found: list[float]) -> Figure:
    target = f">= {TARGETS[name][epsilon]}" if name in TARGETS else ""
    note = f"seeds 0-{len(found) - 1}: " + " ".join(f"{score:.4f}" for score in found)
    return Figure(f"{name}, epsilon {epsilon:g}", statistics.mean(found), target, note)


def _linear(rows: list[private.Rows], epsilon: float, seed: int, *, shared: bool = False) -> float:
    data = private.deal(*rows, CLIENTS, seed)
    return float(private.train(data, epsilon, seed=seed, shared=shared).test["accuracy"])


# -- from the pixels on ------------------------------------------------------------------------------------------------


def _pixels(folder: Path, part: str) -> private.Rows:
    images, labels = load(folder, part)
    return torch.from_numpy(2 * images - 1), torch.from_numpy(labels)


def cnn() -> nn.Module:
    """26,010 parameters, bounded activations (Papernot et al. 2021, "Tempered Sigmoid Activations")."""
    first, second = nn.Conv2d(1, 16, 8, stride=2, padding=2), nn.Conv2d(16, 32, 4, stride=2)
    seen = [first, nn.Tanh(), nn.MaxPool2d(2, 1), second, nn.Tanh(), nn.MaxPool2d(2, 1), nn.Flatten()]
    return nn.Sequential(*seen, nn.Linear(32 * 4 * 4, 32), nn.Tanh(), nn.Linear(32, CLASSES))


STRATEGIES: dict[str, Any] = {
    FEDSGD: FedSGD(
        rounds=200,
        lr=1.0,
        server_optimizer=functools.partial(torch.optim.SGD, momentum=0.9),
        local=fedkit.Gradient(batch_size=BATCH),
    ),
    FEDAVG: FedAvg(rounds=20, local=fedkit.Fit(steps=10, batch_size=BATCH, lr=4.0)),
}


def _cnn(rows: list[private.Rows], name: str, epsilon: float, seed: int) -> float:
    data = private.deal(*rows, CLIENTS, seed)
    privacy = fedkit.Privacy(dp=fedkit.DP(epsilon=epsilon, delta=private.DELTA, max_grad_norm=1.0))
    found = fedkit.simulate(
        _task(data), STRATEGIES[name], clients=list(data), seed=seed, threads=1, privacy=privacy, progress=False
    )
    return float(found.test["accuracy"])


def _task(data: Mapping[str, fedkit.Data]) -> fedkit.Task:
    return fedkit.Task(
        name="fashion-cnn",
        model=cnn,
        data=data.__getitem__,
        loss=nn.CrossEntropyLoss(),
        metrics={"accuracy": lambda: MulticlassAccuracy(CLASSES, average="micro")},
    )


# -- the picture -------------------------------------------------------------------------------------------------------


def _draw(path: Path, scores: Scores) -> None:
    """Saves the mean of the seeds and their spread as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(canvas)
    axes: Any = canvas.subplots()
    for name, points in scores.items():
        axes.plot(list(points), [statistics.mean(found) for found in points.values()], label=name, marker="o")
        axes.fill_between(list(points), *zip(*((min(f), max(f)) for f in points.values()), strict=True), alpha=0.15)
    axes.set_xscale("log")
    axes.set_xticks(list(EPSILONS), [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.minorticks_off()
    axes.set(xlabel="epsilon of each image (more is less private)", ylabel="accuracy on the 10,000 test images")
    axes.set_title("Fashion-MNIST at ten clients, each with noise of its own, or one noise shared", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=130)


def main() -> None:
    """Measures and prints; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("FEDKIT_DATA"), help="folder with the four files")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the plot goes")
    given = parser.parse_args()
    if given.data is None:
        parser.error("give --data DIR, or set FEDKIT_DATA, to the folder with the four Fashion-MNIST .gz files")
    torch.set_num_threads(1)
    sys.exit(not show("Fashion-MNIST, ten clients, delta 1e-5", accuracy_against_epsilon(Path(given.data), given.out)))


if __name__ == "__main__":
    main()
