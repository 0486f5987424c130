"""What `fedkit.Result.save` writes of a run besides its models: the fields of `run.json`, read back and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedkit.config import Engine, Evaluation, Privacy, Settings, parse
from fedkit.deploy.folders import read_file
from fedkit.errors import ConfigError
from fedkit.rounds.call import Refusal
from fedkit.rounds.journal import RoundRecord

__all__ = ["BestRound", "SavedRun", "read"]

_BYTES = 1 << 30  # of run.json


class BestRound(Settings):
    """The best round: its scores on validation data, and on test data where those were asked for."""

    round: int
    metrics: dict[str, float]
    test: dict[str, float]


class SavedRun(Settings):
    """A run as `fedkit.Result.to_dict` has it; `strategy` holds the registered name and the settings.

    `privacy` is None only of a run that was not saved, where nobody has said yet what protects it.
    """

    name: str
    task: str
    engine: Engine
    privacy: Privacy | None
    evaluate: Evaluation | None
    strategy: dict[str, Any]
    seed: int
    clients: tuple[str, ...]
    history: tuple[RoundRecord, ...]
    abandoned: tuple[RoundRecord, ...]
    test: dict[str, float]
    test_per_client: dict[str, dict[str, float]]
    refusals: tuple[Refusal, ...]
    best: BestRound | None


def read(folder: Path) -> SavedRun:
    """A run that `fedkit.Result.save` wrote; raises `ConfigError` where the folder holds none, `PayloadError`."""
    path = folder / "run.json"
    if not path.is_file():
        wanted = "RUN must be a run's name, or a folder that fedkit simulate --out or fedkit run --out wrote"
        raise ConfigError(f"{path} is not there: {wanted}")
    try:
        values = json.loads(read_file(path, _BYTES))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not what fedkit writes there: {error}") from None
    found = parse(SavedRun, values, where=str(path))
    if found.privacy is None:  # it must not be taken for a run that nothing protected
        raise ConfigError(f"{path}: privacy: it must say what protected the run")
    return found
