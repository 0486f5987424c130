"""Whatever is done to an audit log afterwards, `verify` names the first line of it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from fedkit import logs
from fedkit.audit import AuditLog, verify
from fedkit.errors import StorageError, TrustError

LINES = 6


def written(folder: Path, lines: int = LINES, event: str = "stored") -> Path:
    log = AuditLog(folder / "audit.log")
    for i in range(lines):
        log.write({"event": event, "number": i, "names": ["ada", "zoë"], "share": 0.1 * i})
    log.close()
    return folder / "audit.log"


def test_what_was_written_is_verified_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert verify(path).lines == LINES
    assert verify(written(tmp_path)).lines == 2 * LINES
    assert path.stat().st_mode & 0o077 == 0
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [*range(LINES), *range(LINES)]


def test_the_last_line_is_known_when_a_log_is_taken_up_again(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log")
    assert log.last == {}
    log.close()
    log = AuditLog(written(tmp_path))
    assert (log.last["event"], log.last["number"], log.last["line"]) == ("stored", LINES - 1, LINES)
    log.close()


def test_a_log_that_cannot_be_flushed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit.log")
    log.write({"event": "stored"})
    log.flush()

    def full(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="free space or mend the disk"):
        log.flush()
    log.close()


def test_an_event_cannot_pose_as_the_logs_own_fields(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log")
    log.write({"event": "stored", "digest": "x", "line": 9, "previous": "y", "at": "never"})
    log.close()
    assert verify(tmp_path / "audit.log").lines == 1
    [kept] = [json.loads(line) for line in (tmp_path / "audit.log").read_text().splitlines()]
    assert (kept["digest_"], kept["line_"], kept["previous_"], kept["at_"]) == ("x", 9, "y", "never")


def test_an_empty_log_is_intact(tmp_path: Path) -> None:
    assert verify(written(tmp_path, 0)).lines == 0


DONE: dict[str, tuple[Callable[[list[bytes]], object], str]] = {
    "one character": (lambda of: of.__setitem__(2, of[2].replace(b"ada", b"eve")), "line 3: altered"),
    "a space": (lambda of: of.__setitem__(2, of[2].replace(b",", b", ", 1)), "line 3: altered"),
    "removed": (lambda of: of.pop(2), "line 3: this is line 4; a line was removed before it, or moved"),
    "removed first": (lambda of: of.pop(0), "line 1: this is line 2"),
    "removed last": (lambda of: of.pop(), "line 6 and what follows, up to line 6, was removed from the end"),
    "all removed": (lambda of: of.clear(), "line 1 and what follows, up to line 6, was removed"),
    "swapped": (lambda of: of.insert(1, of.pop(3)), "line 2: this is line 4"),
    "doubled": (lambda of: of.insert(2, of[1]), "line 3: this is line 2"),
    "emptied": (lambda of: of.__setitem__(2, b""), "line 3: altered"),
    "noise": (lambda of: of.__setitem__(2, os.urandom(40).replace(b"\n", b"")), "line 3: altered"),
    "another kind": (lambda of: of.__setitem__(2, b"[1]"), "line 3: altered"),
    "appended": (lambda of: of.append(b'{"event":"stored"}'), "line 7: altered"),
}


@pytest.mark.parametrize(("change", "said"), DONE.values(), ids=DONE)
def test_the_first_line_that_was_altered_removed_or_moved_is_named(tmp_path: Path, change, said: str) -> None:
    path = written(tmp_path)
    lines = path.read_bytes().splitlines()
    change(lines)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(TrustError, match=said):
        verify(path)


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_any_bit_counts(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    path = written(tmp_path_factory.mktemp("bits"), 3)
    raw = bytearray(path.read_bytes())
    at %= len(raw)
    raw[at] ^= 1 << bit
    path.write_bytes(bytes(raw))
    with pytest.raises(TrustError, match=f"line {raw[:at].count(10) + 1}: altered"):
        verify(path)


def test_a_history_written_anew_is_told_by_a_head_that_was_kept_elsewhere(tmp_path: Path) -> None:
    path = written(tmp_path)
    kept = tmp_path / "kept.head"
    kept.write_bytes((tmp_path / "audit.log.head").read_bytes())
    path.unlink()
    (tmp_path / "audit.log.head").unlink()
    log = AuditLog(path)
    for _ in range(LINES + 2):
        log.write({"event": "stored", "number": 7})
    log.close()
    verify(path)  # in itself it is whole
    with pytest.raises(TrustError, match="line 6: the log was written anew"):
        verify(path, kept)
    with pytest.raises(TrustError, match="mistyped is missing"):
        verify(path, tmp_path / "mistyped")
    kept.write_text("what")
    with pytest.raises(TrustError, match="not the head of an audit log"):
        verify(path, kept)


def test_whoever_removes_the_head_with_the_last_lines_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    (tmp_path / "audit.log.head").unlink()
    with pytest.raises(TrustError, match=r"audit\.log\.head is missing"):
        verify(path)


def test_a_line_that_a_crash_cut_short_was_no_record(tmp_path: Path) -> None:
    path = written(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"event":"sto')
    assert verify(written(tmp_path, 1)).lines == LINES + 1


def cut(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))


def forge(path: Path) -> None:
    """Another history of as many lines, whole in itself."""
    head = path.with_name("audit.log.head")
    noted = head.read_bytes()
    path.unlink()
    head.unlink()
    written(path.parent, event="settled")
    head.write_bytes(noted)


CHANGED: dict[str, tuple[Callable[[Path], object], int]] = {
    "lines removed": (cut, LINES - 1),
    "written anew": (forge, LINES + 1),
    "removed": (lambda path: path.unlink(), 1),
    "head emptied": (lambda path: path.with_name("audit.log.head").write_bytes(b""), LINES + 1),
    "head of another kind": (lambda path: path.with_name("audit.log.head").write_bytes(b"\xff what"), LINES + 1),
}


@pytest.mark.parametrize(("change", "line"), CHANGED.values(), ids=CHANGED)
def test_a_restart_does_not_hide_what_was_done_before(
    tmp_path: Path, change: Callable[[Path], object], line: int
) -> None:
    path = written(tmp_path)
    change(path)
    for _ in range(2):
        written(tmp_path, 1)
        with pytest.raises(TrustError, match=f"line {line}: .*the head named another last line"):
            verify(path)


@pytest.mark.parametrize("lines", [1, LINES])
def test_a_crash_between_the_log_and_its_head_is_no_change(tmp_path: Path, lines: int) -> None:
    path = written(tmp_path, lines - 1)
    head = path.with_name("audit.log.head")
    noted = head.read_bytes()
    written(tmp_path, 1)
    head.write_bytes(noted)
    assert verify(written(tmp_path, 1)).lines == lines + 1


@pytest.mark.parametrize("left_out", ["previous", "at", "line"])
def test_a_line_without_the_logs_own_fields_is_named(tmp_path: Path, left_out: str) -> None:
    path = written(tmp_path, 1)
    values = json.loads(path.read_bytes())
    del values["digest"], values[left_out]
    body = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(body[:-1] + b',"digest":"%s"}\n' % blake3(body).hexdigest().encode())
    with pytest.raises(TrustError, match="line 1: altered"):
        verify(path)


def test_a_head_that_cannot_be_written_is_said_like_any_failure_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = AuditLog(tmp_path / "audit.log")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="No space left"):
            log.write({"event": "stored"})
    log.close()
    assert verify(written(tmp_path, 1)).lines == 2


def test_a_log_that_cannot_go_on_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "audit.log").write_text("nothing\n")
    with pytest.raises(StorageError, match="move the file away, and keep it"):
        AuditLog(tmp_path / "audit.log")
    (tmp_path / "none.log.head").write_text("0")
    with pytest.raises(TrustError, match="No such file"):
        verify(tmp_path / "none.log")
    (tmp_path / "blocked").write_text("")
    with pytest.raises(StorageError, match="blocked"):
        AuditLog(tmp_path / "blocked" / "audit.log")


def test_a_full_disk_loses_the_event_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = AuditLog(tmp_path / "audit.log")
    before = structlog.get_config()
    try:
        logs.configure("json")
        logs.keep(log)
        told = structlog.get_logger("fedkit.test")
        told.info("stored", number=1)
        with monkeypatch.context() as patch:
            real = os.write
            patch.setattr(os, "write", lambda file, raw: real(file, raw[:10]))
            told.info("stored", number=2)
        told.info("stored", number=3)
        told.info("not connected", number=4)  # of no interest to an audit
    finally:
        structlog.configure(**before)
    log.close()
    assert verify(tmp_path / "audit.log").lines == 2
    kept = [json.loads(line) for line in (tmp_path / "audit.log").read_text().splitlines()]
    assert [one["number"] for one in kept] == [1, 3]
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [one.get("level") for one in said] == ["info", "error", "info", "info"]
    assert "No space left" in said[1]["missing_in_audit_log"]
