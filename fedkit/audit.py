"""The audit log: one line an event, each with the digest of the line before, so that a change shows.

A line is a JSON object with sorted keys and no spaces, and behind them `digest`: BLAKE3 (hex) of the same object
without it. `line` counts from 1, `previous` is the digest of the line before, empty in the first. Beside the file
stands one with the ending `.head`, which holds the number and digest of the last line: without it, lines missing at
the end could not be told. Whoever can write both files can write another history: copy the head elsewhere now and then.

Lines are written without flushing the disk: they outlive the process, and the last ones may be lost with the machine's
power, unless `flush` was called. What must not be lost is in the journal and the outbox.
"""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from fedkit.codec import flush_folder
from fedkit.errors import StorageError, TrustError

__all__ = ["AuditLog", "Verified", "verify"]

_LONGEST = 1 << 20  # bytes of one line
_HEAD_BYTES = 96
_TAIL = b',"digest":"%s"}'
_MISMATCH = "audit log does not end as its head says"
_OURS = frozenset({"at", "line", "previous", "digest"})


@dataclass(frozen=True, slots=True)
class Verified:
    """What an intact log holds: how many lines, the last digest, and the time of the first and last line."""

    lines: int
    digest: str
    since: str
    until: str


class AuditLog:
    """Appends to the file at `path`; one process at a time. Raises `StorageError` where the disk does not do its part.

    A line that a crash cut short was no record yet, and is taken away. Where the head does not name the last line, nor
    the one before (a crash came between the two files), the log was changed meanwhile: the next line says so, and
    `verify` will not pass over it. `last` is the last line that was there at first, empty in a new log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._head = os.open(_head_of(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            end = _end_of(self._file)
            self._line, self._digest = end.line, end.digest
            self.last: Mapping[str, Any] = end.event
            noted = _noted(self._head)
        except OSError as error:
            raise _disk(path, error) from error
        if noted not in (f"{end.line} {end.digest}".strip(), f"{end.line - 1} {end.previous}".strip()):
            self.write({"event": _MISMATCH, "head": noted})
        else:
            self._mark()

    def write(self, event: Mapping[str, Any]) -> None:
        """Appends one event: strings, numbers, and lists and mappings of them. Names the log needs get a `_` behind."""
        now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        values = {f"{name}_" if name in _OURS else name: value for name, value in event.items()}
        values |= {"at": now, "line": self._line + 1, "previous": self._digest}
        body = _dumped(values)
        digest = blake3(body).hexdigest()
        raw = body[:-1] + _TAIL % digest.encode() + b"\n"
        try:
            size = os.fstat(self._file).st_size
            if os.write(self._file, raw) != len(raw):
                os.ftruncate(self._file, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _disk(self.path, error) from error
        self._line, self._digest = self._line + 1, digest
        self._mark()

    def _mark(self) -> None:
        try:
            os.pwrite(self._head, f"{self._line:>20} {self._digest:<64}\n".encode().ljust(_HEAD_BYTES), 0)
        except OSError as error:
            raise _disk(self.path, error) from error

    def flush(self) -> None:
        """Flushes what was written to disk, so that it outlives a power loss too."""
        try:
            os.fsync(self._file)
            os.fsync(self._head)
            flush_folder(self.path.parent)
        except OSError as error:
            raise _disk(self.path, error) from error

    def close(self) -> None:
        """Closes the files."""
        os.close(self._file)
        os.close(self._head)


def verify(path: Path, head: Path | None = None) -> Verified:
    """What the log at `path` holds, if it is as it was written; raises `TrustError` that names the first wrong line.

    `head` is a copy of the head from elsewhere (None: the one beside the log, which must be there). With an older copy,
    the line it names must still be there.
    """
    first: dict[str, Any] | None = None
    last: dict[str, Any] = {"line": 0, "digest": "", "at": ""}
    wanted = _head(head or _head_of(path))
    for number, raw in enumerate(_lines(path), 1):
        last = _checked(path, number, raw, last)
        first = first or last
        if last.get("event") == _MISMATCH:
            text = f"when the log was taken up here, the head named another last line ({last.get('head')!r:.100})"
            raise TrustError(f"{path}, line {number}: {text}; lines before were removed or written anew")
        if number == wanted[0] and last["digest"] != wanted[1]:
            raise TrustError(f"{path}, line {number}: the log was written anew up to here; the head knows another line")
    if last["line"] < wanted[0]:
        text = f"line {last['line'] + 1} and what follows, up to line {wanted[0]}, was removed from the end"
        raise TrustError(f"{path}: {text}")
    return Verified(int(last["line"]), str(last["digest"]), str((first or last)["at"]), str(last["at"]))


def _checked(path: Path, number: int, raw: bytes, before: Mapping[str, Any]) -> dict[str, Any]:
    where = f"{path}, line {number}"
    try:
        values = json.loads(raw)
        line, previous, _, digest = values["line"], values["previous"], values["at"], values.pop("digest")
        body = _dumped(values)
        intact = digest == blake3(body).hexdigest() and raw == body[:-1] + _TAIL % digest.encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise TrustError(f"{where}: altered")
    if previous != before["digest"] or line != number:
        moved = f"this is line {line}" if line != number else "it does not follow from the one before"
        raise TrustError(f"{where}: {moved}; a line was removed before it, or moved")
    return {**values, "digest": digest}


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while raw := file.readline(_LONGEST):
                yield raw.removesuffix(b"\n") if raw.endswith(b"\n") else b""
    except OSError as error:
        raise TrustError(f"{path}: {error.strerror or error}") from None


def _head(path: Path) -> tuple[int, str]:
    try:
        number, _, digest = path.read_text(encoding="ascii").strip().partition(" ")
        return int(number), digest.strip()
    except FileNotFoundError:
        raise TrustError(f"{path} is missing: without it nobody can tell whether lines were removed") from None
    except (OSError, ValueError):
        raise TrustError(f"{path}: this is not the head of an audit log") from None


def _noted(head: int) -> str:
    """What a head says, as `line digest`; of an empty one, what it says of an empty log."""
    return " ".join(os.pread(head, 2 * _HEAD_BYTES, 0).decode("ascii", "replace").split()) or "0"


class _End(NamedTuple):
    line: int
    digest: str
    previous: str
    event: Mapping[str, Any]


def _end_of(file: int) -> _End:
    """The last whole line; what stands behind it is cut off."""
    size = os.fstat(file).st_size
    tail = os.pread(file, min(size, 2 * _LONGEST), max(size - 2 * _LONGEST, 0))
    whole = tail[: tail.rfind(b"\n") + 1]
    if len(whole) < len(tail):
        os.ftruncate(file, size - len(tail) + len(whole))
    if not whole:
        return _End(0, "", "", {})
    try:
        last = json.loads(whole[:-1].rpartition(b"\n")[2])
        return _End(int(last["line"]), str(last["digest"]), str(last["previous"]), last)
    except (ValueError, TypeError, KeyError):
        raise StorageError("the audit log's last line is not one: move the file away, and keep it") from None


def _disk(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: {error.strerror}; free space or mend the disk")


def _head_of(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _dumped(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), default=str).encode()
