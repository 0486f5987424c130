"""The four files of Fashion-MNIST, checked before they are believed."""

from __future__ import annotations

import argparse
import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedkit.errors import DataError

CLASSES = 10
FILES = {
    "train images": "train-images-idx3-ubyte.gz",
    "train labels": "train-labels-idx1-ubyte.gz",
    "test images": "t10k-images-idx3-ubyte.gz",
    "test labels": "t10k-labels-idx1-ubyte.gz",
}
UNSIGNED_BYTE = 0x08
MAX_ITEMS = 100_000
REMEDY = "fetch the file again, unchanged, from the repository zalandoresearch/fashion-mnist"

Labels: TypeAlias = npt.NDArray[np.int64]


def read_idx(path: Path, item_shape: Sequence[int] = ()) -> npt.NDArray[np.uint8]:
    """The unsigned bytes of an idx .gz file, whose items have `item_shape`; raises `DataError`.

    The format: two zero bytes, one byte for the dtype, one for the number of dimensions, each dimension as a big-endian
    32-bit number, then the values. Every claim is checked before memory is taken for it.
    """
    try:
        with gzip.open(path, "rb") as file:
            shape = _shape(file, path, tuple(item_shape))
            values = _take(file, path, math.prod(shape), f"the values of shape {_times(shape)}")
            if file.read(1):
                raise DataError(f"{path}: there is more than the values of shape {_times(shape)}: {REMEDY}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}): {REMEDY}") from None
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _shape(file: gzip.GzipFile, path: Path, item_shape: tuple[int, ...]) -> tuple[int, ...]:
    zeros, dtype, dims = struct.unpack(">HBB", _take(file, path, 4, "the magic number"))
    if zeros != 0:
        raise DataError(f"{path}: not an idx file: its magic number does not begin with two zero bytes: {REMEDY}")
    if dtype != UNSIGNED_BYTE:
        raise DataError(f"{path}: the dtype code is 0x{dtype:02x}, expected 0x08 (unsigned byte): {REMEDY}")
    if dims != 1 + len(item_shape):
        raise DataError(f"{path}: {dims} dimensions, expected {1 + len(item_shape)}: are images and labels swapped?")
    shape = struct.unpack(f">{dims}I", _take(file, path, 4 * dims, "the dimensions"))
    if shape[1:] != item_shape or not 0 < shape[0] <= MAX_ITEMS:
        wanted = _times([f"(1 to {MAX_ITEMS:,})", *item_shape])
        raise DataError(f"{path}: the shape is {_times(shape)}, expected {wanted}: {REMEDY}")
    return shape


def _take(file: gzip.GzipFile, path: Path, count: int, what: str) -> bytes:
    found = file.read(count)
    if len(found) != count:
        raise DataError(f"{path}: {what} need {count:,} bytes, the file holds only {len(found):,} more: {REMEDY}")
    return found


def _times(shape: Sequence[object]) -> str:
    return " x ".join(map(str, shape))


def find(folder: Path) -> Path:
    """The folder with the four files: `folder` or its `fashion_mnist`; raises `DataError`, naming those missing."""
    inner = folder / "fashion_mnist"
    folder = inner if inner.is_dir() else folder
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: there is no {', '.join(missing)}: give --data the folder that holds all four files")
    return folder


def load(folder: Path, part: str) -> tuple[npt.NDArray[np.float32], Labels]:
    """Images as floats from 0 to 1, shaped (n, 1, 28, 28), and labels from 0 to 9; raises `DataError`."""
    images = read_idx(folder / FILES[f"{part} images"], (28, 28))
    labels = read_idx(folder / FILES[f"{part} labels"])
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {part} images but {len(labels)} labels: are the files from one set?")
    if labels.max() >= CLASSES:
        raise DataError(f"{folder}: there is a {part} label {labels.max()}, expected 0 to {CLASSES - 1}: {REMEDY}")
    return images[:, None].astype(np.float32) / 255, labels.astype(np.int64)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, `--data` added to it; ends the program where no folder is given."""
    parser.add_argument("--data", type=Path, default=os.environ.get("FEDKIT_DATA"), help="folder with the four files")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give --data DIR, or set FEDKIT_DATA, to the folder with the four Fashion-MNIST .gz files")
    return arguments
