"""Fashion-MNIST in 8 bits: float32, quantised after training and quantisation-aware training, compared as deployed.

A small CNN with depthwise separable convolutions (Howard et al. 2017, "MobileNets") visits the clients in turn. Then
two runs go on from it for as many rounds: one as before, whose model is deployed in float32 and, quantised after
training, in 8 bits; the other with 8-bit numbers simulated. Both are handed over (`Result.export`): the clients give
the ranges, and score the files in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from idx import CLASSES, find, load, parsed
from rich.console import Console
from rich.table import Table
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import fedkit
from fedkit.deploy.passport import Measured
from fedkit.simulation import splits
from fedkit.strategies import CyclicWeightTransfer

WIDTHS = (16, 32, 64, 128, 256, 512)
STRIDES = (1, 2, 1, 2, 1)
HIDDEN = 2048
RATES = (0.05, 0.005, 0.001)  # of the first rounds, of one after them, and of those that follow
ROWS_CALIBRATED = 64  # of each client, from which the ranges of activations are taken
COMPARED = fedkit.Limits(size=1.0, cpu=10.0, agreement=0.0, drop=1.0)  # shown whatever it comes to


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained, and how long: `rounds` and one, then `more` once as before and once in 8 bits."""

    blocks: int = len(STRIDES)
    clients: int = 10
    rows: int = 60_000
    rounds: int = 3
    more: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One variant as it is deployed: its accuracy on the test images at the clients, and what the gate measured."""

    variant: str
    accuracy: float
    measured: Measured


# -- training ----------------------------------------------------------------------------------------------------------


def deal(folder: Path, plan: Plan) -> dict[str, fedkit.Data]:
    """Each client's data: training and test images in equal parts."""
    names = [f"client-{i:02}" for i in range(plan.clients)]
    (images, labels), (test_images, test_labels) = load(folder, "train"), load(folder, "test")
    mine = splits.iid(len(labels[: plan.rows]), names, plan.seed)
    asked = splits.iid(len(test_labels), names, plan.seed)
    return {
        name: fedkit.Data(
            train=(images[mine[name]], labels[mine[name]]),
            test=(test_images[asked[name]], test_labels[asked[name]]),
        )
        for name in names
    }


def convolved(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution, BatchNorm and ReLU, which become one layer at deployment."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


def model(blocks: int) -> nn.Module:
    """A block is a depthwise convolution, one filter a channel, and a pointwise one; with five, 1.3 million numbers."""
    layers = convolved(1, WIDTHS[0], 3, stride=2)
    widths = WIDTHS[: blocks + 1]
    for inputs, outputs, stride in zip(widths, widths[1:], STRIDES, strict=False):
        layers += convolved(inputs, inputs, 3, stride, groups=inputs) + convolved(inputs, outputs, 1)
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], HIDDEN), nn.ReLU()]
    return nn.Sequential(*layers, *pooled, nn.Linear(HIDDEN, CLASSES))


def task(data: Mapping[str, fedkit.Data], blocks: int) -> fedkit.Task:
    """Fashion-MNIST over the clients of `data`."""
    return fedkit.Task(
        name="quantized-fashion",
        model=functools.partial(model, blocks),
        data=data.__getitem__,
        loss=nn.CrossEntropyLoss(),
        optimizer=functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4),
        metrics={"accuracy": lambda: MulticlassAccuracy(CLASSES, average="micro")},
        inputs={"image": fedkit.Tensor("float32", (1, 28, 28))},
        outputs=["garment"],
    )


def train(data: Mapping[str, fedkit.Data], plan: Plan) -> tuple[fedkit.Result, fedkit.Result]:
    """What the last rounds make of one and the same model: (as before, with 8-bit numbers simulated)."""
    visits = functools.partial(fedkit.simulate, task(data, plan.blocks), clients=list(data), seed=plan.seed, threads=1)
    first, second, third = (fedkit.Fit(epochs=1, batch_size=64, lr=lr) for lr in RATES)
    start = visits(CyclicWeightTransfer(rounds=plan.rounds, local=first)).weights
    start = visits(CyclicWeightTransfer(rounds=1, local=second), init=start).weights
    works = third, third.replace(quantize_from=1)
    plain, aware = (visits(CyclicWeightTransfer(rounds=plan.more, local=work), init=start) for work in works)
    return plain, aware


# -- deployment --------------------------------------------------------------------------------------------------------


def compare(folder: Path, out: Path, plan: Plan = Plan()) -> list[Row]:
    """Trains, hands over to `out`, and compares: float32 first. Raises `DataError` for files of another kind."""
    data = deal(folder, plan)
    plain, aware = train(data, plan)
    settings = fedkit.Export(quantize="int8", rows=ROWS_CALIBRATED, limits=COMPARED)
    after, during = (
        result.export(out / name, settings=settings, key=out / "signer").passport
        for name, result in (("after", plain), ("during", aware))
    )
    exact = Row("float32", plain.test["accuracy"], after.measured("fp32"))
    quantized = {"int8 after training": after, "int8 in training": during}
    return [
        exact,
        *(Row(name, one.examined.pooled["accuracy"], one.measured("int8")) for name, one in quantized.items()),
    ]


# -- the table ---------------------------------------------------------------------------------------------------------


def cells(row: Row, exact: Row) -> Iterator[str]:
    """A row of the table, beside float32."""
    cost = row.measured
    yield from (row.variant, f"{row.accuracy:.2%}", f"{100 * (row.accuracy - exact.accuracy):+.2f}")
    yield from (f"{cost.size_bytes:,}", f"{cost.size_ratio:.3f}")
    yield from (f"{cost.cpu_ratio[batch]:.2f}" for batch in ("1", "64"))
    yield from (f"{cost.torch_ratio['1']:.2f}", f"{cost.agreement:.2%}")


def table(rows: list[Row]) -> Table:
    """The comparison, as it is printed: CPU times are over float32 in ONNX Runtime, and over PyTorch."""
    found = Table(box=None, pad_edge=False)
    found.add_column("variant")
    for head in ("accuracy", "points", "bytes", "ratio", "CPU at 1", "at 64", "of PyTorch at 1", "agreement"):
        found.add_column(head, justify="right")
    for row in rows:
        found.add_row(*cells(row, rows[0]))
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for setting in fields(Plan):
        parser.add_argument(f"--{setting.name}", type=int, default=setting.default)
    parser.add_argument("--out", type=Path, help="where the models go; by default they are not kept")
    return parsed(parser)


def main() -> None:
    """Prints the comparison."""
    given = parse()
    plan = Plan(**{setting.name: getattr(given, setting.name) for setting in fields(Plan)})
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(find(Path(given.data)), given.out or Path(folder), plan)
    except fedkit.FedkitError as error:
        raise SystemExit(f"error: {error}") from None
    Console(width=120).print(table(rows))


if __name__ == "__main__":
    main()
