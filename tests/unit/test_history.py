"""A run's history: every round once, half lines gone, and a checker that names the first line which is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedkit.cli import app
from fedkit.errors import StorageError
from fedkit.history import Checked, History, check, read


def line(round: int, **more: Any) -> dict[str, Any]:
    return {"round": round, "model": f"m{round}", "accepted": [f"a{round}"], "dropped": [f"d{round}"], **more}


def written(path: Path, *lines: dict[str, Any]) -> Path:
    for one in lines:
        History(path).append(one)
    return path


def test_what_is_appended_is_read_and_checked(tmp_path: Path) -> None:
    path = written(tmp_path / "run.jsonl", line(0), line(1), line(2))
    assert list(read(path)) == [line(0), line(1), line(2)]
    assert check(path) == Checked(3, 3, "m2")


@pytest.mark.parametrize("there", range(4))
@pytest.mark.parametrize("cut", [b"", b'{"round":9,"mod', b'{"round":9}'], ids=["", "half", "without its end"])
def test_catching_up_writes_what_is_missing_once_and_takes_half_a_line_away(
    tmp_path: Path, there: int, cut: bytes
) -> None:
    due = [line(0), line(1), line(2)]
    path = written(tmp_path / "history" / "run.jsonl", *due[:0])
    path.parent.mkdir()
    written(path, *due[:there])
    with open(path, "ab") as file:
        file.write(cut)
    for _ in range(2):
        History(path).catch_up(due)
        assert list(read(path)) == due


BAD = {
    "a round twice": ([line(0), line(1), line(1, accepted=[])], "line 3: round 1 where round 2 is due"),
    "a round is missing": ([line(0), line(2)], "line 2: round 2 where round 1 is due"),
    "the first round is missing": ([line(1)], "line 1: round 1 where round 0 is due"),
    "a result twice": ([line(0), line(1, accepted=["b", "a0"])], "line 2: result a0 stands in round 0 already"),
    "a result twice in one round": ([line(0, accepted=["b", "b"])], "line 1: result b stands in round 0 already"),
    "a result that stands is dropped": ([line(0), line(1, dropped=["a0"])], "line 2: result a0 .* is dropped here"),
}


@pytest.mark.parametrize(("lines", "why"), BAD.values(), ids=BAD)
def test_the_first_line_that_does_not_follow_is_named(tmp_path: Path, lines: list[dict[str, Any]], why: str) -> None:
    path = written(tmp_path / "run.jsonl", *lines)
    with pytest.raises(StorageError, match=why):
        check(path)


@pytest.mark.parametrize("raw", [b"{", b"[]\n", b'{"round":0}', b"\xff\n", b"\n"])
def test_what_is_no_line_is_named(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(json.dumps(line(0)).encode() + b"\n" + raw)
    with pytest.raises(StorageError, match="line 2: this is no line of a run's history"):
        check(path)


def test_a_result_of_which_nobody_knows_any_more_is_no_contradiction(tmp_path: Path) -> None:
    assert check(written(tmp_path / "run.jsonl", line(0, accepted=None, dropped=None), line(1))).accepted == 1


def test_a_folder_that_cannot_be_written_to_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "history").write_text("")
    for act in (lambda one: one.append(line(0)), lambda one: one.catch_up([line(0)])):
        with pytest.raises(StorageError, match="free space or mend the disk"):
            act(History(tmp_path / "history" / "run.jsonl"))


def test_the_command_says_what_a_history_holds_or_what_is_wrong(tmp_path: Path) -> None:
    path = written(tmp_path / "run.jsonl", line(0), line(1))
    said = CliRunner().invoke(app, ["history", str(path)])
    assert said.exit_code == 0
    assert "2 rounds, 2 results, each in one of them; model m1" in " ".join(said.output.split())
    assert json.loads(CliRunner().invoke(app, ["history", str(path), "--json"]).output)["model"] == "m1"
    written(path, line(1))
    assert CliRunner().invoke(app, ["history", str(path)]).exit_code == 1
