"""Encrypted runs over a network: the bits of masked ones, whoever is killed; what a coordinator that lies gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fedkit
from fedkit.strategies import FedAvg, FedSGD, Scaffold
from tests.network.hatchery import Hatched
from tests.network.test_masked import FIT, simulated, started, trained

BFV = fedkit.Privacy(aggregation="bfv", bits=20)
MASKED = fedkit.Privacy(aggregation="masked", bits=20)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hatched]:
    with started(tmp_path_factory.mktemp("encrypted")) as running:
        yield running


@pytest.mark.parametrize(
    "strategy",
    [FedAvg(rounds=2, local=FIT), FedSGD(rounds=2, lr=0.1), Scaffold(rounds=2, local=FIT)],
    ids=lambda strategy: type(strategy).__name__,
)
def test_network_and_simulation_give_the_bits_of_a_masked_run(federation: Hatched, strategy: fedkit.Strategy) -> None:
    evaluate = fedkit.Evaluation(best="loss:min")
    networked = trained(federation, strategy, evaluate=evaluate, privacy=BFV)
    for privacy in (BFV, MASKED):
        expected = simulated(strategy, evaluate=evaluate, privacy=privacy)
        assert networked.weights == expected.weights
        assert [record.metrics for record in networked.history] == [record.metrics for record in expected.history]
        assert [record.examples for record in networked.history] == [record.examples for record in expected.history]
        assert networked.test == expected.test
    assert not networked.test_per_client
    assert [record.refusals for record in networked.history] == [()] * strategy.rounds
