"""Tables and bars: what people look at."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedkit.demo.compare import Row
from fedkit.demo.heart import HOSPITALS
from fedkit.result import Result
from fedkit.rounds.journal import RoundRecord

__all__ = ["busy", "comparison", "console", "errors", "print_json", "rounds", "test_scores"]

console = Console()
errors = Console(stderr=True)

_SHOWN = 18  # rounds a live table holds; longer runs show the evaluated ones


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))


def busy(what: str, quiet: bool) -> contextlib.AbstractContextManager[Any]:
    """A spinner beside `what` until the block ends."""
    return contextlib.nullcontext() if quiet else console.status(what)


@contextlib.contextmanager
def rounds(title: str, total: int) -> Iterator[Callable[[RoundRecord], None]]:
    """A table that grows with the rounds; long runs show about `_SHOWN` of them."""
    records: list[RoundRecord] = []
    every = max(-(-total // _SHOWN), 1)

    def seen() -> list[RoundRecord]:
        scored = [record for record in records if record.metrics]
        return scored or [record for record in records if record.round % every == 0 or record.round == total]

    with Live(_table(title, [], total), console=console, auto_refresh=False) as live:

        def observe(record: RoundRecord) -> None:
            records.append(record)
            if record in seen():
                live.update(_table(title, seen()[-_SHOWN - 4 :], total), refresh=True)

        yield observe
    if not console.is_terminal:
        console.print()  # a live table ends its last line only on a terminal


def _table(title: str, records: Sequence[RoundRecord], total: int) -> Table:
    names = [name for name in (records[-1].metrics if records else {}) if name != "loss"]
    metrics = names or sorted({name for record in records for name in record.metrics if name != "loss"})
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    refused = any(record.refusals for record in records)
    heads = ["round", "clients", "loss", "valid", *metrics, "s", "down", "up", *(["refused"] if refused else [])]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for record in records:
        scores = [_number(record.metrics.get(name)) for name in ("loss", *metrics)]
        counts = [f"{record.round}/{total}", str(len(record.clients)), _number(record.loss)]
        sizes = [f"{record.seconds:.2f}", _bytes(record.bytes_down), _bytes(record.bytes_up)]
        table.add_row(*counts, *scores, *sizes, *([str(len(record.refusals))] if refused else []))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f}{unit}" if unit == "B" else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError("unreachable")


def test_scores(result: Result) -> Table:
    """The final model on test data: pooled, and at each client."""
    names = list(result.test)
    table = Table(title="Test data, touched once", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("client")
    for name in names:
        table.add_column(name, justify="right")
    for client, scores in [*result.test_per_client.items(), ("all", result.test)]:
        table.add_row(client, *(_number(scores.get(name)) for name in names), style="bold" if client == "all" else "")
    return table


def comparison(rows: Sequence[Row]) -> Table:
    """Accuracy of each way to train, best in bold."""
    best = max(row.accuracy for row in rows)
    table = Table(title="Accuracy on test rows", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("trained by")
    for head in ("all", *HOSPITALS):
        table.add_column(head, justify="right")
    for row in rows:
        each = [f"{row.per_hospital[hospital]:.3f}" for hospital in HOSPITALS]
        table.add_row(row.name, f"{row.accuracy:.3f}", *each, style="bold" if row.accuracy == best else "")
    return table
