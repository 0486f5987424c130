"""Tasks whose clients return the model changed in one element: `bench.echo:mb1`, `mb25`, `mb100`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import fedkit

__all__ = ["mb1", "mb25", "mb100"]


class Flat(nn.Module):
    """One parameter of `megabytes` millions of bytes."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.arange(1000.0).repeat(megabytes * 250))


def _change(model: Flat, _batches: Iterable[Any], _site: fedkit.Site) -> None:
    with torch.no_grad():
        model.vector[0] += 1


def _task(megabytes: int) -> fedkit.Task:
    rows = fedkit.Data((torch.ones(1, 1), torch.ones(1, 1)))
    return fedkit.Task(name=f"echo-{megabytes}", model=lambda: Flat(megabytes), data=lambda client: rows, train=_change)


mb1, mb25, mb100 = _task(1), _task(25), _task(100)
