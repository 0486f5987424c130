"""Deals the rows of one data set to simulated clients: evenly, with skewed labels, or in shards of few labels.

Every split gives each client's row numbers by its name, and every row to exactly one client. It is a function of its
arguments alone; the order of the names does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedkit import rng
from fedkit.errors import ConfigError

__all__ = ["client_names", "dirichlet", "iid", "shards"]

Numbers: TypeAlias = npt.NDArray[np.int64]

_ALPHAS = (1e-6, 1e6)  # practically one class a client, and none but random differences; far beyond, floats give 0/0
_LEAST_SHARE = 1e-12  # no share is 0, so that a client stops drawing from a class only when the class is used up


def iid(count: int, clients: Sequence[str], seed: int = 0) -> dict[str, npt.NDArray[np.int64]]:
    """Deals shuffled rows in equal parts: no client gets two rows more than another.

    Returns the sorted row numbers, of 0 to `count` - 1, by client name. Raises `ConfigError` for an argument that makes
    no sense, and for fewer rows than clients.
    """
    names = client_names(clients)
    _require_whole("count", count, least=1)
    _require_rows("count", count, len(names), f"{len(names)} clients")
    order = _generator(seed, "iid").permutation(count)
    return _by_name(names, np.array_split(order, len(names)))


def dirichlet(
    labels: npt.ArrayLike, clients: Sequence[str], alpha: float, seed: int = 0, equal_sizes: bool = False
) -> dict[str, npt.NDArray[np.int64]]:
    """Deals rows with label skew: a small `alpha` gives each client few classes, a large one all of them.

    `labels` is one class a row, shaped (rows,). Returns the sorted row numbers by client name; every client gets a row.

    * By default each class is divided in shares drawn from Dirichlet(alpha, ..., alpha) over the clients, so that they
      differ in size too (Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022). Whom this leaves with nothing gets
      one row of whoever has most.
    * With `equal_sizes` no client gets two rows more than another. Each in turn draws its rows, without replacement, by
      class shares from Dirichlet(alpha N p), where p are the shares of the N classes among all rows: the Dir(alpha' p)
      of Hsu et al. 2019 (https://arxiv.org/abs/1909.06335) with alpha' = alpha N, so that `alpha` stands for one class
      in both kinds of split. A class that is used up is left out by those who come later; the last take what is left.

    Raises `ConfigError` for an argument that makes no sense, and for fewer rows than clients.
    """
    names, classes = client_names(clients), _classes(labels)
    _require_alpha(alpha)
    _require_rows("labels", len(classes), len(names), f"{len(names)} clients")
    draw = _generator(seed, "dirichlet", "equal sizes" if equal_sizes else "any sizes")
    held = np.bincount(classes)
    counts = (_equal_counts if equal_sizes else _class_counts)(held, len(names), alpha, draw)
    parts: list[list[Numbers]] = [[] for _ in names]
    for label, ends in enumerate(counts.cumsum(axis=0).T):
        rows = draw.permutation(np.flatnonzero(classes == label))
        for part, share in zip(parts, np.split(rows, ends[:-1]), strict=True):
            part.append(share)
    return _by_name(names, [np.concatenate(part) for part in parts])


def shards(
    labels: npt.ArrayLike, clients: Sequence[str], per_client: int = 2, seed: int = 0
) -> dict[str, npt.NDArray[np.int64]]:
    """Deals rows sorted by label, cut into equal shards, `per_client` of them to each client (McMahan et al. 2017).

    `labels` is one class a row, shaped (rows,). Returns the sorted row numbers by client name. Where all classes have
    equally many rows and the number of shards is a multiple of the number of classes, a shard holds one class, and a
    client at most `per_client`; elsewhere a shard may span a border between classes. Shards differ by one row at most.
    The paper: https://arxiv.org/abs/1602.05629.

    Raises `ConfigError` for an argument that makes no sense, and for fewer rows than shards.
    """
    names, classes = client_names(clients), _classes(labels)
    _require_whole("per_client", per_client, least=1)
    count = len(names) * per_client
    _require_rows("labels", len(classes), count, f"{count} shards ({len(names)} clients, per_client={per_client})")
    draw = _generator(seed, "shards")
    mixed = draw.permutation(len(classes))
    ends = np.arange(1, count) * len(classes) // count  # not array_split, whose cuts miss borders that these meet
    cuts = np.split(mixed[np.argsort(classes[mixed], kind="stable")], ends)
    hands = draw.permutation(count).reshape(len(names), per_client)
    return _by_name(names, [np.concatenate([cuts[shard] for shard in hand]) for hand in hands])


def _class_counts(held: Numbers, clients: int, alpha: float, draw: np.random.Generator) -> Numbers:
    """How many rows of each class each client gets, shaped (clients, classes), where each class is divided for itself.

    All ends of a class are rounded by one random offset: every count is within one row of its share, and right on
    average also where a class has fewer rows than there are clients.
    """
    shares = draw.dirichlet(np.full(clients, alpha), size=len(held))
    ends = np.floor(shares.cumsum(axis=1) * held[:, None] + draw.random((len(held), 1)))
    ends = np.minimum(ends, held[:, None])
    ends[:, -1] = held
    counts = np.diff(ends, axis=1, prepend=0).astype(np.int64).T
    for empty in np.flatnonzero(counts.sum(axis=1) == 0):
        richest = counts.sum(axis=1).argmax()
        label = counts[richest].argmax()
        counts[richest, label] -= 1
        counts[empty, label] += 1
    return counts


def _equal_counts(held: Numbers, clients: int, alpha: float, draw: np.random.Generator) -> Numbers:
    """How many rows of each class each client gets, shaped (clients, classes), with equal sums of the rows."""
    left, total = held.copy(), int(held.sum())
    shares = draw.dirichlet(alpha * len(held) * held / total, size=clients) + _LEAST_SHARE
    counts = np.zeros((clients, len(held)), dtype=np.int64)
    for client, share in enumerate(shares):
        wanted = total // clients + (client < total % clients)
        while wanted:
            open_share = share * (left > 0)
            drawn = np.minimum(draw.multinomial(wanted, open_share / open_share.sum()), left)
            counts[client] += drawn
            left -= drawn
            wanted -= int(drawn.sum())
    return counts


def _by_name(names: list[str], parts: list[Numbers]) -> dict[str, npt.NDArray[np.int64]]:
    return {name: np.sort(part).astype(np.int64) for name, part in zip(names, parts, strict=True)}


def _generator(seed: int, *labels: str) -> np.random.Generator:
    _require_whole("seed", seed)
    return rng.generator(seed, "split", *labels)


def client_names(clients: object) -> list[str]:
    """The names sorted; raises `ConfigError` unless they are one or more different ones."""
    names = list(clients) if isinstance(clients, Iterable) and not isinstance(clients, str) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f'clients must be one or more names, such as ["cleveland", "va"], got {clients!r:.80}')
    if len(set(names)) < len(names):
        raise ConfigError(f"clients must be different names, and one occurs twice in {clients!r:.80}")
    return sorted(names)


def _classes(labels: npt.ArrayLike) -> Numbers:
    """The class of each row as a number from 0."""
    right = "labels must be one class a row, numbers or text in an array of shape (rows,)"
    try:
        found = np.asarray(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{right}: {error}") from None
    if found.ndim != 1 or found.dtype.kind not in "biufUS":
        raise ConfigError(f"{right}, got {found.dtype} of shape {found.shape}")
    if found.dtype.kind == "f" and np.isnan(found).any():
        raise ConfigError(f"{right}, got NaN in row {int(np.isnan(found).argmax())}")
    return np.unique(found, return_inverse=True)[1].astype(np.int64)


def _require_alpha(alpha: object) -> None:
    number = isinstance(alpha, int | float | np.integer | np.floating) and not isinstance(alpha, bool)
    low, high = _ALPHAS
    if not number or not low <= alpha <= high:  # type: ignore[operator]
        raise ConfigError(f"alpha must be a number from {low:g} (strong skew) to {high:g} (none), got {alpha!r:.80}")


def _require_whole(name: str, value: object, least: int | None = None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):  # type: ignore[operator]
        wanted = "a whole number" if least is None else f"a whole number of {least} or more"
        raise ConfigError(f"{name} must be {wanted}, got {value!r:.80}")


def _require_rows(name: str, rows: int, least: int, what: str) -> None:
    if rows < least:
        raise ConfigError(f"{name}: {rows} rows are too few for {what}: each must get one or more")
