"""What the opened sums of shared noise mean."""

from __future__ import annotations

from dataclasses import replace

from fedkit.aggregation import Mean
from fedkit.crypto.ring import Words
from fedkit.errors import RoundAbandoned
from fedkit.rounds.layout import Layout
from fedkit.weights import Manifest
from fedkit.work import Gradient

__all__ = ["clients_mean", "rate_of", "rows_mean"]


def rate_of(work: Gradient, rows: float) -> float:
    """With what probability each row takes part, where clients have `rows` on average: the same one for all clients.

    So many draw `batch_size` on average over the clients, each in proportion to its rows, and a row counts as much
    wherever it is.
    """
    return 1.0 if work.batch_size == "all" else min(work.batch_size / max(rows, 1.0), 1.0)


def rows_mean(layout: Layout, total: Words, clients: tuple[str, ...], manifest: Manifest) -> Mean:
    """The sum of clipped gradients over the rows that these clients draw on average: rate times all of them."""
    mean = layout.mean(total, clients, manifest)
    if layout.noise is None or not mean.examples:
        raise RoundAbandoned("nobody had any rows.")
    return _over(mean, layout.noise.rate * mean.examples)


def clients_mean(layout: Layout, total: Words, clients: tuple[str, ...], manifest: Manifest, expected: float) -> Mean:
    """The sum of clipped updates over the clients that are drawn on average."""
    return _over(layout.mean(total, clients, manifest), expected)


def _over(mean: Mean, count: float) -> Mean:
    """From the mean over clients to the sum over `count`."""
    return replace(mean, update=(len(mean.clients) / count) * mean.update, loss=None)
