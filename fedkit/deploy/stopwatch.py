"""What calls cost; and a program that runs ONNX files and prints that, and crashes instead of whoever exports.

The program is started by its path and imports nothing of fedkit, so that PyTorch's threads and memory do not take part.
Standard input brings JSON: paths of files, and for each batch size the path, type and shape of each input's bytes.
Standard output gives JSON: CPU seconds of one call, for each file and batch size.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["cpu_seconds", "main"]

_SLICE_S = 0.02  # of CPU time in one measurement
_TIMES = 7  # of which the least counts
_THREADS = 1  # several would wait for one another, and count that as work


def main() -> None:
    """Measures what standard input names."""
    asked = json.load(sys.stdin)
    sessions = [_session(path) for path in asked["files"]]
    found: list[dict[str, float]] = [{} for _ in sessions]
    for batch, inputs in asked["inputs"].items():
        feed = _feed(inputs)
        seconds = cpu_seconds([functools.partial(session.run, None, feed) for session in sessions])
        for one, own in zip(found, seconds, strict=True):
            one[batch] = own
    json.dump(found, sys.stdout)


def cpu_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """CPU seconds that each call takes at the least, of all of this process's threads; measured by turns."""
    counts = [_count(call) for call in calls]
    found = [float("inf") for _ in calls]
    for _ in range(_TIMES):  # by turns, so that a busy machine does not decide between them
        for at, (call, count) in enumerate(zip(calls, counts, strict=True)):
            found[at] = min(found[at], _seconds(call, count))
    return found


def _session(path: str) -> Any:
    import onnxruntime  # here, as whoever measures other calls may not have it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = _THREADS
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feed(inputs: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    return {name: np.fromfile(one["path"], dtype=one["dtype"]).reshape(one["shape"]) for name, one in inputs.items()}


def _count(call: Callable[[], object]) -> int:
    """How often it is called in a measurement, for that to be long enough."""
    call()
    return max(1, int(_SLICE_S / max(_seconds(call, 1), 1e-6)))


def _seconds(call: Callable[[], object], count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


if __name__ == "__main__":
    main()
