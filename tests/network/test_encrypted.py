"""Encrypted runs over a network: the bits of masked ones, whoever is killed; what a coordinator that lies gets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedkit
from fedkit.crypto.ceremony import BoxKey
from fedkit.crypto.holder import Announced
from fedkit.crypto.masks import packed
from fedkit.errors import ConfigError, RoundAbandoned, RunFailed
from fedkit.rounds.assignment import Parcel
from fedkit.rounds.encrypted import EncryptedSum
from fedkit.rounds.federation import JournaledFederation
from fedkit.rounds.masked import Asked, RepliesFold, VectorsFold
from fedkit.strategies import FedAvg
from fedkit.weights import Weights
from tests.network import steps
from tests.network.hatchery import Hatched
from tests.network.test_masked import (
    _SOMEBODY,
    CLIENTS,
    FIT,
    SCORED,
    STRATEGIES,
    Lying,
    killed_at,
    no_secret_is_kept,
    same_as_simulated,
    simulated,
    started,
    trained,
)

BFV = fedkit.Privacy(aggregation="bfv", bits=20)
MASKED = fedkit.Privacy(aggregation="masked", bits=20)
ONCE = FedAvg(rounds=1, local=FIT, participation=fedkit.Participation(attempts=1))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hatched]:
    with started(tmp_path_factory.mktemp("encrypted")) as running:
        yield running


def opened(federation: Hatched, name: str) -> list[dict[str, Any]]:
    """The sums that a client's audit log says it has opened."""
    log = federation.folder / "clients" / name / "audit.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [event for line in lines if (event := json.loads(line))["event"] == "sum opened"]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_network_and_simulation_give_the_bits_of_a_masked_run(federation: Hatched, strategy: fedkit.Strategy) -> None:
    networked = trained(federation, strategy, evaluate=SCORED, privacy=BFV)
    for privacy in (BFV, MASKED):
        same_as_simulated(networked, strategy, privacy)


def test_two_clients_open_each_sum_and_their_logs_name_it(federation: Hatched) -> None:
    before = {name: len(opened(federation, name)) for name in CLIENTS}
    trained(federation, FedAvg(rounds=2, local=FIT), privacy=BFV)
    lines = [event for name in CLIENTS for event in opened(federation, name)[before[name] :]]
    by_round = {number: [one for one in lines if one["round"] == number] for number in (1, 2)}
    for number, found in by_round.items():
        assert len(found) == 2
        assert len({one["client"] for one in found}) == 2
        assert len({(one["run"], one["sum"], one["key"], one["names"]) for one in found}) == 1
        assert (found[0]["clients"], found[0]["round"]) == (len(CLIENTS), number)


def test_an_encrypted_run_may_be_private_too(federation: Hatched) -> None:
    rule = fedkit.Privacy(aggregation="bfv", dp=fedkit.DP(epsilon=3.0, delta=1e-3))
    result = trained(federation, FedAvg(rounds=2, local=FIT), privacy=rule)
    assert [record.refusals for record in result.history] == [(), ()]
    assert set(result.history[-1].epsilon) == set(CLIENTS)
    assert all(0.0 < epsilon <= 3.0 for epsilon in result.history[-1].epsilon.values())


@pytest.mark.parametrize("step", steps.ENCRYPTING)
def test_a_process_that_is_killed_in_an_encrypted_sum_costs_no_bit(federation: Hatched, step: str) -> None:
    killed_at(federation, step, BFV)


def test_no_key_is_kept_when_its_round_is_over(federation: Hatched) -> None:
    trained(federation, FedAvg(rounds=1, local=FIT), privacy=BFV)
    no_secret_is_kept(federation)


# -- a coordinator that lies, or loses a process -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lying]:
    with started(tmp_path_factory.mktemp("lying"), Lying) as running:
        assert isinstance(running, Lying)
        yield running
        running.inside.close()


Tell = Callable[[EncryptedSum, Callable[[Asked], Any], Asked], Any]


def lie(monkeypatch: pytest.MonkeyPatch, step: str, tell: Tell) -> None:
    """From now on the coordinator asks `step` of each mean as `tell` has it."""
    init: Any = EncryptedSum.__init__

    def lying_init(
        self: EncryptedSum, ceremony: Any, told: Any, members: Any, values: int, turn: int, ask: Any, *rest: Any
    ) -> None:
        async def asked_so(asked: Asked) -> None:
            is_meant = asked.step == step and ceremony.session.round > 1  # round 0 has other sums
            await (tell(self, ask, asked) if is_meant else ask(asked))

        init(self, ceremony, told, members, values, turn, asked_so, *rest)

    monkeypatch.setattr(EncryptedSum, "__init__", lying_init)


def trained_once(lying: Lying, **more: Any) -> fedkit.Result:
    return trained(lying, ONCE, privacy=BFV, **more)


def test_a_key_that_the_coordinator_puts_under_a_members_name_gets_no_letter(
    lying: Lying, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def swap(found: EncryptedSum, ask: Any, asked: Asked) -> None:
        boxes = [BoxKey.sign(found._ceremony.digest, name, bytes([9]) * 32, _SOMEBODY) for name in CLIENTS]
        text = packed(*(box.to_bytes() for box in boxes))
        await ask(replace(asked, messages=dict.fromkeys(asked.messages, text)))
        assert not asked.fold.clients

    lie(monkeypatch, "deliver", swap)
    with pytest.raises(RunFailed, match="no member made the key"):
        trained_once(lying)


def test_one_sum_of_a_round_is_opened_whatever_the_coordinator_asks_for(
    lying: Lying, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to sign two sums at once, and one more; asked to open single ciphertexts, and sums of others."""
    signed: list[tuple[str, bytes]] = []

    async def thrice(found: EncryptedSum, ask: Any, asked: Asked) -> None:
        [told] = set(asked.messages.values())
        fewer = Announced(Announced.from_bytes(told).names[:3], bytes(32))
        lies = [replace(asked, messages=dict.fromkeys(fewer.names, fewer.to_bytes()), fold=RepliesFold(fewer.names))]
        lies += [replace(lies[0], fold=RepliesFold(fewer.names))]
        for together in ([lies[0], asked], [lies[1]]):
            await asyncio.gather(*map(ask, together), return_exceptions=True)
        signed.extend((name, one.messages[name]) for one in (*lies, asked) for name in one.fold.clients)
        raise RoundAbandoned("enough was asked.")

    lie(monkeypatch, "attest", thrice)
    before = {name: len(opened(lying, name)) for name in CLIENTS}
    with pytest.raises(RunFailed, match="enough was asked"):
        trained_once(lying)
    assert sorted(name for name, _ in set(signed)) == list(CLIENTS)
    assert all(one["round"] == 0 for name in CLIENTS for one in opened(lying, name)[before[name] :])


def test_what_was_not_announced_is_not_opened(lying: Lying, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, ...]] = []

    async def another(found: EncryptedSum, ask: Any, asked: Asked) -> None:
        assert asked.parcel is not None
        model = asked.parcel.model
        false = Parcel(Weights(model.manifest, model.vector[::-1].copy()))
        signatures = dict.fromkeys(asked.messages, packed())
        for change in ({"parcel": false}, {"messages": signatures}):
            one = replace(asked, fold=VectorsFold(list(asked.messages)), **change)  # type: ignore[arg-type]
            await ask(one)
            tried.append(tuple(one.fold.clients))
        await ask(asked)

    lie(monkeypatch, "open", another)
    before = {name: len(opened(lying, name)) for name in CLIENTS}
    result = trained_once(lying)
    assert tried == [(), ()]
    assert result.weights == simulated(ONCE, privacy=BFV).weights
    lines = [one for name in CLIENTS for one in opened(lying, name)[before[name] :] if one["round"] == 1]
    assert len(lines) == 2


def test_clients_that_are_sent_different_models_open_nothing(lying: Lying, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is dead but at one client would show that client's update in the sum."""

    async def split(found: EncryptedSum, ask: Any, asked: Asked) -> None:
        first, *others = sorted(asked.messages)
        dead = replace(asked, messages={first: asked.messages[first]}, fold=VectorsFold([first]))
        rest = replace(asked, messages={name: asked.messages[name] for name in others}, fold=VectorsFold(others))
        model = found.parcel.model  # type: ignore[attr-defined]
        rest = replace(rest, parcel=Parcel(Weights.zeros(model.manifest)))
        await asyncio.gather(ask(dead), ask(rest))
        for name, answer in (dead.fold.kept | rest.fold.kept).items():  # type: ignore[union-attr]
            asked.fold.kept[name] = answer  # type: ignore[union-attr]

    lie(monkeypatch, "encrypt", split)
    note_parcels(monkeypatch)
    result = trained_once(lying)
    assert "members signed the encrypted sum" in result.history[0].rejected


def note_parcels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sum knows what is sent to be worked on."""
    inner = JournaledFederation._secret_sum

    async def summed(self: Any, work: Any, parcel: Any, *rest: Any) -> Any:
        monkeypatch.setattr(EncryptedSum, "parcel", parcel, raising=False)
        return await inner(self, work, parcel, *rest)

    monkeypatch.setattr(JournaledFederation, "_secret_sum", summed)


def test_the_process_that_adds_may_die_and_costs_one_attempt(lying: Lying, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []

    async def kill(found: EncryptedSum, ask: Any, asked: Asked) -> None:
        await ask(asked)
        if not killed:
            [process] = adders()
            killed.append(process)
            os.kill(process, signal.SIGKILL)

    lie(monkeypatch, "encrypt", kill)
    result = trained(lying, FedAvg(rounds=1, local=FIT), privacy=BFV)
    assert killed
    assert result.history[0].attempt <= 2
    assert result.history[0].stands


def adders() -> list[int]:
    """The processes that this one has started to add ciphertexts."""
    command = ["pgrep", "-f", "-P", str(os.getpid()), "fedkit.server.adder"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


# -- sites, and what is refused ----------------------------------------------------------------------------------------


def test_ckks_is_refused_where_the_coordinator_would_get_what_is_decrypted(lying: Lying) -> None:
    with pytest.raises(ConfigError, match="use bfv"):
        trained(lying, ONCE, privacy=fedkit.Privacy(aggregation="ckks"))


def test_a_site_may_allow_masking_alone(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('aggregation = ["masked"]\n')
    with (
        started(tmp_path / "federation", client_options=["--policy", str(policy)]) as running,
        pytest.raises(RunFailed, match="aggregation: bfv"),
    ):
        trained(running, ONCE, privacy=BFV)
