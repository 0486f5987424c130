"""Masked runs over a network: the bits of a simulation, whoever is killed; a coordinator that lies learns nothing."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import fedkit
from bench.processes import free_port
from fedkit.client.prospect import describe
from fedkit.client.settings import AgentSettings
from fedkit.crypto.masks import packed
from fedkit.crypto.member import Member
from fedkit.crypto.messages import Advertised, Cohort
from fedkit.errors import RoundAbandoned, RunFailed
from fedkit.rounds import masked as rounds_masked
from fedkit.rounds.masked import Asked, MaskedSum, RepliesFold, VectorsFold
from fedkit.server.process import CoordinatorSettings
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedSGD, Scaffold
from tests.network import steps, tasks
from tests.network.conftest import ROOT
from tests.network.hatchery import Hatched
from tests.network.inside import Inside

CLIENTS = ("ada", "bea", "cyd", "dan")
FIT = fedkit.Fit(steps=3, batch_size=8, lr=0.1)
MASKED = fedkit.Privacy(aggregation="masked")
SCORED = fedkit.Evaluation(best="loss:min")
STRATEGIES = [FedAvg(rounds=2, local=FIT), FedSGD(rounds=2, lr=0.1), Scaffold(rounds=2, local=FIT)]
TASK = "tests.network.tasks:plain"
_SOMEBODY = Ed25519PrivateKey.generate()  # not on the roster


def started(folder: Path, kind: type[Hatched] = Hatched, **more: Any) -> Hatched:
    return kind(folder, [TASK], CLIENTS, roster=True, rejoin_s=60.0, environment={"PYTHONPATH": str(ROOT)}, **more)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hatched]:
    with started(tmp_path_factory.mktemp("masked")) as running:
        yield running


def trained(federation: Hatched, strategy: fedkit.Strategy, **more: Any) -> fedkit.Result:
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        given = {"seed": 3, "min_clients": len(CLIENTS), "privacy": MASKED, "progress": False} | more
        return coordinator.run(tasks.plain, strategy, **given)


def simulated(strategy: fedkit.Strategy, **more: Any) -> fedkit.Result:
    given = {"seed": 3, "threads": 1, "privacy": MASKED, "progress": False} | more
    return fedkit.simulate(tasks.plain, strategy, clients=CLIENTS, **given)


def seats(federation: Hatched, name: str) -> int:
    """How many secure sums an agent keeps secrets of, by a copy of its files."""
    outbox = federation.folder / "clients" / name / "outbox"
    with tempfile.TemporaryDirectory() as folder:
        for file in outbox.glob("outbox.db*"):
            shutil.copy(file, folder)
        with contextlib.closing(sqlite3.connect(Path(folder) / "outbox.db")) as copied:
            return int(copied.execute("SELECT COUNT(*) FROM seats").fetchone()[0])


def no_secret_is_kept(federation: Hatched) -> None:
    """Once everybody has heard that the round is over."""
    due = time.monotonic() + 20.0
    while any(seats(federation, name) for name in CLIENTS):
        assert time.monotonic() < due
        time.sleep(0.1)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_network_and_simulation_give_the_same_bits(federation: Hatched, strategy: fedkit.Strategy) -> None:
    same_as_simulated(trained(federation, strategy, evaluate=SCORED), strategy, MASKED)


def same_as_simulated(networked: fedkit.Result, strategy: fedkit.Strategy, privacy: fedkit.Privacy) -> None:
    """Bit for bit, with nobody left out and no client's own scores."""
    expected = simulated(strategy, evaluate=SCORED, privacy=privacy)
    assert networked.weights == expected.weights
    assert [record.metrics for record in networked.history] == [record.metrics for record in expected.history]
    assert [record.examples for record in networked.history] == [record.examples for record in expected.history]
    assert networked.test == expected.test
    assert not networked.test_per_client
    assert [record.refusals for record in networked.history] == [()] * strategy.rounds


def test_a_masked_run_may_be_private_too(federation: Hatched) -> None:
    rule = fedkit.Privacy(aggregation="masked", dp=fedkit.DP(epsilon=3.0, delta=1e-3))
    result = trained(federation, FedAvg(rounds=2, local=FIT), privacy=rule)
    assert set(result.history[-1].epsilon) == set(CLIENTS)
    assert all(0.0 < epsilon <= 3.0 for epsilon in result.history[-1].epsilon.values())


@pytest.mark.parametrize(
    ("strategy", "given", "aggregation"),
    [
        (FedAvg(rounds=1, local=FIT), {}, "masked"),
        (FedAvg(rounds=1, local=FIT), {"privacy": fedkit.Privacy(dp=fedkit.DP(epsilon=3.0, delta=1e-3))}, "masked"),
        (FedAvg(rounds=1, local=FIT), {"min_clients": 2}, "plain"),
        (FedAvg(rounds=1, local=FIT), {"privacy": fedkit.Privacy(aggregation="plain")}, "plain"),
        (CyclicWeightTransfer(rounds=1, local=FIT), {}, "plain"),
    ],
    ids=["mean", "private", "two clients", "said", "hops"],
)
def test_where_nothing_else_is_said_what_needs_no_more_than_sums_is_masked(
    federation: Hatched, strategy: fedkit.Strategy, given: dict[str, Any], aggregation: str
) -> None:
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        run = coordinator.submit(tasks.plain, strategy, seed=3, **given)
        assert federation_says(federation, run) == aggregation
        list(coordinator.watch(run))
        result = coordinator.result(run, tasks.plain)
    assert bool(result.test_per_client) == (aggregation == "plain")
    assert len(result.history[0].clients) >= (3 if aggregation == "masked" else 2)


def federation_says(federation: Hatched, run: str) -> str:
    """How the coordinator tells its clients that a run's answers are added up."""
    about = {"coordinator": federation.address, "name": "ada", "identity": federation.identity("ada")}
    return describe(AgentSettings(tasks=(TASK,), **about), run).aggregation


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", steps.MASKING)
def test_a_process_that_is_killed_in_a_masked_sum_costs_no_bit(federation: Hatched, step: str) -> None:
    killed_at(federation, step, MASKED)


def killed_at(federation: Hatched, step: str, privacy: fedkit.Privacy) -> None:
    """One process dies there and comes back; the run ends as if it had not."""
    victim, strategy = step.partition(":")[0], FedAvg(rounds=1, local=FIT)
    federation.kill(victim)
    federation.due[victim] = step
    federation._restart(victim)
    federation.wait_for_server()
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        run = coordinator.submit(tasks.plain, strategy, seed=3, min_clients=len(CLIENTS), privacy=privacy)
        assert federation.processes[victim].wait(30) == -signal.SIGKILL
        federation._restart(victim)
        federation.wait_for_server()
        list(coordinator.watch(run))
        result = coordinator.result(run, tasks.plain)
    assert result.weights == simulated(strategy, privacy=privacy).weights
    assert [record.refusals for record in result.history] == [()]


# -- a coordinator that lies -------------------------------------------------------------------------------------------


class Lying(Hatched):
    """A federation whose coordinator lives in this process, where it can be made to lie."""

    def start_server(self) -> None:
        self.port = self.port or free_port()
        settings = CoordinatorSettings(
            listen=self.address,
            state=self.folder / "server",
            authority=self.authority,
            roster=self.roster,
            heartbeat_s=2.0,
            rejoin_s=5.0,
        )
        self.inside = Inside(settings, {"plain": tasks.plain})

    def wait_for_server(self, seconds: float = 60.0) -> None:
        """Nothing to wait for."""


@pytest.fixture(scope="module")
def lying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lying]:
    with started(tmp_path_factory.mktemp("lying"), Lying) as running:
        assert isinstance(running, Lying)
        yield running
        running.inside.close()


def lie(monkeypatch: pytest.MonkeyPatch, step: str, change: Any) -> list[str]:
    """From now on the coordinator tells something else in `step` of each mean; who was told that and answered."""
    answered: list[str] = []
    init = MaskedSum.__init__

    def lying_init(self: MaskedSum, masked: Any, ask: Any, *rest: Any) -> None:
        async def told(asked: Asked) -> None:
            if asked.step == step and masked.session.round > 1:  # round 0 has other sums
                asked = replace(asked, messages=change(dict(asked.messages), masked))
                await ask(asked)
                answered.extend(asked.fold.clients)
            else:
                await ask(asked)

        init(self, masked, told, *rest)

    monkeypatch.setattr(rounds_masked.MaskedSum, "__init__", lying_init)
    return answered


def swapped(messages: dict[str, bytes], masked: Any) -> dict[str, bytes]:
    """Bea's mask key becomes one that the coordinator has made."""
    cohort = Cohort.from_bytes(masked.session, messages["ada"])
    mine = Member(masked.session, "bea", _SOMEBODY, {}).advertise()
    forged = [replace(mine, name="bea") if one.name == "bea" else one for one in cohort.adverts]
    return dict.fromkeys(messages, Cohort.of(masked.session, forged).to_bytes())


def minted(messages: dict[str, bytes], masked: Any) -> dict[str, bytes]:
    """Members are added that the coordinator has made."""
    cohort = Cohort.from_bytes(masked.session, messages["ada"])
    added: list[Advertised] = [
        Member(masked.session, name, _SOMEBODY, {}).advertise() for name in ("zed", "zoe", "zac")
    ]
    return dict.fromkeys(messages, Cohort.of(masked.session, [*cohort.adverts, *added]).to_bytes())


def alone(messages: dict[str, bytes], masked: Any) -> dict[str, bytes]:
    """Each is told a cohort of two."""
    cohort = Cohort.from_bytes(masked.session, messages["ada"])
    pair = Cohort.of(masked.session, cohort.adverts[:2]).to_bytes()
    return dict.fromkeys(list(messages)[:2], pair)


@pytest.mark.parametrize("change", [swapped, minted, alone], ids=lambda change: change.__name__)
def test_a_coordinator_that_lies_about_the_cohort_gets_no_shares_and_no_vector(
    lying: Lying, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    answered = lie(monkeypatch, "share", change)
    with pytest.raises(RunFailed, match=r"0 of . members shared"):
        trained(lying, FedAvg(rounds=1, local=FIT, participation=fedkit.Participation(attempts=1)))
    assert answered == []


def test_survivors_who_are_told_different_lists_open_nothing(lying: Lying, monkeypatch: pytest.MonkeyPatch) -> None:
    def split(messages: dict[str, bytes], masked: Any) -> dict[str, bytes]:
        names = sorted(messages)
        lists = {name: [other for other in names if other != names[-1 - i]] for i, name in enumerate(names[:2])}
        return {name: packed(*(one.encode() for one in lists.get(name, names))) for name in messages if name in lists}

    lie(monkeypatch, "confirm", split)
    opened = lie_watch(monkeypatch)
    with pytest.raises(RunFailed):
        trained(lying, FedAvg(rounds=1, local=FIT, participation=fedkit.Participation(attempts=1)))
    assert len(opened) == len(CLIENTS)  # of the rows that round 0 counts, and of nothing else


def lie_watch(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What agents give in the last step."""
    given: list[bytes] = []
    unmask = rounds_masked.Unmasking.from_bytes

    def noted(data: bytes) -> Any:
        given.append(data)
        return unmask(data)

    monkeypatch.setattr(rounds_masked.Unmasking, "from_bytes", noted)
    return given


def at_once(monkeypatch: pytest.MonkeyPatch, step: str, other: Any) -> list[tuple[str, bytes]]:
    """From now on the coordinator asks `step` of each mean twice at once, and once more; who answered to what."""
    init: Any = MaskedSum.__init__
    answered: list[tuple[str, bytes]] = []

    def thrice(self: MaskedSum, masked: Any, ask: Any, *rest: Any) -> None:
        async def told(asked: Asked) -> None:
            if asked.step != step or masked.session.round <= 1:
                await ask(asked)
                return
            tries = [other(asked), asked, other(asked)]
            for together in (tries[:2], tries[2:]):
                await asyncio.gather(*map(ask, together), return_exceptions=True)
            answered.extend((client, one.messages[client]) for one in tries for client in one.fold.clients)
            raise RoundAbandoned("enough was asked.")

        init(self, masked, told, *rest)

    monkeypatch.setattr(rounds_masked.MaskedSum, "__init__", thrice)
    return answered


def same_vector(asked: Asked) -> Asked:
    return replace(asked, fold=VectorsFold(list(asked.messages)))


def shorter_list(asked: Asked) -> Asked:
    names = sorted(asked.messages)[:-1]
    told = dict.fromkeys(names, packed(*(name.encode() for name in names)))
    return replace(asked, messages=told, fold=RepliesFold(names))


@pytest.mark.parametrize(("step", "other"), [("vector", same_vector), ("confirm", shorter_list)])
def test_nobody_takes_a_step_of_one_sum_twice(
    lying: Lying, monkeypatch: pytest.MonkeyPatch, step: str, other: Any
) -> None:
    answered = at_once(monkeypatch, step, other)
    with pytest.raises(RunFailed, match="enough was asked"):
        trained(lying, FedAvg(rounds=1, local=FIT, participation=fedkit.Participation(attempts=1)))
    told = answered if step == "vector" else set(answered)  # the same list may be signed again, a vector is made once
    assert sorted(name for name, _ in told) == list(CLIENTS)


# -- sites -------------------------------------------------------------------------------------------------------------


def test_a_site_without_a_roster_takes_no_part(tmp_path: Path) -> None:
    with (
        Hatched(tmp_path, [TASK], CLIENTS[:3], environment={"PYTHONPATH": str(ROOT)}) as running,
        pytest.raises(RunFailed, match="secure aggregation is over members of"),
    ):
        trained(running, FedAvg(rounds=1, local=FIT), min_clients=3)


def test_a_site_with_more_rows_than_it_may_claim_takes_no_part(tmp_path: Path) -> None:
    few = tmp_path / "few.toml"
    few.write_text("max_examples = 5\n")
    with (
        started(tmp_path / "federation", client_options=["--config", str(few)]) as running,
        pytest.raises(RunFailed, match="rows, but max_examples is 5"),
    ):
        trained(running, FedAvg(rounds=1, local=FIT))


def test_nothing_of_a_sum_is_kept_when_its_round_is_over(federation: Hatched) -> None:
    trained(federation, FedAvg(rounds=1, local=FIT))
    no_secret_is_kept(federation)
