"""State as bytes: what a strategy or a client keeps between rounds, bit for bit and without pickle.

    magic | length of the tree, 8 bytes little-endian | tree, canonical JSON | buffers, little-endian, in tree order

In the tree None, booleans, finite floats, ordinary text and whole numbers of 64 bits stand for themselves. Everything
else is a JSON array that begins with a tag, so nothing a state holds can be taken for one: ``["l", ...]`` list,
``["t", ...]`` tuple, ``["d", key, value, ...]`` dict, ``["a", dtype, shape]`` array, ``["n", dtype]`` numpy number,
``["w", manifest]`` weights, ``["f", hex]`` other floats, ``["i", hex]`` longer numbers, ``["s", hex]`` other text.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkit.errors import PayloadError, StateError
from fedkit.weights import Manifest, Weights

__all__ = ["pack", "parts", "unpack"]

_MAGIC = b"FEDPACK1"
_HEAD = struct.Struct("<8sQ")
_DEPTH = 64  # levels of nesting
_DIMENSIONS = 32
_LONG = 1 << 63
_BYTES = (1 << 63) - 1  # what numpy can address
_INTEGERS = ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8")
_DTYPES = frozenset((*_INTEGERS, "<f2", "<f4", "<f8", "<c8", "<c16"))


def pack(value: Any) -> bytes:
    """The bytes of `value`; raises `StateError`, naming the place, for what cannot be packed."""
    return b"".join(parts(value))


def parts(value: Any) -> Iterator[bytes | memoryview]:
    """The bytes of `value` piece by piece: the buffers are views of its arrays, not copies; raises `StateError`."""
    writer = _Writer()
    tree = _dumped(writer.node(value, ()))
    yield _HEAD.pack(_MAGIC, len(tree)) + tree
    yield from writer.buffers


def unpack(raw: bytes | memoryview) -> Any:
    """The value that was packed; raises `PayloadError` for any other bytes, before memory is taken for their claims."""
    raw = memoryview(raw).cast("B")
    if len(raw) < _HEAD.size:
        raise PayloadError("not a packed value: too short")
    magic, length = _HEAD.unpack(raw[: _HEAD.size])
    end = _HEAD.size + length
    if magic != _MAGIC or end > len(raw):
        raise PayloadError("not a packed value: another beginning, or less than the announced tree")
    reader = _Reader(raw[end:])
    value = reader.node(_loaded(bytes(raw[_HEAD.size : end])), 0)
    reader.finish()
    return value


def _dumped(tree: Any) -> bytes:
    return json.dumps(tree, separators=(",", ":"), allow_nan=False).encode()


def _loaded(text: bytes) -> Any:
    """The tree, if the text is exactly what would be written for it."""
    try:
        tree = json.loads(text)
        same = _dumped(tree) == text
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"not a packed value: {type(error).__name__} in its tree") from None
    if not same:
        raise PayloadError("not a packed value: its tree has other characters than those that are written")
    return tree


# -- single values that JSON would change ------------------------------------------------------------------------------


def _integer(value: int) -> Any:
    return value if -_LONG <= value < _LONG else ["i", hex(value)]


def _float(value: float) -> Any:
    return value if math.isfinite(value) else ["f", struct.pack("<d", value).hex()]


def _text(value: str) -> Any:
    """JSON would join two surrogates that Python keeps apart."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return ["s", value.encode("utf-8", "surrogatepass").hex()]
    return value


def _float_of(raw: str) -> float:
    value: float = struct.unpack("<d", bytes.fromhex(raw))[0]
    return value


_SCALARS: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any]]] = {
    "i": (lambda raw: int(raw, 16), _integer),
    "f": (_float_of, _float),
    "s": (lambda raw: bytes.fromhex(raw).decode("utf-8", "surrogatepass"), _text),
}
_PLAIN: dict[type, Callable[[Any], Any]] = {
    type(None): lambda value: value,
    bool: lambda value: value,
    int: _integer,
    float: _float,
    str: _text,
}


# -- writing -----------------------------------------------------------------------------------------------------------


class _Writer:
    """Turns a value into a tree for JSON and collects the buffers that go behind it."""

    def __init__(self) -> None:
        self.buffers: list[memoryview] = []

    def node(self, value: Any, path: tuple[Any, ...]) -> Any:
        """The tree of one value, which `path` leads to."""
        if len(path) > _DEPTH:
            raise StateError(f"{_place(path[:3])}... is nested deeper than {_DEPTH} levels")
        kind = type(value)
        if kind in _PLAIN:
            return _PLAIN[kind](value)
        if kind is list or kind is tuple:
            return ["l" if kind is list else "t", *(self.node(item, (*path, i)) for i, item in enumerate(value))]
        if kind is dict:
            return ["d", *self._pairs(value, path)]
        if isinstance(value, Weights):
            self._buffer(value.vector, "<f4")
            return ["w", value.manifest.to_json()]
        return self._numbers(value, path)

    def _pairs(self, value: dict[Any, Any], path: tuple[Any, ...]) -> Iterator[Any]:
        for key, inner in value.items():
            if type(key) not in (str, int, bool):
                raise StateError(f"{_place(path)} has the key {key!r:.80}; keys are text and whole numbers")
            yield _PLAIN[type(key)](key)
            yield self.node(inner, (*path, key))

    def _numbers(self, value: Any, path: tuple[Any, ...]) -> Any:
        if type(value) is not np.ndarray and not isinstance(value, np.generic):
            raise StateError(f"{_place(path)} is a {type(value).__name__}, which cannot be written down: {_ALLOWED}")
        dtype = value.dtype.newbyteorder("<").str
        if dtype not in _DTYPES or value.ndim > _DIMENSIONS:
            raise StateError(f"{_place(path)} is an array of {value.dtype}, which cannot be written down: {_ALLOWED}")
        self._buffer(value, dtype)
        return ["n", dtype] if isinstance(value, np.generic) else ["a", dtype, list(value.shape)]

    def _buffer(self, values: Any, dtype: str) -> None:
        self.buffers.append(np.ascontiguousarray(values, dtype=dtype).reshape(-1).view(np.uint8).data)


def _place(path: tuple[Any, ...]) -> str:
    """Where a value is, for people."""
    shown = ["a long number" if isinstance(key, int) and key.bit_length() > 64 else f"{key!r:.80}" for key in path]
    first = str(path[0])[:80] if path and isinstance(path[0], str) else "the value"
    return first + "".join(f"[{key}]" for key in (shown[1:] if path and isinstance(path[0], str) else shown))


_ALLOWED = "keep numbers, text, numpy arrays of numbers, Weights, and lists, tuples and dicts of them"


# -- reading -----------------------------------------------------------------------------------------------------------


class _Reader:
    """Turns a tree into the value; every buffer it asks for must be among the bytes that are really there."""

    def __init__(self, buffers: memoryview) -> None:
        self._left = buffers

    def finish(self) -> None:
        """Raises `PayloadError` where bytes are left over."""
        if self._left:
            raise PayloadError(f"not a packed value: {len(self._left)} bytes are left over")

    def node(self, tree: Any, depth: int) -> Any:
        """The value of one tree."""
        if depth > _DEPTH:
            raise PayloadError(f"not a packed value: nested deeper than {_DEPTH} levels")
        if type(tree) is not list:
            return _plain(tree)
        tag = tree[0] if tree and isinstance(tree[0], str) else ""
        if tag in _SCALARS:
            return _scalar(tag, tree)
        if tag not in _TAGS:
            raise PayloadError(f"not a packed value: there is no tag {tag!r:.20}")
        return _TAGS[tag](self, tree[1:], depth + 1)

    def sequence(self, items: list[Any], depth: int) -> list[Any]:
        """A list of values."""
        return [self.node(item, depth) for item in items]

    def mapping(self, items: list[Any], depth: int) -> dict[Any, Any]:
        """A dict, its keys and values taking turns."""
        if len(items) % 2:
            raise PayloadError("not a packed value: a key has no value")
        found: dict[Any, Any] = {}
        for tree, inner in zip(items[::2], items[1::2], strict=True):
            key = self.node(tree, depth) if type(tree) is not list or tree[:1] in (["i"], ["s"]) else None
            if type(key) not in (str, int, bool) or key in found:
                raise PayloadError("not a packed value: a key is no key, or there twice")
            found[key] = self.node(inner, depth)
        return found

    def array(self, items: list[Any], depth: int) -> npt.NDArray[Any]:  # noqa: ARG002
        """An array of the announced shape."""
        if len(items) != 2 or not _is_shape(items[1]):
            raise PayloadError("not a packed value: an array has no shape that an array can have")
        dtype, shape = _dtype(items[0]), items[1]
        if math.prod(dim or 1 for dim in shape) * dtype.itemsize > _BYTES:
            raise PayloadError("not a packed value: an array is larger than any")
        return self._take(math.prod(shape), dtype).reshape(shape)

    def number(self, items: list[Any], depth: int) -> Any:  # noqa: ARG002
        """A numpy number."""
        if len(items) != 1:
            raise PayloadError("not a packed value: a number has more than a dtype")
        return self._take(1, _dtype(items[0]))[0]

    def weights(self, items: list[Any], depth: int) -> Weights:  # noqa: ARG002
        """Weights of the announced manifest."""
        if len(items) != 1 or not isinstance(items[0], str):
            raise PayloadError("not a packed value: weights have no manifest")
        manifest = Manifest.from_json(items[0])
        return Weights(manifest, self._take(manifest.size, np.dtype("<f4")))

    def _take(self, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """The next `count` values, copied."""
        size = count * dtype.itemsize
        if size > len(self._left):
            raise PayloadError(f"not a packed value: {size} bytes are claimed, {len(self._left)} are there")
        raw, self._left = self._left[:size], self._left[size:]
        if dtype.kind == "b" and np.frombuffer(raw, dtype=np.uint8).max(initial=0) > 1:
            raise PayloadError("not a packed value: a boolean is neither 0 nor 1")
        return np.frombuffer(raw, dtype=dtype).astype(dtype.newbyteorder("="))


_TAGS: dict[str, Callable[[_Reader, list[Any], int], Any]] = {
    "l": _Reader.sequence,
    "t": lambda reader, items, depth: tuple(reader.sequence(items, depth)),
    "d": _Reader.mapping,
    "a": _Reader.array,
    "n": _Reader.number,
    "w": _Reader.weights,
}


def _plain(tree: Any) -> Any:
    """A value that stands for itself; the other spelling of what has a tag is refused."""
    if type(tree) not in _PLAIN or type(_PLAIN[type(tree)](tree)) is list:
        raise PayloadError("not a packed value: something is written in another way than it would be")
    return tree


def _scalar(tag: str, tree: list[Any]) -> Any:
    read, write = _SCALARS[tag]
    try:
        value = read(tree[1])
    except (ValueError, TypeError, IndexError, struct.error):
        raise PayloadError(f"not a packed value: {tag!r} is not what it should be") from None
    if write(value) != tree:
        raise PayloadError(f"not a packed value: {tag!r} is written in another way than it would be")
    return value


def _dtype(name: Any) -> np.dtype[Any]:
    if not isinstance(name, str) or name not in _DTYPES:
        raise PayloadError(f"not a packed value: there is no dtype {name!r:.20}")
    return np.dtype(name)


def _is_shape(shape: Any) -> bool:
    is_list = type(shape) is list and len(shape) <= _DIMENSIONS
    return is_list and all(type(dim) is int and 0 <= dim <= _BYTES for dim in shape)
