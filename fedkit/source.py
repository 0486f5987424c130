"""Which code a task is: a digest of the files that define it, for a site that allows one version and no other."""

from __future__ import annotations

import functools
import inspect
import sys
from pathlib import Path
from typing import Any

from blake3 import blake3

from fedkit.errors import TaskError
from fedkit.task import Task

__all__ = ["files_of", "source_of"]

_LIBRARIES = frozenset({"numpy", "torch", "torchaudio", "torchmetrics", "torchvision"})


def source_of(task: Task) -> str:
    """BLAKE3 (hex) of the name and content of each file that `files_of` finds.

    What those files import is not in it: pin that by how the environment is installed.
    """
    total = blake3()
    for name, path in files_of(task).items():
        content = path.read_bytes()
        total.update(f"{name}\x1f{len(content)}\x1f".encode()).update(content)
    return total.hexdigest()


def files_of(task: Task) -> dict[str, Path]:
    """The files of the modules that define the task's functions and classes, by module, sorted.

    Those of the standard library, PyTorch and its companions are left out. Raises `TaskError` for a task that was not
    defined in a file.
    """
    own = (task.model, task.data, task.loss, task.optimizer, task.step, task.predict, task.train, task.exchange)
    names = {_module(one) for one in (*own, *task.metrics.values()) if one is not None}
    found: dict[str, Path] = {}
    for name in sorted(names):
        if name.partition(".")[0] in _LIBRARIES or name.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
            continue
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is None:
            raise TaskError(f"{task.name}: {name} is in no file, so its source has no digest")
        found[name] = Path(path)
    return found


def _module(one: Any) -> str:
    while isinstance(one, functools.partial):
        one = one.func
    one = inspect.unwrap(one) if callable(one) else one
    return str(getattr(one, "__module__", None) or type(one).__module__)
