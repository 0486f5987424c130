"""Fashion-MNIST in 8 bits: float32, quantised after training and quantisation-aware training, compared as deployed.

A small CNN with depthwise separable convolutions (Howard et al. 2017, "MobileNets") visits the clients in turn. Then
two runs go on from it for as many rounds: one as before, whose model is deployed in float32 and, quantised after
training, in 8 bits; the other with 8-bit numbers simulated. All are measured on the test images in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from idx import CLASSES, Labels, find, load, parsed
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from rich.console import Console
from rich.table import Table
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import fedkit
from fedkit.simulation import splits
from fedkit.strategies import CyclicWeightTransfer

WIDTHS = (16, 32, 64, 128, 256, 512)
STRIDES = (1, 2, 1, 2, 1)
HIDDEN = 2048
RATES = (0.05, 0.005, 0.001)  # of the first rounds, of one after them, and of those that follow
CALIBRATED_ROWS = 64  # of each client, from which the ranges of activations are taken
REPEATS = {1: (60, 20), 64: (30, 2)}  # for each batch size: how often it is timed, and how many calls at once

Images = npt.NDArray[np.float32]


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
    """One variant as it is deployed: its accuracy, the size of its file, and milliseconds of CPU time by batch size."""

    variant: str
    accuracy: float
    size_bytes: int
    cpu_ms: Mapping[int, float]


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


class Batches(CalibrationDataReader):
    """The clients' images, one client after the other."""

    def __init__(self, data: Mapping[str, fedkit.Data]) -> None:
        self._left = iter([held.train[:CALIBRATED_ROWS][0].numpy() for held in data.values()])

    def get_next(self) -> dict[str, Images] | None:
        """The next client's images; None after the last."""
        images = next(self._left, None)
        return None if images is None else {"image": images}


def quantized(file: Path, data: Mapping[str, fedkit.Data], *, per_channel: bool = True) -> Path:
    """The model in 8 bits beside `file`: activations by the ranges that clients see, weights by channel or tensor."""
    found = file.with_suffix(f".{'channel' if per_channel else 'tensor'}.onnx")
    kinds = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    float_bias = {"QuantizeBias": False}  # which ONNX Runtime quantises itself: the file is smaller, and as fast
    quantize_static(str(file), str(found), Batches(data), per_channel=per_channel, extra_options=float_bias, **kinds)
    return found


def opened(file: Path) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime, on one core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def accuracy(session: onnxruntime.InferenceSession, images: Images, labels: Labels) -> float:
    """The share of images that are told rightly."""
    told = [session.run(None, {"image": part})[0].argmax(axis=1) for part in np.array_split(images, 20)]
    return float((np.concatenate(told) == labels).mean())


def cpu_ms(sessions: list[onnxruntime.InferenceSession], images: Images) -> list[float]:
    """The median milliseconds of CPU time that one call takes, measured in turn."""
    repeats, calls = REPEATS[len(images)]
    found: list[list[float]] = [[] for _ in sessions]
    for _ in range(repeats):
        for session, times in zip(sessions, found, strict=True):
            began = time.process_time()
            for _ in range(calls):
                session.run(None, {"image": images})
            times.append((time.process_time() - began) * 1000 / calls)
    return [statistics.median(times) for times in found]


def compare(folder: Path, out: Path, plan: Plan = Plan()) -> list[Row]:
    """Trains, deploys to `out` and measures: float32 first. Raises `DataError` for files that are not Fashion-MNIST."""
    data = deal(folder, plan)
    plain, aware = train(data, plan)
    exact, learned = plain.export(out / "plain"), aware.export(out / "aware")
    files = {
        "float32": exact,
        "int8 after training, one scale a tensor": quantized(exact, data, per_channel=False),
        "int8 after training": quantized(exact, data),
        "int8 in training": quantized(learned, data),
    }
    return measured(files, *load(folder, "test"))


def measured(files: Mapping[str, Path], images: Images, labels: Labels) -> list[Row]:
    """Each variant with its file's figures."""
    sessions = [opened(file) for file in files.values()]
    times = {batch: cpu_ms(sessions, images[:batch]) for batch in REPEATS}
    return [
        Row(name, accuracy(session, images, labels), file.stat().st_size, {batch: times[batch][i] for batch in times})
        for i, ((name, file), session) in enumerate(zip(files.items(), sessions, strict=True))
    ]


# -- the table ---------------------------------------------------------------------------------------------------------


def cells(row: Row, exact: Row) -> Iterator[str]:
    """A row of the table, beside float32."""
    yield from (row.variant, f"{row.accuracy:.2%}", f"{100 * (row.accuracy - exact.accuracy):+.2f}")
    yield from (f"{row.size_bytes:,}", f"{row.size_bytes / exact.size_bytes:.3f}")
    for batch, spent in row.cpu_ms.items():
        yield from (f"{spent:.3f}", f"{spent / exact.cpu_ms[batch]:.2f}")


def table(rows: list[Row]) -> Table:
    """The comparison, as it is printed."""
    found = Table(box=None, pad_edge=False)
    found.add_column("variant")
    heads = [
        "accuracy",
        "points",
        "bytes",
        "ratio",
        *(f"{head}" for n in REPEATS for head in (f"ms, batch {n}", "ratio")),
    ]
    for head in heads:
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
