"""Runs ONNX files and prints what they cost; a program of its own, that crashes instead of whoever exports.

It is started by its path and imports nothing of fedkit, so that PyTorch's threads and memory do not take part. Standard
input brings JSON: paths of files, and for each batch size the path, type and shape of each input's bytes. Standard
output gives JSON: CPU seconds of one call, for each file and batch size.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime

__all__ = ["main"]

_SLICE_S = 0.02  # of CPU time in one measurement
_TIMES = 7  # of which the least counts
_THREADS = 1  # several would wait for one another, and count that as work


def main() -> None:
    """Measures what standard input names."""
    asked = json.load(sys.stdin)
    sessions = [_session(path) for path in asked["files"]]
    feeds = {batch: _feed(inputs) for batch, inputs in asked["inputs"].items()}
    found = [{batch: float("inf") for batch in feeds} for _ in sessions]
    for batch, feed in feeds.items():
        counts = [_count(session, feed) for session in sessions]
        for _ in range(_TIMES):  # by turns, so that a busy machine does not decide between them
            for one, session, count in zip(found, sessions, counts, strict=True):
                one[batch] = min(one[batch], _seconds(session, feed, count))
    json.dump(found, sys.stdout)


def _session(path: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = _THREADS
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feed(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: np.fromfile(one["path"], dtype=one["dtype"]).reshape(one["shape"]) for name, one in inputs.items()}


def _count(session: Any, feed: dict[str, Any]) -> int:
    """How many calls a measurement takes to be long enough."""
    session.run(None, feed)
    return max(1, int(_SLICE_S / max(_seconds(session, feed, 1), 1e-6)))


def _seconds(session: Any, feed: dict[str, Any], count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        session.run(None, feed)
    return (time.process_time() - start) / count


if __name__ == "__main__":
    main()
