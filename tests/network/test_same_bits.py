"""Simulation and network give the same bits, whatever the strategy and whatever stays at the clients."""

from __future__ import annotations

import dataclasses

import pytest

import fedkit
from fedkit.errors import IncompatibleStrategy
from fedkit.loopback import Loopback
from fedkit.strategies import (
    CoordinateMedian,
    CyclicWeightTransfer,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBuff,
    FedSGD,
    FedYogi,
    Krum,
    NormClipping,
    Scaffold,
    SingleWeightTransfer,
    StochasticWeightTransfer,
)
from tests.network import tasks
from tests.network.conftest import CLIENTS

FIT = fedkit.Fit(steps=6, batch_size=8, lr=0.1)
STRATEGIES = [
    FedAvg(rounds=3, local=FIT),
    FedAvg(rounds=3, local=FIT.replace(proximal=0.5), participation=fedkit.Participation(fraction=0.67)),
    FedSGD(rounds=4, lr=0.2),
    FedSGD(rounds=3, lr=0.2, local=fedkit.Gradient(batch_size=8)),
    FedAvgM(rounds=3, local=FIT),
    FedAdam(rounds=3, local=FIT),
    FedYogi(rounds=3, local=FIT),
    FedAdagrad(rounds=3, local=FIT),
    FedAvg(rounds=3, local=FIT.replace(quantize_from=2)),
    Scaffold(rounds=3, local=FIT),
    CoordinateMedian(rounds=3, local=FIT),
    NormClipping(rounds=3, local=FIT, max_norm=0.1),
    CyclicWeightTransfer(rounds=2, local=FIT),
    SingleWeightTransfer(local=FIT),
    StochasticWeightTransfer(rounds=3, clients_per_round=2, local=FIT),
    FedBuff(rounds=3, concurrency=1, buffer=2, local=FIT),
]


def both(
    federation: Loopback, task: fedkit.Task, strategy: fedkit.Strategy, **more: object
) -> tuple[fedkit.Result, fedkit.Result]:
    with fedkit.connect(federation.address) as coordinator:
        networked = coordinator.run(task, strategy, seed=3, min_clients=len(CLIENTS), progress=False, **more)
    return networked, fedkit.simulate(task, strategy, clients=CLIENTS, seed=3, threads=1, progress=False, **more)


def facts(record: fedkit.RoundRecord) -> fedkit.RoundRecord:
    return dataclasses.replace(record, seconds=0.0)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_every_strategy_gives_the_same_bits_over_the_network(federation: Loopback, strategy: fedkit.Strategy) -> None:
    networked, simulated = both(federation, tasks.plain, strategy)
    assert networked.weights == simulated.weights
    assert networked.test == simulated.test
    assert [facts(record) for record in networked.history] == [facts(record) for record in simulated.history]
    assert networked.strategy.state_dict().keys() == simulated.strategy.state_dict().keys()


def test_a_scored_run_has_the_same_best_round_and_scores(federation: Loopback) -> None:
    evaluate = fedkit.Evaluation(best="loss:min")
    networked, simulated = both(federation, tasks.plain, FedAvg(rounds=4, local=FIT), evaluate=evaluate)
    assert networked.best.round == simulated.best.round
    assert networked.best.weights == simulated.best.weights
    assert networked.best.test == simulated.best.test
    assert networked.test_per_client == simulated.test_per_client
    assert [record.per_client for record in networked.history] == [record.per_client for record in simulated.history]


@pytest.mark.parametrize("task", [tasks.stateful, tasks.counting], ids=lambda task: task.name)
def test_what_stays_at_the_clients_is_the_same(federation: Loopback, task: fedkit.Task) -> None:
    networked, simulated = both(federation, task, FedAvg(rounds=4, local=FIT))
    assert networked.weights == simulated.weights


@pytest.mark.parametrize(
    ("strategy", "evaluate"),
    [
        (CyclicWeightTransfer(rounds=3, local=FIT, gate=fedkit.Gate(max_drop=0.2)), None),
        (SingleWeightTransfer(local=FIT, gate=fedkit.Gate(max_norm=9.0, max_ratio=9.0)), None),
        (FedAvg(rounds=3, local=FIT), fedkit.Evaluation(best="loss:min", max_drop=0.2)),
    ],
    ids=["gated hops", "a gate that lets pass", "gated rounds"],
)
def test_what_a_gate_decides_is_the_same(
    federation: Loopback, strategy: fedkit.Strategy, evaluate: fedkit.Evaluation | None
) -> None:
    networked, simulated = both(federation, tasks.hostile, strategy, evaluate=evaluate)
    assert networked.weights == simulated.weights
    assert [facts(record) for record in networked.history] == [facts(record) for record in simulated.history]
    undone = [r.round for r in simulated.history if r.refusals or not r.stands]
    assert undone == ([2, 3] if strategy.rounds == 3 else [])  # with what it left at bea: her third is her second again


def test_a_run_that_may_begin_with_too_few_for_its_rule_is_refused_at_submission(federation: Loopback) -> None:
    with fedkit.connect(federation.address) as coordinator:
        with pytest.raises(IncompatibleStrategy, match="Krum needs 5 clients in a round, and a round may begin with 3"):
            coordinator.submit(tasks.plain, Krum(local=FIT), min_clients=3)
        with pytest.raises(IncompatibleStrategy, match=r"Krum needs 5 answers in a round, and participation.quorum=4"):
            coordinator.submit(tasks.plain, Krum(local=FIT, participation=fedkit.Participation(quorum=4)))
        name = coordinator.submit(tasks.plain, Krum(local=FIT))
        waiting = coordinator.status(name).runs[0]
        assert coordinator.cancel(name).state == "cancelled"
    assert (waiting.state, waiting.detail) in [("waiting", "3 of at least 5 clients are here"), ("running", "")]


def test_a_warm_start_is_the_same(federation: Loopback) -> None:
    init = fedkit.simulate(tasks.plain, FedAvg(rounds=1, local=FIT), clients=["ada"], seed=8, threads=1).weights
    networked, simulated = both(federation, tasks.plain, FedAvg(rounds=1, local=FIT), init=init)
    assert networked.weights == simulated.weights


def test_runs_side_by_side_do_not_touch_each_other(federation: Loopback) -> None:
    strategies = [FedAvg(rounds=5, local=FIT), Scaffold(rounds=5, local=FIT), CyclicWeightTransfer(rounds=2, local=FIT)]
    with fedkit.connect(federation.address) as coordinator:
        names = [coordinator.submit(tasks.plain, one, seed=i, min_clients=3) for i, one in enumerate(strategies)]
        ended = [list(coordinator.watch(name)) for name in names]
        weights = [coordinator.weights(name) for name in names]
    assert all(ended)
    for i, (strategy, found) in enumerate(zip(strategies, weights, strict=True)):
        assert found == fedkit.simulate(tasks.plain, strategy, clients=CLIENTS, seed=i, threads=1).weights
