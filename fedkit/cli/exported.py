"""`fedkit export`."""

from __future__ import annotations

import json
from pathlib import Path

from fedkit import codec, deploy
from fedkit.errors import ConfigError
from fedkit.registry import choose_task

__all__ = ["exported"]


def exported(run: Path, out: Path, task: str | None, best: bool) -> deploy.Exported:
    """Exports the last or best model of a saved run; raises `ConfigError` where the folder holds none."""
    facts, weights = run / "run.json", run / ("best.fedkit" if best else "model.fedkit")
    for path in (facts, weights):
        if not path.is_file():
            raise ConfigError(f"{path} is not there: RUN must be a folder that fedkit simulate --out wrote")
    saved = json.loads(facts.read_text())
    chosen = choose_task(task, saved["task"])
    module = codec.load(weights).to_module(chosen.build(saved["seed"]), chosen.travels)
    return deploy.export(module, chosen, out)
