"""`fedkit server` and `fedkit client`: the two processes that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedkit import logs

__all__ = ["attending", "coordinating"]


def coordinating(tasks: list[str], strategies: list[str], form: Any, given: dict[str, Any], tethered: bool) -> None:
    """Runs a coordinator until it is told to end."""
    from fedkit import registry
    from fedkit.config import parse
    from fedkit.server.process import CoordinatorSettings, coordinate

    logs.configure(form)
    for path in strategies:
        registry.add_strategy(path)
    settings = parse(CoordinatorSettings, {key: value for key, value in given.items() if value is not None}, where="")
    coordinate(settings, {task.name: task for task in map(registry.import_task, tasks)}, tethered=tethered)


def attending(config: Path | None, form: Any, given: dict[str, Any], tethered: bool) -> None:
    """Runs an agent until it is told to end."""
    from fedkit.client.process import attend
    from fedkit.client.settings import read

    logs.configure(form)
    attend(read(config, **given), tethered=tethered)
