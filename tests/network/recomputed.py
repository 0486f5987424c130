"""The models that a run published, worked out again from its history and the updates its agents have stored."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

import fedkit
from bench.faults import stored
from fedkit import history
from fedkit.aggregation import MeanFold
from fedkit.strategies import FedAvg
from fedkit.weights import Weights
from fedkit.work import Update
from tests.network import tasks

__all__ = ["CLIENTS", "SEED", "STRATEGY", "require_undisturbed", "simulated"]

CLIENTS = ("ada", "bea")
SEED = 3
STRATEGY = FedAvg(rounds=2, local=fedkit.Fit(steps=1))


@functools.cache
def simulated() -> Weights:
    """What `STRATEGY` makes of the large task, with no network that could be disturbed."""
    return fedkit.simulate(tasks.large, STRATEGY, clients=CLIENTS, seed=SEED, threads=1, progress=False).weights


def require_undisturbed(result: fedkit.Result, folder: Path) -> None:
    """A run of that gives the same bits, takes each result once and works nothing out again."""
    assert result.weights == simulated()
    assert [record.refusals for record in result.history] == [()] * STRATEGY.rounds
    newest = max((folder / "server" / "history").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert require_recomputed(newest, folder / "archive", tasks.large, SEED) == simulated()
    assert set(stored(folder).values()) == {1}


def require_recomputed(path: Path, archive: Path, task: fedkit.Task, seed: int) -> fedkit.Weights:
    """The last model of FedAvg's history at `path`, if each round's is the mean of what the round says it took."""
    history.check(path)
    model = Weights.from_module(task.build(seed), task.travels)
    for line in history.read(path):
        updates = {}
        for key in line["accepted"]:
            updates |= _stored(archive, key, model)
        if updates:
            fold = MeanFold(updates, model.manifest, "examples")
            for client, update in updates.items():
                fold.add(client, update)
            model = model + fold.result().update
        assert sorted(updates) == sorted(line["clients"]), f"round {line['round']}"
        assert model.digest == line["model"], f"round {line['round']}"
    return model


def _stored(archive: Path, key: str, model: fedkit.Weights) -> dict[str, Update]:
    """The update of that id, if it is one; every copy of it is the same."""
    copies = [path for path in archive.glob(f"{key}.*") if path.suffix != ".json"]
    assert len({path.read_bytes() for path in copies}) <= 1, f"{key} was worked out twice, and differently"
    for path in copies[:1]:
        facts = json.loads(path.with_name(path.name + ".json").read_text())
        values = np.frombuffer(path.read_bytes(), dtype="<f4")
        return {facts["client"]: Update(model.with_vector(values), facts["examples"])}
    return {}
