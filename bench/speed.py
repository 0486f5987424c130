"""Ratios of fedkit's time to a floor or a peer, measured in one run, in turn."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import fedkit
from bench.table import Figure, alternate, timed
from fedkit import rng
from fedkit.strategies import FedAvg
from fedkit.trainer.batches import shuffled

__all__ = ["cnn", "import_time", "many_clients", "simulated_training"]

CLIENTS = [f"client-{i}" for i in range(10)]
ROWS, BATCH, EPOCHS = 600, 32, 1
PEER = Path(__file__).parent / "peers" / "pfl_rounds.py"


def cnn() -> nn.Module:
    """Two convolutions and two linear layers, for images of 28 by 28."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10))


def _rows(client: str) -> tuple[torch.Tensor, torch.Tensor]:
    source = rng.torch_generator(0, client)
    return torch.randn(ROWS, 1, 28, 28, generator=source), torch.randint(10, (ROWS,), generator=source)


def simulated_training(device: str = "cpu") -> Figure:
    """A round of 10 clients of a CNN against ten bare PyTorch loops over the same batches, on one thread."""
    torch.set_num_threads(1)
    data = {client: _rows(client) for client in CLIENTS}
    task = fedkit.Task(
        name="cnn", model=cnn, data=lambda client: fedkit.Data(train=data[client]), loss=nn.CrossEntropyLoss()
    )
    strategy = FedAvg(rounds=2, local=fedkit.Fit(epochs=EPOCHS, batch_size=BATCH, lr=0.05))

    def simulated() -> float:
        result = fedkit.simulate(task, strategy, clients=CLIENTS, device=device, threads=1, progress=False)
        return sum(record.seconds for record in result.history)

    ratio, mine, floor = alternate(simulated, lambda: timed(lambda: _bare(data, device)))
    note = f"{mine:.2f} s against {floor:.2f} s on {device}, one thread, {ROWS} images a client"
    return Figure("simulated training / bare PyTorch loop", ratio, "<= 1.1" if device == "cpu" else "<= 1.05", note)


def _bare(data: dict[str, tuple[torch.Tensor, torch.Tensor]], device: str) -> None:
    for seed in (1, 2):
        for features, labels in data.values():
            module = cnn().to(device)
            rows, targets = features.to(device), labels.to(device)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
            for index in shuffled(ROWS, BATCH, epochs=EPOCHS, steps=None, seed=seed):
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(module(rows[index]), targets[index]).backward()
                optimizer.step()
            next(module.parameters()).sum().item()  # waits for the device


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10_000))


def _idle_round() -> float:
    """The median seconds of a round of 1,000 clients whose own loop returns at once."""
    rows = fedkit.Data((torch.ones(4, 4), torch.ones(4, 1)))
    task = fedkit.Task(name="idle", model=_Flat, data=lambda client: rows, train=lambda model, batches, site: None)
    names = [f"client-{i:04d}" for i in range(1000)]
    result = fedkit.simulate(task, FedAvg(rounds=11), clients=names, threads=1, progress=False)
    return statistics.median(record.seconds for record in result.history[1:])


def many_clients(peer: str) -> list[Figure]:
    """1,000 clients of 10,000 parameters that return at once, against pfl-research with and without user sampling."""
    found = []
    for arguments, target in (([], "<= 1"), (["--trimmed"], "<= 4")):
        ratio, mine, theirs = alternate(_idle_round, lambda arguments=arguments: _peer_round(peer, arguments))
        label = "pfl without its user sampling" if arguments else "pfl-research"
        note = f"{mine * 1e6 / 1000:.0f} against {theirs * 1e6 / 1000:.0f} microseconds a client"
        found.append(Figure(f"round of 1,000 idle clients / {label}", ratio, target, note))
    return found


def _peer_round(peer: str, arguments: list[str]) -> float:
    done = subprocess.run([peer, str(PEER), "--rounds", "10", *arguments], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["seconds_per_round"])


def import_time() -> Figure:
    """`import fedkit` in a fresh process against `import torch`."""

    def importing(name: str) -> float:
        code = f"import time; began = time.perf_counter(); import {name}; print(time.perf_counter() - began)"
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    ratio, mine, floor = alternate(lambda: importing("fedkit"), lambda: importing("torch"), times=7)
    return Figure("import fedkit / import torch", ratio, "<= 1.3", f"{mine:.2f} s against {floor:.2f} s")
