"""A live table of rounds on the terminal, for those who call fedkit from Python."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from fedkit.rounds.journal import RoundRecord
from fedkit.strategy import Strategy

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["describe", "shown"]

Observer: TypeAlias = Callable[[RoundRecord], None]


@contextlib.contextmanager
def shown(strategy: Strategy, progress: bool | None, on_round: Observer | None) -> Iterator[Observer | None]:
    """An observer that moves a progress bar and passes records on; None where nobody watches."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield on_round
        return
    with _bar() as bar:
        line = bar.add_task(type(strategy).__name__, total=strategy.rounds, said="")

        def observe(record: RoundRecord) -> None:
            bar.update(line, completed=record.round, said=describe(record))
            if on_round is not None:
                on_round(record)

        yield observe


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
    ]
    return Progress(*columns, console=Console(stderr=True))


def describe(record: RoundRecord) -> str:
    """A round in a few words: clients, loss, metrics."""
    parts = [f"{len(record.clients)} clients"]
    if record.loss is not None:
        parts.append(f"loss {record.loss:.4f}")
    parts += [f"{'valid loss' if name == 'loss' else name} {value:.3f}" for name, value in record.metrics.items()]
    if record.refusals:
        parts.append(f"{len(record.refusals)} refused")
    return ", ".join(parts)
