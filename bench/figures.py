"""`make figures`: every figure the project states, with its target."""

from __future__ import annotations

import argparse
import runpy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import nn

import fedkit
from bench.accounting import accounting
from bench.architectures import architectures
from bench.calibration import calibration
from bench.encryption import encryption
from bench.fashion_mnist import accuracy_against_epsilon
from bench.masking import masking
from bench.network import other_frameworks
from bench.page import Page
from bench.quantization import eight_bits
from bench.run import arguments, network, ratios
from bench.sealing import sealing
from bench.table import Figure, show
from fedkit import rng
from fedkit.demo.compare import SHOWN_EPSILON, STRATEGIES, private_accuracy
from fedkit.demo.heart import HOSPITALS, load, task
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedSGD
from fedkit.task import Prepared
from fedkit.trainer.batches import shuffled
from fedkit.weights import Weights

SEEDS = range(42, 47)
FLOORS = {
    "FedAvg": 0.785,
    "FedSGD": 0.785,
    "CyclicWeightTransfer": 0.78,
    "StochasticWeightTransfer": 0.78,
    "SingleWeightTransfer": 0.77,
}
FASHION = (  # need --data
    "Fashion-MNIST, ten clients, delta 1e-5",
    "Depthwise CNN in 8 bits, ONNX Runtime, one core",
    "Ranges from five clients with different images",
)
OTHERS = "Other frameworks"  # needs --peers


def _heart(strategy: fedkit.Strategy, clients: tuple[str, ...] = HOSPITALS, seed: int = 42) -> fedkit.Result:
    return fedkit.simulate(task, strategy, clients=clients, seed=seed, threads=1, progress=False)


def heart() -> list[Figure]:
    """Accuracy over the 254 test rows of the four hospitals, mean of five seeds, all training rows used."""
    found = []
    for name, floor in FLOORS.items():
        scores = [_heart(STRATEGIES[name], seed=seed).test["accuracy"] for seed in SEEDS]
        note = "seeds 42-46: " + " ".join(f"{score:.3f}" for score in scores)
        found.append(Figure(f"heart, {name}", statistics.mean(scores), f">= {floor}", note))
    return found


def private_heart() -> list[Figure]:
    """The same at epsilon 3 (delta 1e-3) of each row, the statistics for standardisation included."""
    found = []
    for name, floor in {"FedAvg": 0.775, "CyclicWeightTransfer": 0.76}.items():
        scores = private_accuracy(name, SHOWN_EPSILON, SEEDS)
        note = "five runs: " + " ".join(f"{score:.3f}" for score in scores)
        found.append(Figure(f"heart, {name}, epsilon 3", statistics.mean(scores), f">= {floor}", note))
    return found


def equalities() -> list[Figure]:
    """FedAvg with one full-batch step against FedSGD; a cycle over one client against a bare PyTorch loop."""
    step = fedkit.Fit(steps=1, batch_size="all", lr=0.1)
    averaged, stepped = _heart(FedAvg(rounds=20, local=step)), _heart(FedSGD(rounds=20, lr=0.1))
    apart = float(np.abs(averaged.weights.vector - stepped.weights.vector).max())
    fit = fedkit.Fit(epochs=2, batch_size=4, lr=0.003)
    cycled = _heart(CyclicWeightTransfer(rounds=1, local=fit), clients=("va",)).weights
    differing = int((cycled.vector != _plain_loop("va", fit, cycled).vector).sum())
    return [
        Figure("FedAvg with one full-batch step - FedSGD", apart, "<= 1e-6", "largest difference, 20 rounds"),
        Figure("CWT over one client != plain local training", differing, "== 0", "weights that differ in any bit"),
    ]


def scaffold() -> list[Figure]:
    """SCAFFOLD against FedAvg at equal rounds on the label-skewed digits of examples/digits, mean of three seeds."""
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "digits" / "main.py"))
    pairs = [example["compare"](0.1, example["ROUNDS"], seed) for seed in range(3)]
    ahead = statistics.mean(scaffold - fedavg for fedavg, scaffold in pairs)
    note = "FedAvg, Scaffold: " + "; ".join(f"{fedavg:.3f}, {scaffold:.3f}" for fedavg, scaffold in pairs)
    return [Figure("digits, accuracy of Scaffold - FedAvg", ahead, ">= 0.01", note)]


def _plain_loop(client: str, fit: fedkit.Fit, prepared: Weights) -> Weights:
    module = task.build(42)
    assert isinstance(module, Prepared)
    module.prepare.mean.copy_(torch.from_numpy(prepared["prepare.mean"]))
    module.prepare.scale.copy_(torch.from_numpy(prepared["prepare.scale"]))
    features, labels = load(client).train.tensors  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(module.parameters(), lr=fit.lr)
    seed = rng.seed_for(42, 1, client)
    for index in shuffled(len(labels), fit.batch_size, epochs=fit.epochs, steps=None, seed=seed):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(module(features[index]), labels[index]).backward()
        optimizer.step()
    return Weights.from_module(module)


def _eight_bits(data: Path) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        return eight_bits(data, Path(folder))


def _sections(given: argparse.Namespace) -> dict[str, Callable[[], list[Figure]]]:
    """What can be measured, by title, in order."""
    return {
        "Accuracy on real data": heart,
        "Differential privacy": lambda: [*private_heart(), *accounting()],
        "Masked sums": masking,
        "Six architectures as ONNX": architectures,
        FASHION[0]: lambda: accuracy_against_epsilon(given.data, Path("out")),
        FASHION[1]: lambda: _eight_bits(given.data),
        FASHION[2]: lambda: calibration(given.data),
        "Encrypted sums": encryption,
        "Sealed models": sealing,
        "Equalities": equalities,
        "Label skew": scaffold,
        "Speed": lambda: ratios(given.pfl),
        "Network": network,
        OTHERS: lambda: other_frameworks(given.peers),
    }


def _arguments() -> argparse.Namespace:
    parser = arguments()
    parser.add_argument("--page", type=Path, help="a Markdown page to write what is measured to")
    parser.add_argument("--only", action="append", metavar="TITLE", help="measure this section; may be given again")
    given = parser.parse_args()
    unknown = set(given.only or ()) - set(_sections(given))
    if unknown:
        parser.error(f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(_sections(given))}")
    if given.data is None and set(given.only or ()) & set(FASHION):
        parser.error("--only: that section needs --data")
    if given.peers is None and OTHERS in (given.only or ()):
        parser.error("--only: that section needs --peers")
    return given


def main() -> None:
    """Measures and prints, and writes the page; exits with 1 where a target is missed."""
    torch.set_num_threads(1)
    given = _arguments()
    good, sections = True, _sections(given)
    missing = (*(FASHION if given.data is None else ()), *(() if given.peers else (OTHERS,)))
    wanted = given.only or [title for title in sections if title not in missing]
    page = None if given.page is None else Page(given.page, tuple(sections))
    for title in [title for title in sections if title in wanted]:
        figures = sections[title]()
        good &= show(title, figures)
        if page is not None:
            page.put(title, figures)
    sys.exit(not good)


if __name__ == "__main__":
    main()
