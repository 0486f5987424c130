"""Tasks that agents and coordinators of the tests import by `module:attr`."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

import fedkit
from fedkit.testing import toy_task

plain = toy_task(name="plain")

# Tensors that stay at the client (integer counters, and a layer that is not exchanged).
stateful = toy_task(
    name="stateful",
    model=lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    exchange=lambda name: not name.startswith("3."),
)


def _counting(model: nn.Module, batches, site: fedkit.Site) -> float:
    visits = int(site.state.get("visits", torch.zeros(1).numpy())[0]) + 1
    site.state["visits"] = torch.full((1,), float(visits)).numpy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * visits)
    return float(visits)


# The update says how often this client has trained in this run: a repeated training would show in the bits.
counting = toy_task(name="counting", loss=None, train=_counting)


def _hostile(model: nn.Module, batches, site: fedkit.Site) -> float:
    visits = site.state["visits"] = site.state.get("visits", np.zeros(1)) + 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for features, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(features), labels).backward()
        optimizer.step()
    if site.client == "bea" and visits[0] == 2:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-20)
    return 0.0


# Bea ruins the model the second time she trains it.
hostile = toy_task(name="hostile", train=_hostile)


def _stuck(model: nn.Module, batches, site: fedkit.Site) -> float:
    time.sleep(3600)  # deaf to any wish to stop
    return 0.0


stuck = toy_task(name="stuck", loss=None, train=_stuck)


def _leaky(client: str) -> fedkit.Data:
    raise ValueError(f"canary-{client}-4711 is a patient")


leaky = toy_task(name="leaky", data=_leaky)


# A value that would be recognised wherever it turned up, in text and in bytes.
CANARY = 8888.125


def _canaries(client: str) -> fedkit.Data:
    rows = torch.full((40, 5), CANARY), torch.arange(40) % 3
    return fedkit.Data(rows, rows)


canaries = toy_task(name="canaries", data=_canaries)


def _marking(model: nn.Module, batches, site: fedkit.Site) -> float:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(CANARY)
    return 0.0


# A model that would be recognised wherever it turned up.
marking = toy_task(name="marking", train=_marking)


def _failing(model: nn.Module, batch: object) -> torch.Tensor:
    raise ValueError(f"a canary is a patient: {batch}")


canaries_in_step = toy_task(name="canaries_in_step", data=_canaries, loss=None, step=_failing, metrics={})


class Flat(nn.Module):
    """One parameter of 3 million bytes: three pieces on the wire, and a file of its own at the coordinator."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.arange(1000.0).repeat(750))


# As `counting`; what a client adds depends on its name.
large = fedkit.Task(
    name="large",
    model=Flat,
    data=lambda client: fedkit.Data((torch.full((len(client), 1), 1.0), torch.ones(len(client), 1))),
    train=lambda model, batches, site: _counting(model, batches, site) * len(site.client),
)
