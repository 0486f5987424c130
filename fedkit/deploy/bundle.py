"""The bundle: the folder that is handed over for deployment.

`model.onnx` (float32) and, where the gate chose another one, `model.int8.onnx` or `model.fp16.onnx`; `passport.json`,
where the model comes from and what every other file's digest is; `SIGNATURE` over it; `card.md` with its pictures, the
same for people; `parity.json`, by which the files are checked anywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.codec import write_atomically
from fedkit.deploy import card, onnxfile, runtime
from fedkit.deploy.folders import new_folder
from fedkit.deploy.passport import FileFacts, Passport
from fedkit.deploy.plots import Curves, plots
from fedkit.deploy.probe import Allowed, Probe, apart
from fedkit.deploy.signer import sign
from fedkit.deploy.verify import FP32, MODELS, Verified, looks_like_a_bundle, stamp_of, verify_bundle
from fedkit.errors import ConfigError, ExportError, FedkitError
from fedkit.trust.signing import public_of

__all__ = ["FP32", "MODELS", "Verified", "verify_bundle", "write_bundle"]

_LEEWAY, _LEAST = 2.0, 0.05  # another processor rounds int8 differently: so much more, and at least so much, is allowed


def write_bundle(
    folder: Path | str,
    models: Mapping[str, bytes],
    passport: Passport,
    key: Ed25519PrivateKey,
    *,
    probe: Probe,
    curves: Curves | None = None,
) -> Path:
    """Writes a signed bundle to `folder`, which appears whole and verified, or not at all.

    `models` are "model.onnx" and, where `passport.shipped` is not float32, its file (see `MODELS`). Their metadata is
    written here, and so are `passport.files`. `probe` is what PyTorch gave for a few made-up rows; `curves` are scores
    by round for the card. `folder` may be missing, empty, or an older bundle, which is replaced.

    Raises `ConfigError` for another folder or other models, `ExportError` or `PayloadError` for a model that does not
    do what the passport says, `StorageError` where the disk does not do its part.
    """
    wanted = {FP32, MODELS[passport.shipped]}
    if set(models) != wanted:
        raise ConfigError(f"models: {passport.shipped} needs {', '.join(sorted(wanted))}, got {', '.join(models)}")
    try:
        passport.to_json()
    except ValueError as error:
        raise ConfigError(f"the passport cannot be written ({error}): None stands for a score that is none") from None
    with new_folder(Path(folder), looks_like_a_bundle) as beside:
        for name, content in _contents(models, passport, key, probe, curves or {}).items():
            write_atomically(beside / name, content)
        _examined(beside, Path(folder), public_of(key))
    return Path(folder)


def _examined(beside: Path, folder: Path, signer: str) -> None:
    try:
        verify_bundle(beside, signer)
    except FedkitError as error:
        raise type(error)(str(error).replace(str(beside), str(folder))) from None


def _contents(
    models: Mapping[str, bytes], passport: Passport, key: Ed25519PrivateKey, probe: Probe, curves: Curves
) -> dict[str, bytes]:
    stamps = {name: stamp_of(passport, "fp32" if name == FP32 else passport.shipped) for name in sorted(models)}
    files = {name: onnxfile.stamped(models[name], facts) for name, facts in stamps.items()}
    probe = replace(probe, variants={name: _allowed(files, name, probe) for name in files if name != FP32})
    files["parity.json"] = probe.to_json().encode()
    pictures = plots(passport, curves)
    sizes = {name: len(files[name]) for name in stamps}
    files["card.md"] = card.text(passport, public_of(key), sizes, list(pictures)).encode()
    files |= pictures
    digests = {name: _digest(content) for name, content in files.items()}
    body = passport.replace(files=digests).to_json().encode()
    return files | {"passport.json": body, "SIGNATURE": sign(body, key)}


def _allowed(models: Mapping[str, bytes], name: str, probe: Probe) -> Allowed:
    """How far a file is from float32 on the probe here, and how far it may be elsewhere."""
    found, wanted = (runtime.run(runtime.session(models[one], threads=1), probe.inputs) for one in (name, FP32))
    far = apart(found, wanted)
    if not math.isfinite(far):
        raise ExportError(f"{name} gives numbers for the probe that are not finite")
    return Allowed(difference=far, allowed=max(_LEEWAY * far, _LEAST))


def _digest(content: bytes) -> FileFacts:
    return FileFacts(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
