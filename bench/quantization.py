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
    """Accuracy, size and speed in ONNX Runtime on one core, beside float32; the models go to `out`."""
    exact, as_a_whole, after, during = quantized.compare(find(folder), out)
    figures = [
        Figure("float32, accuracy", exact.accuracy, ">= 0.9", f"{exact.size_bytes:,} bytes"),
        Figure("one scale a tensor, points lost", _lost(as_a_whole, exact), "", "quantised after training"),
        Figure("quantised after training, points lost", _lost(after, exact), "<= 0.5", f"{after.accuracy:.4f}"),
        Figure("quantised in training, points lost", _lost(during, exact), "<= 0.2", f"{during.accuracy:.4f}"),
    ]
    figures.append(Figure("file", during.size_bytes / exact.size_bytes, "<= 0.26", f"{during.size_bytes:,} bytes"))
    for batch, spent in during.cpu_ms.items():
        note = f"{spent:.3f} ms against {exact.cpu_ms[batch]:.3f}"
        figures.append(Figure(f"CPU time, batch {batch}", spent / exact.cpu_ms[batch], "<= 0.8", note))
    return figures


def _lost(row: quantized.Row, exact: quantized.Row) -> float:
    return 100 * (exact.accuracy - row.accuracy)
