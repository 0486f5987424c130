"""The registry of models: stages, crashes at every step, several writers, and bundles that lie."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import posix
import random
import shutil
import signal
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import coverage
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from fedkit import audit
from fedkit.config import parse
from fedkit.deploy.acceptance import Criteria
from fedkit.deploy.bundle import verify_bundle
from fedkit.deploy.passport import Passport
from fedkit.deploy.registry import Registry, Version
from fedkit.errors import ConfigError, FedkitError, NotAccepted, PayloadError, StorageError, TrustError
from tests.deploy.bundles import KEY, SIGNER, small_bundle
from tests.deploy.passports import passport

GOOD = parse(Criteria, {"floors": {"accuracy": 0.75}})
BAD = parse(Criteria, {"floors": {"accuracy": 0.9}, "ceilings": {"loss": 0.6}, "noise": {"0.5": {"loss": 1.0}}})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four bundles nobody may change."""
    folder = tmp_path_factory.mktemp("bundles")
    return [small_bundle(folder / f"b{number}", number / 10) for number in range(1, 5)]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry", create=True) as found:
        yield found


@pytest.fixture
def own(made: list[Path], tmp_path: Path) -> Path:
    """A bundle of the test's own."""
    return Path(shutil.copytree(made[0], tmp_path / "own"))


def stages(registry: Registry, name: str = "heart") -> dict[int, str]:
    return {one.number: one.stage for one in registry.versions(name)}


def lines(registry: Registry) -> list[dict[str, Any]]:
    """The audit log, verified; each change of the database is in it once, in order."""
    path = registry.folder / "audit.log"
    if not path.exists():
        return []
    audit.verify(path)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["change"] for line in found] == list(range(1, len(found) + 1))
    assert len(found) == sum(len(registry.changes(name)) for name in {one.name for one in registry.versions()})
    return found


# -- stages ------------------------------------------------------------------------------------------------------------


def test_versions_go_from_candidate_to_production_and_back(registry: Registry, made: list[Path]) -> None:
    for bundle in made:
        assert registry.add(bundle, "heart").stage == "candidate"
    assert [str(one) for one in registry.versions()] == ["heart:1", "heart:2", "heart:3", "heart:4"]
    registry.promote("heart:1", "canary")
    registry.promote("heart:canary", "production", criteria=GOOD)
    registry.promote("heart:2", "production", criteria=GOOD)
    registry.promote("heart:3", "canary")
    registry.promote("heart:4", "canary")
    assert stages(registry) == {1: "archived", 2: "production", 3: "archived", 4: "canary"}
    registry.promote("heart:4", "production", criteria=GOOD)
    assert str(registry.rollback("heart")) == "heart:2"
    assert str(registry.rollback("heart")) == "heart:1"
    assert stages(registry) == {1: "production", 2: "archived", 3: "archived", 4: "archived"}
    with pytest.raises(ConfigError, match="of heart no other version was in production"):
        registry.rollback("heart")


def test_what_was_archived_by_hand_is_passed_over_by_rollback(registry: Registry, made: list[Path]) -> None:
    for number, bundle in enumerate(made[:3], 1):
        registry.add(bundle, "heart")
        registry.promote(f"heart:{number}", "production", unjudged=True)
    registry.archive("heart:2", note="it was never any good")
    with pytest.raises(ConfigError, match="heart:2 is archived already"):
        registry.archive("heart:2")
    registry.archive("heart:production")
    assert stages(registry) == {1: "archived", 2: "archived", 3: "archived"}
    assert str(registry.rollback("heart")) == "heart:1"


def test_what_went_on_trial_again_can_be_gone_back_to(registry: Registry, made: list[Path]) -> None:
    for number, bundle in enumerate(made[:2], 1):
        registry.add(bundle, "heart")
        registry.promote(f"heart:{number}", "production", unjudged=True)
    registry.promote("heart:1", "canary")
    assert str(registry.rollback("heart")) == "heart:1"
    assert stages(registry) == {1: "production", 2: "archived"}


def test_a_version_that_was_promoted_again_is_not_its_own_past(registry: Registry, made: list[Path]) -> None:
    for number, bundle in enumerate(made[:2], 1):
        registry.add(bundle, "heart")
        registry.promote(f"heart:{number}", "production", unjudged=True)
    registry.archive("heart:2")
    registry.promote("heart:1", "production", unjudged=True)
    with pytest.raises(ConfigError, match="no other version was in production"):
        registry.rollback("heart")


def test_names_have_versions_of_their_own_and_may_share_a_bundle(registry: Registry, made: list[Path]) -> None:
    for name in ("heart", "heart.2"):
        registry.add(made[0], name)
        registry.promote(f"{name}:1", "production", unjudged=True)
    assert {str(one) for one in registry.versions() if one.stage == "production"} == {"heart:1", "heart.2:1"}
    assert len(list((registry.folder / "bundles").iterdir())) == 1
    with pytest.raises(ConfigError, match="is heart:1 already, which is production"):
        registry.add(made[0], "heart")


def test_a_bare_name_means_the_version_in_production_or_else_the_newest(registry: Registry, made: list[Path]) -> None:
    for bundle in made[:2]:
        registry.add(bundle, "heart")
    assert registry.find("heart").number == 2
    registry.promote("heart:1", "production", unjudged=True)
    assert registry.find("heart").number == 1
    assert registry.find("heart:production").number == 1
    assert registry.passport(registry.find("heart:2")) == verify_bundle(made[1]).passport


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (lambda one: one.find("heart:9"), "there is no heart:9"),
        (lambda one: one.find("heart:canary"), "there is no heart:canary"),
        (lambda one: one.find("heart:archived"), "a version is written"),
        (lambda one: one.find("heart:0"), "a version is written"),
        (lambda one: one.find("heart:1:2"), "a version is written"),
        (lambda one: one.find("heart:\u0661"), "a version is written"),
        (lambda one: one.find("../heart:1"), "a model's name must be"),
        (lambda one: one.find(""), "a model's name must be"),
        (lambda one: one.find("lung"), "holds no model 'lung'; known are heart"),
        (lambda one: one.rollback("lung"), "holds no model 'lung'"),
        (lambda one: one.archive("heart"), "say which version: heart:NUMBER"),
        (lambda one: one.promote("heart", "canary"), "say which version"),
        (lambda one: one.promote("heart:1", "production"), "no criteria"),
        (lambda one: one.promote("heart:2", "production", unjudged=True), "heart:2 is in production already"),
        (lambda one: one.promote("heart:2", "canary"), "heart:2 is in production: put another one there"),
        (lambda one: one.archive("heart:1", note="x" * 1001), "at most 1000 characters"),
    ],
)
def test_ways_that_there_are_not_are_refused_and_change_nothing(
    registry: Registry, made: list[Path], does: Callable[[Registry], object], said: str
) -> None:
    for bundle in made[:2]:
        registry.add(bundle, "heart")
    registry.promote("heart:2", "production", unjudged=True)
    before = stages(registry), len(lines(registry))
    with pytest.raises(ConfigError, match=said):
        does(registry)
    assert (stages(registry), len(lines(registry))) == before


@pytest.mark.parametrize("name", ["../up", "/tmp/x", "a/b", "", "-x", "a:1", ".", "..", "a\n", "ä", "x" * 101])
def test_a_name_is_never_a_path_or_an_option(registry: Registry, made: list[Path], name: str) -> None:
    with pytest.raises(ConfigError, match="a model's name must be"):
        registry.add(made[0], name)
    assert not (registry.folder / "bundles").exists()


def test_every_change_is_in_the_audit_log_with_who_and_why(registry: Registry, made: list[Path]) -> None:
    for bundle in made[:2]:
        registry.add(bundle, "heart", signer=SIGNER, note="from the spring run")
    registry.promote("heart:1", "production", unjudged=True, note="first \ud800 release")
    registry.promote("heart:2", "production", criteria=GOOD)
    registry.rollback("heart", note="complaints")
    found = lines(registry)
    ways = [(line["event"], line["version"], line["from"], line["to"]) for line in found]
    assert ways == [
        ("model added", 1, None, "candidate"),
        ("model added", 2, None, "candidate"),
        ("model promoted", 1, "candidate", "production"),
        ("model replaced", 1, "production", "archived"),
        ("model promoted", 2, "candidate", "production"),
        ("model rolled back", 2, "production", "archived"),
        ("model put back", 1, "archived", "production"),
    ]
    assert {line["model"] for line in found} == {"heart"}
    assert all(line["who"] and line["bundle"] for line in found)
    assert found[0]["signer"] == SIGNER
    assert [line["note"] for line in found[:3]] == ["from the spring run"] * 2 + ["first \ud800 release"]
    assert found[2]["judged"] is False
    assert found[3]["by"] == "heart:2"
    assert found[4]["found"] == {"accuracy >= 0.75": "0.8"}
    assert [line["note"] for line in found[5:]] == ["complaints"] * 2


# -- acceptance --------------------------------------------------------------------------------------------------------


def test_a_version_that_misses_a_criterion_stays_where_it_is_and_all_verdicts_are_told(
    registry: Registry, made: list[Path]
) -> None:
    registry.add(made[0], "heart")
    with pytest.raises(
        NotAccepted, match=r"heart:1 is not promoted: it does not pass 2 of 3 criteria \(accuracy; drop"
    ):
        registry.promote("heart:1", "canary", criteria=BAD)
    with pytest.raises(NotAccepted) as told:
        registry.promote("heart:1", "production", criteria=BAD)
    assert [verdict.outcome for verdict in told.value.verdicts] == ["missed", "passed", "not measured"]
    assert stages(registry) == {1: "candidate"}
    assert len(lines(registry)) == 1


def test_the_registrys_own_criteria_hold_where_no_others_are_given(registry: Registry, made: list[Path]) -> None:
    registry.add(made[0], "heart")
    assert registry.criteria() is None
    (registry.folder / "criteria.toml").write_text("[floors]\naccuracy = 0.9\n")
    for to in ("canary", "production"):
        with pytest.raises(NotAccepted):
            registry.promote("heart:1", to)
    assert registry.promote("heart:1", "canary", criteria=GOOD)[0].passed
    assert registry.promote("heart:1", "production", unjudged=True) == []
    (registry.folder / "criteria.toml").write_text("[flors]")
    registry.add(made[1], "heart")
    with pytest.raises(ConfigError, match=r"criteria.toml.flors"):
        registry.promote("heart:2", "canary")


# -- bundles that lie --------------------------------------------------------------------------------------------------


def nothing_is_kept(registry: Registry) -> bool:
    return registry.versions() == [] and list((registry.folder / "bundles").iterdir()) == []


def swap_model(bundle: Path, elsewhere: Path) -> None:
    (bundle / "model.onnx").rename(elsewhere / "model.onnx")
    (bundle / "model.onnx").symlink_to(elsewhere / "model.onnx")


def swap_passport(bundle: Path, elsewhere: Path) -> None:
    (bundle / "passport.json").rename(elsewhere / "passport.json")
    (bundle / "passport.json").symlink_to(elsewhere / "passport.json")


def pipe(bundle: Path, _: Path) -> None:
    (bundle / "SIGNATURE").unlink()
    os.mkfifo(bundle / "SIGNATURE")


def more(bundle: Path, _: Path) -> None:
    (bundle / "run.sh").write_text("echo")


def inner(bundle: Path, _: Path) -> None:
    (bundle / "card.md").unlink()
    (bundle / "card.md").mkdir()


def longer(bundle: Path, _: Path) -> None:
    with open(bundle / "card.md", "a") as file:
        file.write("x")


def flipped(bundle: Path, _: Path) -> None:
    raw = bytearray((bundle / "model.onnx").read_bytes())
    raw[100] ^= 1
    (bundle / "model.onnx").write_bytes(raw)


def unsigned(bundle: Path, _: Path) -> None:
    (bundle / "SIGNATURE").unlink()


def other_passport(bundle: Path, _: Path) -> None:
    text = (bundle / "passport.json").read_text()
    (bundle / "passport.json").write_text(text.replace('"seed": 42', '"seed": 43'))


def escaping(bundle: Path, _: Path) -> None:
    facts = json.loads((bundle / "passport.json").read_text())
    facts["files"]["../../evil"] = facts["files"]["card.md"]
    (bundle / "passport.json").write_text(json.dumps(facts))


def no_json(bundle: Path, _: Path) -> None:
    (bundle / "passport.json").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (swap_model, "model.onnx cannot be read"),
        (swap_passport, "passport.json cannot be read"),
        (pipe, "SIGNATURE is not a regular file"),
        (more, "holds 'run.sh', of which its passport knows nothing"),
        (inner, "card.md"),
        (longer, "card.md has"),
        (flipped, "model.onnx is not the file that was signed"),
        (unsigned, "SIGNATURE cannot be read"),
        (other_passport, "SIGNATURE"),
        (escaping, "should match pattern"),
        (no_json, "passport.json"),
        (lambda bundle, _: shutil.rmtree(bundle), "passport.json cannot be read"),
    ],
)
def test_a_bundle_that_lies_is_refused_by_its_own_path_and_leaves_nothing(
    registry: Registry, own: Path, tmp_path: Path, lie: Callable[[Path, Path], None], said: str
) -> None:
    lie(own, tmp_path)
    with pytest.raises((PayloadError, TrustError), match=said) as told:
        registry.add(own, "heart")
    assert str(own) in str(told.value)
    assert nothing_is_kept(registry)
    assert not (tmp_path / "evil").exists()


def test_a_signer_who_is_not_the_expected_one_is_refused(registry: Registry, own: Path) -> None:
    with pytest.raises(TrustError, match=f"signed by {SIGNER}"):
        registry.add(own, "heart", signer="0" * 64)
    assert nothing_is_kept(registry)


def test_a_bundle_that_changes_while_it_is_taken_is_kept_as_it_was_verified(
    tmp_path: Path, own: Path, made: list[Path]
) -> None:
    def spoil(folder: Path, signer: str | None) -> Any:
        flipped(own, tmp_path)  # after the copy was made, which is what gets verified
        return verify_bundle(folder, signer)

    with Registry(tmp_path / "registry", create=True, verify=spoil) as registry:
        version = registry.add(own, "heart")
    assert verify_bundle(registry.path(version)).models == verify_bundle(made[0]).models
    with pytest.raises(TrustError):
        verify_bundle(own)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model.onnx", "is not the file that was signed"),
        ("passport.json", "is not the passport that was added"),
        ("SIGNATURE", "SIGNATURE"),
        (None, "is missing: put it back from a backup"),
    ],
)
def test_what_was_changed_on_disk_is_neither_promoted_nor_rolled_back_to(
    registry: Registry, made: list[Path], file: str | None, said: str
) -> None:
    for bundle in made[:2]:
        registry.add(bundle, "heart")
    place = registry.path(registry.find("heart:1"))
    registry.promote("heart:1", "production", unjudged=True)
    registry.promote("heart:2", "production", unjudged=True)
    if file is None:
        place.rename(place.with_name("away"))
    else:
        raw = bytearray((place / file).read_bytes())
        raw[len(raw) // 2] ^= 1
        (place / file).chmod(0o600)
        (place / file).write_bytes(raw)
    with pytest.raises((TrustError, PayloadError, StorageError), match=said):
        registry.promote("heart:1", "canary")
    with pytest.raises(FedkitError, match=r"heart:1 is damaged.*fedkit models archive heart:1"):
        registry.rollback("heart")
    assert stages(registry) == {1: "archived", 2: "production"}


def test_a_bundle_signed_anew_in_its_place_by_another_is_not_promoted(registry: Registry, own: Path) -> None:
    from fedkit.deploy.signer import sign

    version = registry.add(own, "heart")
    path = registry.path(version) / "SIGNATURE"
    path.chmod(0o600)
    body = (registry.path(version) / "passport.json").read_bytes()
    path.write_bytes(sign(body, Ed25519PrivateKey.generate()))
    with pytest.raises(TrustError, match=f"and not by {SIGNER}"):
        registry.promote("heart:1", "canary")
    path.write_bytes(sign(body, KEY))
    registry.promote("heart:1", "canary")


# -- crashes -----------------------------------------------------------------------------------------------------------

STEPS = ("replace", "rename", "mkdir", "write", "pwrite")  # between two of them no other process sees a difference


def forked() -> int:
    """`os.fork`, of which later Pythons warn where there are threads: the child uses none of them.

    Coverage, which would begin anew in each child, is not told; the child has to end by `posix._exit`.
    """
    with warnings.catch_warnings(), mock.patch.object(coverage.Coverage, "current", return_value=None):
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def killed_at(step: int, act: Callable[[Callable[[str], None]], None]) -> bool:
    """Whether `act`, in a process of its own that is killed before its `step`-th step on disk, was."""
    child = forked()
    if not child:  # pragma: no cover
        count = 0

        def tick(*_: object) -> None:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

        def ticking(real: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *given, **named: (tick(), real(*given, **named))[1]

        sys.settrace(None)
        for name in STEPS:
            setattr(os, name, ticking(getattr(os, name)))
        os.fsync = lambda _: None  # what the kernel was given outlives the process
        with contextlib.suppress(BaseException):
            act(tick)
            posix._exit(0)
        posix._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def opened(folder: Path, tick: Callable[[str], None]) -> Registry:
    """A registry of which each statement is a step, too."""
    found = Registry(folder, create=True)
    found._records._connection.set_trace_callback(tick)
    return found


def whole(folder: Path) -> dict[int, str]:
    """The stages, of a registry in which everything fits together."""
    with Registry(folder) as registry:
        lines(registry)
        found = [one for one in registry.versions() if one.name == "heart"]
        for version in found:
            verify_bundle(registry.path(version), version.signer)
        return {one.number: one.stage for one in found}


@pytest.mark.unmeasured
def test_a_process_killed_at_any_step_of_adding_leaves_it_whole(tmp_path: Path, made: list[Path]) -> None:
    with Registry(tmp_path / "before", create=True) as registry:
        registry.add(made[0], "heart")
    seen, step = set(), 0
    while True:
        step += 1
        folder = Path(shutil.copytree(tmp_path / "before", tmp_path / f"killed-{step}"))
        if not killed_at(step, lambda tick, here=folder: opened(here, tick).add(made[1], "heart")):
            break
        found = whole(folder)
        seen.add(len(found))
        if step % 5 == 0:  # what the next writer finds, it cleans up
            with Registry(folder) as registry:
                registry.add(made[2], "heart")
                assert {path.name for path in (folder / "bundles").iterdir()} == {
                    one.bundle for one in registry.versions()
                }
                lines(registry)
        shutil.rmtree(folder)
    assert seen == {1, 2}
    assert step > 20


@pytest.mark.unmeasured
def test_a_process_killed_at_any_step_of_promoting_leaves_it_whole(tmp_path: Path, made: list[Path]) -> None:
    with Registry(tmp_path / "before", create=True) as registry:
        for bundle in made[:2]:
            registry.add(bundle, "heart")
        registry.promote("heart:1", "production", unjudged=True)
    before, after = {1: "production", 2: "candidate"}, {1: "archived", 2: "production"}
    seen, step = [], 0
    while True:
        step += 1
        folder = Path(shutil.copytree(tmp_path / "before", tmp_path / f"killed-{step}"))
        if not killed_at(step, lambda tick, here=folder: promoted(here, tick)):
            break
        seen.append(whole(folder))
        shutil.rmtree(folder)
    assert seen == [before] * seen.count(before) + [after] * seen.count(after)
    assert min(seen.count(before), seen.count(after)) > 3


def promoted(folder: Path, tick: Callable[[str], None]) -> None:
    opened(folder, tick).promote("heart:2", "production", unjudged=True)


def test_a_line_that_the_log_cannot_take_follows_when_it_can(registry: Registry, made: list[Path]) -> None:
    registry.add(made[0], "heart")
    log, away = registry.folder / "audit.log", registry.folder / "away"
    log.rename(away)
    log.mkdir()
    with pytest.raises(StorageError, match="the change stands, and its line is written as soon as that is mended"):
        registry.promote("heart:1", "canary")
    assert stages(registry) == {1: "canary"}
    with pytest.raises(StorageError, match=r"audit\.log"):  # no further change without the line of the one before
        registry.archive("heart:1")
    log.rmdir()
    away.rename(log)
    with Registry(registry.folder) as again:
        assert [line["to"] for line in lines(again)] == ["candidate", "canary"]


# -- several processes -------------------------------------------------------------------------------------------------


def test_writers_at_the_same_time_each_get_a_version_of_their_own(tmp_path: Path, made: list[Path]) -> None:
    folder = tmp_path / "registry"
    children = []
    for bundle in made:
        child = forked()
        if not child:  # pragma: no cover
            with contextlib.suppress(BaseException), Registry(folder, create=True) as registry:
                version = registry.add(bundle, "heart")
                registry.promote(str(version), "production", unjudged=True)
                posix._exit(0)
            posix._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert sorted(whole(folder).values()) == ["archived", "archived", "archived", "production"]
    with Registry(folder) as registry:
        assert {one.bundle for one in registry.versions()} == {path.name for path in (folder / "bundles").iterdir()}
        assert len(lines(registry)) == 4 + 4 + 3


def test_who_only_looks_does_not_wait_for_a_writer(registry: Registry, made: list[Path]) -> None:
    registry.add(made[0], "heart")
    with open(registry.folder / "lock", "r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with Registry(registry.folder) as other:
            assert stages(other) == {1: "candidate"}


# -- a damaged database ------------------------------------------------------------------------------------------------


def test_no_registry_is_made_by_looking(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedkit models add BUNDLE --name NAME --registry"):
        Registry(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_another_files_bytes_or_a_newer_format_are_told(registry: Registry, made: list[Path], tmp_path: Path) -> None:
    registry.add(made[0], "heart")
    registry.close()
    path = registry.folder / "registry.db"
    raw = path.read_bytes()
    path.write_bytes(b"not a database, but something else" * 100)
    with pytest.raises(StorageError, match="is damaged"):
        Registry(registry.folder)
    path.write_bytes(raw)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(ConfigError, match="another fedkit"):
        Registry(registry.folder)


def test_flipped_bits_in_the_database_never_name_a_path_and_end_in_our_words(
    registry: Registry, made: list[Path]
) -> None:
    for bundle in made[:2]:
        registry.add(bundle, "heart", note="x" * 200)
    registry.close()
    path, draw = registry.folder / "registry.db", random.Random(7)
    raw, told = path.read_bytes(), 0
    for _ in range(150):
        spoiled = bytearray(raw)
        for _ in range(3):
            spoiled[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(spoiled)
        try:
            with Registry(registry.folder) as found:
                for version in found.versions():
                    assert found.path(version).parent == registry.folder / "bundles"
                    found.changes(version.name)
                    found.passport(version)
        except FedkitError:
            told += 1
    assert told > 10


# -- the stages as a machine -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Believed:
    """What a check finds that checks nothing."""

    passport: Passport
    signer: str = "me"


def believing(folder: Path, _: str | None) -> Believed:
    return Believed(Passport.from_json((folder / "passport.json").read_text()))


class Stages(RuleBasedStateMachine):
    """The registry beside a model of a few lines: stages by number, and what rollback goes back to, last one last."""

    folder: Path

    @initialize()
    def begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.registry = Registry(self.folder / "registry", create=True, verify=believing)
        self.stages: dict[int, str] = {}
        self.past: list[int] = []
        self.changes = 0

    def teardown(self) -> None:
        self.registry.close()

    @rule()
    def add(self) -> None:
        bundle = self.folder / f"b{len(self.stages)}"
        bundle.mkdir(exist_ok=True)
        facts = passport()
        text = facts.replace(run=facts.run.replace(seed=len(self.stages))).to_json()
        (bundle / "passport.json").write_text(text)
        (bundle / "SIGNATURE").write_text("")
        assert self.registry.add(bundle, "m").bundle == hashlib.sha256(text.encode()).hexdigest()
        self.stages[len(self.stages) + 1] = "candidate"
        self.changes += 1

    @rule(number=st.integers(1, 4), to=st.sampled_from(["canary", "production"]))
    def promote(self, number: int, to: str) -> None:
        if self.stages.get(number) in (None, to, "production"):
            with pytest.raises(ConfigError):
                self.registry.promote(f"m:{number}", to, unjudged=True)
            return
        self.registry.promote(f"m:{number}", to, unjudged=True)
        for other in [one for one, stage in self.stages.items() if stage == to]:
            self.stages[other] = "archived"
            self.changes += 1
            if to == "production":
                self.past = [*[one for one in self.past if one != number], other]
        if to == "production" and number in self.past:
            self.past.remove(number)
        self.stages[number] = to
        self.changes += 1

    @rule()
    def rollback(self) -> None:
        if not self.past:
            with pytest.raises(ConfigError):
                self.registry.rollback("m")
            return
        back = self.past.pop()
        for other in [one for one, stage in self.stages.items() if stage == "production"]:
            self.stages[other] = "archived"
            self.changes += 1
        self.stages[back] = "production"
        self.changes += 1
        assert self.registry.rollback("m").number == back

    @rule(number=st.integers(1, 4))
    def archive(self, number: int) -> None:
        stage = self.stages.get(number)
        if stage is None or (stage == "archived" and number not in self.past):
            with pytest.raises(ConfigError):
                self.registry.archive(f"m:{number}")
            return
        self.registry.archive(f"m:{number}")
        self.stages[number] = "archived"
        self.past = [one for one in self.past if one != number]
        self.changes += 1

    @invariant()
    def agree(self) -> None:
        if self.stages:
            assert stages(self.registry, "m") == self.stages
            assert len(self.registry.changes("m")) == self.changes
            held = list(self.stages.values())
            assert held.count("canary") <= 1
            assert held.count("production") <= 1


def test_stages_follow_a_model_of_a_few_lines(tmp_path: Path) -> None:
    run_state_machine_as_test(
        type("Here", (Stages,), {"folder": tmp_path / "machine"}),
        settings=settings(max_examples=20, stateful_step_count=12),
    )


def test_a_version_is_written_as_it_is_asked_for() -> None:
    version = Version("heart", 2, "canary", "0" * 64, "me", 0.0)
    assert str(replace(version, number=12)) == "heart:12"
