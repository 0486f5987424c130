"""A bundle in a server that speaks the Open Inference Protocol: called, compared with PyTorch, and as a canary."""

from __future__ import annotations

import argparse
import hashlib
import re
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from calls import infer
from served import serving

import fedkit
from fedkit.demo.heart import HOSPITALS, task
from fedkit.deploy.bundle import verify_bundle
from fedkit.deploy.layouts import kserve
from fedkit.strategies import FedAvg


def main() -> None:
    """Trains, exports, lays the bundle out for KServe, serves the network that lies there, and calls it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mlserver", default="mlserver", help="the program, in an environment of its own")
    parser.add_argument("--out", type=Path, default=Path("out/serving"))
    arguments = parser.parse_args()

    strategy = FedAvg(rounds=5, local=fedkit.Fit(steps=100, batch_size=4, lr=0.003))
    result = fedkit.simulate(task, strategy, clients=HOSPITALS, seed=42, threads=1, progress=False)
    bundle = verify_bundle(result.export(arguments.out / "bundle", "none").folder)
    folder = kserve(bundle, arguments.out / "kserve", storage_uri="s3://bucket/heart/models", canary_percent=10)
    network = folder / "models" / "heart" / "1" / "model.onnx"

    rows, _ = task.data("va").test.tensors
    with torch.inference_mode():
        trained = result.model(rows).numpy()
    [ours] = onnxruntime.InferenceSession(bundle.shipped).run(None, {"features": rows.numpy()})
    digest = hashlib.sha256(bundle.shipped).hexdigest()
    with serving(arguments.mlserver, arguments.out / "server", network, digest) as port:
        print(f"MLServer serves {network.relative_to(arguments.out)}")
        served = infer(port, rows.numpy())
    for name, wanted in (("PyTorch", trained), ("ONNX Runtime", ours)):
        apart = np.abs(served - wanted).max() / np.abs(wanted).max()
        print(f"{len(rows)} rows, apart from {name} by {apart:.0e}")
        assert apart <= 1e-5

    service = (folder / "inference-service.yaml").read_text()
    [percent] = re.findall(r"canaryTrafficPercent: (\d+)", service)
    [signed] = re.findall(r'fedkit/sha256: "(\w+)"', service)
    assert signed == digest
    print(f"KServe sends {percent} % of the requests to this network, the rest to the one it served before")


if __name__ == "__main__":
    main()
