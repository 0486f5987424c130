"""One thread a process, and one hypothesis profile: the same examples on every machine, none cut off by a clock."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # several test processes share the cores; torch reads this when it is loaded

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fedkit",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fedkit")
