"""Names for tasks and strategies: entry points, or `module:attr` on the command line of the process that imports it.

Names come over the wire, code never does.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fedkit.errors import ConfigError
from fedkit.strategy import Strategy
from fedkit.task import Task

__all__ = ["add_strategy", "choose_task", "find_strategy", "find_task", "import_task", "strategies"]


_added: dict[str, type[Strategy]] = {}


def strategies() -> list[str]:
    """The registered strategies, sorted."""
    return sorted({*_registered("fedkit.strategies"), *_added})


def add_strategy(path: str) -> type[Strategy]:
    """Registers the strategy at `module:attr` in this process, under its class's name; raises `ConfigError`.

    Only for paths a person typed: never for one that came from elsewhere.
    """
    found = _import(path, "--strategy")
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise ConfigError(f"{path} is a {type(found).__name__}, not a subclass of fedkit.Strategy")
    _added[found.__name__] = found
    return found


def find_strategy(name: str) -> type[Strategy]:
    """The strategy class registered under `name`; raises `ConfigError`, naming the nearest."""
    if name in _added:
        return _added[name]
    found = _load("fedkit.strategies", name)
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise ConfigError(f"strategy {name!r} is registered, but is not a fedkit.Strategy")
    return found


def find_task(name: str) -> Task:
    """The task registered under `name`; raises `ConfigError`, naming the nearest."""
    return _as_task(_load("fedkit.tasks", name), name)


def choose_task(path: str | None, name: str | None) -> Task:
    """The task a person typed as `module:attr`, else the registered one; raises `ConfigError`."""
    if path is not None:
        return import_task(path)
    if name is None:
        raise ConfigError("run.task: name a registered task, or give --task module:attr")
    return find_task(name)


def import_task(path: str) -> Task:
    """The task at `module:attr`, looked up from the current folder too; raises `ConfigError`.

    Only for paths a person typed: never for one that came from elsewhere.
    """
    return _as_task(_import(path, "--task"), path)


def _import(path: str, option: str) -> Any:
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{option} must be module:attr, such as my_project.heart:task, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{option} {path}: {error}") from error


def _as_task(found: Any, name: str) -> Task:
    if not isinstance(found, Task):
        raise ConfigError(f"{name} is a {type(found).__name__}, not a fedkit.Task")
    return found


def _registered(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def _load(group: str, name: str) -> Any:
    known = _registered(group)
    if name not in known:
        kind = group.removeprefix("fedkit.").removesuffix("s").replace("strategie", "strategy")
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"registered are {', '.join(sorted(known)) or 'none'}"
        raise ConfigError(f"there is no {kind} {name!r}; {hint}")
    return known[name].load()
