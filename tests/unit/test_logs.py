"""What libraries log is an event like any other: one JSON object a line, without arguments, texts or tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import asyncio, logging
from fedkit import logs
logs.configure("json")
logs.configure("json")
log = logging.getLogger("grpc._cython.cygrpc")
try:
    raise ValueError("canary-4711")
except ValueError:
    log.exception("Unexpected [%s] raised", "canary-4712")
log.warning("to be heard")
log.info("not to be heard")
"""


def test_what_libraries_log_is_one_json_object_a_line_and_holds_no_data() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert "canary" not in done.stderr + done.stdout
    first, second = [json.loads(line) for line in done.stderr.splitlines()]
    assert (first["event"], first["library"], first["error"]) == ("library", "grpc._cython.cygrpc", "ValueError")
    assert first["said"] == "Unexpected [%s] raised"
    assert second["said"] == "to be heard"
