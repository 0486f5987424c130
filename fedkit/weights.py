"""A model as a value: a manifest and one flat vector.

`Manifest` says which tensors there are, in which order; `Weights` adds one contiguous float32 numpy vector that holds
them all. Everything that is sent, summed, masked or stored is that vector.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import nn

from fedkit.errors import CastWarning, ManifestMismatch, ModelSealed, PayloadError, Reason, Refused

__all__ = ["BLOCK", "SEALED", "Binding", "Entry", "Exchange", "Manifest", "Vector", "Weights", "require_plausible"]

Vector: TypeAlias = npt.NDArray[np.float32]
Exchange: TypeAlias = Callable[[str], bool]

SEALED = "a sealed model"  # the one tensor of what stands for a model that is encrypted
DTYPES = ("float32", "float64", "float16", "bfloat16")
MAX_NAME = 512
MAX_TENSORS = 100_000
MAX_ELEMENTS = 1 << 36
BLOCK = 1 << 18  # elements that are folded or measured at a time
LARGEST = 1e18  # value of an update: no training comes near it, and its square is still a float32


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a model: its name, shape, the dtype the module keeps it in, and whether gradients change it.

    Raises `PayloadError` for anything a real tensor could not be.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    trainable: bool = True

    def __post_init__(self) -> None:
        """Refuses names, shapes and dtypes that no module has."""
        if not isinstance(self.name, str) or not 0 < len(self.name) <= MAX_NAME or not self.name.isprintable():
            raise PayloadError(f"a tensor's name must be 1 to {MAX_NAME} printable characters, got {self.name!r:.80}")
        if "" in self.name.split("."):
            raise PayloadError(f"a tensor's name must be words joined by single dots, got {self.name!r:.80}")
        if (
            type(self.shape) is not tuple
            or len(self.shape) > 16
            or not all(type(dim) is int and 0 <= dim <= MAX_ELEMENTS for dim in self.shape)
        ):
            raise PayloadError(f"{self.name}: a shape is at most 16 whole numbers from 0, got {self.shape!r:.80}")
        if self.dtype not in DTYPES:
            raise PayloadError(f"{self.name}: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r:.40}")
        if type(self.trainable) is not bool:
            raise PayloadError(f"{self.name}: trainable must be true or false, got {self.trainable!r:.40}")

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The ordered tensors of a model. Equal manifests have equal `digest`s, and the reverse."""

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        """Refuses two tensors of one name, and more than any machine could hold."""
        if len(self.entries) > MAX_TENSORS:
            raise PayloadError(f"a model has at most {MAX_TENSORS} tensors, got {len(self.entries)}")
        if len({entry.name for entry in self.entries}) != len(self.entries):
            raise PayloadError("two tensors of one model have the same name")
        if self.size > MAX_ELEMENTS:
            raise PayloadError(f"a model has at most {MAX_ELEMENTS} elements, got {self.size}")

    @functools.cached_property
    def size(self) -> int:
        """The number of elements of all tensors together."""
        return sum(entry.size for entry in self.entries)

    @functools.cached_property
    def slices(self) -> dict[str, slice]:
        """Where each tensor lies in the flat vector."""
        found, start = {}, 0
        for entry in self.entries:
            found[entry.name] = slice(start, start + entry.size)
            start += entry.size
        return found

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name."""
        return {entry.name: entry.shape for entry in self.entries}

    @functools.cached_property
    def digest(self) -> str:
        """BLAKE3 (hex) of the canonical JSON."""
        return blake3(self.to_json().encode()).hexdigest()

    @functools.cached_property
    def trainable(self) -> npt.NDArray[np.bool_]:
        """A mask over the flat vector: True where gradients change the model, False for buffers."""
        mask = np.zeros(self.size, dtype=bool)
        for entry in self.entries:
            mask[self.slices[entry.name]] = entry.trainable
        return mask

    @property
    def is_sealed(self) -> bool:
        """Whether what it announces is an encrypted model, as `fedkit.crypto.sealing` makes them."""
        return len(self.entries) == 1 and self.entries[0].name == SEALED

    def require_readable(self) -> None:
        """Raises `ModelSealed` for a model that is encrypted."""
        if self.is_sealed:
            raise ModelSealed(
                "this model is sealed: it can be passed on to the next site, and its values are not to be had here; "
                "fedkit open gives them to those for whom it was sealed"
            )

    def to_json(self) -> str:
        """The canonical text: the same manifest always gives the same characters."""
        rows = [[entry.name, list(entry.shape), entry.dtype, entry.trainable] for entry in self.entries]
        return json.dumps(rows, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that `to_json` wrote; raises `PayloadError` for anything else."""
        try:
            rows = json.loads(text)
            manifest = cls(tuple(Entry(name, tuple(shape), dtype, flag) for name, shape, dtype, flag in rows))
        except (ValueError, TypeError, RecursionError) as error:
            raise PayloadError(f"not a manifest: {type(error).__name__}") from None
        if manifest.to_json() != text:
            raise PayloadError("not a manifest: other characters than those that are written")
        return manifest

    def require_shapes(self, other: Manifest, what: str) -> None:
        """Raises `ManifestMismatch` unless both hold tensors of the same names and shapes, whatever trains them."""
        if list(self.shapes.items()) != list(other.shapes.items()):
            self.require(other, what)

    def require(self, other: Manifest, what: str = "the other model") -> None:
        """Raises `ManifestMismatch`, naming the first difference, unless both hold the same tensors."""
        if self is other or self.digest == other.digest:
            return
        for mine, theirs in zip(self.entries, other.entries, strict=False):
            if mine != theirs:
                raise ManifestMismatch(f"expected {_show(mine)}, but {what} has {_show(theirs)}")
        mine_n, theirs_n = len(self.entries), len(other.entries)
        raise ManifestMismatch(f"expected {mine_n} tensors, but {what} has {theirs_n}")


def _show(entry: Entry) -> str:
    return f"{entry.name} {entry.dtype}{list(entry.shape)}{'' if entry.trainable else ' (not trainable)'}"


class Weights:
    """A model's parameters as a value: `.manifest` and `.vector`, float32, contiguous, immutable by convention.

    Supports `+`, `-`, `*` and `/` with numbers and with weights of the same manifest, `@` as the inner product, and
    indexing by tensor name. Raises `ManifestMismatch` where two manifests differ.
    """

    __slots__ = ("__dict__", "manifest", "vector")

    is_stored = False  # whether the values lie in a file and are read when needed

    def __init__(self, manifest: Manifest, vector: npt.ArrayLike) -> None:
        self.manifest = manifest
        self.vector: Vector = np.ascontiguousarray(vector, dtype=np.float32)
        if self.vector.shape != (manifest.size,):
            raise ManifestMismatch(f"expected a vector of {manifest.size} elements, got shape {self.vector.shape}")

    @classmethod
    def from_module(cls, module: nn.Module, exchange: Exchange | None = None) -> Weights:
        """The floating-point parameters and buffers of `module`; integer buffers stay behind.

        `exchange(name)` says which of them travel. Warns with `CastWarning` for other dtypes than float32.
        """
        return Binding(module, exchange).read()

    @classmethod
    def zeros(cls, manifest: Manifest) -> Weights:
        """All elements zero."""
        return cls(manifest, np.zeros(manifest.size, dtype=np.float32))

    def to_module(self, module: nn.Module, exchange: Exchange | None = None) -> nn.Module:
        """Copies the values into `module` and returns it; raises `ManifestMismatch` before anything is changed."""
        Binding(module, exchange).write(self)
        return module

    def with_vector(self, vector: npt.ArrayLike) -> Weights:
        """Other values for the same tensors."""
        return Weights(self.manifest, vector)

    @functools.cached_property
    def digest(self) -> str:
        """BLAKE3 (hex) of the manifest's digest and the values' bytes."""
        return blake3(self.manifest.digest.encode()).update(self.vector.view(np.uint8).data).hexdigest()

    def block(self, start: int, out: Vector) -> Vector:
        """`len(out)` values from `start` on: a view, or `out` filled where they lie in a file."""
        return self.vector[start : start + len(out)]

    def norm(self) -> float:
        """The Euclidean norm, summed in float64 block by block."""
        self.manifest.require_readable()
        total, scratch = 0.0, np.empty(min(BLOCK, self.manifest.size), dtype=np.float32)
        for start in range(0, self.manifest.size, BLOCK):
            block = self.block(start, scratch[: self.manifest.size - start]).astype(np.float64)
            total += float(block @ block)
        return math.sqrt(total)

    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        if self.manifest.is_sealed:
            return True  # which was seen to where it was sealed
        with np.errstate(over="ignore", invalid="ignore"):
            square = np.dot(self.vector, self.vector)  # one fast pass; finite only if every element is
        return bool(np.isfinite(square)) or bool(np.isfinite(self.vector).all())

    def arrays(self) -> Iterator[tuple[str, Vector]]:
        """Each tensor's name and values, as views in its own shape."""
        for entry in self.manifest.entries:
            yield entry.name, self[entry.name]

    def __getitem__(self, name: str) -> Vector:
        self.manifest.require_readable()
        return self.vector[self.manifest.slices[name]].reshape(self.manifest.shapes[name])

    def _with(self, other: object, function: Callable[[Any, Any], Vector]) -> Weights:
        self.manifest.require_readable()
        if isinstance(other, Weights):
            self.manifest.require(other.manifest)
            return self.with_vector(function(self.vector, other.vector))
        if isinstance(other, int | float | np.floating | np.integer):
            return self.with_vector(function(self.vector, np.float32(other)))
        raise TypeError(f"weights combine with numbers and weights, not with {type(other).__name__}")

    def __add__(self, other: object) -> Weights:
        return self._with(other, np.add)

    def __radd__(self, other: object) -> Weights:
        return self._with(other, np.add)

    def __sub__(self, other: object) -> Weights:
        return self._with(other, np.subtract)

    def __rsub__(self, other: object) -> Weights:
        return self._with(other, lambda mine, theirs: np.subtract(theirs, mine))

    def __mul__(self, other: object) -> Weights:
        return self._with(other, np.multiply)

    def __rmul__(self, other: object) -> Weights:
        return self._with(other, np.multiply)

    def __truediv__(self, other: object) -> Weights:
        return self._with(other, np.divide)

    def __neg__(self) -> Weights:
        self.manifest.require_readable()
        return self.with_vector(-self.vector)

    def __matmul__(self, other: Weights) -> float:
        if not isinstance(other, Weights):
            return NotImplemented
        self.manifest.require(other.manifest)
        self.manifest.require_readable()
        return float(self.vector.astype(np.float64) @ other.vector.astype(np.float64))

    def __eq__(self, other: object) -> bool:
        """The same tensors with the same bits (so NaN equals itself, and 0.0 differs from -0.0)."""
        if not isinstance(other, Weights):
            return NotImplemented
        same = self.manifest.digest == other.manifest.digest
        return same and np.array_equal(self.vector.view(np.uint32), other.vector.view(np.uint32))

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        tensors = len(self.manifest.entries)
        return f"<Weights {self.vector.size:,} elements in {tensors} tensors, {self.digest[:12]}>"


class Binding:
    """The tensors of one module that travel, found once; reads and writes them as `Weights`.

    `local` holds the tensors that stay: integer buffers, and what `exchange` keeps back. A module may assign a buffer
    anew: reading sees the new tensor, and `restore` puts the first ones back.
    """

    def __init__(self, module: nn.Module, exchange: Exchange | None = None) -> None:
        travels, self.local = _split(module, exchange or _all)
        self._slots = [(part, key, t) for part in _slots(module) for key, t in part.items() if t is not None]
        places = {id(t): (part, key) for part, key, t in self._slots}
        self._places = [places.get(id(t)) for t in travels.values()]
        self._local_places = {name: places.get(id(t)) for name, t in self.local.items()}
        self._tensors = list(travels.values())
        self._views = _shared_views(self._tensors)
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self.manifest = Manifest(
            tuple(Entry(name, tuple(t.shape), _dtype(name, t), t.requires_grad) for name, t in travels.items())
        )
        _warn_about_casts(self.manifest)

    def read(self) -> Weights:
        """The values as they are now, copied."""
        if self._is_shared():
            return Weights(self.manifest, np.concatenate(self._views))
        return Weights(self.manifest, _flat(tensor.detach() for tensor in self._current()))

    def read_local(self) -> dict[str, torch.Tensor]:
        """The tensors that stay, as the module holds them now."""
        places = self._local_places.items()
        return {name: self.local[name] if place is None else place[0][place[1]] for name, place in places}

    def restore(self) -> None:
        """Every parameter and buffer of the module is again the tensor it was at first; values stay as they are."""
        for part, key, tensor in self._slots:
            part[key] = tensor

    def _current(self) -> list[torch.Tensor]:
        pairs = zip(self._places, self._tensors, strict=True)
        return [tensor if place is None else place[0][place[1]] for place, tensor in pairs]

    def read_change(self, received: Weights) -> Weights:
        """The values as they are now minus `received`."""
        if not self._is_shared():
            return self.read() - received
        change = np.empty_like(received.vector)
        for view, where in zip(self._views, self.manifest.slices.values(), strict=True):
            np.subtract(view, received.vector[where], out=change[where])
        return Weights(self.manifest, change)

    def read_gradients(self) -> Weights:
        """The gradients as they are now; zero where a tensor has none."""
        return Weights(
            self.manifest,
            _flat(torch.zeros_like(t) if t.grad is None else t.grad.to_dense() for t in self._tensors),
        )

    def write(self, weights: Weights) -> None:
        """Copies `weights` into the module; raises `ManifestMismatch` before anything is changed."""
        weights.manifest.require_readable()
        self.manifest.require(weights.manifest, "what was received")
        self.restore()
        if self._is_shared():
            for view, where in zip(self._views, self.manifest.slices.values(), strict=True):
                np.copyto(view, weights.vector[where])
            return
        for tensor, values in zip(self._tensors, self.split(weights.vector), strict=True):
            tensor.detach().copy_(values)

    def _is_shared(self) -> bool:
        """Whether the module still keeps its values where the views look."""
        return bool(self._views) and self._addresses == [tensor.data_ptr() for tensor in self._current()]

    def split(self, vector: Vector) -> list[torch.Tensor]:
        """The flat `vector` as tensors shaped and placed as the module's own, without a copy on the CPU."""
        if not self._tensors:
            return []
        flat = torch.from_numpy(vector if vector.flags.writeable else vector.copy()).to(self._tensors[0].device)
        sizes = [tensor.numel() for tensor in self._tensors]
        return [part.view(t.shape) for part, t in zip(torch.split(flat, sizes), self._tensors, strict=True)]

    def trainable(self) -> list[tuple[int, torch.Tensor]]:
        """The position and the tensor of every entry that gradients change."""
        return [(i, tensor) for i, tensor in enumerate(self._tensors) if tensor.requires_grad]


def _split(module: nn.Module, exchange: Exchange) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    travels: dict[str, torch.Tensor] = {}
    stays: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen or not isinstance(tensor, torch.Tensor):
            continue  # a tied tensor is listed under its first name only; extra state stays in the module
        seen.add(id(tensor))
        _require_own_memory(name, tensor)
        numbers = tensor.is_floating_point() or tensor.is_complex()
        target = travels if numbers and exchange(name) else stays
        target[name] = tensor
        if target is travels and tensor.is_complex():
            raise PayloadError(f"{name}: complex tensors cannot travel; keep real and imaginary parts as two tensors")
    return travels, stays


def _slots(module: nn.Module) -> Iterator[dict[str, Any]]:
    for part in module.modules():
        yield part._parameters  # noqa: SLF001
        yield part._buffers  # noqa: SLF001


def _require_own_memory(name: str, tensor: torch.Tensor) -> None:
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise PayloadError(f"{name}: its elements share memory, so it cannot be written; register a .clone() of it")


def _shared_views(tensors: list[torch.Tensor]) -> list[Vector]:
    """Flat numpy views of float32 tensors on the CPU, which are faster to copy; empty where any tensor is another."""
    plain = all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() and t.numel() for t in tensors
    )
    return [tensor.detach().view(-1).numpy() for tensor in tensors] if plain else []


def require_plausible(values: Vector) -> None:
    """Raises `Refused` where an update holds NaN, infinity, or a value beyond 1e18, which no training brings."""
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.dot(values, values)  # one fast pass; nearly always it says enough
    if square <= LARGEST**2:
        return
    if not np.isfinite(values).all():
        raise Refused(Reason.NOT_FINITE, "NaN or infinity in the update: lower the learning rate or check the data")
    if np.abs(values).max() > LARGEST:
        raise Refused(Reason.NORM, f"values beyond {LARGEST:g} in the update: lower the learning rate")


def _all(name: str) -> bool:  # noqa: ARG001
    return True


def _dtype(name: str, tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise PayloadError(f"{name}: dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return dtype


def _flat(tensors: Iterable[torch.Tensor]) -> Vector:
    parts = [tensor.reshape(-1).to(torch.float32) for tensor in tensors]
    if not parts:
        return np.zeros(0, dtype=np.float32)
    return torch.cat(parts).cpu().numpy()


def _warn_about_casts(manifest: Manifest) -> None:
    others = [entry for entry in manifest.entries if entry.dtype != "float32"]
    if others:
        dtypes = ", ".join(sorted({entry.dtype for entry in others}))
        text = f"{len(others)} tensors ({others[0].name} ...) are {dtypes}; they travel as float32"
        warnings.warn(text, CastWarning, stacklevel=4)
