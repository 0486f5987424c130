"""A small network in float32 and int8, a passport written by hand, and bundles made of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

import fedkit
from fedkit.demo.heart import HOSPITALS
from fedkit.deploy.bundle import write_bundle
from fedkit.deploy.convert import convert
from fedkit.deploy.passport import FileFacts, Passport
from fedkit.deploy.probe import Probe
from fedkit.deploy.signer import pseudonyms, sign

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CURVES = {
    "auroc, validation": {one: 0.6 + 0.02 * one for one in range(1, 13)},
    "loss, validation": {one: 0.7 - 0.02 * one for one in range(1, 13)},
    "loss, training": {one: 0.7 - 0.025 * one for one in range(1, 13)} | {5: None},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 1)).eval()


def facts(shipped: str = "int8-dynamic") -> dict[str, Any]:
    """A passport's facts, as they could be of a run on the four hospitals."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("facts.json").read_text())
    names = pseudonyms(HOSPITALS, KEY, found["run"]["name"])
    for client in found["clients"]:
        client["pseudonym"] = names[client["pseudonym"]]
    found["versions"] = {"fedkit": fedkit.__version__, "torch": torch.__version__}
    found["shipped"] = found["examined"]["variant"] = shipped
    return found


def passport_of(values: dict[str, Any]) -> Passport:
    return Passport.from_json(json.dumps(values))


@pytest.fixture(scope="session")
def fp32() -> bytes:
    inputs = {"features": fedkit.Tensor("float32", (13,))}
    task = fedkit.Task(name="heart", model=network, data=dict, loss=nn.MSELoss(), inputs=inputs, outputs=["risk"])
    return convert(network(), task).content


@pytest.fixture(scope="session")
def int8(fp32: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from onnxruntime.quantization import quantize_dynamic

    model = onnx.load_model_from_string(fp32)
    del model.graph.value_info[:]  # the quantiser turns a weight round, and leaves its old shape there
    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    quantize_dynamic(model, path)
    return path.read_bytes()


@pytest.fixture(scope="session")
def probe() -> Probe:
    rows = np.random.default_rng(0).normal(size=(4, 13)).astype(np.float32)
    with torch.inference_mode():
        risk = network()(torch.from_numpy(rows)).numpy()
    return Probe.of({"features": rows}, {"risk": risk})


@pytest.fixture(scope="session")
def made(fp32: bytes, int8: bytes, probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle nobody may change."""
    models = {"model.onnx": fp32, "model.int8.onnx": int8}
    folder = tmp_path_factory.mktemp("made") / "bundle"
    return write_bundle(folder, models, passport_of(facts()), KEY, probe=probe, curves=CURVES)


def resealed(folder: Path, key: Ed25519PrivateKey = KEY, **changes: Any) -> Path:
    """The folder with a new passport over the files that are there, signed anew, as its owner could do it."""
    passport = Passport.from_json((folder / "passport.json").read_text()).replace(**changes)
    names = [path.name for path in folder.iterdir() if path.name not in ("passport.json", "SIGNATURE")]
    contents = {name: (folder / name).read_bytes() for name in names}
    files = {
        one: FileFacts(sha256=hashlib.sha256(raw).hexdigest(), size_bytes=len(raw)) for one, raw in contents.items()
    }
    body = passport.replace(files=files).to_json().encode()
    (folder / "passport.json").write_bytes(body)
    (folder / "SIGNATURE").write_bytes(sign(body, key))
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A bundle of the test's own."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))
