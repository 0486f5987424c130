"""A bundle's probe: a few made-up rows and what PyTorch gave for them, by which its files are checked anywhere.

The rows are no data. Where they are many numbers, the file holds the seed and the digest of the inputs in place of
them: number i of an input comes from the 16 bits u at i of SHAKE-256 over `fedkit-probe-1`, the seed and the input's
name, each followed by a zero byte; little-endian. It is u / 16384 - 2, in [-2, 2), where the input takes fractions, and
u mod 2 where it does not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedkit.config import Name, PositiveInt, Settings, parse
from fedkit.deploy.passport import TaskFacts, TensorFacts
from fedkit.errors import ConfigError, ExportError, PayloadError

__all__ = ["MOST_SHOWN", "Allowed", "Arrays", "Expected", "Probe", "apart", "drawn"]

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
Dtype: TypeAlias = Literal[
    "float16", "float32", "float64", "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"
]
Number = Annotated[float, Field(allow_inf_nan=False)]
Dims = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=16)]

_FREE_DIM = 8  # the size that a dimension without one takes
MOST_SHOWN = 20_000  # numbers written down, of all inputs and of all outputs
_MOST_VALUES = 1 << 26
_MOST_BYTES = 4 << 20


class Allowed(Settings):
    """How far a file in fewer bits was from float32 on the probe, and how far it may be elsewhere (both relative)."""

    difference: Number
    allowed: Number


class Expected(Settings):
    """What PyTorch gave for one output: its shape, and every `every`-th value in C order."""

    shape: Dims
    every: PositiveInt
    values: list[int | Number]

    @classmethod
    def of(cls, array: npt.NDArray[Any], most: int) -> Expected:
        """Of an array, at most about `most` values; raises `ExportError` where one is not finite."""
        if not np.isfinite(array).all():
            raise ExportError("PyTorch gives numbers for the probe that are not finite")
        every = max(-(-array.size // most), 1)
        return cls(shape=list(array.shape), every=every, values=array.ravel()[::every].tolist())


class _Given(Settings):
    dtype: Dtype
    shape: Dims
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    values: list[int | Number] | None

    @classmethod
    def of(cls, name: str, array: npt.NDArray[Any], seed: int, *, is_shown: bool) -> _Given:
        dtype = _known(name, str(array.dtype))
        if not is_shown and not np.array_equal(array, _stream(name, dtype, array.shape, seed)):
            raise ConfigError(f"the probe's inputs are more than {MOST_SHOWN} numbers: take those of probe.drawn()")
        values = array.ravel().tolist() if is_shown else None
        return cls(dtype=dtype, shape=list(array.shape), sha256=_digest(array), values=values)

    def read(self, name: str, seed: int) -> npt.NDArray[Any]:
        """The array; raises `PayloadError` where values, shape and digest are not one another's."""
        count = math.prod(self.shape)
        if count > _MOST_VALUES or (self.values is not None and len(self.values) != count):
            raise PayloadError(f"the probe's input {name} has another number of values than its shape {self.shape}")
        if self.values is None:
            array = _stream(name, self.dtype, tuple(self.shape), seed)
        else:
            array = _array(name, self.values, self.dtype).reshape(self.shape)
        if _digest(array) != self.sha256:
            raise PayloadError(f"the probe's input {name} does not have the digest that is written beside it")
        return array


class _File(Settings):
    format: Literal[1] = 1
    seed: int
    inputs: dict[str, _Given]
    outputs: dict[str, Expected]
    variants: dict[Name, Allowed] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Inputs by name, the batch first, and what is expected of each output.

    `seed` is that of `drawn`, where inputs come from there; `variants` says, by file name, how far another file may be
    from float32.
    """

    inputs: Arrays
    outputs: Mapping[str, Expected]
    seed: int = 0
    variants: Mapping[str, Allowed] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Arrays, outputs: Arrays, *, seed: int = 0) -> Probe:
        """Of what went into PyTorch, and what came out of it."""
        share = MOST_SHOWN // max(len(outputs), 1)
        return cls(inputs, {name: Expected.of(array, share) for name, array in outputs.items()}, seed)

    def apart(self, found: Arrays) -> float:
        """The largest difference to PyTorch, as `apart` has it."""
        _require_same(found, self.outputs)
        wanted = {name: _array(name, one.values, "float64") for name, one in self.outputs.items()}
        for name, one in self.outputs.items():
            if list(found[name].shape) != one.shape:
                raise ExportError(f"{name} has shape {list(found[name].shape)} where PyTorch gives {one.shape}")
        return apart({name: found[name].ravel()[:: one.every] for name, one in self.outputs.items()}, wanted)

    def to_json(self) -> str:
        """One line of JSON, of a megabyte at most.

        Raises `ConfigError` for inputs too large to be written down that do not come from `drawn`.
        """
        is_shown = sum(array.size for array in self.inputs.values()) <= MOST_SHOWN
        inputs = {name: _Given.of(name, one, self.seed, is_shown=is_shown) for name, one in self.inputs.items()}
        file = _File(seed=self.seed, inputs=inputs, outputs=dict(self.outputs), variants=dict(self.variants))
        return json.dumps(file.to_dict(), sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, raw: bytes) -> Probe:
        """What `to_json` wrote; raises `PayloadError`."""
        if len(raw) > _MOST_BYTES:
            raise PayloadError(f"a probe has at most {_MOST_BYTES} bytes, got {len(raw)}")
        try:
            file = parse(_File, json.loads(raw), where="probe")
        except (ValueError, TypeError, RecursionError) as error:
            raise PayloadError(f"not a probe: {error}") from None
        return cls(
            {name: one.read(name, file.seed) for name, one in file.inputs.items()},
            file.outputs,
            file.seed,
            file.variants,
        )


def drawn(task: TaskFacts, *, rows: int = 4, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Inputs of the task's shapes, the same on every machine; a dimension that may vary has 8."""
    return {one.name: _stream(one.name, _known(one.name, one.dtype), _shape(one, rows), seed) for one in task.inputs}


def apart(found: Arrays, wanted: Arrays) -> float:
    """The largest difference over all outputs, each relative to its largest wanted value; NaN where one is.

    Raises `ExportError` where names or shapes differ.
    """
    _require_same(found, wanted)
    worst = [0.0]
    for name, want in wanted.items():
        got = found[name].astype(np.float64)
        if got.shape != want.shape:
            raise ExportError(f"{name} has shape {got.shape} where {want.shape} is expected")
        scale = max(float(np.abs(want).max(initial=0.0)), 1e-6)
        worst.append(float(np.abs(got - want).max(initial=0.0)) / scale)
    return float(np.max(worst))


def _require_same(found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    if set(found) != set(wanted):
        raise ExportError(f"the outputs are {', '.join(sorted(found))}, and not {', '.join(sorted(wanted))}")


def _shape(tensor: TensorFacts, rows: int) -> tuple[int, ...]:
    return (rows, *(_FREE_DIM if dim is None else dim for dim in tensor.shape[1:]))


def _known(name: str, dtype: str) -> Dtype:
    known: Dtype | None = next((one for one in get_args(Dtype) if one == dtype), None)
    if known is None:
        raise ConfigError(f"input {name} is {dtype}, and a probe can be made of {', '.join(get_args(Dtype))}")
    return known


def _stream(name: str, dtype: Dtype, shape: tuple[int, ...], seed: int) -> npt.NDArray[Any]:
    words = b"".join(part.encode() + b"\0" for part in ("fedkit-probe-1", str(seed), name))
    bits = np.frombuffer(hashlib.shake_256(words).digest(2 * math.prod(shape)), "<u2").reshape(shape)
    return (bits / 16384 - 2).astype(dtype) if dtype.startswith("float") else (bits % 2).astype(dtype)


def _array(name: str, values: list[int | float], dtype: str) -> npt.NDArray[Any]:
    try:
        return np.array(values, dtype=dtype)
    except (ValueError, OverflowError) as error:
        raise PayloadError(f"the probe's {name} cannot be read as {dtype}: {error}") from None


def _digest(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()
