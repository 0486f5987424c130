"""A bundle in a server that speaks the Open Inference Protocol, as examples/serving shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "serving"
MLSERVER = os.environ.get("FEDKIT_MLSERVER", "")

pytestmark = [
    pytest.mark.skipif(not MLSERVER, reason="make extras says in FEDKIT_MLSERVER where MLServer is"),
    pytest.mark.timeout(400),  # what was just installed is compiled when it is first imported
]


def run(cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE / "main.py"), "--mlserver", MLSERVER]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=350)


def test_the_server_answers_as_pytorch_does_and_the_example_prints_what_its_readme_shows(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    shown = (EXAMPLE / "README.md").read_text().split("```\n")[-2]
    numbers = re.compile(r"[\d.]+e[+-]\d+")
    assert numbers.sub("#", done.stdout) == numbers.sub("#", shown)
    assert all(float(number) <= 1e-5 for number in numbers.findall(done.stdout))


def test_another_network_than_that_of_the_bundle_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"another")
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(EXAMPLE)!r})
from served import serving
with serving({MLSERVER!r}, Path("server"), Path("model.onnx"), "0" * 64):
    pass
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=350)
    assert done.returncode == 1
    assert "this is not the network of the bundle" in done.stderr
