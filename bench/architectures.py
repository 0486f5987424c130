"""Six architectures as ONNX: how far from PyTorch, and what int8 makes of their files and their CPU time.

    python bench/architectures.py

Weights are random: parity and size do not depend on training. Ranges are those of normal inputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import nn

import fedkit
from bench.table import Figure, show
from fedkit.deploy.convert import as_outputs, convert, difference, inputs
from fedkit.deploy.gate import noise_ranges, onnx_seconds
from fedkit.deploy.quantize import build
from fedkit.deploy.runtime import session

__all__ = ["NETWORKS", "architectures", "same_classes"]

TIES = 1e-4  # classes whose outputs differ by less, relative to the largest, are no different ones


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """Two convolutions and a way around them (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.short = nn.Identity() if before == after and stride == 1 else short

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.path(x) + self.short(x))


def resnet18() -> nn.Module:
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks = [Residual(*width) for width in [*widths, (512, 512, 1)]]
    head = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*head, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Inverted(nn.Module):
    """Widens, convolves each channel alone, narrows (Sandler et al. 2018)."""

    def __init__(self, before: int, after: int, stride: int, wider: int) -> None:
        super().__init__()
        middle = before * wider
        widen = [nn.Conv2d(before, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU6()] if wider > 1 else []
        self.path = nn.Sequential(
            *widen,
            nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False), nn.BatchNorm2d(middle), nn.ReLU6(),
            nn.Conv2d(middle, after, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.adds = before == after and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.path(x) if self.adds else self.path(x)


def mobilenet_v2() -> nn.Module:
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    blocks, width = [], 32
    for wider, after, count, stride in rows:
        for i in range(count):
            blocks.append(Inverted(width, after, stride if i == 0 else 1, wider))
            width = after
    head = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    tail = [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*head, *blocks, *tail, nn.Flatten(), nn.Linear(1280, 1000))


class Lstm(nn.Module):
    """The next character of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(80, 16), nn.LSTM(16, 256, batch_first=True), nn.Linear(256, 80)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.embed(x))[0])


class Transformer(nn.Module):
    """Four layers of attention (Vaswani et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.embed, self.layers = nn.Embedding(80, 128), nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.out = nn.Linear(128, 80)
        for one in self.layers.parameters():  # they begin as copies of one layer, which a file needs only once
            if one.dim() > 1:
                nn.init.xavier_uniform_(one)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layers(self.embed(x)))


NETWORKS = [
    ("MLP", mlp, fedkit.Tensor("float32", (1, 28, 28)), "int8"),
    ("CNN", cnn, fedkit.Tensor("float32", (1, 28, 28)), "int8"),
    ("ResNet-18", resnet18, fedkit.Tensor("float32", (3, 64, 64)), "int8"),
    ("MobileNetV2", mobilenet_v2, fedkit.Tensor("float32", (3, 64, 64)), "int8"),
    ("LSTM", Lstm, fedkit.Tensor("int64", (40,)), "int8-dynamic"),
    ("transformer", Transformer, fedkit.Tensor("int64", (40,)), "int8-dynamic"),
]


def architectures() -> list[Figure]:
    """Parity of float32, and what the best int8 variant for such a network comes to."""
    found = []
    for name, make, given, variant in NETWORKS:
        about = {"inputs": {"x": given}, "outputs": ["y"], "loss": nn.CrossEntropyLoss()}
        task = fedkit.Task(name=name, model=make, data=_no_data, **about)
        module = task.build(0).eval()
        converted = convert(module, task)
        content = build(converted, variant, noise_ranges(converted, module, task))
        fp32, own = onnx_seconds([converted.content, content], module, task)
        cpu = ", ".join(f"{own[batch] / fp32[batch]:.2f} at batch {batch}" for batch in fp32)
        size, most = len(content) / len(converted.content), 0.35 if name == "transformer" else 0.26
        found += [
            Figure(f"{name}, fp32", difference(converted.content, module, task), "<= 1e-5", "from PyTorch, relative"),
            Figure(f"{name}, same class", same_classes(converted.content, module, task), "== 1", "outside ties"),
            Figure(f"{name}, {variant} file / fp32", size, f"<= {most}", f"CPU time / fp32: {cpu}"),
        ]
    return found


def _no_data(client: str) -> fedkit.Data:
    raise LookupError(f"{client} has no data: weights are random here")


def same_classes(content: bytes, module: nn.Module, task: fedkit.Task) -> float:
    """On how many of 64 rows both have the same class, where there is no tie."""
    feed = inputs(task, 64, module)
    with torch.inference_mode():
        wanted = as_outputs(module(*(torch.from_numpy(array) for array in feed.values())))[0].numpy()
    got = session(content).run(None, feed)[0]
    two = np.sort(wanted, axis=-1)[..., -2:]
    clear = (two[..., 1] - two[..., 0]) > TIES * np.abs(wanted).max()
    return float((got.argmax(-1) == wanted.argmax(-1))[clear].mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(0 if show("Six architectures as ONNX", architectures()) else 1)
