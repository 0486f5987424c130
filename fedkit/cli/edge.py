"""The edge at which every error becomes one clear message."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from typing import Annotated

import typer

from fedkit.errors import FedkitError

__all__ = ["HERE", "Json", "LogForm", "Tethered", "edge"]

HERE = "127.0.0.1:8443"  # where a coordinator is that nobody has given the address of
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output instead of tables.")]

Tethered = Annotated[bool, typer.Option("--tethered", hidden=True, help="End when standard input does.")]


class LogForm(enum.StrEnum):
    """How a process writes its events."""

    AUTO = "auto"
    JSON = "json"
    TEXT = "text"


@contextlib.contextmanager
def edge() -> Iterator[None]:
    """An error that fedkit knows ends with its message and exit code 1; everything else keeps its traceback."""
    try:
        yield
    except FedkitError as error:
        _say(str(error), "red")
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stop:
        _say(str(stop) or "stopped; nothing half-written was left behind", "yellow")
        raise typer.Exit(130) from None


def _say(text: str, style: str) -> None:
    from fedkit.cli import show  # an agent that starts has no use for tables

    show.errors.print(f"fedkit: {text}", style=style, markup=False, highlight=False)
