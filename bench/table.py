"""Figures with their targets, as one table, and alternating measurement of two things."""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

__all__ = ["Figure", "alternate", "show", "timed"]

_COMPARE = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, what it should be, and a word on how it came about.

    `target` begins with <=, >= or ==; it is empty where the number is only told.
    """

    name: str
    value: float
    target: str
    note: str = ""

    @property
    def reached(self) -> bool:
        """Whether the value keeps to its target."""
        if not self.target:
            return True
        sign, bound = self.target.split()
        return _COMPARE[sign](self.value, float(bound))


def alternate(one: Callable[[], float], other: Callable[[], float], times: int = 5) -> tuple[float, float, float]:
    """Seconds of both, in turn, one warm-up each: (median ratio one/other, median one, median other)."""
    one(), other()
    pairs = [(one(), other()) for _ in range(times)]
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def timed(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def show(title: str, figures: list[Figure]) -> bool:
    """Prints the table; whether every target is reached."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for head in ("figure", "measured", "target", "", "how"):
        table.add_column(head, justify="right" if head == "measured" else "left")
    for figure in figures:
        value = f"{figure.value:.4g}"
        verdict = "[red]MISSED[/red]" if not figure.reached else "ok" if figure.target else ""
        table.add_row(figure.name, value, figure.target, verdict, figure.note)
    Console().print(table)
    return all(figure.reached for figure in figures)
