"""Messages and payloads as Flower's records: one ConfigRecord of bytes, one ArrayRecord of raw float32."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedkit.engines.flower.library import flower
from fedkit.errors import PayloadError
from fedkit.weights import Vector

__all__ = ["from_records", "to_records"]

_MESSAGE, _PAYLOAD = "message", "payload"
_STYPE = "fedkit.float32"  # little-endian values and nothing around them


def to_records(message: bytes, payload: Vector) -> Any:
    """A RecordDict of both."""
    app = flower("app")
    content = app.RecordDict({_MESSAGE: app.ConfigRecord({_MESSAGE: message})})
    if payload.size:
        raw = payload.astype("<f4", copy=False).tobytes()
        array = app.Array(dtype="float32", shape=(payload.size,), stype=_STYPE, data=raw)
        content[_PAYLOAD] = app.ArrayRecord({_PAYLOAD: array})
    return content


def from_records(content: Any) -> tuple[bytes, Vector]:
    """What `to_records` wrote; raises `PayloadError` for anything else. Nothing in it is unpickled."""
    said = content.config_records.get(_MESSAGE, {}).get(_MESSAGE)
    if not isinstance(said, bytes):
        raise PayloadError("the message is not one of fedkit's: is it another app's?")
    array = content.array_records.get(_PAYLOAD, {}).get(_PAYLOAD)
    if array is None:
        return said, np.zeros(0, dtype=np.float32)
    if (array.dtype, array.stype, len(array.shape)) != ("float32", _STYPE, 1):
        raise PayloadError(f"a payload is one flat vector of float32, got {array.dtype} as {array.stype:.40}")
    if len(array.data) != 4 * math.prod(array.shape):
        raise PayloadError(f"a payload of shape {array.shape} came in {len(array.data)} bytes")
    return said, np.frombuffer(array.data, dtype="<f4")
