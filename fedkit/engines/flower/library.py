"""Flower itself, which is not there unless somebody has asked for it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any

from fedkit.errors import ConfigError

__all__ = ["flower", "identify", "quiet", "require_ray"]

# Both report their use over the network unless they are told not to, which nobody expects of a hospital's machine.
_SILENT = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def flower(module: str) -> Any:
    """The module `flwr.MODULE`; raises `ConfigError` where Flower is not installed, or is another one than is known.

    Flower's and Ray's reports of use are switched off, unless the environment says otherwise.
    """
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module(f"flwr.{module}")
    except ImportError as error:
        raise ConfigError(f"Flower 1.41 or newer is needed here ({error}): pip install fedkit[flower]") from None


def require_ray() -> None:
    """Raises `ConfigError` where Ray is missing, on which Flower simulates."""
    flower("app")
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Flower simulates on Ray, which is not installed: pip install fedkit[flower]")


def identify() -> None:
    """Lets messages be made in a process that is none of Flower's own, which otherwise says who makes them."""
    identity = flower("supercore.task_identity").TaskIdentity
    for name in ("task_id", "run_id", "node_id"):
        try:
            getattr(identity, name)
        except RuntimeError:
            setattr(identity, name, 1)


@contextlib.contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Flower's log, which tells a person of each step, keeps to `level`, and is as it was afterwards."""
    log = logging.getLogger("flwr")
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)
