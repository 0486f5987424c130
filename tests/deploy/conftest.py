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
    names = pseudonyms(HOSPITALS, KEY, "heart-1")
    scores = [{"auroc": 0.84, "loss": 0.45}, {"auroc": 0.88, "loss": 0.41}, None, {"auroc": 0.71, "loss": 0.66}]
    clients = [
        {"pseudonym": names[one], "rounds": 12, "test": score, "epsilon": 2.41}
        for one, score in zip(HOSPITALS, scores, strict=True)
    ]
    measured = [
        {
            "variant": "fp32",
            "passed": True,
            "why": "the reference",
            "size_bytes": 3000,
            "cpu_ratio": {"1": 1.0, "64": 1.0},
        },
        {
            "variant": "int8",
            "passed": False,
            "why": "it agrees with PyTorch on 97.10 % of rows | 99 % are asked for",
            "operators": 2,
            "size_ratio": 0.31,
            "cpu_ratio": {"1": 0.62, "64": 0.41},
            "agreement": 0.971,
            "valid": {"auroc": 0.82, "loss": 0.47},
            "drop": 0.011,
        },
        {
            "variant": "int8-dynamic",
            "passed": True,
            "why": "the smallest that passes",
            "operators": 2,
            "size_ratio": 0.29,
            "cpu_ratio": {"1": 0.71, "64": 0.55},
            "agreement": 0.998,
            "valid": {"auroc": 0.83, "loss": 0.46},
            "drop": 0.001,
        },
    ]
    return {
        "created": "2026-11-21T10:00:00Z",
        "run": {
            "name": "heart-1",
            "seed": 42,
            "engine": "federation",
            "rounds": 15,
            "round": 12,
            "best": True,
            "strategy": "FedAvg",
            "settings": {"local": {"steps": 100, "batch_size": 4, "lr": 0.003}},
        },
        "task": {
            "name": "heart",
            "source": "ab" * 32,
            "inputs": [{"name": "features", "dtype": "float32", "shape": [None, 13]}],
            "outputs": [{"name": "risk", "dtype": "float32", "shape": [None, 1]}],
            "metrics": ["auroc"],
        },
        "model": {"weights": "cd" * 32, "parameters": 481},
        "clients": clients,
        "test": {"auroc": 0.8312, "loss": 0.4711},
        "privacy": {"aggregation": "masked", "dp": {"epsilon": 2.5, "delta": 1e-4, "max_grad_norm": 1.0}},
        "calibration": {"method": "mean", "clients": 4, "rows": 64, "epsilon": 0.2, "delta": 1e-5},
        "parity": {"difference": 2.1e-7, "allowed": 1e-5, "batches": [1, 2, 64]},
        "gate": measured,
        "shipped": shipped,
        "examined": {
            "variant": shipped,
            "sites": 4,
            "pooled": {"auroc": 0.83, "loss": 0.4722},
            "passing": {"auroc>=0.7": 4, "auroc>=0.8": 3},
            "groups": {"f": {"auroc": 0.79, "loss": 0.5}, "m": {"auroc": 0.84, "loss": 0.46}},
            "noise": {"0.1": {"auroc": 0.829, "loss": 0.4731}},
            "latency_s": {"1": 2e-5},
        },
        "versions": {"fedkit": fedkit.__version__, "torch": torch.__version__},
    }


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
