"""A run's history as JSON lines: one line a committed round, each there once, whatever dies in between.

A line holds the round, the digest of the model it published, the ids of the assignments whose results it took
(`accepted`) and of those that count for nothing (`dropped`), and what else is on record of the round. It is appended
when the round stands; a line that a crash kept from being written, or cut short, is written when the run is taken up
again. Lines are not flushed to disk: after a power loss they are written again too, but of all but the last such round
nobody knows any more which results it took, and `accepted` is null.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkit.errors import StorageError

__all__ = ["Checked", "History", "check", "read"]


@dataclass(frozen=True, slots=True)
class Checked:
    """What a history that is in order holds: rounds, results that stand, and the digest of the last model."""

    rounds: int
    accepted: int
    model: str


class History:
    """The history of one run, in the file at `path`. Raises `StorageError` where the disk does not do its part."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def catch_up(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends those of the run's `lines`, which are all there should be, that are not in the file."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            raw = self.path.read_bytes() if self.path.exists() else b""
            whole = raw[: raw.rfind(b"\n") + 1]
            if len(whole) < len(raw):
                os.truncate(self.path, len(whole))
        except OSError as error:
            raise self._failed(error) from error
        for line in lines[whole.count(b"\n") :]:
            self.append(line)

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line, in one piece."""
        raw = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(file).st_size
                if os.write(file, raw) != len(raw):
                    os.ftruncate(file, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(file)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path}: {error.strerror}; free space or mend the disk")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a history; raises `StorageError` where one is none."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = json.loads(raw)
                    if not raw.endswith(b"\n") or not isinstance(line, dict):
                        raise ValueError
                except ValueError:
                    raise StorageError(f"{path}, line {number}: this is no line of a run's history") from None
                yield line
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error


def check(path: Path) -> Checked:
    """What a history holds in which each round follows from the one before and no result stands in two.

    Raises `StorageError` that names the first line of which this is not true.
    """
    rounds, model = 0, ""
    taken: dict[str, int] = {}
    for number, line in enumerate(read(path), 1):
        where = f"{path}, line {number}"
        if line.get("round") != rounds:
            raise StorageError(f"{where}: round {line.get('round')} where round {rounds} is due")
        for key in line.get("accepted") or ():
            if key in taken:
                raise StorageError(f"{where}: result {key} stands in round {taken[key]} already")
            taken[key] = rounds
        undone = [key for key in line.get("dropped") or () if key in taken]
        if undone:
            raise StorageError(f"{where}: result {undone[0]} stands in round {taken[undone[0]]}, and is dropped here")
        rounds, model = rounds + 1, str(line.get("model", ""))
    return Checked(rounds, len(taken), model)
