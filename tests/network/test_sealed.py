"""Sealed hops over a network: the bits of plain ones, whoever is killed; a coordinator that lies reads no model."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

import fedkit
from bench.processes import free_port
from fedkit import codec
from fedkit.cli import app
from fedkit.crypto.box import Box, Owner
from fedkit.crypto.sealing import Header, SealedModel, Stamp, seal
from fedkit.errors import ConfigError, ModelSealed, Refused, RunFailed
from fedkit.rounds.assignment import Sealing
from fedkit.rounds.hops import SealedHops
from fedkit.server.journal import SqliteJournal
from fedkit.server.process import CoordinatorSettings
from fedkit.strategies import CyclicWeightTransfer, SingleWeightTransfer, StochasticWeightTransfer
from fedkit.weights import Weights
from tests.network import steps, tasks
from tests.network.conftest import ROOT
from tests.network.gates import here
from tests.network.hatchery import Hatched
from tests.network.inside import Inside

CLIENTS = ("ada", "bea", "cyd", "dan")
FIT = fedkit.Fit(steps=3, batch_size=8, lr=0.1)
SEALED = fedkit.Privacy(sealed=True, aggregation="plain")  # of scores
ONCE = SingleWeightTransfer(local=FIT, participation=fedkit.Participation(attempts=1))
TASKS = ["tests.network.tasks:plain", "tests.network.tasks:marking"]
_SOMEBODY = Ed25519PrivateKey.generate()  # not on the roster


def started(folder: Path, kind: type[Hatched] = Hatched, **more: Any) -> Hatched:
    given = {"rejoin_s": 60.0, "roster": True} | more
    return kind(folder, TASKS, CLIENTS, environment={"PYTHONPATH": str(ROOT)}, **given)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hatched]:
    with started(tmp_path_factory.mktemp("sealed")) as running:
        yield running


def trained(federation: Hatched, strategy: fedkit.Strategy, **more: Any) -> fedkit.Result:
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        given = {"seed": 3, "min_clients": len(CLIENTS), "privacy": SEALED, "progress": False} | more
        given = {"task": tasks.plain, "owner": federation.owner} | given
        return coordinator.run(given.pop("task"), strategy, **given)


def simulated(strategy: fedkit.Strategy, clients: tuple[str, ...] = CLIENTS, **more: Any) -> fedkit.Result:
    given = {"seed": 3, "threads": 1, "progress": False} | more
    return fedkit.simulate(tasks.plain, strategy, clients=clients, **given)


@pytest.mark.parametrize(
    "strategy",
    [
        CyclicWeightTransfer(rounds=2, local=FIT, reshuffle=True),
        StochasticWeightTransfer(rounds=2, local=FIT, clients_per_round=3),
        CyclicWeightTransfer(rounds=2, local=FIT, gate=fedkit.Gate(max_norm=1e-3)),
    ],
    ids=["cyclic", "stochastic", "gated"],
)
def test_a_sealed_run_gives_the_bits_of_a_plain_one(federation: Hatched, strategy: fedkit.Strategy) -> None:
    evaluate = fedkit.Evaluation(best="loss:min")
    networked, expected = trained(federation, strategy, evaluate=evaluate), simulated(strategy, evaluate=evaluate)
    assert networked.weights == expected.weights
    assert networked.best.weights == expected.best.weights
    assert [record.metrics for record in networked.history] == [record.metrics for record in expected.history]
    undone = [[(one.client, one.reason) for one in record.refusals] for record in expected.history]
    assert [[(one.client, one.reason) for one in record.refusals] for record in networked.history] == undone
    assert any(undone) == (strategy.gate is not None)  # type: ignore[attr-defined]
    assert networked.test == expected.test


def test_scores_are_masked_where_nothing_else_is_said_and_training_may_be_private(federation: Hatched) -> None:
    rule = fedkit.Privacy(sealed=True, dp=fedkit.DP(epsilon=3.0, delta=1e-3))
    result = trained(federation, SingleWeightTransfer(local=FIT), privacy=rule, evaluate=fedkit.Evaluation())
    assert set(result.history[-1].epsilon) == set(CLIENTS)
    assert result.history[-1].metrics
    assert not result.history[-1].per_client


# -- whose model it is -------------------------------------------------------------------------------------------------


def test_without_the_owners_key_a_result_is_sealed_and_fedkit_open_opens_it(
    federation: Hatched, tmp_path: Path
) -> None:
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        strategy, owner = SingleWeightTransfer(local=FIT), federation.owner
        given = {"seed": 3, "min_clients": len(CLIENTS), "privacy": SEALED, "owner": owner}
        run = coordinator.submit(tasks.plain, strategy, **given)
        list(coordinator.watch(run))
        kept = coordinator.result(run, tasks.plain)
        assert coordinator.result(run, tasks.plain, owner=owner).weights == simulated(strategy).weights
    assert kept.test == simulated(strategy).test
    for read in (lambda: kept.weights, lambda: kept.model):
        with pytest.raises(ModelSealed, match="fedkit open"):
            read()
    kept.save(tmp_path)
    keys = ["--roster", str(federation.roster), "--identity"]
    for name in ("operator", "cyd"):
        line = ["open", str(tmp_path / "model.fedkit"), *keys, str(federation.identity(name))]
        found = CliRunner().invoke(app, [*line, "--out", str(tmp_path / f"{name}.fedkit"), "--json"])
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["for"] == [*CLIENTS, "operator"]
        assert codec.load(tmp_path / f"{name}.fedkit") == simulated(strategy).weights


def test_an_owner_is_a_member_and_an_owner_of_something(federation: Hatched, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="the owner zoe is not on the roster"):
        trained(federation, ONCE, owner=None, privacy=fedkit.Privacy(sealed=True, owner="zoe"))
    with pytest.raises(RunFailed, match="its box key was not sent"):
        trained(federation, ONCE, owner=None, privacy=fedkit.Privacy(sealed=True, owner="operator"))
    with pytest.raises(ConfigError, match="is not sealed, and has no owner"):
        trained(federation, ONCE, privacy=fedkit.Privacy())
    with pytest.raises(ConfigError, match="names ada as its owner"):
        trained(federation, ONCE, privacy=fedkit.Privacy(sealed=True, owner="ada"))
    assert federation.roster is not None
    result = trained(federation, ONCE, owner=None, privacy=fedkit.Privacy(sealed=True, owner="ada"))
    ada = Owner.load(federation.identity("ada"), federation.roster)
    assert ada.open(result.outcome.weights) == simulated(ONCE).weights
    with pytest.raises(Refused, match="not sealed for operator"):
        federation.owner.open(result.outcome.weights)  # type: ignore[union-attr]


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", steps.SEALING)
def test_a_process_that_is_killed_in_a_sealed_run_costs_no_bit(federation: Hatched, step: str) -> None:
    victim, strategy = step.partition(":")[0], SingleWeightTransfer(local=FIT)
    federation.kill(victim)
    federation.due[victim] = step
    federation._restart(victim)
    federation.wait_for_server()
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        given = {"seed": 3, "min_clients": len(CLIENTS), "privacy": SEALED, "owner": federation.owner}
        run = coordinator.submit(tasks.plain, strategy, **given)
        assert federation.processes[victim].wait(30) == -signal.SIGKILL
        federation._restart(victim)
        federation.wait_for_server()
        list(coordinator.watch(run))
        result = coordinator.result(run, tasks.plain, owner=federation.owner)
    assert result.weights == simulated(strategy).weights
    assert [record.refusals for record in result.history] == [()]


# -- a coordinator that lies, or looks ---------------------------------------------------------------------------------


class Inner(Hatched):
    """A federation whose coordinator lives in this process, where it can be made to lie."""

    def start_server(self) -> None:
        self.port = self.port or free_port()
        given: dict[str, Any] = {"authority": self.authority, "roster": self.roster, "heartbeat_s": 2.0}
        settings = CoordinatorSettings(listen=self.address, state=self.folder / "server", rejoin_s=3.0, **given)
        self.inside = Inside(settings, {"plain": tasks.plain, "marking": tasks.marking})

    def wait_for_server(self, seconds: float = 60.0) -> None:
        """Nothing to wait for."""


@pytest.fixture(scope="module")
def inner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inner]:
    with started(tmp_path_factory.mktemp("inner"), Inner) as running:
        assert isinstance(running, Inner)
        yield running
        running.inside.close()


def told_others(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """From now on the coordinator names others than it should as recipients."""
    honest = SealedHops.sealing

    def lying(self: SealedHops, *given: Any) -> Sealing:
        return replace(honest(self, *given), boxes=change(self, honest(self, *given).boxes))

    monkeypatch.setattr(SealedHops, "sealing", lying)


def minted(hops: SealedHops, boxes: Any) -> Any:
    """One is a member that the coordinator has made."""
    mallory = Box("mallory", _SOMEBODY, dict).offer(hops.run)
    return tuple(sorted((*boxes[1:], mallory), key=lambda one: one.name))


def swapped(hops: SealedHops, boxes: Any) -> Any:
    """Bea's key becomes one that the coordinator has made."""
    mine = Box("bea", _SOMEBODY, dict).offer(hops.run)
    return tuple(mine if one.name == "bea" else one for one in boxes)


def old(hops: SealedHops, boxes: Any) -> Any:
    """Bea's key becomes one of another run's, whose secret may be known."""
    return tuple(replace(one, signature=bytes(64)) if one.name == "bea" else one for one in boxes)


@pytest.mark.parametrize(
    ("change", "why"),
    [(minted, "not on the roster: mallory"), (swapped, "not signed for this run: bea"), (old, "not signed for this")],
    ids=lambda change: getattr(change, "__name__", ""),
)
def test_nobody_seals_for_who_is_no_member(
    inner: Inner, monkeypatch: pytest.MonkeyPatch, change: Any, why: str
) -> None:
    told_others(monkeypatch, change)
    result = trained(inner, ONCE, owner=None)
    details = {one.client: one.detail for one in result.history[0].refusals}
    assert set(details) == set(CLIENTS)
    assert all(why in detail or "words when it is sealed" in detail for detail in details.values()), details
    assert result.history[0].clients == ()
    assert not result.outcome.weights.manifest.is_sealed  # the model that the coordinator began with


def handed_on(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """From now on the coordinator hands on another model than the first site has sealed."""
    honest = SealedHops.taken

    def lying(self: SealedHops, weights: Weights, client: str, *given: Any) -> SealedModel:
        found = honest(self, weights, client, *given)
        return change(self, found) if client == "ada" else found

    monkeypatch.setattr(SealedHops, "taken", lying)


def own(hops: SealedHops, found: SealedModel) -> SealedModel:
    """A model of the coordinator's own, under ada's name."""
    about, vector = found.header.subject, np.zeros(hops.manifest.size, np.float32)
    boxes = [box for box in _SEEN if box.name in found.header.names]
    stamp = Stamp.fresh()
    return seal(Header.make(about, stamp, boxes, _SOMEBODY), stamp, vector)


_SEEN: list[Any] = []
_BEFORE: list[SealedModel] = []


def replayed(hops: SealedHops, found: SealedModel) -> SealedModel:
    """What ada has sealed in a run before."""
    return _BEFORE[0]


def cut(hops: SealedHops, found: SealedModel) -> SealedModel:
    """Ada's, with one bit changed."""
    words = found.vector.view(np.uint32).copy()
    words[-30] ^= 1
    return SealedModel(found.manifest, words.view(np.float32))


@pytest.mark.parametrize(
    ("change", "why"),
    [(own, "ada has not signed"), (replayed, "sealed in another run"), (cut, "has not signed the sealed model")],
    ids=lambda change: getattr(change, "__name__", ""),
)
def test_nobody_takes_a_model_that_no_member_has_sealed_in_this_run(
    inner: Inner, monkeypatch: pytest.MonkeyPatch, change: Any, why: str
) -> None:
    boxes_of = SealedHops.boxes

    def seen(self: SealedHops, *given: Any) -> Any:
        found = boxes_of(self, *given)
        _SEEN[:] = found.values()
        return found

    monkeypatch.setattr(SealedHops, "boxes", seen)
    with monkeypatch.context() as before:
        handed_on(before, lambda hops, found: _BEFORE.insert(0, found) or found)
        trained(inner, ONCE)
    handed_on(monkeypatch, change)
    with pytest.raises(RunFailed, match="nobody is left") as caught:
        trained(inner, ONCE)
    for name in CLIENTS[1:]:
        assert f"{name}: encryption" in str(caught.value)
    assert why in str(caught.value)


def holding(folder: Path, pattern: bytes) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and pattern in path.read_bytes()]


@pytest.mark.parametrize("privacy", [SEALED, fedkit.Privacy()], ids=["sealed", "plain"])
def test_no_file_of_the_coordinator_or_of_a_site_ever_holds_a_model_that_was_trained(
    inner: Inner, monkeypatch: pytest.MonkeyPatch, privacy: fedkit.Privacy
) -> None:
    """Looked for whenever something is written down; in a plain run it is found."""
    pattern, found, note = np.full(8, tasks.CANARY, np.float32).tobytes(), set[str](), SqliteJournal.note

    def looking(self: SqliteJournal, *given: Any) -> None:
        note(self, *given)
        found.update(path for part in ("server", "clients") for path in holding(inner.folder / part, pattern))

    monkeypatch.setattr(SqliteJournal, "note", looking)
    owner = inner.owner if privacy.sealed else None
    result = trained(inner, CyclicWeightTransfer(rounds=2), task=tasks.marking, privacy=privacy, owner=owner)
    assert set(result.weights.vector.tolist()) == {tasks.CANARY}
    found.update(holding(inner.folder / "server", pattern))
    assert bool(found) == (not privacy.sealed), found


# -- sites -------------------------------------------------------------------------------------------------------------


def test_a_site_that_dies_does_not_stop_the_chain(inner: Inner) -> None:
    """Bea dies with the model in hand; cyd, for whom it was sealed too, goes on from it."""
    inner.kill("bea")
    inner.due["bea"] = "ada: before the hop is stored"
    inner.start_client("bea")
    here(inner, *CLIENTS)
    result = trained(inner, ONCE, min_clients=3)
    assert inner.processes["bea"].wait(30) == -signal.SIGKILL
    assert result.weights == simulated(ONCE, ("ada", "cyd", "dan")).weights
    assert [(one.client, one.reason.value) for one in result.history[0].refusals] == [("bea", "lost")]
    inner.start_client("bea")


def test_a_site_without_a_roster_takes_no_part(tmp_path: Path) -> None:
    with started(tmp_path, roster=False) as running:
        result = trained(running, ONCE, owner=None)
    assert {(one.client, one.reason.value) for one in result.history[0].refusals} >= {
        (name, "encryption") for name in CLIENTS
    }
    assert result.history[0].clients == ()


def test_a_site_may_insist_on_sealed_hops(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text('aggregation = ["masked"]\nmin_batch_size = 1\n')
    options = ["--policy", str(tmp_path / "policy.toml")]
    with started(tmp_path / "federation", client_options=options) as running:
        sealed, plain = trained(running, ONCE), trained(running, ONCE, owner=None, privacy=fedkit.Privacy())
    assert sealed.weights == simulated(ONCE).weights
    assert {one.detail for one in plain.history[0].refusals} == {"aggregation: plain (allowed: masked)"}
