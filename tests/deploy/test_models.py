"""`fedkit models` as people type it, and what two passports say differently."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedkit.cli import app
from fedkit.deploy.differences import Difference, differences
from fedkit.deploy.passport import ClientFacts
from fedkit.deploy.registry import Registry
from tests.deploy.bundles import SIGNER, small_bundle
from tests.deploy.passports import passport

Typed = Callable[..., Result]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two bundles nobody may change, of which the second scores worse."""
    folder = tmp_path_factory.mktemp("bundles")
    worse = {"test": {"accuracy": 0.7, "loss": 0.6}}
    return [small_bundle(folder / "good", 0.1), small_bundle(folder / "worse", 0.2, **worse)]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDKIT_REGISTRY", raising=False)
    return lambda *arguments: CliRunner().invoke(app, ["models", *map(str, arguments)])


@pytest.fixture
def filled(typed: Typed, made: list[Path]) -> Typed:
    """With heart:1, and heart:2 that scores worse."""
    with Registry(Path("fedkit-registry"), create=True) as registry:
        for bundle in made:
            registry.add(bundle, "heart")
    return typed


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_model_is_added_promoted_shown_and_rolled_back(typed: Typed, made: list[Path], tmp_path: Path) -> None:
    added = typed("add", made[0], "--name", "heart", "--note", "spring")
    assert added.exit_code == 0, added.output
    assert f"heart:1 is a candidate, signed by {SIGNER}" in words(added.stdout)
    assert "compare that key, or give it with --signer" in words(added.stdout)
    assert "Next: fedkit models promote heart:1 --to canary" in words(added.stdout)
    assert "Nobody has said" not in typed("add", made[1], "--name", "heart", "--signer", SIGNER).stdout
    on_trial = typed("promote", "heart:1", "--to", "canary")
    assert "heart:1 is the canary, judged by no criteria" in words(on_trial.stdout)
    assert "Next: fedkit models promote heart:1 --to production" in words(on_trial.stdout)
    (tmp_path / "criteria.toml").write_text("[floors]\naccuracy = 0.75\n")
    released = typed("promote", "heart:1", "--to", "production", "--criteria", "criteria.toml")
    assert released.exit_code == 0, released.output
    assert re.search(r"accuracy +>= 0\.75 +0\.8 +passed", released.stdout)
    assert words(released.stdout).endswith("heart:1 is in production")
    next_one = typed("promote", "heart:2", "--to", "production", "--without-criteria", "--note", "urgent")
    assert "heart:2 is in production; heart:1 is archived, judged by no criteria" in words(next_one.stdout)
    assert "Next: fedkit models rollback heart puts heart:1 back" in words(next_one.stdout)
    shown = words(typed("show", "heart").stdout)
    assert "heart:2, production" in shown
    assert "promoted: urgent" in shown
    assert "accuracy 0.7000" in shown
    assert "heart:1 is in production again" in typed("rollback", "heart", "--note", "complaints").stdout
    archived = words(typed("archive", "heart:1").stdout)
    assert "heart:1 is archived Now no version of heart is in production." in archived
    (audited,) = [line for line in Path("fedkit-registry/audit.log").read_text().splitlines() if "urgent" in line][1:]
    assert json.loads(audited)["judged"] is False


def test_a_model_that_misses_a_criterion_ends_with_one_and_the_table_of_all(filled: Typed, tmp_path: Path) -> None:
    criteria = "[floors]\naccuracy = 0.9\n[ceilings]\nloss = 0.6\n[latency_ms]\n2 = 1\n"
    (tmp_path / "fedkit-registry" / "criteria.toml").write_text(criteria)  # the registry's own
    found = filled("promote", "heart:1", "--to", "production")
    assert found.exit_code == 1
    for row in (r"accuracy +>= 0\.9 +0\.8 +missed", r"loss +<= 0\.6 +0\.5 +passed"):
        assert re.search(row, found.stdout), found.stdout
    assert "not measured" in found.stdout
    said = "heart:1 is not promoted: it does not pass 2 of 3 criteria (accuracy; milliseconds of one call, batch of 2)"
    assert said in words(found.stderr)
    as_json = filled("promote", "heart:1", "--to", "production", "--json")
    assert as_json.exit_code == 1
    facts = json.loads(as_json.stdout)
    assert facts["stage"] == "candidate"
    assert [one["outcome"] for one in facts["criteria"]] == ["missed", "passed", "not measured"]
    assert filled("promote", "heart:1", "--to", "production", "--without-criteria").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("promote", "heart:1", "--to", "production"), "no criteria: give some"),
        (("promote", "heart", "--to", "canary"), "say which version: heart:NUMBER"),
        (("promote", "heart:7", "--to", "canary"), "there is no heart:7: fedkit models show heart lists what there is"),
        (("promote", "heart:1", "--to", "canary", "--criteria", "no.toml"), "no.toml: No such file"),
        (("promote", "heart:1", "--to", "canary", "--criteria", "x", "--without-criteria"), "give one or the other"),
        (("rollback", "heart"), "of heart no other version was in production"),
        (("show", "lung"), "holds no model 'lung'; known are heart"),
        (("show", "../heart"), "a model's name must be"),
        (("add", "nowhere", "--name", "heart"), "nowhere/passport.json cannot be read"),
        (("list", "--registry", "nowhere"), "fedkit models add BUNDLE --name NAME --registry nowhere makes one"),
    ],
)
def test_what_cannot_be_done_says_what_to_do(filled: Typed, arguments: tuple[str, ...], said: str) -> None:
    found = filled(*arguments)
    assert found.exit_code == 1
    assert said in words(found.stderr)


def test_versions_are_listed_with_their_stages_and_an_unreadable_one_too(filled: Typed, tmp_path: Path) -> None:
    filled("promote", "heart:1", "--to", "canary")
    (gone,) = [one for one in json.loads(filled("list", "--json").stdout) if one["version"] == "heart:2"]
    Path(gone["path"]).rename(tmp_path / "gone")
    table = filled("list").stdout
    assert re.search(r"heart:1 +canary .*heart-1", table)
    assert re.search(r"heart:2 +candidate .*\?", table)
    assert "Next: fedkit models show heart:2" in words(table)


def test_json_says_what_the_tables_say(filled: Typed, made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(filled("list", "--json").stdout)
    assert [(one["version"], one["stage"], one["signer"]) for one in found] == [
        (f"heart:{number}", "candidate", SIGNER) for number in (1, 2)
    ]
    assert json.loads(filled("promote", "heart:1", "--to", "canary", "--json").stdout)["stage"] == "canary"
    shown = json.loads(filled("show", "heart:canary", "--json").stdout)
    assert shown["passport"]["run"]["name"] == "heart-1"
    assert [one["to"] for one in shown["changes"]] == ["candidate", "candidate", "canary"]
    assert json.loads(filled("archive", "heart:1", "--json").stdout)["stage"] == "archived"
    filled("promote", "heart:1", "--to", "production", "--without-criteria")
    filled("promote", "heart:2", "--to", "production", "--without-criteria")
    assert json.loads(filled("rollback", "heart", "--json").stdout)["version"] == "heart:1"
    monkeypatch.setenv("FEDKIT_REGISTRY", "elsewhere")
    assert json.loads(filled("add", made[0], "--name", "lung", "--json").stdout)["version"] == "lung:1"
    assert Path("elsewhere", "registry.db").is_file()


def test_a_registry_without_models_says_what_to_do_next(typed: Typed) -> None:
    Registry(Path("fedkit-registry"), create=True).close()
    assert "There are no models yet. Next: fedkit models add BUNDLE --name NAME" in words(typed("list").stdout)
    assert json.loads(typed("list", "--json").stdout) == []


def test_nothing_that_a_passport_says_is_obeyed_by_the_terminal(typed: Typed, tmp_path: Path) -> None:
    run = passport().run.replace(strategy="[red]x[/red]\x1b]0;owned\x07\u202etac")
    bundle = small_bundle(tmp_path / "bundle", 0.3, run=run)
    assert typed("add", bundle, "--name", "heart").exit_code == 0
    for command in ("list", "show"):
        found = typed(command, *(["heart"] if command == "show" else []))
        assert found.exit_code == 0, found.output
        assert not {"\x1b", "\x07", "\u202e"} & set(found.stdout)
        assert command == "list" or "[red]x[/red]" in found.stdout.replace("\n", "")


def test_two_versions_are_compared(filled: Typed) -> None:
    found = filled("diff", "heart:1", "heart:2")
    assert re.search(r"test\.accuracy +0\.8 +0\.7 +-0\.1", found.stdout)
    facts = json.loads(filled("diff", "heart:1", "heart:2", "--json").stdout)
    assert {one["fact"] for one in facts} - {"files.model.onnx.size_bytes"} == {"test.accuracy", "test.loss"}
    same = filled("diff", "heart:2", "heart").stdout
    assert "The passports of heart:2 and heart:2 say the same" in words(same)


def test_what_differs_is_told_by_name_and_by_how_much() -> None:
    one = passport()
    clients = [ClientFacts(pseudonym="z", rounds=1, test={"accuracy": 0.6}, epsilon=2.5)]
    gate = [measured.replace(size_bytes=100, why="other words") for measured in one.gate]
    other = one.replace(clients=clients, gate=gate, versions={"torch": "2.14.0"}, created="later", calibration=None)
    found = {difference.fact: difference for difference in differences(one, other)}
    assert found["clients.count"].change == -2
    assert found["clients.accuracy.least"] == Difference("clients.accuracy.least", 0.75, 0.6)
    assert found["clients.epsilon"].change == pytest.approx(2.5 - 2.85)
    assert found["gate.int8.size_bytes"].change == 100
    assert found["versions.torch"] == Difference("versions.torch", "2.13.0", "2.14.0")
    assert found["versions.torch"].change is None
    assert found["calibration.method"].other is None
    assert not {"created", "gate.int8.why"} & set(found)
    assert list(found) == sorted(found)
    assert differences(one, one.replace(created="later")) == []
