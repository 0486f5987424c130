"""The .proto files, what was generated from them, and what serves them belong together."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from fedkit.protos import agents_pb2, identities_pb2, operators_pb2
from fedkit.protos.wire import handlers
from fedkit.server.agents import AgentService
from fedkit.server.identities import EnrolmentService, IdentityService
from fedkit.server.operators import DescribingService, OperatorService

ROOT = Path(__file__).parents[2]
PROTOS = sorted(path.name for path in (ROOT / "protos").glob("*.proto"))
SERVICES = {
    AgentService: agents_pb2.DESCRIPTOR.services_by_name["Agents"],
    DescribingService: agents_pb2.DESCRIPTOR.services_by_name["Runs"],
    OperatorService: operators_pb2.DESCRIPTOR.services_by_name["Operators"],
    EnrolmentService: identities_pb2.DESCRIPTOR.services_by_name["Enrolment"],
    IdentityService: identities_pb2.DESCRIPTOR.services_by_name["Identities"],
}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("grpc_tools")
    folder = tmp_path_factory.mktemp("generated")
    files = [f"fedkit/protos/{name}" for name in PROTOS]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={folder}", f"--pyi_out={folder}"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "fedkit" / "protos"


@pytest.mark.parametrize("name", PROTOS)
@pytest.mark.parametrize("ending", ["_pb2.py", "_pb2.pyi"])
def test_the_generated_files_are_those_of_the_protos(generated: Path, name: str, ending: str) -> None:
    made = name.replace(".proto", ending)
    assert (generated / made).read_text() == (ROOT / "protos" / made).read_text(), (
        f"python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. fedkit/protos/{name}"
    )


def test_every_proto_was_generated_and_nothing_else() -> None:
    stubs = {path.name for path in (ROOT / "protos").iterdir() if "_pb2" in path.name}
    assert stubs == {name.replace(".proto", ending) for name in PROTOS for ending in ("_pb2.py", "_pb2.pyi")}


@pytest.mark.parametrize(("servicer", "service"), SERVICES.items(), ids=lambda of: getattr(of, "name", ""))
def test_every_rpc_has_a_method_that_serves_it(servicer: type, service: ServiceDescriptor) -> None:
    assert handlers(service, servicer) is not None
    for method in service.methods:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower()
        serves = getattr(servicer, name)
        assert inspect.isasyncgenfunction(serves) or inspect.iscoroutinefunction(serves)
        assert method.server_streaming or not inspect.isasyncgenfunction(serves)
        assert serves.__doc__


def test_every_service_of_the_protos_is_served() -> None:
    declared = [name for file in PROTOS for name in re.findall(r"^service (\w+)", text(file), re.MULTILINE)]
    assert sorted(declared) == sorted(service.name for service in SERVICES.values())


def text(name: str) -> str:
    return (ROOT / "protos" / name).read_text()


def undocumented(name: str) -> list[str]:
    """The services, rpcs and messages that no comment goes before, nor explains a field of."""
    lines, found = text(name).splitlines(), []
    for number, line in enumerate(lines):
        declared = re.match(r"(service|message|enum|  rpc) (\w+)", line)
        if declared is None or lines[number - 1].lstrip().startswith("//"):
            continue
        if declared[1] in ("message", "enum") and "//" in "\n".join(body(lines[number:])):
            continue
        found.append(declared[2])
    return found


def body(lines: list[str]) -> list[str]:
    if lines[0].endswith("{}"):
        return lines[:1]
    return lines[: lines.index("}") + 1]


@pytest.mark.parametrize("name", PROTOS)
def test_every_service_rpc_and_message_is_explained(name: str) -> None:
    assert undocumented(name) == []
