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

__all__ = ["Watcher", "describe", "shown"]

Observer: TypeAlias = Callable[[RoundRecord], None]


class Watcher:
    """Passes records on; `say` tells whoever looks on what the run waits for, where anybody does."""

    def __init__(self, on_round: Observer | None) -> None:
        self._on_round = on_round

    def __call__(self, record: RoundRecord) -> None:
        """One more round is committed."""
        if self._on_round is not None:
            self._on_round(record)

    def say(self, text: str) -> None:
        """Shows a few words until the next round."""


class _Bar(Watcher):
    def __init__(self, bar: Progress, strategy: Strategy, on_round: Observer | None) -> None:
        super().__init__(on_round)
        self._bar = bar
        self._line = bar.add_task(type(strategy).__name__, total=strategy.rounds, said="")

    def __call__(self, record: RoundRecord) -> None:
        self._bar.update(self._line, completed=record.round, said=describe(record))
        super().__call__(record)

    def say(self, text: str) -> None:
        self._bar.update(self._line, said=text)


@contextlib.contextmanager
def shown(strategy: Strategy, progress: bool | None, on_round: Observer | None) -> Iterator[Watcher]:
    """A watcher that moves a progress bar, where there is a terminal or `progress` is True, and passes records on."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield Watcher(on_round)
        return
    with _bar() as bar:
        yield _Bar(bar, strategy, on_round)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}", markup=False),
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
