"""What one row can do: with or without it, the sum of clipped gradients moves by the clip at most."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fedkit
from fedkit.privacy.clipping import BookKeeping, Clipped, Hooks, Way, row_losses

MODELS = {
    "dense": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), (6,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Flatten(), nn.Linear(40, 2)), (2, 3)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 2), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 4, 2), nn.Flatten(), nn.Linear(16, 2)
        ),
        (2, 4, 4),
    ),
}


def length(sums: list[torch.Tensor]) -> float:
    return float(torch.cat([part.reshape(-1).double() for part in sums]).norm())


@settings(max_examples=25)
@pytest.mark.parametrize("way", [BookKeeping, Hooks])
@pytest.mark.parametrize("name", MODELS)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    clip=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    scale=st.sampled_from([1e-2, 1.0, 1e2, 1e4]),
    outlier=st.sampled_from([1.0, 1e3, 1e6]),
)
def test_neighbours_differ_by_the_clip_at_most(name, way, seed, rows, clip, scale, outlier) -> None:
    make, shape = MODELS[name]
    source = torch.Generator().manual_seed(seed)
    task = fedkit.Task(name="toy", model=make, data=lambda client: None, loss=nn.MSELoss())
    module = task.build(seed)
    x, y = scale * torch.randn(rows + 1, *shape, generator=source), torch.randn(rows + 1, 2, generator=source)
    x[rows] *= outlier
    attached: Way = way(module)
    with attached:

        def sums(count: int) -> Clipped:
            return attached.sums(row_losses(task, module), (x[:count], y[:count]), count, clip)

        without, with_it = sums(rows), sums(rows + 1)
    moved = length([a - b for a, b in zip(with_it.sums, without.sums, strict=True)])
    assert moved <= clip * (1 + 1e-4)
    assert length(without.sums) <= rows * clip * (1 + 1e-4)
    expected = min(clip, float(with_it.norms[rows]))
    if float(with_it.norms[rows]) < 1e30:  # beyond, the factor is too small for float32, and the row counts for less
        assert moved == pytest.approx(expected, rel=1e-3, abs=1e-5 * rows * clip)
