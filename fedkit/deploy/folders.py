"""Folders that appear whole or not at all, and files of a folder that others may have written."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from fedkit.codec import flush_folder
from fedkit.errors import ConfigError, PayloadError, StorageError

__all__ = ["new_folder", "read_file", "require_free"]


@contextlib.contextmanager
def new_folder(target: Path, is_replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends, and is gone where the block raises.

    `target` may be missing, empty, or a folder of which `is_replaceable` says so. Raises `ConfigError` for any other,
    `StorageError` where the disk does not do its part.
    """
    require_free(target, is_replaceable)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        yield beside
        _put(beside, target)
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror or error}; it must be possible to write there") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def require_free(target: Path, is_replaceable: Callable[[Path], bool]) -> None:
    """Raises `ConfigError` where something stands at `target` that must not be replaced."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"{target} is no folder: name one that is empty or not there yet")
    if any(target.iterdir()) and not is_replaceable(target):
        raise ConfigError(f"{target} holds other files: name a folder that is empty or not there yet")


def _put(new: Path, target: Path) -> None:
    """Renames `new` to `target`; what stood there goes only when that is done."""
    for folder in [path for path in new.rglob("*") if path.is_dir()] + [new]:
        flush_folder(folder)
    before = new.with_name(f"{new.name}.before")
    with contextlib.ExitStack() as undo:
        if target.exists():
            os.rename(target, before)
            undo.callback(os.rename, before, target)
        os.rename(new, target)
        undo.pop_all()
    flush_folder(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def read_file(path: Path, most: int) -> bytes:
    """A regular file of at most `most` bytes; links, pipes and larger files are refused before they are read.

    Raises `PayloadError`.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise PayloadError(f"{path} is not a regular file")
            if facts.st_size > most:
                raise PayloadError(f"{path} has {facts.st_size} bytes, at most {most} are taken")
            return file.read(facts.st_size)
    except OSError as error:
        raise PayloadError(f"{path} cannot be read: {error.strerror or error}") from None
