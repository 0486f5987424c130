"""Each strategy does what its paper says, checked against the formula or a bare PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import fedkit
from fedkit import rng
from fedkit.aggregation import Mean
from fedkit.errors import ConfigError, IncompatibleStrategy, StateError
from fedkit.rounds.conduct import Outcome
from fedkit.strategies import (
    CyclicWeightTransfer,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBuff,
    FedSGD,
    FedYogi,
    Scaffold,
    SingleWeightTransfer,
    StochasticWeightTransfer,
)
from fedkit.strategy import Federation, Strategy
from fedkit.testing import InMemoryFederation, toy_task
from fedkit.trainer.batches import shuffled
from fedkit.weights import Weights

CLIENTS = ["ann", "bob", "cyd", "dan", "eve"]
FIT = fedkit.Fit(epochs=1, batch_size=8, lr=0.1)


def run(strategy: Strategy, clients: list[str] = CLIENTS, **task: object) -> Outcome:
    return InMemoryFederation(toy_task(**task), clients, seed=7).run(strategy)


def trained_plainly(start: Weights, client: str, round: int, fit: fedkit.Fit, seed: int = 7) -> Weights:
    """A PyTorch loop that knows nothing of fedkit but the order of the batches."""
    task = toy_task()
    module = start.to_module(task.build(seed))
    features, labels = task.data(client).train.tensors
    optimizer = torch.optim.SGD(module.parameters(), lr=fit.lr)
    batches = shuffled(
        len(labels), fit.batch_size, epochs=fit.epochs, steps=fit.steps, seed=rng.seed_for(seed, round, client)
    )
    for index in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(features[index]), labels[index]).backward()
        optimizer.step()
    return Weights.from_module(module)


def initial(seed: int = 7) -> Weights:
    return Weights.from_module(toy_task().build(seed))


def test_one_cycle_over_one_client_is_plain_local_training_bit_for_bit() -> None:
    fit = FIT.replace(epochs=3)
    found = run(CyclicWeightTransfer(rounds=1, local=fit), ["ann"])
    assert found.weights == trained_plainly(initial(), "ann", 1, fit)
    assert found.weights != initial()


def test_single_weight_transfer_passes_each_client_once_in_order() -> None:
    model = initial()
    for client in CLIENTS:
        model = trained_plainly(model, client, 1, FIT)
    assert run(SingleWeightTransfer(local=FIT)).weights == model


def test_cyclic_weight_transfer_repeats_the_cycle() -> None:
    model = initial()
    for cycle in (1, 2):
        for client in CLIENTS:
            model = trained_plainly(model, client, cycle, FIT)
    assert run(CyclicWeightTransfer(rounds=2, local=FIT)).weights == model


def test_a_reshuffled_cycle_visits_every_client_in_an_order_that_changes() -> None:
    orders = []

    class Watched(CyclicWeightTransfer):
        def order(self, federation: Federation) -> list[str]:
            orders.append(super().order(federation))
            return orders[-1]

    run(Watched(rounds=4, local=FIT, reshuffle=True))
    assert all(sorted(order) == CLIENTS for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_stochastic_weight_transfer_draws_k_different_clients_a_round() -> None:
    history = run(StochasticWeightTransfer(rounds=6, clients_per_round=2, local=FIT)).history
    assert all(len(record.clients) == 2 for record in history)
    assert len({record.clients for record in history}) > 1


def test_fedavg_is_the_mean_by_examples_of_what_each_client_trains() -> None:
    parts = [trained_plainly(initial(), client, 1, FIT) for client in CLIENTS]
    counts = [len(toy_task().data(client).train) for client in CLIENTS]
    expected = np.average([part.vector.astype(np.float64) for part in parts], axis=0, weights=counts)
    assert len(set(counts)) > 1
    np.testing.assert_allclose(run(FedAvg(rounds=1, local=FIT)).weights.vector, expected, atol=1e-6)


def test_fedavg_samples_max_of_c_k_and_one_clients() -> None:
    for fraction, expected in ((0.4, 2), (0.1, 1), (0.5, 2), (1.0, 5)):
        rule = fedkit.Participation(fraction=fraction)
        history = run(FedAvg(rounds=3, local=FIT, participation=rule)).history
        assert [len(record.clients) for record in history] == [expected] * 3


def test_fedavg_with_one_full_batch_step_is_fedsgd() -> None:
    fit = fedkit.Fit(steps=1, batch_size="all", lr=0.3)
    averaged, stepped = run(FedAvg(rounds=5, local=fit)), run(FedSGD(rounds=5, lr=0.3))
    assert np.abs(averaged.weights.vector - stepped.weights.vector).max() <= 1e-6
    assert averaged.weights != initial()


def test_fedsgd_on_one_batch_uses_one_batch() -> None:
    full = run(FedSGD(rounds=1, lr=0.3))
    batch = run(FedSGD(rounds=1, lr=0.3, local=fedkit.Gradient(batch_size=4)))
    assert np.abs(full.weights.vector - batch.weights.vector).max() > 1e-4


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop"])
def test_fedsgd_with_a_server_optimizer_is_that_optimizer_on_the_pooled_data(name: str) -> None:
    task = toy_task()
    module = task.build(7)
    rows = [task.data(client).train.tensors for client in CLIENTS]
    features, labels = (torch.cat(columns) for columns in zip(*rows, strict=True))
    optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(features), labels).backward()
        optimizer.step()
    found = run(FedSGD(rounds=4, lr=0.05, server_optimizer=name)).weights
    np.testing.assert_allclose(found.vector, Weights.from_module(module).vector, atol=2e-5)


def test_a_server_optimizer_with_weight_decay_leaves_the_preprocessing_alone() -> None:
    decaying = FedSGD(rounds=3, lr=0.1, server_optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, weight_decay=0.5))
    world = InMemoryFederation(toy_task(prepare=fedkit.Standardize()), CLIENTS)
    before = InMemoryFederation(toy_task(prepare=fedkit.Standardize()), CLIENTS)
    after = world.run(decaying).weights
    plain = before.run(FedSGD(rounds=3, lr=0.1)).weights
    np.testing.assert_array_equal(after["prepare.scale"], plain["prepare.scale"])
    assert not np.array_equal(after["model.0.weight"], plain["model.0.weight"])


class Scripted:
    """A federation whose mean updates are given; everything else is not to be asked."""

    round, clients, drawn = 1, ("ann", "bob"), None
    rng = np.random.default_rng(0)

    def __init__(self, updates: list[Weights]) -> None:
        self._updates = list(updates)

    async def mean(self, cohort: object, *_: object, **__: object) -> Mean:
        return Mean(self._updates.pop(0), 10, tuple(cohort))


def adaptive_reference(second: Callable[[np.ndarray, np.ndarray], np.ndarray], beta1: float) -> np.ndarray:
    """Algorithm 2 of Reddi et al. 2021 in float64, over DELTAS."""
    x, m, v = np.zeros(3), np.zeros(3), np.full(3, 1e-3**2)
    for delta in DELTAS:
        m = beta1 * m + (1 - beta1) * delta
        v = second(v, delta**2)
        x = x + 0.01 * m / (np.sqrt(v) + 1e-3)
    return x


DELTAS = [np.array([0.5, -0.1, 0.0]), np.array([-0.2, 0.3, 0.01]), np.array([0.1, 0.1, -2.0])]


@pytest.mark.parametrize(
    ("strategy", "second", "beta1"),
    [
        (FedAdagrad(rounds=3), lambda v, s: v + s, 0.0),
        (FedAdam(rounds=3), lambda v, s: 0.99 * v + 0.01 * s, 0.9),
        (FedYogi(rounds=3), lambda v, s: v - 0.01 * s * np.sign(v - s), 0.9),
    ],
    ids=["FedAdagrad", "FedAdam", "FedYogi"],
)
def test_adaptive_strategies_follow_reddi_et_al(
    strategy: Strategy, second: Callable[..., np.ndarray], beta1: float
) -> None:
    import asyncio

    manifest = fedkit.Manifest((fedkit.weights.Entry("w", (3,)),))
    federation = Scripted([Weights(manifest, delta) for delta in DELTAS])
    model = Weights.zeros(manifest)
    for _ in DELTAS:
        model = asyncio.run(strategy.round(federation, model))
    np.testing.assert_allclose(model.vector, adaptive_reference(second, beta1), rtol=2e-4, atol=1e-7)


def test_fedavgm_adds_momentum_to_the_mean_update() -> None:
    import asyncio

    manifest = fedkit.Manifest((fedkit.weights.Entry("w", (3,)),))
    strategy, federation = FedAvgM(momentum=0.5), Scripted([Weights(manifest, delta) for delta in DELTAS])
    model = Weights.zeros(manifest)
    for _ in DELTAS:
        model = asyncio.run(strategy.round(federation, model))
    expected = DELTAS[0] * 1.75 + DELTAS[1] * 1.5 + DELTAS[2]
    np.testing.assert_allclose(model.vector, expected, atol=1e-6)


def test_proximal_training_stays_closer_to_the_received_model() -> None:
    loose = run(FedAvg(rounds=1, local=FIT.replace(epochs=5)))
    tight = run(FedAvg(rounds=1, local=FIT.replace(epochs=5, proximal=5.0)))
    assert (tight.weights - initial()).norm() < 0.5 * (loose.weights - initial()).norm()


def test_scaffold_with_equal_controls_starts_as_uniform_fedavg() -> None:
    parts = [trained_plainly(initial(), client, 1, FIT) for client in CLIENTS]
    expected = np.mean([part.vector.astype(np.float64) for part in parts], axis=0)
    np.testing.assert_allclose(run(Scaffold(rounds=1, local=FIT)).weights.vector, expected, atol=1e-6)


def test_scaffolds_control_is_the_mean_of_its_clients_controls() -> None:
    strategy = Scaffold(rounds=3, local=FIT, participation=fedkit.Participation(fraction=0.6))
    world = InMemoryFederation(toy_task(), CLIENTS)
    world.run(strategy)
    kept = [client._store.state().get("control") for client in world.place.clients.values()]
    mean = sum(vector for vector in kept if vector is not None) / len(CLIENTS)
    state = world.journal.last().state["control"]
    np.testing.assert_allclose(state.vector, mean, atol=1e-6)
    assert np.abs(mean).max() > 1e-3


def test_fedbuff_commits_after_each_full_buffer_and_scales_stale_updates_down() -> None:
    found = run(FedBuff(rounds=8, concurrency=4, buffer=2, local=FIT))
    assert len(found.history) == 8
    assert all(1 <= len(record.clients) <= 2 for record in found.history)
    assert (found.weights - initial()).norm() > 0


def test_what_a_strategy_sets_is_its_state_and_what_it_declares_is_a_setting() -> None:
    strategy = FedAvgM(rounds=2, momentum=0.5)
    strategy.velocity, strategy.seen = initial(), {"rounds": [1, 2]}
    state = strategy.state_dict()
    assert sorted(state) == ["seen", "velocity"]
    strategy.seen["rounds"].append(3)
    strategy.extra = 1
    strategy.load_state_dict(state)
    assert strategy.seen == {"rounds": [1, 2]}
    assert not hasattr(strategy, "extra")


def test_state_that_cannot_be_committed_is_named() -> None:
    strategy = FedAvg()
    strategy.cache = {"open": object()}
    with pytest.raises(StateError, match=r"cache\['open'\] is a object"):
        strategy.state_dict()


def test_a_run_leaves_the_strategy_object_as_it_was() -> None:
    strategy = FedAvgM(rounds=2, local=FIT)
    assert run(strategy).weights == run(strategy).weights
    assert strategy.state_dict() == {}


@pytest.mark.parametrize(
    ("strategy", "task", "words"),
    [
        (
            FedSGD(rounds=1, lr=0.1),
            {"model": lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))},
            "running statistics",
        ),
        (FedSGD(rounds=1, lr=0.1), {"loss": None, "train": lambda m, b, s: None}, "own train loop"),
        (Scaffold(rounds=1), {"loss": None, "train": lambda m, b, s: None}, "own train loop"),
        (
            FedAvg(rounds=1, local=FIT.replace(proximal=1.0)),
            {"loss": None, "train": lambda m, b, s: None},
            "built-in loop",
        ),
        (
            CyclicWeightTransfer(participation=fedkit.Participation(quorum=2)),
            {},
            "CyclicWeightTransfer has no use for participation.quorum=2",
        ),
        (
            FedBuff(participation=fedkit.Participation(over_select=1.5)),
            {},
            "FedBuff has no use for participation.over_select=1.5",
        ),
    ],
)
def test_what_cannot_work_together_is_named_before_anything_is_trained(
    strategy: Strategy, task: dict[str, object], words: str
) -> None:
    world = InMemoryFederation(toy_task(**task), CLIENTS)
    with pytest.raises(IncompatibleStrategy, match=words):
        world.run(strategy)
    assert world.trained == 0


def test_scaffold_refuses_an_optimizer_for_which_it_is_not_defined() -> None:
    world = InMemoryFederation(toy_task(optimizer=torch.optim.Adam), CLIENTS)
    with pytest.raises(IncompatibleStrategy, match="plain SGD"):
        world.run(Scaffold(rounds=1, local=FIT))


def test_strategies_check_their_settings() -> None:
    with pytest.raises(ConfigError, match="lr: must be given"):
        FedSGD(rounds=3)
    with pytest.raises(ConfigError, match=r"rounds: .* got 2"):
        SingleWeightTransfer(rounds=2)
    with pytest.raises(ConfigError, match="did you mean 'momentum'"):
        FedAvgM(momentun=0.5)
