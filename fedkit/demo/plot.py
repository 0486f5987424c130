"""The demo's picture: how each strategy learns, and what each hospital gets."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkit.codec import write_atomically
from fedkit.demo.compare import ALONE, POOLED, Row
from fedkit.demo.heart import HOSPITALS
from fedkit.rounds.journal import RoundRecord

__all__ = ["draw", "draw_privacy"]

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#555555", "#bbbbbb")  # Okabe and Ito


def draw(path: Path, histories: Mapping[str, Sequence[RoundRecord]], rows: Sequence[Row]) -> Path:
    """Saves the curves of `histories` beside the bars of `rows` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves, bars = figure.subplots(1, 2, width_ratios=(1, 1.25))
    colours = dict(zip([*histories, ALONE, POOLED], [*_COLOURS[: len(histories)], *_COLOURS[-2:]], strict=True))
    _curves(curves, histories, colours)
    _bars(bars, rows, colours)
    figure.suptitle("Heart disease at four hospitals: one model, no row leaves its hospital", fontsize=13)
    return _saved(figure, path)


def draw_privacy(path: Path, curves: Mapping[str, Mapping[float, Sequence[float]]], without: float) -> Path:
    """Saves accuracy against epsilon, each with the spread of its seeds, above what is reached without privacy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for (name, points), colour in zip(curves.items(), _COLOURS, strict=False):
        middle = [sum(found) / len(found) for found in points.values()]
        axes.plot(list(points), middle, label=name, color=colour, marker="o", markersize=5)
        low, high = [min(found) for found in points.values()], [max(found) for found in points.values()]
        axes.fill_between(list(points), low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(without, color=_COLOURS[-2], linestyle="--", label="FedAvg without privacy")
    axes.set_xscale("log")
    ticks = list(next(iter(curves.values())))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("epsilon of each hospital (more is less private)")
    axes.set_ylabel("accuracy on all test rows")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower right")
    axes.set_title("Heart disease at four hospitals: what privacy of each row costs", fontsize=11)
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomically(path, buffer.getvalue())
    return path


def _curves(axes: Any, histories: Mapping[str, Sequence[RoundRecord]], colours: Mapping[str, str]) -> None:
    for name, history in histories.items():
        scored = [record for record in history if record.metrics]
        share = [record.round / len(history) for record in scored]
        loss = [record.metrics["loss"] for record in scored]
        axes.plot(share, loss, label=f"{name} ({len(history)})", color=colours[name], marker="o", markersize=4)
    axes.set_xlabel("share of the run (rounds in brackets)")
    axes.set_ylabel("validation loss, all hospitals")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    axes.set_title("Learning", fontsize=11)


def _bars(axes: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    groups = ["all", *HOSPITALS]
    width = 0.85 / len(rows)
    for i, row in enumerate(rows):
        heights = [row.accuracy, *(row.per_hospital.get(hospital, 0.0) for hospital in HOSPITALS)]
        places = [group + (i - (len(rows) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, heights, width, label=row.name, color=colours[row.name])
    axes.set_xticks(range(len(groups)), ["all test rows", *HOSPITALS])
    axes.set_ylim(0.4, 1.0)
    axes.set_ylabel("accuracy on test rows")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    axes.set_title("What each hospital gets", fontsize=11)
