"""The heart example prints what its README shows."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "heart"


def test_the_heart_example_prints_what_its_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    runpy.run_path(str(EXAMPLE / "main.py"), run_name="__main__")
    shown = (EXAMPLE / "README.md").read_text().split("```\n")[-2]
    assert capsys.readouterr().out == shown
    assert (tmp_path / "out" / "heart" / "model.onnx").is_file()
