"""What a Flower strategy tells its clients: a flat JSON object, which travels as one of the strategy's own vectors.

fedkit's wire moves no text from a strategy to clients, only named vectors: each element is one byte of the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from fedkit.errors import IncompatibleStrategy, PayloadError
from fedkit.weights import Vector

__all__ = ["CONFIG", "Config", "config_from", "config_to"]

Scalar: TypeAlias = bool | int | float | str
Config: TypeAlias = dict[str, Scalar | list[Scalar]]

CONFIG = "flower/config"
_BYTES = 1 << 16


def config_to(config: Mapping[str, Any]) -> Vector:
    """The vector; raises `IncompatibleStrategy` for what JSON does not hold, such as bytes, or for too much."""
    try:
        raw = json.dumps(dict(config), separators=(",", ":"), sort_keys=True).encode()
    except TypeError as error:
        raise IncompatibleStrategy(f"the config that goes to clients holds numbers and text alone: {error}") from None
    if len(raw) > _BYTES:
        raise IncompatibleStrategy(f"the config that goes to clients has at most {_BYTES} bytes, not {len(raw)}")
    return np.frombuffer(raw, dtype=np.uint8).astype(np.float32)


def config_from(vector: Vector) -> Config:
    """What `config_to` wrote; raises `PayloadError` for anything else."""
    with np.errstate(invalid="ignore"):
        raw = vector.astype(np.uint8)
    if vector.size > _BYTES or not np.array_equal(raw, vector):
        raise PayloadError("not a config: its elements are no bytes, or too many")
    try:
        found = json.loads(raw.tobytes())
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"not a config: {type(error).__name__}") from None
    if not isinstance(found, dict) or not all(map(_is_value, found.values())):
        raise PayloadError("not a config: it is no flat JSON object")
    return found


def _is_value(value: object) -> bool:
    return isinstance(value, Scalar) or (isinstance(value, list) and all(isinstance(one, Scalar) for one in value))
