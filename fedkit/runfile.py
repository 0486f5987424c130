"""A run as a TOML file: the same settings as the Python objects, checked the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field

from fedkit import registry
from fedkit.config import Evaluation, Name, PositiveInt, Privacy, Settings, parse, read_toml
from fedkit.deploy.settings import Export
from fedkit.errors import ConfigError
from fedkit.strategy import Strategy

__all__ = ["RunFile", "RunSection", "SimulationSection", "read"]

_CHARACTERS = 256 << 10  # of a run file that travels


class RunSection(Settings):
    """`[run]`: what is trained.

    A round on a network begins when `min_clients` are there (None: the strategy's quorum, else 2).
    """

    name: Name
    task: str | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    min_clients: PositiveInt | None = None


class SimulationSection(Settings):
    """`[simulation]`: who takes part and how many processes work."""

    clients: tuple[str, ...] = ()
    workers: PositiveInt = 1
    threads: PositiveInt | None = None
    device: str = "auto"


class RunFile(Settings):
    """A whole run file. `strategy` holds a registered `name` and that strategy's own settings.

    `[export]` has the result handed over as a bundle, `simulate --out` and `run --out` write it beside the model.
    """

    run: RunSection
    strategy: dict[str, Any]
    evaluate: Evaluation | None = None
    privacy: Privacy = Privacy()
    export: Export | None = None
    simulation: SimulationSection = SimulationSection()

    def build_strategy(self) -> Strategy:
        """The strategy with its settings; raises `ConfigError` that names the field."""
        settings = dict(self.strategy)
        name = settings.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"strategy.name: must be given; registered are {', '.join(registry.strategies())}")
        return parse(registry.find_strategy(name), settings, where="strategy")

    def to_json(self) -> str:
        """The run file as it travels, without what stays with whoever submits it; raises `ConfigError`."""
        evaluate = None if self.evaluate is None else self.evaluate.to_dict()
        values = {"run": self.run.to_dict(), "strategy": self.strategy, "evaluate": evaluate}
        values["privacy"] = self.privacy.to_dict()
        try:
            return json.dumps(values, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.run.name}: a setting of the strategy does not travel: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> RunFile:
        """What `to_json` wrote, from whomever it came; raises `ConfigError` for anything else."""
        if len(text) > _CHARACTERS:
            raise ConfigError(f"a run file has at most {_CHARACTERS} characters, got {len(text)}")
        try:
            values = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the run file is not JSON: {type(error).__name__}") from None
        if not isinstance(values, dict):
            raise ConfigError("the run file must be a JSON object with run and strategy")
        file = parse(cls, values)
        if file.run.task is None:
            raise ConfigError("run.task: must be given")
        return file


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def read(path: Path) -> RunFile:
    """The run file at `path`; raises `ConfigError` with one line a problem."""
    values = read_toml(path)
    try:
        found = parse(RunFile, values, where="")
        found.build_strategy()
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return found
