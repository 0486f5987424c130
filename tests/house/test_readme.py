"""What the README shows is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from fedkit.demo.heart import HOSPITALS
from fedkit.loopback import Loopback

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
NUMBER = re.compile(r"\d+\.\d+")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README.read_text(), re.DOTALL)
PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]
OUTPUTS = [text for kind, text in BLOCKS if kind == ""]


def run(program: str, cwd: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_alike(printed: str, shown: str) -> None:
    """The same words; numbers may differ by as much as another processor's rounding can make of them."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    assert all(abs(float(a) - float(b)) <= 0.02 for a, b in pairs), printed


def test_the_first_program_has_at_most_twenty_lines_and_prints_what_is_shown(tmp_path: Path) -> None:
    program, shown = PROGRAMS[0], OUTPUTS[1]
    assert len([line for line in program.splitlines() if line.strip()]) <= 20
    assert_alike(run(program, tmp_path), shown)


def test_the_strategy_of_the_readme_trains_and_keeps_its_state(tmp_path: Path) -> None:
    program = f"""
{PROGRAMS[2]}
import fedkit
from fedkit.testing import toy_task
fit = fedkit.Fit(steps=5, lr=0.1)
result = fedkit.simulate(toy_task(), FedAvgM(rounds=3, momentum=0.5, local=fit), clients=["a", "b"], seed=1)
print(result.history[0].loss > result.history[-1].loss, list(result.strategy.state_dict()))
"""
    assert run(program, tmp_path) == "True ['velocity']\n"


def test_the_program_for_a_federation_gives_the_bits_of_simulation(tmp_path: Path) -> None:
    with Loopback(tmp_path, ["heart"], HOSPITALS) as federation:
        program = f"""
import fedkit
from fedkit.demo.heart import HOSPITALS, task
from fedkit.strategies import FedAvg
{PROGRAMS[1].replace("127.0.0.1:8443", federation.address)}
print(result.weights == fedkit.simulate(task, FedAvg(rounds=15), clients=HOSPITALS, seed=42, threads=1).weights)
"""
        assert run(program, tmp_path) == "True\n"


def test_the_heart_example_prints_what_its_readme_shows(tmp_path: Path) -> None:
    example = ROOT / "examples" / "heart"
    shown = (example / "README.md").read_text().split("```\n")[-2]
    assert_alike(run((example / "main.py").read_text(), tmp_path), shown)
    assert (tmp_path / "out" / "heart" / "model.onnx").is_file()
