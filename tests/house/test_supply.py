"""What a deployment is installed from: every package pinned by hash, and listed in the bill of materials."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = [ROOT / "locks" / f"{name}.lock" for name in ("cpu", "gpu")]
SBOM = ROOT / os.environ.get("OUT", "out") / "sbom.cdx.json"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(path: Path) -> dict[str, tuple[str, set[str]]]:
    """Version and digests of each package in a lock file."""
    found = {}
    for block in re.split(r"(?m)^(?=\S)", path.read_text())[1:]:
        name, _, version = block.split()[0].partition("==")
        found[normal(name)] = (version, set(re.findall(r"--hash=sha256:([0-9a-f]{64})", block)))
    return found


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {normal(name): version for name, version in pairs}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_file_holds_every_dependency_in_the_tested_version_with_its_hashes(path: Path) -> None:
    found, tested = locked(path), pinned()
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {normal(re.match(r"[\w.-]+", line)[0]) for line in wanted} <= set(found)
    assert all(hashes for _, hashes in found.values())
    differing = {name: version for name, (version, _) in found.items() if tested.get(name, version) != version}
    assert differing == ({"torch": f"{tested['torch']}+cpu"} if path.stem == "cpu" else {})


def test_what_builds_the_wheel_is_locked_with_its_hashes() -> None:
    found, tested = locked(ROOT / "locks" / "build.lock"), pinned()
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {"build", *(normal(re.match(r"[\w.-]+", line)[0]) for line in wanted)} <= set(found)
    assert all(hashes for _, hashes in found.values())
    assert {name: version for name, (version, _) in found.items() if tested.get(name, version) != version} == {}


def test_both_lock_files_hold_the_same_but_for_what_a_gpu_needs() -> None:
    cpu, gpu = (locked(ROOT / "locks" / f"{name}.lock") for name in ("cpu", "gpu"))
    assert {name: cpu[name] for name in cpu if name != "torch"} == {name: gpu[name] for name in cpu if name != "torch"}
    assert all(name.startswith(("cuda-", "nvidia-", "triton")) for name in set(gpu) - set(cpu))


@pytest.mark.skipif(not SBOM.exists(), reason="make sbom writes it, which make test does first")
def test_the_bill_of_materials_lists_what_is_locked_with_its_digests() -> None:
    bill = json.loads(SBOM.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "fedkit"
    listed = {
        normal(one["name"]): (
            one["version"],
            {digest["content"] for reference in one["externalReferences"] for digest in reference["hashes"]},
        )
        for one in bill["components"]
    }
    assert listed == locked(ROOT / "locks" / "cpu.lock")


def test_every_test_that_the_threat_model_names_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(tests/[\w/.]+|bench/[\w/.]+|test_\w+)`", text))
    assert len(named) > 10
    missing = [one for one in named if not ((ROOT / one).exists() if "/" in one else f"def {one}(" in sources)]
    assert not missing
