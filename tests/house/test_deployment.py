"""What runs it elsewhere says only what the program understands: images, units, charts and dashboards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from fedkit.cli import app
from fedkit.server.metrics import Metrics

DEPLOYMENT = Path(__file__).parents[2] / "deployment"
CHART = DEPLOYMENT / "helm" / "fedkit"
UNITS = sorted((DEPLOYMENT / "systemd").glob("*.service"))


def options(*path: str) -> set[str]:
    """Every option of a command."""
    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    return {option for parameter in command.params for option in parameter.opts}


def used(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def test_compose_starts_what_there_is_and_nobody_as_root() -> None:
    compose = yaml.safe_load((DEPLOYMENT / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        command, *rest = service["command"]
        assert used(" ".join(rest)) <= options(command), name
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"]
        assert "ports" not in service  # without TLS nothing leaves the shared loopback
    assert set(compose["volumes"]) == set(compose["services"])


def test_the_image_is_made_from_the_lock_files_and_runs_as_nobody() -> None:
    lines = (DEPLOYMENT / "Dockerfile").read_text()
    installs = re.findall(r"pip install (.*?)(?:;|\\?\n)", lines)
    assert len(installs) == 4
    assert all("--require-hashes -r locks/" in one or "--no-deps --no-index" in one for one in installs)
    last = lines[lines.rindex("\nFROM") :]
    assert re.search(r"^USER 10001$", last, re.MULTILINE)
    assert last.index("USER") < last.index("ENTRYPOINT")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_start_what_there_is(unit: Path) -> None:
    [start] = re.findall(r"^ExecStart=/opt/fedkit/bin/fedkit (.*)$", unit.read_text(), re.MULTILINE)
    assert used(start) <= options(start.split()[0])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_what_systemd_takes_and_little_exposed(unit: Path, tmp_path: Path) -> None:
    found = tmp_path / unit.name.replace("@", "@cleveland")
    found.write_text(unit.read_text().replace("/opt/fedkit/bin/fedkit", "/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", "--man=no", found], capture_output=True, text=True)
    assert unit.name.split("@")[0] not in checked.stderr, checked.stderr
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=35", "--no-pager", found],
        capture_output=True,
        text=True,
    )
    if "Unknown" in rated.stderr or "unrecognized" in rated.stderr:
        pytest.skip("this systemd-analyze does not rate files")
    assert rated.returncode == 0, rated.stdout[-400:] + rated.stderr


def values(tree: Any, path: str = "") -> set[str]:
    """Every path through nested mappings, such as coordinator.service.port."""
    found = {path} if path else set()
    if isinstance(tree, dict):
        for key, inner in tree.items():
            found |= values(inner, f"{path}.{key}" if path else key)
    return found


def test_the_chart_asks_only_for_values_that_it_has_and_starts_what_there_is() -> None:
    known = values(yaml.safe_load((CHART / "values.yaml").read_text()))
    for template in (CHART / "templates").iterdir():
        text = template.read_text()
        assert set(re.findall(r"\.Values\.([\w.]+)", text)) <= known, template.name
        assert text.count("{{") == text.count("}}")
        ends, begins = len(re.findall(r"{{-? end", text)), len(re.findall(r"{{-? (?:if|range|with|define)\b", text))
        assert ends == begins, template.name
    coordinator, agents = ((CHART / "templates" / name).read_text() for name in ("coordinator.yaml", "agents.yaml"))
    started = used(coordinator) - {"--authority"}
    assert started <= options("server") | options("ca", "init")
    assert used(agents) <= options("client") | options("enroll")
    example = (CHART / "values.yaml").read_text().split("agents: []\n")[1].split("agent:\n")[0]
    agent = yaml.safe_load("\n".join(line.removeprefix("# ") for line in example.splitlines()))[0]
    assert set(re.findall(r"\$agent\.(\w+)", agents)) <= agent.keys()


@pytest.mark.skipif(shutil.which("helm") is None, reason="there is no helm")
def test_helm_renders_the_chart(tmp_path: Path) -> None:
    agents = {"agents": [{"name": "cleveland", "tasks": ["heart"], "coordinator": "fed", "tokenSecret": "token"}]}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(agents))
    subprocess.run(["helm", "lint", "--strict", CHART], check=True, capture_output=True)
    command = ["helm", "template", "trial", CHART, "--values", tmp_path / "values.yaml"]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kinds = [one["kind"] for one in yaml.safe_load_all(rendered) if one]
    assert sorted(kinds) == ["Service", "StatefulSet", "StatefulSet"]


def test_the_dashboard_shows_metrics_that_the_coordinator_has() -> None:
    board = json.loads((DEPLOYMENT / "grafana" / "fedkit.json").read_text())
    exposed = {sample.name for metric in Metrics().registry.collect() for sample in metric.samples}
    exposed |= {f"{metric.name}{end}" for metric in Metrics().registry.collect() for end in ("", "_total", "_bucket")}
    asked = {name for panel in board["panels"] for name in re.findall(r"fedkit_\w+", panel["targets"][0]["expr"])}
    assert len(asked) == 6
    assert asked <= exposed
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
