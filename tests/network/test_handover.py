"""A hand-over between real processes: clients convert, calibrate and score by themselves, to the bit as simulated."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

import fedkit
from fedkit.deploy.convert import checked
from fedkit.deploy.gate import noise_ranges
from fedkit.errors import RunFailed
from fedkit.exam import Questions
from fedkit.loopback import Loopback
from fedkit.privacy.accounting import epsilon_of, rdp_of
from fedkit.privacy.ledger import Ledger
from fedkit.strategies import HandOver
from fedkit.weights import Weights
from fedkit.work import Steps
from tests.network import tasks
from tests.network.conftest import CLIENTS


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return tasks.plain.build(3).eval()


@pytest.fixture(scope="module")
def plan(module: nn.Module) -> HandOver:
    converted, _ = checked(module, tasks.plain)
    bounds = (16.0 * np.abs(noise_ranges(converted, module, tasks.plain)).max(axis=1)).tolist()
    exam = Questions(criteria=("loss<=10",), noise=(0.5,))
    return HandOver(graph=converted.graph, bounds=bounds, variants=("int8",), exam=exam, max_drop=1.0)


def over(federation: Loopback, plan: HandOver, module: nn.Module, **more: object) -> HandOver:
    with fedkit.connect(federation.address) as coordinator:
        about = {"seed": 3, "init": module, "min_clients": len(CLIENTS), "progress": False}
        return coordinator.run(tasks.plain, plan, **about, **more).strategy


def test_a_hand_over_finds_what_simulation_finds(federation: Loopback, plan: HandOver, module: nn.Module) -> None:
    networked = over(federation, plan, module)
    about = {"clients": CLIENTS, "seed": 3, "init": Weights.from_module(module)}
    simulated = fedkit.simulate(tasks.plain, plan, threads=1, progress=False, **about).strategy
    assert np.array_equal(networked.ranges, simulated.ranges)
    assert networked.scores == simulated.scores
    assert networked.agreement == simulated.agreement
    assert networked.chosen == simulated.chosen == "int8"
    assert networked.examined == simulated.examined
    assert networked.examined["sites"] == 3
    assert networked.examined["passing"] == {"loss<=10": 3}


def test_a_graph_that_clients_do_not_come_to_is_refused_by_each(
    federation: Loopback, plan: HandOver, module: nn.Module
) -> None:
    with pytest.raises(RunFailed, match="converts the model to another graph"):
        over(federation, plan.replace(graph="0" * 64), module)


def test_noised_ranges_are_in_each_sites_ledger_at_their_price(
    federation: Loopback, plan: HandOver, module: nn.Module
) -> None:
    def spent(name: str) -> list[Steps]:
        account = Ledger(federation.folder / "clients" / name / "ledger.db", look=True).account("plain")
        return [reservation.steps for reservation in account.reservations]

    before = {name: spent(name) for name in CLIENTS}
    private = fedkit.Privacy(dp=fedkit.DP(epsilon=2.0, delta=1e-3))
    found = over(federation, plan.replace(per_row=True), module, privacy=private)
    assert found.ranges.shape == (len(plan.bounds), 2)
    for name in CLIENTS:
        *known, last = spent(name)
        assert known == before[name]
        assert (last.q, last.count) == (1.0, 1)
        assert 1.5 < epsilon_of(rdp_of([last]), 1e-3) <= 2.0
