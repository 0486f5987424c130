"""A bundle as those who serve models expect it: Triton's repository, KServe's InferenceService, a phone's ORT file.

Triton: github.com/triton-inference-server/server, docs/user_guide/model_repository.md and model_configuration.md.
KServe: kserve.github.io, InferenceService v1beta1. Traffic is split by KServe itself; nothing here serves anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from fedkit.codec import write_atomically
from fedkit.config import require_name
from fedkit.deploy.folders import new_folder
from fedkit.deploy.mobile import mobile_files
from fedkit.deploy.passport import TensorFacts
from fedkit.deploy.verify import Verified
from fedkit.errors import ConfigError

__all__ = ["kserve", "ort_mobile", "triton"]

_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
}
_SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1035 label, as Kubernetes wants it
_URI = re.compile(r"[a-z][a-z0-9+.-]*://[!-~]+")


def triton(bundle: Verified, out: Path | str, name: str | None = None, *, max_batch: int = 64) -> Path:
    """Writes `out/name`: `config.pbtxt`, and the shipped network as version 1; returns that folder.

    `name` is the task's by default. Requests are put together to batches of up to `max_batch` rows. Raises
    `ConfigError` where `out/name` is there already, and for names or types that Triton does not take.
    """
    name = require_name(bundle.passport.task.name if name is None else name, "the model's name")
    return _written(Path(out) / name, _repository(bundle, name, max_batch))


def kserve(
    bundle: Verified,
    out: Path | str,
    name: str | None = None,
    *,
    storage_uri: str | None = None,
    canary_percent: int | None = None,
    max_batch: int = 64,
) -> Path:
    """Writes `out`: `inference-service.yaml`, and in `models` the Triton repository that it serves; returns `out`.

    `storage_uri` is where `models` is copied to, such as "s3://bucket/heart/models". With `canary_percent`, so much of
    the traffic goes to this model and the rest to the one before it, where KServe runs serverless. Raises
    `ConfigError` for a name that is no DNS label, a URI that is none, and where `out` holds anything.
    """
    name = bundle.passport.task.name.lower().replace("_", "-") if name is None else name
    if not _SERVICE.fullmatch(name):
        raise ConfigError(f"{name!r:.100} is no name for a service: up to 63 of a-z 0-9 -, and a letter first")
    if storage_uri is None or not _URI.fullmatch(storage_uri):
        raise ConfigError(f"KServe needs --storage-uri, where the models folder will be: s3://..., got {storage_uri!r}")
    if canary_percent is not None and not 0 <= canary_percent <= 100:
        raise ConfigError(f"a canary gets 0 to 100 percent of the traffic, got {canary_percent}")
    files = {f"models/{name}/{path}": content for path, content in _repository(bundle, name, max_batch).items()}
    files["inference-service.yaml"] = _service(bundle, name, storage_uri, canary_percent).encode()
    return _written(Path(out), files)


def ort_mobile(bundle: Verified, out: Path | str, name: str | None = None) -> Path:
    """Writes `out`: `NAME.ort`, which ONNX Runtime loads on phones, and `NAME.required_operators.config`; returns it.

    `name` is the task's by default. The second file is for whoever builds ONNX Runtime with nothing but what the
    network needs. Where the machine that converts has no float16 kernels, as x86, a float16 network is float32 in it.
    Raises `ConfigError` where `out` holds anything, `ExportError` where the file does not give what the network gives.
    """
    name = require_name(bundle.passport.task.name if name is None else name, "the model's name")
    return _written(Path(out), mobile_files(bundle.shipped, name, bundle.passport))


def _written(folder: Path, files: Mapping[str, bytes]) -> Path:
    with new_folder(folder, lambda _: False) as beside:
        for path, content in files.items():
            write_atomically(beside / path, content)
    return folder


def _repository(bundle: Verified, name: str, max_batch: int) -> dict[str, bytes]:
    if max_batch < 1:
        raise ConfigError(f"a batch has at least one row, got {max_batch}")
    return {"config.pbtxt": _config(bundle, name, max_batch).encode(), "1/model.onnx": bundle.shipped}


def _config(bundle: Verified, name: str, max_batch: int) -> str:
    task = bundle.passport.task
    lines = [
        f"# {bundle.passport.shipped} network of run {bundle.passport.run.name}; its passport is in its metadata",
        f"name: {_quoted(name)}",
        'platform: "onnxruntime_onnx"',
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch}",
        *(_tensor("input", one) for one in task.inputs),
        *(_tensor("output", one) for one in task.outputs),
        "dynamic_batching { }",
    ]
    return "\n".join(lines) + "\n"


def _tensor(kind: str, one: TensorFacts) -> str:
    """One tensor without its batch dimension; Triton wants at least one other, and takes it away again."""
    if one.dtype not in _TYPES:
        raise ConfigError(f"Triton does not take {one.name}, which is {one.dtype}")
    dims = [-1 if dim is None else dim for dim in one.shape[1:]]
    lines = [f"  name: {_quoted(one.name)}", f"  data_type: {_TYPES[one.dtype]}", f"  dims: {dims or [1]}"]
    if not dims:
        lines.append("  reshape { shape: [ ] }")
    return "\n".join([f"{kind} {{", *lines, "}"])


def _quoted(text: str) -> str:
    """A string of protobuf's text format."""
    plain = (chr(one) if 32 <= one < 127 and chr(one) not in '"\\' else f"\\{one:03o}" for one in text.encode())
    return f'"{"".join(plain)}"'


def _service(bundle: Verified, name: str, storage_uri: str, canary_percent: int | None) -> str:
    passport = bundle.passport
    annotations = {
        "fedkit/run": passport.run.name,
        "fedkit/variant": passport.shipped,
        "fedkit/signer": bundle.signer,
        "fedkit/sha256": hashlib.sha256(bundle.shipped).hexdigest(),
    }
    canary = [] if canary_percent is None else [f"    canaryTrafficPercent: {canary_percent}"]
    lines = [
        "apiVersion: serving.kserve.io/v1beta1",
        "kind: InferenceService",
        "metadata:",
        f"  name: {json.dumps(name)}",
        "  annotations:",
        *(f"    {key}: {json.dumps(value)}" for key, value in annotations.items()),
        "spec:",
        "  predictor:",
        *canary,
        "    model:",
        "      modelFormat:",
        "        name: onnx",
        "      protocolVersion: v2",
        "      runtime: kserve-tritonserver",
        f"      storageUri: {json.dumps(storage_uri)}",
    ]
    return "\n".join(lines) + "\n"
