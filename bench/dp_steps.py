"""A private step against a plain one: ours, and what Opacus' two ways make of the same step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from torch import nn

import fedkit
from bench.speed import cnn
from bench.table import Figure, alternate
from fedkit import rng
from fedkit.privacy.clipping import Clipped, ClippedGradients, Hooks, Loss, Way
from fedkit.privacy.dpsgd import NoisyGradients, PrivateSteps

__all__ = ["Ghost", "private_steps"]

ROWS, CLIP = 6000, 1.0
SECONDS_A_TURN = 0.6


class Ghost:
    """Opacus' ghost clipping, for `CrossEntropyLoss`: one backward pass for the norms, a second for the sums."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> Ghost:
        self._hooks = GradSampleHooksFastGradientClipping(self._module, loss_reduction="sum", max_grad_norm=CLIP)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.cleanup()

    def sums(self, loss: Loss, batch: Any, rows: int, clip: float) -> Clipped:
        """Both passes; `loss` is not asked, because single losses are needed."""
        losses = nn.functional.cross_entropy(self._module(batch[0]), batch[1], reduction="none")
        with warnings.catch_warnings():  # of the first layer, whose inputs need no gradient
            warnings.simplefilter("ignore")
            return self._twice(losses, rows, clip)

    def _twice(self, losses: torch.Tensor, rows: int, clip: float) -> Clipped:
        losses.sum().backward(retain_graph=True)
        norms = self._hooks.get_norm_sample().double()
        self._module.zero_grad()
        self._hooks.disable_hooks()
        ((clip / norms).clamp(max=1.0).to(losses.dtype).detach() * losses).sum().backward()
        self._hooks.enable_hooks()
        sums = [parameter.grad for parameter in self._module.parameters()]
        self._module.zero_grad()
        return Clipped(sums, norms, rows)


def private_steps(device: str = "cpu") -> list[Figure]:
    """A CNN of two convolutions and two linear layers at two batch sizes, on one thread."""
    torch.set_num_threads(1)
    found = []
    for batch in (32, 256):
        for name, way, target in (("ours", None, ">= 0.6"), ("hooks", Hooks, ""), ("ghost", Ghost, "")):
            found.append(_against_sgd(batch, name, way, target, device))
    return found


def _against_sgd(batch: int, name: str, way: Callable[[nn.Module], Way] | None, target: str, device: str) -> Figure:
    where = torch.device(device)
    data = _data(where)
    plain, private = _plain(data, batch, where), _private(data, batch, way, where)
    steps = max(int(SECONDS_A_TURN / (plain(3) / 3)), 5)
    ratio, floor, mine = alternate(lambda: plain(steps), lambda: private(steps), times=7)
    note = f"{mine / steps * 1e3:.1f} ms against {floor / steps * 1e3:.1f} ms a step, CPU time of one thread"
    return Figure(f"private steps / plain SGD, {name}, batch {batch}, {device}", ratio, target, note)


def _data(device: torch.device) -> fedkit.Data:
    source = rng.torch_generator(0, "rows")
    rows = torch.randn(ROWS, 1, 28, 28, generator=source), torch.randint(10, (ROWS,), generator=source)
    return fedkit.Data(tuple(column.to(device) for column in rows))


def _clock(device: torch.device) -> float:
    """Seconds of this process on a CPU, whoever else uses it; on a GPU, seconds of the wall."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _plain(data: fedkit.Data, batch: int, device: torch.device) -> Callable[[int], float]:
    features, labels = data.train.tensors  # type: ignore[attr-defined]
    module, criterion = cnn().to(device), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    def run(steps: int) -> float:
        began = _clock(device)
        for _ in range(steps):
            chosen = torch.randint(ROWS, (batch,)).to(device)
            optimizer.zero_grad(set_to_none=True)
            criterion(module(features[chosen]), labels[chosen]).backward()
            optimizer.step()
        return _clock(device) - began

    return run


def _private(
    data: fedkit.Data, batch: int, way: Callable[[nn.Module], Way] | None, device: torch.device
) -> Callable[[int], float]:
    task = fedkit.Task(name="cnn", model=cnn, data=lambda client: data, loss=nn.CrossEntropyLoss())
    module = cnn().to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    clipped = ClippedGradients(task, module, way)

    def run(steps: int) -> float:
        plan = PrivateSteps(1.0, CLIP, batch, steps, ROWS)
        with NoisyGradients(clipped, plan, data, data.train, device) as noisy:
            began = _clock(device)
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                noisy.write()
                optimizer.step()
            return _clock(device) - began

    return run
