"""What 8 bits cost and bring: the depthwise CNN of examples/fashion/quantized.py, as it is deployed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "fashion"))

import quantized
from idx import find

from bench.table import Figure

__all__ = ["eight_bits"]


def eight_bits(folder: Path, out: Path) -> list[Figure]:
    """Accuracy, size and speed beside float32, as the bundles' passports have them; the bundles go to `out`."""
    exact, after, during = quantized.compare(find(folder), out)
    cost = during.measured
    figures = [
        Figure("float32, accuracy", exact.accuracy, ">= 0.9", f"{exact.measured.size_bytes:,} bytes"),
        Figure("quantised after training, points lost", _lost(after, exact), "<= 0.5", f"{after.accuracy:.4f}"),
        Figure("quantised in training, points lost", _lost(during, exact), "<= 0.2", f"{during.accuracy:.4f}"),
        Figure("agreement after training", after.measured.agreement or 0.0, ">= 0.99", "with PyTorch, validation rows"),
        Figure("agreement in training", cost.agreement or 0.0, ">= 0.99", "the same"),
        Figure("file", cost.size_ratio, "<= 0.26", f"{cost.size_bytes:,} bytes"),
        Figure("CPU time / PyTorch, batch 1", cost.torch_ratio["1"], "<= 0.35", "eager, one thread"),
    ]
    for batch, ratio in cost.cpu_ratio.items():
        figures.append(Figure(f"CPU time / fp32, batch {batch}", ratio, "<= 0.8", "both in ONNX Runtime, one thread"))
    return figures


def _lost(row: quantized.Row, exact: quantized.Row) -> float:
    return 100 * (exact.accuracy - row.accuracy)
