"""Runs in a real MLflow over SQLite, and in event files that TensorBoard itself reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedkit
from fedkit.cli import app
from fedkit.errors import TrackingWarning
from fedkit.strategies import FedAvg
from fedkit.testing import toy_task

mlflow = pytest.importorskip("mlflow")
events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

# What other people's libraries warn of is theirs; a tracker that fails is ours.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings("error::fedkit.errors.TrackingWarning")]

RUN = """
[run]
name = "heart-1"
task = "heart"
seed = 42
[strategy]
name = "FedAvg"
rounds = 3
local = { steps = 5, batch_size = 4, lr = 0.003 }
[evaluate]
best = "loss:min"
[export]
quantize = "none"
[simulation]
clients = ["cleveland", "va"]
threads = 1
"""


def simulate(**settings: object) -> fedkit.Result:
    strategy = FedAvg(rounds=2, local=fedkit.Fit(steps=3, batch_size=8, lr=0.1))
    return fedkit.simulate(toy_task(), strategy, clients=["a", "b"], seed=5, threads=1, progress=False, **settings)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An empty database of MLflow's, which takes it several seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow.MlflowClient(f"sqlite:///{path}")
    return path.read_bytes()


@pytest.fixture
def store(template: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # MLflow puts artifacts there
    (tmp_path / "runs.db").write_bytes(template)
    return f"sqlite:///{tmp_path}/runs.db"


def runs(client: Any, experiment: str) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def invoke(*arguments: object) -> str:
    found = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_mlflow_holds_settings_rounds_scores_and_the_bundle_as_a_candidate(store: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    invoke("simulate", "run.toml", "--out", "out", "--track", f"mlflow:{store}", "--json")
    client = mlflow.MlflowClient(store)
    [run] = runs(client, "heart")
    assert run.info.status == "FINISHED"
    assert run.data.params["strategy.name"] == "FedAvg"
    assert (run.data.params["strategy.local.lr"], run.data.params["seed"]) == ("0.003", "42")
    assert run.data.tags["fedkit.engine"] == "simulation"
    losses = client.get_metric_history(run.info.run_id, "valid/loss")
    assert [one.step for one in losses] == [1, 2, 3]
    saved = fedkit.codec.load(tmp_path / "out" / "model.fedkit")
    assert run.data.tags["fedkit.model"] == saved.digest
    assert {"test/accuracy", "client/va/test/loss", "train/loss", "bytes/up", "best/round"} < set(run.data.metrics)

    version = client.get_model_version_by_alias("heart", "candidate")
    assert (int(version.version), version.run_id) == (1, run.info.run_id)
    assert (version.tags["fedkit.variant"], version.tags["fedkit.epsilon"]) == ("fp32", "none")
    (tmp_path / "fetched").mkdir()
    (tmp_path / "kept").mkdir()
    fetched = client.download_artifacts(run.info.run_id, "bundle", str(tmp_path / "fetched"))
    invoke("verify", fetched, "--signer", version.tags["fedkit.signer"], "--json")

    invoke("export", "out", "--out", "again", "--quantize", "none", "--track", f"mlflow:{store}", "--json")
    assert len(runs(client, "heart")) == 1
    version = client.get_model_version_by_alias("heart", "candidate")
    assert (int(version.version), version.source) == (2, f"runs:/{run.info.run_id}/bundle-2")
    kept = client.download_artifacts(run.info.run_id, "bundle", str(tmp_path / "kept"))
    invoke("verify", kept, "--json")


def test_a_bundle_of_a_run_that_mlflow_does_not_know_brings_its_run_along(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    result = simulate()
    result.export("bundle", "none", track="mlflow")
    [run] = runs(mlflow.MlflowClient(store), "mine")
    assert (run.info.status, run.data.tags["fedkit.model"]) == ("FINISHED", result.weights.digest)
    assert run.data.metrics["train/loss"] == result.history[-1].loss


def test_a_run_that_fails_is_failed_in_mlflow_too(store: str) -> None:
    def stop(_: fedkit.RoundRecord) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        simulate(track=f"mlflow:{store}", on_round=stop)
    assert [run.info.status for run in runs(mlflow.MlflowClient(store), "toy")] == ["FAILED"]


def test_names_that_mlflow_does_not_take_are_told_in_others(store: str) -> None:
    from torchmetrics.classification import MulticlassAccuracy

    task = toy_task(metrics={"top@1 (%)": lambda: MulticlassAccuracy(3)})
    strategy = FedAvg(rounds=1, local=fedkit.Fit(steps=3, batch_size=8, lr=0.1))
    fedkit.simulate(task, strategy, clients=["a"], threads=1, progress=False, track=f"mlflow:{store}")
    [run] = runs(mlflow.MlflowClient(store), "toy")
    assert "test/top_1 ___" in run.data.metrics


@pytest.mark.filterwarnings("always::fedkit.errors.TrackingWarning")
def test_a_server_that_is_gone_costs_one_warning_and_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(TrackingWarning, match="goes on without it") as caught:
        result = simulate(track="mlflow:http://me:s3cret@127.0.0.1:9")
    assert len([one for one in caught if one.category is TrackingWarning]) == 1
    assert "s3cret" not in str(caught[0].message)
    assert result.weights == simulate().weights


def test_tensorboard_reads_the_curves_of_each_run_in_a_folder_of_its_own(tmp_path: Path) -> None:
    results = [simulate(track=f"tensorboard:{tmp_path / 'curves'}") for _ in range(2)]
    folders = list((tmp_path / "curves").iterdir())
    assert len(folders) == 2
    found = events.EventAccumulator(str(folders[0]))
    found.Reload()
    assert [one.step for one in found.Scalars("train/loss")] == [1, 2]
    assert found.Scalars("test/loss")[0].value == pytest.approx(results[0].test["loss"])
    assert found.Scalars("client/a/test/loss")[0].step == 2
    [text] = found.Tensors("run/text_summary")
    assert b"strategy.local.lr | 0.1" in text.tensor_proto.string_val[0]
