"""The command line as a person meets it: real processes, real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from fedkit.demo import heart

RUN = """
[run]
name = "heart-1"
task = "heart"
seed = 42
[strategy]
name = "FedAvg"
rounds = 3
local = { steps = 20, batch_size = 4, lr = 0.003 }
participation = { quorum = 3 }
[evaluate]
best = "auroc:max"
[simulation]
clients = ["cleveland", "hungarian", "switzerland", "va"]
threads = 1
"""


def fedkit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-c", "from fedkit.cli import app; app()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_a_run_file_is_trained_saved_and_exported(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    trained = fedkit("simulate", "run.toml", "--out", "first", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "3/3" in trained.stdout
    assert "Test data, touched once" in trained.stdout
    assert "Next: fedkit export first" in trained.stdout
    exported = fedkit("export", "first", "--out", "bundle", "--best", "--json", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["passport"]["parity"]["difference"] < 1e-5
    assert (tmp_path / "bundle" / "model.onnx").stat().st_size > 1000


def test_gates_are_set_in_a_run_file(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fedkit.cli import app

    gated = RUN.replace("FedAvg", "CyclicWeightTransfer").replace(
        "participation = { quorum = 3 }", "gate = { max_norm = 9 }"
    )
    gated = gated.replace("lr = 0.003", "lr = 2.0").replace('"auroc:max"', '"loss:min"\nmax_drop = 0.0')
    (tmp_path / "run.toml").write_text(gated)
    found = CliRunner().invoke(app, ["simulate", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["strategy"]["gate"] == {"max_norm": 9.0, "max_ratio": None, "max_drop": None, "metric": "loss:min"}
    assert any(record["rejected"] for record in facts["history"])


def test_a_table_says_which_rounds_do_not_stand() -> None:
    from fedkit.cli import show
    from fedkit.rounds.journal import RoundRecord

    table = show._table("", [RoundRecord(1), RoundRecord(2, rejected="loss is 9 after 1")], 2)
    assert table.columns[-1].header == "stands"
    assert list(table.columns[-1].cells) == ["", "no"]
    assert show._table("", [RoundRecord(1)], 2).columns[-1].header == "up"


def test_json_output_is_one_document_with_everything(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    found = fedkit("simulate", "run.toml", "--json", "--clients", "cleveland,hungarian,va", cwd=tmp_path)
    facts = json.loads(found.stdout)
    assert facts["clients"] == ["cleveland", "hungarian", "va"]
    assert [record["round"] for record in facts["history"]] == [1, 2, 3]
    assert 0.4 < facts["test"]["accuracy"] < 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("rounds = 3", "round = 3"), "run.toml: strategy.round: there is no such setting; did you mean 'rounds'?"),
        (("steps = 20", "steps = -1"), "run.toml: strategy.local.steps: should be greater than or equal to 1, got -1"),
        (('name = "FedAvg"', 'name = "FedAvgg"'), "there is no strategy 'FedAvgg'; did you mean 'FedAvg'?"),
        (("[simulation]", "[simulation"), "run.toml: not TOML"),
    ],
)
def test_a_wrong_run_file_is_explained_field_by_field(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    from typer.testing import CliRunner

    from fedkit.cli import app

    path = tmp_path / "run.toml"
    path.write_text(RUN.replace(*change))
    found = CliRunner().invoke(app, ["simulate", str(path)])
    assert found.exit_code == 1
    assert _flat(words) in _flat(found.output)


def test_what_is_missing_is_said_with_what_to_do(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fedkit.cli import app

    missing = CliRunner().invoke(app, ["simulate", str(tmp_path / "none.toml")])
    assert _flat("No such file") in _flat(missing.output)
    empty = CliRunner().invoke(app, ["export", str(tmp_path), "--out", str(tmp_path / "x")])
    assert _flat("fedkit simulate --out") in _flat(empty.output)
    other = CliRunner().invoke(app, ["demo", "--strategy", "Krum", "--out", str(tmp_path)])
    assert _flat("the demo has no strategy 'Krum'") in _flat(other.output)
    assert [missing.exit_code, empty.exit_code, other.exit_code] == [1, 1, 1]


def test_the_shipped_split_is_the_one_scikit_learn_draws() -> None:
    sizes = {"cleveland": (199, 104), "hungarian": (172, 89), "switzerland": (30, 16), "va": (85, 45)}
    for hospital in heart.HOSPITALS:
        features, labels = heart.rows(hospital)
        flat = labels[:, 0].astype(int)
        stratify = flat if min(np.bincount(flat)) > 2 else None
        drawn = train_test_split(np.arange(len(flat)), train_size=0.66, random_state=43, stratify=stratify)
        data = heart.load(hospital)
        np.testing.assert_array_equal(data.train.tensors[0].numpy(), features[np.sort(drawn[0])])
        assert (len(data.train), len(data.test)) == sizes[hospital]


def test_every_heart_value_lies_within_its_public_bounds() -> None:
    for hospital in heart.HOSPITALS:
        features, _ = heart.rows(hospital)
        low, high = np.array(heart.BOUNDS).T
        assert (features >= low).all()
        assert (features <= high).all()


def _flat(text: str) -> str:
    """Without white space: where a terminal's lines break depends on the length of a path."""
    return "".join(text.split())


def test_the_masked_demo_comes_to_the_same_model_and_no_hospitals_own_scores(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fedkit.cli import app

    found = CliRunner().invoke(
        app, ["demo", "--aggregation", "masked", "--in-process", "--json", "--out", str(tmp_path)]
    )
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["apart"] < 1e-3
    assert abs(facts["runs"]["masked"]["accuracy"] - facts["runs"]["plain"]["accuracy"]) <= 0.005
    assert [facts["runs"][name]["scores_of_one_hospital"] for name in ("plain", "masked")] == [4, 0]


def test_the_sealed_demo_comes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from fedkit.cli import app
    from fedkit.demo import compare

    short = compare.STRATEGIES["CyclicWeightTransfer"].replace(rounds=2)
    monkeypatch.setitem(compare.STRATEGIES, "CyclicWeightTransfer", short)
    line = ["demo", "--sealed", "--in-process", "--out", str(tmp_path)]
    found = CliRunner().invoke(app, [*line, "--json"])
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["same_bits"]
    assert facts["runs"]["sealed"]["accuracy"] == facts["runs"]["plain"]["accuracy"]
    assert "the model has the same bits" in CliRunner().invoke(app, line).output


def test_the_private_demo_draws_accuracy_against_epsilon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from fedkit.cli import app
    from fedkit.demo import compare

    monkeypatch.setattr(compare, "EPSILONS", (8.0,))
    found = CliRunner().invoke(app, ["demo", "--dp", "--in-process", "--json", "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert set(facts["epsilon"]) == {"cleveland", "hungarian", "switzerland", "va"}
    assert all(2.9 < epsilon <= 3.0 for epsilon in facts["epsilon"].values())
    assert facts["accuracy"] > 0.6
    assert set(facts["curves"]["FedAvg"]) == {"8.0"}
    assert (tmp_path / "privacy.png").read_bytes().startswith(b"\x89PNG")
