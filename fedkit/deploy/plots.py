"""The pictures of a model card: how the model learned, what each client gets, what each variant costs."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from fedkit.deploy.passport import Measured, Passport, Scores

__all__ = ["Curves", "in_order", "main_metric", "plots"]

Curves: TypeAlias = Mapping[str, Mapping[int, float | None]]  # by what is scored ("auroc"), by round

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe and Ito
_GREY = "#555555"
_NAMED = 24  # clients whose names fit beside each other


def plots(passport: Passport, curves: Curves) -> dict[str, bytes]:
    """PNG pictures by file name; one of which nothing is known is left out."""
    drawn = {
        "learning.png": _learning({name: _known(points) for name, points in curves.items()}, passport.run.round),
        "clients.png": _clients(passport),
        "variants.png": _variants(passport),
    }
    return {name: content for name, content in drawn.items() if content is not None}


def main_metric(passport: Passport) -> str:
    """The metric that pictures show: the task's first, or the loss where it has none."""
    return passport.task.metrics[0] if passport.task.metrics else "loss"


def _known(points: Mapping[int, float | None]) -> dict[int, float]:
    return {x: y for x, y in sorted(points.items()) if y is not None and math.isfinite(y)}


def _learning(curves: Mapping[str, Mapping[int, float]], chosen: int) -> bytes | None:
    """Losses beside other scores, because they have other units."""
    losses = {name: points for name, points in curves.items() if points and "loss" in name}
    others = {name: points for name, points in curves.items() if points and "loss" not in name}
    panels = [one for one in (("loss", losses), ("score", others)) if one[1]]
    if not panels:
        return None
    figure, axes = _figure(5.2 * len(panels), 3.8, len(panels))
    for panel, (label, lines) in zip(axes, panels, strict=True):
        for (name, points), colour in zip(lines.items(), itertools.cycle(_COLOURS), strict=False):
            panel.plot(list(points), list(points.values()), label=name, color=colour, marker="o", markersize=3.5)
        panel.axvline(chosen, color=_GREY, linestyle=":", linewidth=1, label="this model")
        panel.set_xlabel("round")
        panel.set_ylabel(label)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return _png(figure)


def _clients(passport: Passport) -> bytes | None:
    """One bar a client that releases its score, best first, and the score of all rows together."""
    metric = main_metric(passport)
    scores = _known_scores({one.pseudonym: one.test for one in passport.clients}, metric)
    if not scores:
        return None
    ranked = sorted(scores.items(), key=lambda one: one[1], reverse=metric != "loss")
    figure, (panel,) = _figure(min(max(4.8, 1.0 + 0.55 * len(ranked)), 12), 4.2)
    places = range(len(ranked))
    bars = panel.bar(places, [score for _, score in ranked], 0.7, color=_COLOURS[0])
    pooled = passport.test.get(metric)
    if pooled is not None:
        panel.axhline(pooled, color=_COLOURS[1], linestyle="--", label=f"all rows together: {pooled:.3f}")
        _legend_above(panel)
    if len(ranked) <= _NAMED:
        panel.bar_label(bars, fmt="%.2f", fontsize=7)
        panel.set_xticks(places, [name for name, _ in ranked], rotation=45, ha="right", fontsize=8)
    else:
        panel.set_xticks([])
        panel.set_xlabel(f"{len(ranked)} clients, best first")
    panel.set_ylabel(f"{metric} on test rows")
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    return _png(figure)


def _known_scores(scores: Mapping[str, Scores | None], metric: str) -> dict[str, float]:
    found = {name: (one or {}).get(metric) for name, one in scores.items()}
    return {name: score for name, score in found.items() if score is not None}


def _variants(passport: Passport) -> bytes | None:
    """File size and CPU time of each variant over float32, one group of bars each; the shipped one stands out."""
    if len(passport.gate) < 2:
        return None
    batches = in_order(batch for one in passport.gate for batch in one.cpu_ratio)
    kinds = {"file size": [one.size_ratio for one in passport.gate]}
    for batch in batches:
        kinds[f"CPU time, batch {batch}"] = [one.cpu_ratio.get(batch, 0.0) for one in passport.gate]
    figure, (panel,) = _figure(max(4.8, 1.6 + 1.3 * len(passport.gate)), 3.8)
    width = 0.8 / len(kinds)
    for i, ((label, ratios), colour) in enumerate(zip(kinds.items(), itertools.cycle(_COLOURS), strict=False)):
        places = [group + (i - (len(kinds) - 1) / 2) * width for group in range(len(passport.gate))]
        bars = panel.bar(places, ratios, width, label=label, color=colour)
        panel.bar_label(bars, fmt="%.2f", fontsize=7)
    names = [f"{one.variant}\n{_verdict(passport, one)}" for one in passport.gate]
    panel.set_xticks(range(len(names)), names)
    panel.axhline(1.0, color=_GREY, linestyle="--", linewidth=1)
    panel.set_ylabel("over float32 (less is better)")
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    _legend_above(panel)
    return _png(figure)


def _verdict(passport: Passport, one: Measured) -> str:
    if one.variant == passport.shipped:
        return "shipped"
    return "passed" if one.passed else "refused"


def in_order(batches: Iterable[str]) -> list[str]:
    """Batch sizes, each once, the smallest first."""
    return sorted(set(batches), key=lambda one: (len(one), one))


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _legend_above(panel: Any) -> None:
    panel.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
