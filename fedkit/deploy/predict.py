"""A bundle's answers for a file of rows or a folder of pictures, as a CSV. The bundle is verified first."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedkit.codec import write_atomically
from fedkit.deploy import runtime
from fedkit.deploy.rows import Batch, Pictures, Table, pictures_in
from fedkit.deploy.verify import FP32, Verified
from fedkit.errors import ConfigError, ExportError, StorageError

__all__ = ["Predicted", "predict"]

Watch: TypeAlias = Callable[[int, int], None]  # how much of the input is done, of how much


@dataclass(frozen=True, slots=True)
class Predicted:
    """What was written where: rows, and the names of the columns."""

    path: Path
    rows: int
    columns: tuple[str, ...]


def predict(
    bundle: Verified,
    source: Path,
    out: Path,
    *,
    table: Table = Table(),
    pictures: Pictures = Pictures(),
    use_fp32: bool = False,
    watch: Watch | None = None,
) -> Predicted:
    """Writes `out`: one line a row of `source`, a CSV or a folder of pictures, with the columns of each output.

    An output of several columns also has one that names the largest, from 0 (`_argmax`). With a label, or for
    pictures, the first column names the row. `out` is there when all of it is, and not before.

    Raises `ConfigError` for an input that does not fit the model, `ExportError` where the model does not run.
    """
    inputs = bundle.passport.task.inputs
    if len(inputs) != 1:
        raise ConfigError(f"the model takes {len(inputs)} inputs; predict can fill one: call it through onnxruntime")
    _require_apart(bundle, source, out)
    in_folder = source.is_dir()
    batches = pictures.batches(pictures_in(source), inputs[0]) if in_folder else table.batches(source, inputs[0])
    running = runtime.session(bundle.models[FP32] if use_fp32 else bundle.shipped)
    writer = _Writer(running, inputs[0].name, "file" if in_folder else table.label)
    try:
        write_atomically(out, writer.lines(batches, watch))
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror or error}; it must be possible to write there") from None
    return Predicted(out, writer.rows, tuple(writer.columns))


def _require_apart(bundle: Verified, source: Path, out: Path) -> None:
    """Refuses to write over the input, and into a bundle, which would not be one any more."""
    place = out.resolve()
    if place == source.resolve() or place.is_dir():
        raise ConfigError(f"{out} is the input or a folder: name another file")
    if bundle.folder.resolve() in place.parents:
        raise ConfigError(f"{out} lies in the bundle, which holds what was signed and nothing else: name another place")


class _Writer:
    """Lines of CSV for batches; counts rows, and knows its columns once the first batch is through."""

    def __init__(self, running: Any, feed: str, head: str | None) -> None:
        self._running = running
        self._feed = feed
        self._head = [] if head is None else [head]
        self.columns: list[str] = []
        self.rows = 0

    def lines(self, batches: Iterator[Batch], watch: Watch | None) -> Iterator[bytes]:
        """The file in pieces, the header first."""
        for batch in batches:
            found = runtime.run(self._running, {self._feed: batch.array})
            tables = [_columns(name, array, len(batch.array)) for name, array in found.items()]
            columns = [*self._head, *itertools.chain.from_iterable(names for names, _ in tables)]
            if not self.columns:
                self.columns = columns
                yield _csv([columns])
            if columns != self.columns:
                raise ExportError(f"the model gives {len(columns)} columns for one batch, {len(self.columns)} before")
            self.rows += len(batch.array)
            yield _csv(_joined(batch.names, [values for _, values in tables]))
            if watch is not None:
                watch(batch.done, batch.total)


def _columns(name: str, array: npt.NDArray[Any], rows: int) -> tuple[list[str], npt.NDArray[Any]]:
    """The columns of one output and their values as text, (rows, columns)."""
    if array.ndim == 0 or len(array) != rows:
        raise ExportError(f"{name} has shape {array.shape} for {rows} rows: the model does not answer row by row")
    flat = array.reshape(rows, -1)
    if flat.shape[1] == 1:
        return [name], flat.astype(str)
    names = ["_".join([name, *map(str, place)]) for place in np.ndindex(array.shape[1:])]
    if array.ndim > 2:
        return names, flat.astype(str)
    largest = flat.argmax(axis=1)[:, None]
    return [*names, f"{name}_argmax"], np.concatenate([flat.astype(str), largest.astype(str)], axis=1)


def _joined(names: Sequence[str], tables: Sequence[npt.NDArray[Any]]) -> list[list[str]]:
    values = np.concatenate(tables, axis=1).tolist()
    return [[name, *row] for name, row in zip(names, values, strict=True)] if names else values


def _csv(rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
