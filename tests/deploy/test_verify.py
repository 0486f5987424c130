"""Nothing of a bundle can be changed unseen, and nothing that its owner did not sign is ever run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedkit.deploy import runtime
from fedkit.deploy.passport import TaskFacts
from fedkit.deploy.verify import Examination, verify_bundle
from fedkit.errors import ConfigError, ExportError, FedkitError, PayloadError, TrustError
from fedkit.trust.signing import public_of
from tests.deploy.conftest import KEY, resealed

OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
NAMES = [
    "SIGNATURE",
    "card.md",
    "clients.png",
    "learning.png",
    "model.int8.onnx",
    "model.onnx",
    "parity.json",
    "passport.json",
    "variants.png",
]


@pytest.fixture(scope="module")
def own(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("own") / "bundle"))


def failed(folder: Path, signer: str | None = None) -> dict[str, str]:
    return {check.name: check.detail for check in Examination(folder, signer).checks() if check.error is not None}


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_one_flipped_byte_anywhere_fails(name: str, own: Path, data: st.DataObject) -> None:
    path = own / name
    content = path.read_bytes()
    place, change = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
    path.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
    try:
        with pytest.raises(FedkitError, match=name.replace(".", r"\.")):
            verify_bundle(own)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_shorter_longer_or_gone_fails(name: str, bundle: Path) -> None:
    content = (bundle / name).read_bytes()
    for other in (content[:-1], content + b"\n", b""):
        (bundle / name).write_bytes(other)
        with pytest.raises(FedkitError, match=name.replace(".", r"\.")):
            verify_bundle(bundle)
    (bundle / name).unlink()
    with pytest.raises(FedkitError, match=name.replace(".", r"\.")):
        verify_bundle(bundle)


def test_another_file_fails_and_so_does_a_folder(bundle: Path) -> None:
    (bundle / "weights.bin").write_bytes(b"")
    with pytest.raises(TrustError, match=r"'weights\.bin' is not listed"):
        verify_bundle(bundle)
    (bundle / "weights.bin").unlink()
    (bundle / "__pycache__").mkdir()
    with pytest.raises(TrustError, match="'__pycache__' is not listed"):
        verify_bundle(bundle)


def test_a_link_and_a_pipe_are_not_read(bundle: Path, tmp_path: Path) -> None:
    (bundle / "card.md").rename(tmp_path / "card.md")
    (bundle / "card.md").symlink_to(tmp_path / "card.md")
    with pytest.raises(PayloadError, match=r"card\.md cannot be read"):
        verify_bundle(bundle)
    (bundle / "card.md").unlink()
    os.mkfifo(bundle / "card.md")
    with pytest.raises(PayloadError, match=r"card\.md is not a regular file"):
        verify_bundle(bundle)


def test_the_signer_must_be_the_one_who_is_expected(bundle: Path) -> None:
    assert verify_bundle(bundle, public_of(KEY).upper()).signer == public_of(KEY)
    with pytest.raises(TrustError, match=f"signed by {public_of(KEY)}, and not by {public_of(OTHER)}"):
        verify_bundle(bundle, public_of(OTHER))
    with pytest.raises(ConfigError, match="a signer is 64 hexadecimal characters"):
        verify_bundle(bundle, "me")
    resealed(bundle, OTHER)
    assert verify_bundle(bundle).signer == public_of(OTHER)
    with pytest.raises(TrustError, match="and not by"):
        verify_bundle(bundle, public_of(KEY))


def test_a_signature_by_one_and_the_name_of_another_is_none(bundle: Path) -> None:
    fields = json.loads((bundle / "SIGNATURE").read_text()) | {"public_key": public_of(OTHER)}
    (bundle / "SIGNATURE").write_text(json.dumps(fields, indent=2) + "\n")
    with pytest.raises(TrustError, match=r"SIGNATURE: it does not sign this passport\.json"):
        verify_bundle(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"signature": 1}', "[" * 3000, "\udcff"])
def test_what_is_no_signature_is_refused(text: str, bundle: Path) -> None:
    (bundle / "SIGNATURE").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(TrustError, match="SIGNATURE: not a signature"):
        verify_bundle(bundle)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b"\xff", b'{"format": 2}', b"[" * 100_000])
def test_what_is_no_passport_is_refused(raw: bytes, bundle: Path) -> None:
    (bundle / "passport.json").write_bytes(raw)
    with pytest.raises(FedkitError, match=r"passport\.json"):
        verify_bundle(bundle)


def test_a_passport_cannot_name_a_file_outside_or_one_that_no_bundle_has(bundle: Path) -> None:
    passport = json.loads((bundle / "passport.json").read_text())
    for name, match in (
        ("../secret", "passport.json"),
        ("a..b", "lists other files"),
        ("model.fp16.onnx", "lists other"),
    ):
        files = passport["files"] | {name: {"sha256": "0" * 64, "size_bytes": 1 << 60}}
        (bundle / "passport.json").write_text(json.dumps(passport | {"files": files}))
        assert match in " ".join(failed(bundle).values())


def test_every_check_is_listed_and_nothing_that_nobody_signed_is_opened(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / "card.md").write_text("better than it is")
    (bundle / "model.onnx").write_bytes(b"\x08\x0a")
    opened: list[bytes] = []
    monkeypatch.setattr(runtime, "session", lambda content, threads: opened.append(content))
    checks = {check.name: check.result for check in Examination(bundle, public_of(OTHER)).checks()}
    assert {name for name, result in checks.items() if result == "failed"} == {"SIGNATURE", "card.md", "model.onnx"}
    assert {name for name, result in checks.items() if result == "not tried"} == {
        "model.int8.onnx: network",
        "model.int8.onnx: metadata",
        "model.onnx: network",
        "model.onnx: metadata",
        "model.onnx: parity",
        "model.int8.onnx: probe",
    }
    assert opened == []
    with pytest.raises(TrustError, match="has not passed every check"):
        Examination(bundle).verified(())


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        verify_bundle(tmp_path / "missing")
    assert set(failed(tmp_path)) == {"passport.json", "SIGNATURE"}


def rewritten(folder: Path, change: object, name: str = "model.onnx") -> Path:
    """The folder with one network changed, and signed by its owner."""
    model = onnx.load(folder / name)
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    return resealed(folder)


def outside(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")


def in_a_branch(model: onnx.ModelProto) -> None:
    hidden = onnx.TensorProto(name="hidden", data_type=1, dims=[1])
    outside(hidden)
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=hidden)], "inner", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["risk"], ["x"], then_branch=inner, else_branch=inner))


@pytest.mark.parametrize("change", [lambda model: outside(model.graph.initializer[0]), in_a_branch])
def test_a_network_with_tensors_in_other_files_is_refused_before_it_is_loaded(
    change: object, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "session", None)
    with pytest.raises(PayloadError, match=r"model\.onnx: tensor '.*' lies in another file"):
        verify_bundle(rewritten(bundle, change))


def test_the_metadata_must_be_the_passport_s(bundle: Path) -> None:
    def otherwise(model: onnx.ModelProto) -> None:
        next(one for one in model.metadata_props if one.key == "fedkit.run").value = "heart-2"

    with pytest.raises(TrustError, match=r"model\.onnx: its metadata says something else"):
        verify_bundle(rewritten(bundle, otherwise))


def test_metadata_that_says_a_thing_twice_is_refused(bundle: Path) -> None:
    rewritten(bundle, lambda model: model.metadata_props.add(key="fedkit.run", value="heart-1"))
    with pytest.raises(FedkitError, match=r"model\.onnx"):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"outputs": [{"name": "score", "dtype": "float32", "shape": [None, 1]}]},
            "its outputs are risk; the passport",
        ),
        (
            {"inputs": [{"name": "features", "dtype": "float64", "shape": [None, 13]}]},
            "features is float32; the passport",
        ),
        (
            {"inputs": [{"name": "features", "dtype": "float32", "shape": [13]}]},
            r"features has shape \[None, 13\]; the",
        ),
    ],
)
def test_a_network_must_take_and_give_what_the_passport_says(change: dict, match: str, bundle: Path) -> None:
    task = TaskFacts(**(verify_bundle(bundle).passport.task.to_dict() | change))
    with pytest.raises(PayloadError, match=match):
        verify_bundle(resealed(bundle, task=task))


def test_a_network_that_the_checker_refuses_fails(bundle: Path) -> None:
    with pytest.raises(PayloadError, match=r"model\.onnx: ONNX's checker refuses it"):
        verify_bundle(rewritten(bundle, lambda model: setattr(model.graph.node[0], "op_type", "Nonsense")))


def test_a_network_with_an_operator_of_nobody_fails(bundle: Path) -> None:
    def strange(model: onnx.ModelProto) -> None:
        model.graph.node[0].domain = "nobody"
        model.opset_import.add(domain="nobody", version=1)

    found = failed(rewritten(bundle, strange))
    assert any("ONNX Runtime does not take the file" in text for text in found.values())


def doubled(model: onnx.ModelProto) -> None:
    for one in model.graph.initializer:
        if one.data_type == 1:
            values = onnx.numpy_helper.to_array(one) * np.float32(2)
            one.CopyFrom(onnx.numpy_helper.from_array(values, one.name))


def test_a_network_that_computes_something_else_fails(bundle: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.onnx: ONNX Runtime is .* from PyTorch here"):
        verify_bundle(rewritten(bundle, doubled))


def test_a_quantised_network_that_is_far_from_float32_fails(bundle: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.int8\.onnx: it is .* from float32 here"):
        verify_bundle(rewritten(bundle, doubled, "model.int8.onnx"))


def test_a_quantised_network_that_gives_no_numbers_fails(bundle: Path) -> None:
    def spoiled(model: onnx.ModelProto) -> None:
        one = next(one for one in model.graph.initializer if one.data_type == 1 and one.dims == [1])
        one.CopyFrom(onnx.numpy_helper.from_array(np.array([np.nan], dtype=np.float32), one.name))

    with pytest.raises(ExportError, match=r"model\.int8\.onnx: it is nan from float32 here"):
        verify_bundle(rewritten(bundle, spoiled, "model.int8.onnx"))


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": {}},
        {"outputs": {}},
        {"variants": {}},
        {"seed": "x"},
        {"inputs": {"features": {"dtype": "object", "shape": [1], "sha256": "0" * 64, "values": None}}},
        {"inputs": {"features": {"dtype": "float32", "shape": [1 << 40], "sha256": "0" * 64, "values": None}}},
        {"inputs": {"features": {"dtype": "float32", "shape": [4, 13], "sha256": "0" * 64, "values": [1.0] * 52}}},
        {"inputs": {"features": {"dtype": "uint8", "shape": [1], "sha256": "0" * 64, "values": [300]}}},
        {"outputs": {"risk": {"shape": [4, 1], "every": 0, "values": []}}},
        {"outputs": {"risk": {"shape": [4, 1], "every": 1, "values": [1.0]}}},
        {"outputs": {"risk": {"shape": [4, 2], "every": 1, "values": [1.0] * 8}}},
    ],
)
def test_a_probe_that_is_none_is_refused(change: dict, bundle: Path) -> None:
    probe = json.loads((bundle / "parity.json").read_text())
    (bundle / "parity.json").write_text(json.dumps(probe | change))
    found = failed(resealed(bundle))
    assert found
    assert set(found) <= {"model.onnx: parity", "model.int8.onnx: probe"}


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"seed": NaN}'])
def test_bytes_that_are_no_probe_are_refused(raw: bytes, bundle: Path) -> None:
    (bundle / "parity.json").write_bytes(raw)
    with pytest.raises(PayloadError, match=r"parity\.json: not a probe"):
        verify_bundle(resealed(bundle))


def test_another_variant_than_the_one_that_is_there_is_refused(bundle: Path) -> None:
    with pytest.raises(
        PayloadError, match=r"lists other files than a bundle has: model\.fp16\.onnx, model\.int8\.onnx"
    ):
        verify_bundle(resealed(bundle, shipped="fp16"))
