"""Models as Flower's strategies and clients know them: one named array a tensor, in the shape of the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedkit.engines.flower.library import flower
from fedkit.errors import RunError
from fedkit.weights import Weights

__all__ = ["from_arrays", "to_arrays"]


def to_arrays(weights: Weights) -> Any:
    """An ArrayRecord of all tensors, by name."""
    app = flower("app")
    return app.ArrayRecord({name: app.Array(np.ascontiguousarray(values)) for name, values in weights.arrays()})


def from_arrays(arrays: Mapping[str, Any], like: Weights, maker: str) -> Weights:
    """The weights in an ArrayRecord that `maker` has made; raises `RunError` for other tensors than those of `like`."""
    vector, shapes = np.empty_like(like.vector), like.manifest.shapes
    if set(arrays) != set(shapes):
        other = sorted(set(arrays) ^ set(shapes))
        raise RunError(f"{maker} has made another model than it was given: they differ in {', '.join(other[:5])}")
    for name, where in like.manifest.slices.items():
        values = np.asarray(arrays[name].numpy())
        if values.shape != shapes[name]:
            raise RunError(f"{maker} has made {name} of shape {values.shape}, where {shapes[name]} was given")
        vector[where] = values.ravel()
    return like.with_vector(vector)
