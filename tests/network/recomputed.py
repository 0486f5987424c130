"""The models that a run published, worked out again from its history and the updates its agents have stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import fedkit
from fedkit import history
from fedkit.aggregation import MeanFold
from fedkit.weights import Weights
from fedkit.work import Update

__all__ = ["require_recomputed"]


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
