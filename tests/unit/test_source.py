"""A task's source: the files that define it, and a digest that any change of them changes."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fedkit
from fedkit.demo import heart
from fedkit.errors import TaskError
from fedkit.source import files_of, source_of

DATA = "import fedkit\n\ndef load(client):\n    return fedkit.Data(([[0.0]], [[0.0]]))\n"
MODEL = "import torch\n\ndef make():\n    return torch.nn.Linear(1, 1)\n"


@pytest.fixture
def modules(tmp_path: Path) -> Iterator[dict[str, ModuleType]]:
    found = {}
    for name, text in (("site_data_4711", DATA), ("site_model_4711", MODEL)):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found
    for name in found:
        del sys.modules[name]


def task(modules: dict[str, ModuleType], **changes: object) -> fedkit.Task:
    parts = {
        "model": modules["site_model_4711"].make,
        "data": functools.partial(functools.partial(modules["site_data_4711"].load)),
        "loss": torch.nn.MSELoss(),
        "optimizer": functools.partial(torch.optim.SGD, lr=0.1),
    }
    return fedkit.Task(name="own", **(parts | changes))


def test_the_files_are_those_of_the_tasks_own_functions(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    assert files_of(task(modules)) == {name: tmp_path / f"{name}.py" for name in modules}
    assert list(files_of(heart.task)) == ["fedkit.demo.heart"]


def test_any_change_of_a_file_is_another_source(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    before = source_of(task(modules))
    assert source_of(task(modules)) == before
    (tmp_path / "site_data_4711.py").write_text(DATA + "\n")
    assert source_of(task(modules)) != before


def test_what_moves_between_the_files_is_another_source(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    before = source_of(task(modules))
    (tmp_path / "site_data_4711.py").write_text(MODEL)
    (tmp_path / "site_model_4711.py").write_text(DATA)
    assert source_of(task(modules)) != before


def test_a_task_that_is_in_no_file_has_no_source(modules: dict[str, ModuleType]) -> None:
    typed: dict[str, object] = {"__name__": "typed_4711"}
    exec("import torch\ndef make():\n    return torch.nn.Linear(1, 1)\n", typed)
    with pytest.raises(TaskError, match="own: typed_4711 is in no file"):
        source_of(task(modules, model=typed["make"]))
