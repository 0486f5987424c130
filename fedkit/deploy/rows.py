"""Rows for a network, from a CSV or from a folder of pictures, a batch at a time and each number looked at."""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedkit.config import PositiveInt, Settings
from fedkit.deploy.passport import TensorFacts
from fedkit.errors import ConfigError

__all__ = ["Batch", "Pictures", "Table", "pictures_in"]

Row: TypeAlias = tuple[int, list[str]]  # its line number, its cells

_ENDINGS = (".png", ".jpg", ".jpeg")
_NAMED = 12  # columns that a message lists


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows: what names each (nothing, where none does), the array, and how far the input is read, of how much."""

    names: list[str]
    array: npt.NDArray[Any]
    done: int
    total: int


class Table(Settings):
    """How a CSV is read. `columns` and `label` are names in its header; digits are positions, from 1.

    `columns` are the network's inputs in its order, by default all but `label`, which names rows in the output.
    `has_header` says whether the first line is one; None: where its inputs are no numbers.
    """

    columns: list[str] | None = None
    label: str | None = None
    has_header: bool | None = None
    batch: PositiveInt = 256

    def batches(self, path: Path, tensor: TensorFacts) -> Iterator[Batch]:
        """All rows in batches of the tensor's type and shape.

        Raises `ConfigError` with the line of the first row that does not fit.
        """
        try:
            with open(path, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
                rows = _rows(csv.reader(file, strict=True))
                total = path.stat().st_size
                for names, array in self._grouped(path, rows, tensor):
                    yield Batch(names, array, min(raw.tell(), total), total)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not a CSV in UTF-8: {error}") from None

    def _grouped(
        self, path: Path, rows: Iterator[Row], tensor: TensorFacts
    ) -> Iterator[tuple[list[str], npt.NDArray[Any]]]:
        first = next(rows, None)
        if first is None:
            raise ConfigError(f"{path} has no rows")
        reader = _Reader.of(self, path, first[1], tensor)
        pending = [] if reader.skips_first else [first]
        for row in rows:
            if len(pending) == self.batch:
                yield reader.read(pending)
                pending = []
            pending.append(row)
        if not pending:
            raise ConfigError(f"{path} has a header and no rows")
        yield reader.read(pending)


def _rows(reader: Any) -> Iterator[Row]:
    """Lines that are not blank."""
    return ((reader.line_num, cells) for cells in reader if cells)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Which cells of a line are inputs, which one names it, and what numbers they must be."""

    path: Path
    width: int
    inputs: list[int]
    label: int | None
    names: list[str]
    dtype: str
    shape: tuple[int, ...]
    skips_first: bool

    @classmethod
    def of(cls, table: Table, path: Path, first: list[str], tensor: TensorFacts) -> _Reader:
        shape = _fixed(tensor)
        label = None if table.label is None else _position(path, first, table.label)
        if table.columns is None:
            inputs = [i for i in range(len(first)) if i != label]
        else:
            inputs = [_position(path, first, one) for one in table.columns]
        if len(inputs) != math.prod(shape):
            raise ConfigError(
                f"{path}: the model takes {math.prod(shape)} numbers a row, and {len(inputs)} columns are given;"
                " name the right ones, in the model's order"
            )
        skips = _is_header(table, path, first, inputs)
        heads = first if skips else [str(i) for i in range(1, len(first) + 1)]
        return cls(path, len(first), inputs, label, heads, tensor.dtype, shape, skips)

    def read(self, rows: Sequence[Row]) -> tuple[list[str], npt.NDArray[Any]]:
        values = [[self._number(line, cells, i) for i in self.inputs] for line, cells in map(self._whole, rows)]
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=self.dtype)
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if bad.size:
            raise ConfigError(f"{self.path}, line {rows[bad[0]][0]}: a number is too large for {self.dtype}")
        names = [] if self.label is None else [cells[self.label] for _, cells in rows]
        return names, array.reshape(len(rows), *self.shape)

    def _whole(self, row: Row) -> Row:
        line, cells = row
        if len(cells) != self.width:
            raise ConfigError(f"{self.path}, line {line}: {len(cells)} cells, and not {self.width}")
        return row

    def _number(self, line: int, cells: list[str], place: int) -> float | int:
        found = _number(cells[place], self.dtype)
        if found is None:
            what = f"column {self.names[place]} is {cells[place]!r:.60}"
            kind = "a finite number" if self.dtype.startswith("float") else f"a whole number of {self.dtype}"
            raise ConfigError(f"{self.path}, line {line}: {what}, and not {kind}")
        return found


def _number(cell: str, dtype: str) -> float | int | None:
    """The number in a cell; None where there is none that a network could take."""
    is_whole = not dtype.startswith("float")
    try:
        found = int(cell) if is_whole else float(cell)
    except ValueError:
        return None
    low, high = _range(dtype) if is_whole else (-math.inf, math.inf)
    return found if "_" not in cell and math.isfinite(found) and low <= found <= high else None


@functools.cache
def _range(dtype: str) -> tuple[int, int]:
    """The least and the largest whole number of a type."""
    return (0, 1) if dtype == "bool" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))


def _position(path: Path, first: list[str], column: str) -> int:
    """Where a column is, by its name in the first line or by its position from 1."""
    if column.isdecimal():
        found = [int(column) - 1] if 1 <= int(column) <= len(first) else []
    else:
        found = [i for i, name in enumerate(first) if name.strip() == column]
    if len(found) == 1:
        return found[0]
    has = ", ".join(first[:_NAMED]) + (", ..." if len(first) > _NAMED else "")
    what = f"{len(found)} columns" if found else "no column"
    raise ConfigError(f"{path} has {what} {column!r:.60}; line 1 is {has:.300}")


def _is_header(table: Table, path: Path, first: list[str], inputs: list[int]) -> bool:
    """Whether the first line names columns, which it must where one is given by its name."""
    if any(not name.isdecimal() for name in (*(table.columns or ()), table.label or "0")):
        if table.has_header is False:
            raise ConfigError(f"{path}: a column is given by its name, which needs a header; give its position from 1")
        return True
    if table.has_header is not None:
        return table.has_header
    numbers = [_number(first[i], "float64") is not None for i in inputs]
    if any(numbers) and not all(numbers):
        raise ConfigError(f"{path}: line 1 is half numbers; say whether it is a header (--header or --no-header)")
    return not all(numbers)


def _fixed(tensor: TensorFacts) -> tuple[int, ...]:
    shape = tuple(dim for dim in tensor.shape[1:] if dim is not None)
    if len(shape) < len(tensor.shape) - 1:
        raise ConfigError(f"{tensor.name} has dimensions that vary: call the model through onnxruntime yourself")
    return shape


class Pictures(Settings):
    """How pictures are read: `values` says whether pixels go from 0 to 1 or to 255 where the network takes fractions.

    They are not resized: a network that was trained on other sizes than its own would answer nonsense quietly.
    """

    values: Literal["unit", "byte"] = "unit"
    batch: PositiveInt = 32

    def batches(self, paths: Sequence[Path], tensor: TensorFacts) -> Iterator[Batch]:
        """All pictures, as (batch, channels, height, width); raises `ConfigError` with the name of a bad one."""
        shape = _fixed(tensor)
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ConfigError(
                f"{tensor.name} takes rows of shape {list(shape)}, and pictures are (1 or 3, height, width)"
            )
        for start in range(0, len(paths), self.batch):
            some = paths[start : start + self.batch]
            array = np.stack([_pixels(path, shape) for path in some])
            scaled = array / 255 if tensor.dtype.startswith("float") and self.values == "unit" else array
            yield Batch([path.name for path in some], scaled.astype(tensor.dtype), start + len(some), len(paths))


def pictures_in(folder: Path) -> list[Path]:
    """The PNG and JPEG files of a folder by name; raises `ConfigError` where there is none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    if not found:
        raise ConfigError(f"{folder} holds no picture: {', '.join(_ENDINGS)}")
    return found


def _pixels(path: Path, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """One picture as (channels, height, width) of 0 to 255."""
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("pictures need Pillow: pip install pillow") from None
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.size != (shape[2], shape[1]):
                size = f"{image.size[0]} x {image.size[1]}"
                raise ConfigError(f"{path} is {size} pixels, and the model takes {shape[2]} x {shape[1]}: resize it")
            pixels = np.asarray(image.convert("L" if shape[0] == 1 else "RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} cannot be read as a picture: {error}") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
