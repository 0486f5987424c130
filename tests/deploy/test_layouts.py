"""What is written for Triton and KServe is what their published schemas know."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
from typer.testing import CliRunner

from fedkit.cli import app
from fedkit.deploy import layouts, runtime
from fedkit.deploy.layouts import kserve, ort_mobile, triton
from fedkit.deploy.passport import TensorFacts
from fedkit.deploy.probe import apart, drawn
from fedkit.deploy.verify import Verified, verify_bundle
from fedkit.errors import ConfigError, ExportError
from fedkit.trust.signing import public_of
from tests.deploy.conftest import KEY

URI = "s3://models/heart/models"


@pytest.fixture(scope="module")
def verified(made: Path) -> Verified:
    return verify_bundle(made)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def config(path: Path) -> ModelConfig:
    return text_format.Parse((path / "config.pbtxt").read_text(), ModelConfig())


def with_tensors(verified: Verified, **tensors: TensorFacts) -> Verified:
    task = verified.passport.task
    task = task.replace(**{name: [one] for name, one in tensors.items()})
    return dataclasses.replace(verified, passport=verified.passport.replace(task=task))


def test_triton_s_schema_reads_the_configuration(verified: Verified, tmp_path: Path) -> None:
    found = triton(verified, tmp_path)
    assert found == tmp_path / "heart"
    assert files(found) == ["1/model.onnx", "config.pbtxt"]
    assert (found / "1" / "model.onnx").read_bytes() == verified.shipped
    read = config(found)
    assert (read.name, read.platform, read.backend) == ("heart", "onnxruntime_onnx", "onnxruntime")
    assert read.max_batch_size == 64
    assert read.HasField("dynamic_batching")
    assert [(one.name, one.data_type, list(one.dims)) for one in read.input] == [("features", DataType.TYPE_FP32, [13])]
    assert [(one.name, one.data_type, list(one.dims)) for one in read.output] == [("risk", DataType.TYPE_FP32, [1])]
    assert triton(verified, tmp_path, "again", max_batch=8).name == "again"
    assert config(tmp_path / "again").max_batch_size == 8


def test_dimensions_that_vary_and_rows_that_are_single_numbers_are_told_to_triton(
    verified: Verified, tmp_path: Path
) -> None:
    free = TensorFacts(name='to "ken"\\s\nä', dtype="int64", shape=[None, None, 3])
    single = TensorFacts(name="y", dtype="float16", shape=[None])
    read = config(triton(with_tensors(verified, inputs=free, outputs=single), tmp_path))
    assert (read.input[0].name, read.input[0].data_type, list(read.input[0].dims)) == (
        free.name,
        DataType.TYPE_INT64,
        [-1, 3],
    )
    assert (list(read.output[0].dims), read.output[0].HasField("reshape"), list(read.output[0].reshape.shape)) == (
        [1],
        True,
        [],
    )


def test_every_type_that_is_named_is_one_of_triton_s() -> None:
    assert set(layouts._TYPES.values()) < set(DataType.keys())


@given(st.text(max_size=30))
def test_any_name_is_quoted_so_that_protobuf_reads_it_back(text):
    assert text_format.Parse(f"name: {layouts._quoted(text)}", ModelConfig()).name == text


def test_what_triton_does_not_take_is_refused_and_nothing_is_written_over(verified: Verified, tmp_path: Path) -> None:
    odd = with_tensors(verified, inputs=TensorFacts(name="x", dtype="complex64", shape=[None, 2]))
    for bundle, options, match in (
        (odd, {}, "Triton does not take x, which is complex64"),
        (verified, {"name": "../up"}, "the model's name must be"),
        (verified, {"max_batch": 0}, "a batch has at least one row"),
    ):
        with pytest.raises(ConfigError, match=match):
            triton(bundle, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    triton(verified, tmp_path)
    with pytest.raises(ConfigError, match="holds other files"):
        triton(verified, tmp_path)


def test_kserve_s_service_serves_the_repository_beside_it(verified: Verified, tmp_path: Path) -> None:
    found = kserve(verified, tmp_path / "out", storage_uri=URI, canary_percent=10)
    assert files(found) == ["inference-service.yaml", "models/heart/1/model.onnx", "models/heart/config.pbtxt"]
    assert config(found / "models" / "heart").name == "heart"
    service = yaml.safe_load((found / "inference-service.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert service["metadata"]["name"] == "heart"
    assert service["metadata"]["annotations"]["fedkit/run"] == "heart-1"
    assert service["metadata"]["annotations"]["fedkit/signer"] == public_of(KEY)
    assert service["spec"] == {
        "predictor": {
            "canaryTrafficPercent": 10,
            "model": {
                "modelFormat": {"name": "onnx"},
                "protocolVersion": "v2",
                "runtime": "kserve-tritonserver",
                "storageUri": URI,
            },
        }
    }
    kserve(verified, tmp_path / "whole", "heart-risk", storage_uri=URI)
    service = yaml.safe_load((tmp_path / "whole" / "inference-service.yaml").read_text())
    assert "canaryTrafficPercent" not in service["spec"]["predictor"]
    assert config(tmp_path / "whole" / "models" / "heart-risk").name == "heart-risk"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"storage_uri": None}, "KServe needs --storage-uri"),
        ({"storage_uri": "models"}, "KServe needs --storage-uri"),
        ({"storage_uri": 's3://a\n  image: "evil"'}, "KServe needs --storage-uri"),
        ({"name": "Heart_1"}, "is no name for a service"),
        ({"name": "a" * 64}, "is no name for a service"),
        ({"name": "heart\n"}, "is no name for a service"),
        ({"canary_percent": 101}, "0 to 100 percent"),
        ({"canary_percent": -1}, "0 to 100 percent"),
    ],
)
def test_what_kserve_does_not_take_is_refused(options: dict, match: str, verified: Verified, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        kserve(verified, tmp_path / "out", **({"storage_uri": URI} | options))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def phone(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phone") / "out"
    found = CliRunner().invoke(app, ["layout", str(made), "--to", "ort-mobile", "--out", str(out), "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["path"] == str(out)
    return out


def test_a_phone_s_file_gives_the_numbers_of_the_network_and_carries_its_passport(
    verified: Verified, phone: Path
) -> None:
    assert files(phone) == ["heart.ort", "heart.required_operators.config"]
    content = (phone / "heart.ort").read_bytes()
    assert content[4:8] == b"ORTM"
    running = runtime.session(content, threads=1)
    rows = drawn(verified.passport.task, rows=16, seed=1)
    wanted = runtime.run(runtime.session(verified.shipped, threads=1), rows)
    assert apart(runtime.run(running, rows), wanted) <= 1e-6
    assert "fedkit.passport" in running.get_modelmeta().custom_metadata_map


def test_the_operators_of_a_phone_s_file_are_named_and_no_path_of_this_machine(phone: Path) -> None:
    head, *lines = (phone / "heart.required_operators.config").read_text().splitlines()
    assert head == "# int8-dynamic network of run heart-1: --include_ops_by_config of a minimal build"
    named = {name for line in lines for name in line.split(";")[2].split(",")}
    assert "DynamicQuantizeMatMul" in named


def test_what_no_phone_takes_is_refused_and_leaves_nothing_behind(verified: Verified, tmp_path: Path) -> None:
    broken = dataclasses.replace(verified, models=dict.fromkeys(verified.models, b"no network"))
    with pytest.raises(ExportError, match="cannot be converted"):
        ort_mobile(broken, tmp_path / "out")
    with pytest.raises(ConfigError, match="the model's name"):
        ort_mobile(verified, tmp_path / "out", "../up")
    assert list(tmp_path.iterdir()) == []
