"""Rules that a minority of liars cannot steer: they see single updates, and hold one block of each in memory.

A `Stack` takes updates as they come and gives them block by block in the order of client names, so that no result
depends on the order of arrival. The rules here are pure functions of a stack; none looks at example counts, which a
liar would choose.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from fedkit.errors import ConfigError, StorageError
from fedkit.spool import Payload, Spooled, Values
from fedkit.weights import Manifest, Vector, Weights

__all__ = ["Stack", "clipped_mean", "coordinate_median", "krum_scores", "mean_of", "norms", "trimmed_mean"]

T = TypeVar("T")
Block: TypeAlias = npt.NDArray[np.float32]  # (clients, elements), the clients in the order of their names
Numbers: TypeAlias = npt.NDArray[np.float64]

_BLOCK = (1 << 12, 1 << 16)  # elements of each update that are read at a time: the least and the most
_MATRIX = 1 << 20  # values of one block of all updates
_IN_MEMORY = 1 << 24  # values of updates that come in memory and may stay there; the others go into a file
_MOST_OPEN = 256  # files that are kept open
_THREADS = min(4, os.cpu_count() or 1)  # each has a block; which thread it is does not change a bit


class Stack:
    """Single updates of one model. Of each, one block is in memory at a time, wherever the update lies.

    What came over a network stays in its spool; updates in memory beyond 64 MB go into a file without a name, in the
    folder for temporary files. A context: it ends with that file. Raises `StorageError` where that folder is full.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._rows: dict[str, Vector | Values] = {}
        self._held = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.clear()
        if self._file is not None:
            self._file.close()

    @property
    def clients(self) -> tuple[str, ...]:
        """Whose updates these are, sorted by name: the rows of each block."""
        return tuple(sorted(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, client: str, update: Weights) -> None:
        """Takes one client's update; raises `ManifestMismatch` for one of another model."""
        self.manifest.require(update.manifest, f"the update of {client}")
        if client in self._rows:
            raise ConfigError(f"{client} has an update in this stack already")
        self._rows[client] = update.values if isinstance(update, Spooled) else self._kept(update.vector)

    def _kept(self, vector: Vector) -> Vector | Values:
        self._held += vector.size
        if self._held <= _IN_MEMORY:
            return vector
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed with the stack
            start = self._file.tell() // vector.itemsize
            self._file.write(vector.view(np.uint8).data)
            self._file.flush()
        except OSError as error:
            text = f"{tempfile.gettempdir()}: {error.strerror}; free space, or set TMPDIR to another folder"
            raise StorageError(text) from error
        return Values(Payload(Path("updates")), start, vector.size, self._file.fileno())

    def blocks(self, work: Callable[[int, Block], T]) -> list[T]:
        """What `work(start, block)` gives for each block of shape (clients, elements), in order; `work` may change it.

        Several threads work at blocks of their own. The size of a block depends on the number of clients alone.
        """
        least, most = _BLOCK
        length = max(least, min(most, _MATRIX // max(len(self._rows), 1)))
        starts = range(0, self.manifest.size, length)
        with self._opened() as rows, ThreadPoolExecutor(min(_THREADS, max(len(starts), 1))) as threads:
            return list(threads.map(lambda start: work(start, self._block(rows, start, length)), starts))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[list[Vector | Values]]:
        with contextlib.ExitStack() as files:
            rows = [self._rows[client] for client in self.clients]
            opened = [files.enter_context(r.opened()) if isinstance(r, Values) else r for r in rows[:_MOST_OPEN]]
            yield opened + rows[_MOST_OPEN:]

    def _block(self, rows: list[Vector | Values], start: int, length: int) -> Block:
        block = np.empty((len(rows), min(length, self.manifest.size - start)), dtype=np.float32)
        for into, row in zip(block, rows, strict=True):
            if isinstance(row, Values):
                row.read(start, into)
            else:
                into[:] = row[start : start + len(into)]
        return block


def coordinate_median(stack: Stack) -> Weights:
    """The median of each coordinate; of an even number, the mean of the middle two, rounded once to float32."""
    _require(stack, 1, "a median")

    def middle(block: Block) -> Numbers:
        block.sort(axis=0)
        count = len(block)
        both: Numbers = block[(count - 1) // 2].astype(np.float64) + block[count // 2]
        return 0.5 * both

    return _by_coordinate(stack, middle)


def trimmed_mean(stack: Stack, trim: int) -> Weights:
    """The mean of each coordinate without its `trim` largest and `trim` smallest values, in float64.

    Raises `ConfigError` unless there are more than 2 `trim` updates.
    """
    _require(stack, 2 * trim + 1, f"a mean without {trim} at each end")

    def inner(block: Block) -> Numbers:
        block.sort(axis=0)
        return _sum(block[trim : len(block) - trim]) / (len(block) - 2 * trim)

    return _by_coordinate(stack, inner)


def clipped_mean(stack: Stack, max_norm: float) -> Weights:
    """The mean of the updates, each scaled down to a Euclidean norm of `max_norm` where it is longer, in float64."""
    _require(stack, 1, "a mean")
    scales = [min(1.0, max_norm / norm) if norm else 1.0 for norm in norms(stack).tolist()]
    return _by_coordinate(stack, lambda block: _sum(block, scales) / len(block))


def mean_of(stack: Stack, clients: Collection[str]) -> Weights:
    """The unweighted mean of the updates of these clients, in float64."""
    rows = [i for i, client in enumerate(stack.clients) if client in clients]
    if not rows or len(rows) != len(clients):
        raise ConfigError(f"a mean needs different clients of the stack's {len(stack)}, got {sorted(clients)}")
    return _by_coordinate(stack, lambda block: _sum(block[rows]) / len(rows))


def norms(stack: Stack) -> Numbers:
    """The Euclidean norm of each update, in float64, by client name."""
    squares = stack.blocks(lambda _, block: np.array([_square(row) for row in block.astype(np.float64)]))
    lengths: Numbers = np.sqrt(sum(squares, np.zeros(len(stack))))
    return lengths


def krum_scores(stack: Stack, byzantine: int) -> Numbers:
    """For each of n updates, by client name: the sum of squared distances to its n - `byzantine` - 2 nearest others.

    Blanchard et al. 2017, section 4. Distances are sums of squared differences in float64, so that those between close
    updates are exact too. Raises `ConfigError` unless n >= 2 `byzantine` + 3.
    """
    _require(stack, 2 * byzantine + 3, f"Krum against {byzantine}")
    squares = sum(stack.blocks(lambda _, block: _distances(block)), np.zeros((len(stack), len(stack))))
    np.fill_diagonal(squares, np.inf)  # an update is not its own neighbour
    scores: Numbers = np.sort(squares, axis=1)[:, : len(stack) - byzantine - 2].sum(axis=1)
    return scores


def _distances(block: Block) -> Numbers:
    """Squared distances of each row to each other one, shaped (clients, clients)."""
    rows, found = block.astype(np.float64), np.zeros((len(block), len(block)))
    for i in range(len(rows) - 1):
        apart = rows[i + 1 :] - rows[i]
        found[i, i + 1 :] = found[i + 1 :, i] = [_square(row) for row in apart]
    return found


def _square(row: Numbers) -> float:
    return float(np.einsum("i,i->", row, row))  # not a BLAS product, whose bits depend on its number of threads


def _sum(rows: Block, scales: list[float] | None = None) -> Numbers:
    """The sum of the rows, each times its scale, one after the other."""
    total = np.zeros(rows.shape[1])
    for i, row in enumerate(rows):
        total += row if scales is None else np.float64(scales[i]) * row.astype(np.float64)
    return total


def _by_coordinate(stack: Stack, rule: Callable[[Block], Numbers]) -> Weights:
    out = np.empty(stack.manifest.size, dtype=np.float32)

    def work(start: int, block: Block) -> None:
        end = start + block.shape[1]
        out[start:end] = rule(block) + 0.0  # no negative zero: how a sort places it depends on the processor

    stack.blocks(work)
    return Weights(stack.manifest, out)


def _require(stack: Stack, least: int, what: str) -> None:
    if len(stack) < least:
        raise ConfigError(f"{what} needs at least {least} updates, and there are {len(stack)}")
