"""One thread a process, and one hypothesis profile: the same examples on every machine, none cut off by a clock."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="fedkit-tests-")  # signing keys are made there, not at home
os.environ["OMP_NUM_THREADS"] = "1"  # several test processes share the cores; torch reads this when it is loaded

import pytest
from hypothesis import HealthCheck, settings

# Formatting some of gRPC's tracebacks ends CPython 3.11 now and then; the records themselves are still captured.
logging.getLogger("grpc._cython.cygrpc").addFilter(lambda record: bool(setattr(record, "exc_info", None)) or True)

settings.register_profile(
    "fedkit",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fedkit")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Coverage slows Python down by half: it leaves out what goes over the same lines again and again.

    (Coverage's own way to pause slows down every later fork.)
    """
    if item.path.parent.name not in ("property", "attacks") and not item.get_closest_marker("unmeasured"):
        return (yield)
    tracers = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracers[0])
        threading.settrace(tracers[1])


@pytest.fixture(autouse=True)
def only_lasting_processes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coverage follows the federations that fixtures start for many tests, not what a single test starts and kills."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
