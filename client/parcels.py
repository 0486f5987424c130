"""What came with an assignment, as it lies in a file: mapped, so that only what is looked at is read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedkit.protos import agents_pb2 as pb
from fedkit.protos import convert
from fedkit.rounds.assignment import Parcel
from fedkit.weights import Manifest, Vector, Weights

__all__ = ["fetched_parcel"]


def fetched_parcel(message: pb.Assignment, fetched: tuple[Path | str, Manifest] | None) -> Parcel:
    """The parcel of an assignment; an empty one where nothing came. Raises `PayloadError` for extras that are none."""
    if fetched is None:
        return Parcel(Weights.zeros(Manifest(())))
    path, manifest = fetched
    return _read(path, manifest, convert.extras_from_proto(message.extras, manifest.size))


def _read(path: Path | str, manifest: Manifest, extras: Mapping[str, int]) -> Parcel:
    """The model in a file, and the extra vectors of these lengths behind it."""
    values = _mapped(path)
    found: dict[str, Vector] = {}
    start = manifest.size
    for name, size in extras.items():
        found[name] = values[start : start + size]
        start += size
    return Parcel(Weights(manifest, values[: manifest.size]), found)


def _mapped(path: Path | str) -> Vector:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return np.zeros(0, np.float32)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype="<f4")
