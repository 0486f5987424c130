"""A bundle appears whole and verified or not at all, and says the same in each of its files."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import venv
from pathlib import Path

import numpy as np
import onnx
import pytest

from fedkit.deploy.bundle import verify_bundle, write_bundle
from fedkit.deploy.passport import Passport
from fedkit.deploy.probe import Expected, Probe
from fedkit.errors import ConfigError, ExportError, PayloadError, StorageError
from fedkit.trust.signing import public_of
from tests.deploy.conftest import KEY, facts, passport_of

FILES = {"SIGNATURE", "card.md", "model.int8.onnx", "model.onnx", "parity.json", "passport.json"}
PLOTS = {"clients.png", "learning.png", "variants.png"}


def test_a_bundle_holds_its_files_and_passes_its_own_checks(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == FILES | PLOTS
    found = verify_bundle(made, public_of(KEY))
    assert all(check.passed for check in found.checks)
    assert found.signer == public_of(KEY)
    assert found.passport.replace(files={}) == passport_of(facts())
    assert set(found.passport.files) == (FILES | PLOTS) - {"passport.json", "SIGNATURE"}
    assert found.shipped == (made / "model.int8.onnx").read_bytes()
    assert [path.name for path in made.parent.iterdir()] == ["bundle"]


def test_the_facts_are_in_the_metadata_of_each_network(made: Path) -> None:
    for name, variant in (("model.onnx", "fp32"), ("model.int8.onnx", "int8-dynamic")):
        said = {one.key: one.value for one in onnx.load(made / name).metadata_props}
        assert Passport.from_json(said["fedkit.passport"]) == passport_of(facts())
        assert said["fedkit.variant"] == variant
        assert (said["fedkit.task"], said["fedkit.run"], said["fedkit.strategy"]) == ("heart", "heart-1", "FedAvg")
        assert (said["fedkit.aggregation"], said["fedkit.created"]) == ("masked", "2026-11-21T10:00:00Z")


ALONE = """
import json

card = open("card.md").read()
exec(card.split("```python\\n")[1].split("```")[0])
passport = json.loads(session.get_modelmeta().custom_metadata_map["fedkit.passport"])
reference = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
probe = json.load(open("parity.json"))
rows = np.array(probe["inputs"]["features"]["values"], dtype="float32").reshape(probe["inputs"]["features"]["shape"])
got = reference.run(["risk"], {"features": rows})[0].ravel()
print(json.dumps([passport["task"]["name"], float(np.abs(got - probe["outputs"]["risk"]["values"]).max())]))
"""
RUNTIME = ("numpy", "onnxruntime", "flatbuffers", "google", "packaging")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment that has ONNX Runtime and what that needs, by links, and nothing else."""
    root = tmp_path_factory.mktemp("runtime")
    venv.create(root, with_pip=False, symlinks=True)
    [packages] = root.glob("lib/*/site-packages")
    for name in RUNTIME:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        found = Path(next(iter(spec.submodule_search_locations)))
        for folder in (found, found.with_name(f"{name}.libs")):
            if folder.is_dir():
                (packages / folder.name).symlink_to(folder)
    return root / "bin" / "python"


def test_the_card_s_program_runs_the_shipped_network_where_neither_fedkit_nor_torch_is(
    made: Path, runtime: Path
) -> None:
    for missing in ("fedkit", "torch", "onnx"):
        assert subprocess.run([runtime, "-I", "-c", f"import {missing}"], capture_output=True).returncode == 1
    done = subprocess.run([runtime, "-I", "-c", ALONE], cwd=made, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    assert printed[0].startswith("risk [[")
    name, difference = json.loads(last)
    assert name == "heart"
    assert difference < 1e-5


def test_float32_alone_is_a_bundle_too(fp32: bytes, probe: Probe, tmp_path: Path) -> None:
    values = facts("fp32") | {"gate": [], "calibration": None, "examined": None}
    folder = write_bundle(tmp_path / "out", {"model.onnx": fp32}, passport_of(values), KEY, probe=probe)
    assert {path.name for path in folder.iterdir()} == FILES - {"model.int8.onnx"} | {"clients.png"}
    found = verify_bundle(folder)
    assert found.shipped == found.models["model.onnx"]


def test_an_older_bundle_is_replaced_and_an_empty_folder_filled(
    made: Path, fp32: bytes, probe: Probe, tmp_path: Path
) -> None:
    values = facts("fp32") | {"gate": [], "calibration": None}
    (tmp_path / "out").mkdir()
    for seed in (1, 2):
        passport = passport_of(values | {"run": values["run"] | {"seed": seed}})
        write_bundle(tmp_path / "out", {"model.onnx": fp32}, passport, KEY, probe=probe)
        assert verify_bundle(tmp_path / "out").passport.run.seed == seed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", "model.onnx"])
def test_a_folder_with_other_files_is_left_alone(name: str, fp32: bytes, probe: Probe, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="holds other files: name a folder"):
        write_bundle(tmp_path, {"model.onnx": fp32}, passport_of(facts("fp32")), KEY, probe=probe)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_link_and_a_file_are_no_folders_to_write_to(fp32: bytes, probe: Probe, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match="is no folder"):
            write_bundle(tmp_path / name, {"model.onnx": fp32}, passport_of(facts("fp32")), KEY, probe=probe)


def test_a_parent_that_is_a_file_is_named(fp32: bytes, probe: Probe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/out"):
        write_bundle(tmp_path / "file" / "out", {"model.onnx": fp32}, passport_of(facts("fp32")), KEY, probe=probe)


def test_an_older_bundle_stays_where_a_new_one_cannot_be_made(bundle: Path, fp32: bytes) -> None:
    wrong = Probe({"features": np.zeros((1, 13), np.float32)}, {"risk": Expected.of(np.full((1, 1), 9.0), 100)})
    with pytest.raises(ExportError, match="from PyTorch here"):
        write_bundle(bundle, {"model.onnx": fp32}, passport_of(facts("fp32")), KEY, probe=wrong)
    assert verify_bundle(bundle).passport.shipped == "int8-dynamic"
    assert list(bundle.parent.iterdir()) == [bundle]


def test_an_older_bundle_comes_back_where_the_new_one_cannot_take_its_place(
    bundle: Path, fp32: bytes, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, count = os.rename, iter(range(9))

    def failing(old: Path, new: Path) -> None:
        if next(count) == 1:
            raise OSError(28, "No space left on device")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError, match="No space left on device"):
        write_bundle(bundle, {"model.onnx": fp32}, passport_of(facts("fp32")), KEY, probe=probe)
    assert verify_bundle(bundle).passport.shipped == "int8-dynamic"
    assert list(bundle.parent.iterdir()) == [bundle]


def refused(tmp_path: Path, models: dict[str, bytes], values: dict, probe: Probe, kind: type, match: str) -> None:
    with pytest.raises(kind, match=match):
        write_bundle(tmp_path / "out", models, passport_of(values), KEY, probe=probe)
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_few_or_too_many_is_refused(fp32: bytes, int8: bytes, probe: Probe, tmp_path: Path) -> None:
    refused(
        tmp_path, {"model.onnx": fp32}, facts(), probe, ConfigError, "int8-dynamic needs model.int8.onnx, model.onnx"
    )
    both = {"model.onnx": fp32, "model.int8.onnx": int8}
    refused(tmp_path, both, facts("fp32"), probe, ConfigError, "fp32 needs model.onnx")


def test_a_network_that_computes_something_else_is_not_handed_over(fp32: bytes, probe: Probe, tmp_path: Path) -> None:
    wrong = Probe(probe.inputs, {"risk": Expected.of(np.full((4, 1), 0.5), 100)})
    refused(
        tmp_path, {"model.onnx": fp32}, facts("fp32"), wrong, ExportError, r"out/model.onnx: ONNX Runtime is .* from"
    )


def test_a_network_of_another_shape_than_the_passport_s_is_refused(fp32: bytes, probe: Probe, tmp_path: Path) -> None:
    values = facts("fp32")
    values["task"]["inputs"][0]["shape"] = [None, 12]
    refused(
        tmp_path, {"model.onnx": fp32}, values, probe, PayloadError, r"features has shape \[None, 13\]; the passport"
    )


def test_bytes_that_are_no_network_are_refused(probe: Probe, tmp_path: Path) -> None:
    refused(tmp_path, {"model.onnx": b"\xff\xffno"}, facts("fp32"), probe, PayloadError, "not an ONNX file")


def test_a_score_that_is_no_number_must_be_none(fp32: bytes, probe: Probe, tmp_path: Path) -> None:
    values = passport_of(facts("fp32")).replace(test={"auroc": float("nan")})
    with pytest.raises(ConfigError, match="None stands for a score that is none"):
        write_bundle(tmp_path / "out", {"model.onnx": fp32}, values, KEY, probe=probe)
    assert list(tmp_path.iterdir()) == []
