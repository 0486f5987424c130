"""The commands: verify, predict and layout, as people and programs meet them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner, Result

from fedkit.cli import app
from fedkit.trust.signing import public_of
from tests.deploy.conftest import KEY


def fedkit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def said(found: Result) -> str:
    """What was printed, wherever lines were broken."""
    return "".join(found.output.split())


def test_verify_lists_every_check_and_says_who_signed(made: Path) -> None:
    found = fedkit("verify", made, "--signer", public_of(KEY))
    assert found.exit_code == 0, found.output
    assert f"Signedby{public_of(KEY)},asexpected" in said(found)
    assert f"Signedby{public_of(KEY)}:compare" in said(fedkit("verify", made))
    facts = json.loads(fedkit("verify", made, "--json").output)
    assert (facts["holds"], facts["signer"]) == (True, public_of(KEY))
    assert {check["result"] for check in facts["checks"]} == {"ok"}
    assert {"SIGNATURE", "files", "model.onnx: parity", "model.int8.onnx: probe"} < {
        one["name"] for one in facts["checks"]
    }


def test_verify_ends_with_exit_code_1_and_lists_all_that_failed(bundle: Path) -> None:
    for name in ("card.md", "model.onnx"):
        (bundle / name).write_bytes((bundle / name).read_bytes()[:-1] + b"!")
    (bundle / "extra").write_text("")
    found = fedkit("verify", bundle, "--json")
    assert found.exit_code == 1
    facts = json.loads(found.output)
    assert facts["holds"] is False
    failed = {check["name"] for check in facts["checks"] if check["result"] == "failed"}
    assert failed == {"files", "card.md", "model.onnx"}
    shown = fedkit("verify", bundle)
    assert shown.exit_code == 1
    assert "donotdeployit" in said(shown)
    assert fedkit("verify", bundle / "missing").exit_code == 1


def test_predict_refuses_a_bad_bundle_and_runs_a_good_one(bundle: Path, tmp_path: Path) -> None:
    rows = np.zeros((3, 13))
    (tmp_path / "in.csv").write_text("".join(f"p{i}," + ",".join(map(str, row)) + "\n" for i, row in enumerate(rows)))
    arguments = ("predict", bundle, tmp_path / "in.csv", "--out", tmp_path / "out.csv", "--id", "1")
    found = fedkit(*arguments, "--json", "--variant", "fp32")
    assert found.exit_code == 0, found.output
    facts = json.loads(found.output)
    assert (facts["rows"], facts["columns"], facts["variant"]) == (3, ["1", "risk"], "fp32")
    assert fedkit(*arguments).exit_code == 0
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 4
    (tmp_path / "out.csv").unlink()
    (bundle / "card.md").write_text("")
    refused = fedkit(*arguments)
    assert refused.exit_code == 1
    assert not (tmp_path / "out.csv").exists()


def test_predict_takes_columns_and_a_header(made: Path, tmp_path: Path) -> None:
    names = [f"f{i}" for i in range(13)]
    (tmp_path / "in.csv").write_text(",".join([*names, "age"]) + "\n" + ",".join(["0"] * 14) + "\n")
    arguments = ("predict", made, tmp_path / "in.csv", "--out", tmp_path / "out.csv")
    assert fedkit(*arguments, "--columns", ", ".join(names), "--batch", "1").exit_code == 0
    assert fedkit(*arguments).exit_code == 1
    positions = ",".join(str(i) for i in range(1, 14))
    assert fedkit(*arguments, "--columns", positions, "--no-header").exit_code == 1
    assert fedkit(*arguments, "--columns", positions, "--header").exit_code == 0


def test_layout_writes_what_servers_want(made: Path, tmp_path: Path) -> None:
    found = fedkit("layout", made, "--to", "triton", "--out", tmp_path / "t", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["files"] == ["1/model.onnx", "config.pbtxt"]
    arguments = ("layout", made, "--to", "kserve", "--out", tmp_path / "k", "--name", "risk", "--canary", "10")
    assert fedkit(*arguments, "--storage-uri", "s3://b/models").exit_code == 0
    assert (tmp_path / "k" / "models" / "risk" / "config.pbtxt").is_file()
    assert fedkit("layout", made, "--to", "triton", "--out", tmp_path / "x", "--canary", "10").exit_code == 1
    assert not (tmp_path / "x").exists()
    assert fedkit("layout", made, "--to", "ort-mobile", "--out", tmp_path / "x", "--canary", "10").exit_code == 1
