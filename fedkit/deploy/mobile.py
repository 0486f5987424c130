"""A network in the format of ONNX Runtime's mobile and minimal builds, by ONNX Runtime's own tool.

The format: onnxruntime.ai, "ORT model format". The tool runs in a process of its own, as it prints, sets up logging,
and may die of a network.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedkit.deploy import runtime
from fedkit.deploy.passport import Passport
from fedkit.deploy.probe import apart, drawn
from fedkit.errors import ExportError

__all__ = ["mobile_files"]

_TOOL = "onnxruntime.tools.convert_onnx_models_to_ort"
# Fused for ARM's kernels and without x86's own layout of tensors.
_OPTIONS = ("--optimization_style", "Fixed", "--target_platform", "arm")
_WITHIN_S = 600.0
_CLOSE = 1e-5  # fusing changes the order of sums, and no more than that


def mobile_files(content: bytes, name: str, passport: Passport) -> dict[str, bytes]:
    """`NAME.ort` and `NAME.required_operators.config`, the operators that a build must have to run it.

    Raises `ExportError` where ONNX Runtime does not convert the network, or the file does not give what it gave.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{name}.onnx"
        source.write_bytes(content)
        _convert(source)
        model = source.with_name(f"{name}.ort").read_bytes()
        config = source.with_name(f"{name}.required_operators.config").read_text()
    _require_same(model, content, passport)
    kept = [line for line in config.splitlines() if not line.startswith("#")]
    head = [f"# {passport.shipped} network of run {passport.run.name}: --include_ops_by_config of a minimal build"]
    return {f"{name}.ort": model, f"{name}.required_operators.config": ("\n".join(head + kept) + "\n").encode()}


def _convert(source: Path) -> None:
    try:
        runtime.aside(["-m", _TOOL, *_OPTIONS, str(source)], within_s=_WITHIN_S)
    except ExportError as error:
        raise ExportError(f"the network cannot be converted to ONNX Runtime's mobile format: {error}") from None


def _require_same(model: bytes, content: bytes, passport: Passport) -> None:
    rows = drawn(passport.task)
    found, wanted = (runtime.run(runtime.session(one, threads=1), rows) for one in (model, content))
    far = apart(found, wanted)
    if not far <= _CLOSE:
        raise ExportError(f"in ONNX Runtime's mobile format the network is off by {far:.2g}, {_CLOSE:g} are allowed")
