"""Runs with shared noise, simulated: as much noise as planned, whoever drops out, and nothing opened below n - d."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from torch import nn
from torch.nn.functional import pad

import fedkit
from fedkit.errors import ConfigError, IncompatibleStrategy, Reason, Refused, RunFailed
from fedkit.rounds.conduct import Outcome
from fedkit.rounds.shield import EVERY_CLIENT
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedAvgM, FedBuff, FedSGD, Krum, Scaffold
from fedkit.strategy import Federation, Strategy
from fedkit.task import Task
from fedkit.testing import Crash, Fuse, InMemoryFederation, toy_task
from fedkit.weights import Weights
from fedkit.work import Answer, Gradient
from tests.integration.test_masked import drops

pytestmark = pytest.mark.unmeasured  # its lines are gone over by runs between processes, too

CLIENTS = [f"site-{number}" for number in range(6)]
WIDE = 400  # features: enough elements for a test of their variance
BATCH = Gradient(batch_size=12)


class Kept(FedSGD):
    """FedSGD that keeps each mean gradient and stays where it is."""

    async def round(self, federation: Federation, model: Weights) -> Weights:
        mean = await federation.mean(self.cohort(federation), model, self.local)
        self.gradient, self.rows = mean.gradient.vector.copy(), mean.examples
        return model


class KeptUpdates(FedAvg):
    """FedAvg that keeps each mean update and stays where it is."""

    async def round(self, federation: Federation, model: Weights) -> Weights:
        self.update = (await federation.mean(self.cohort(federation), model, self.local)).update.vector.copy()
        return model


def wide() -> Task:
    def model() -> nn.Module:
        return nn.Linear(WIDE, 3)

    def data(client: str) -> fedkit.Data:
        held = toy_task().data(client)
        (x, y), (u, v) = (part[:] for part in (held.train, held.test))
        grow = (0, WIDE - x.shape[1])
        return fedkit.Data(train=(pad(x, grow), y), test=(pad(u, grow), v))

    return toy_task(model=model, data=data, inputs={"features": fedkit.Tensor("float32", (WIDE,))})


def shared(**changes: Any) -> fedkit.Privacy:
    given = {"noise_multiplier": 5.0, "delta": 1e-3, "noise": "shared", "dropouts": 1, "colluders": 1} | changes
    return fedkit.Privacy(dp=fedkit.DP(**given), aggregation="masked")


def whole(**changes: Any) -> fedkit.Privacy:
    return shared(level="client", few_clients=True, **changes)


def run(
    strategy: Strategy, privacy: fedkit.Privacy, task: Task | None = None, clients: list[str] = CLIENTS, **faults: Any
) -> Outcome:
    world = InMemoryFederation(
        task or toy_task(), clients, seed=3, faults={k.replace("_", "-"): faults[k] for k in faults}
    )
    return world.run(strategy, privacy=privacy)


# -- how much noise there is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [{}, {"site_4": drops(7)}], ids=["all there", "one missing"])
def test_a_mean_gradient_has_the_planned_noise_and_that_of_those_who_need_not_be_there(gone: dict[str, Any]) -> None:
    found = run(Kept(rounds=1, lr=1.0, local=BATCH), shared(noise_multiplier=400.0), wide(), **gone).state
    rate = 12 / (run_rows() / len(CLIENTS))
    planned = 400.0 / (rate * found["rows"])  # the clip is 1
    survivors = len(CLIENTS) - len(gone)
    ratio = found["gradient"].std() / (planned * math.sqrt(survivors / 4))  # 4 = n - d - c
    assert abs(ratio - 1.0) < 7.0 / math.sqrt(2 * found["gradient"].size)


def run_rows() -> int:
    return sum(len(toy_task().data(name).train) for name in CLIENTS)


def test_a_mean_update_of_clients_has_the_planned_noise() -> None:
    local = fedkit.Fit(steps=1, lr=0.1)
    found = run(KeptUpdates(rounds=1, local=local), whole(noise_multiplier=20.0), wide()).state["update"]
    ratio = found.std() / (20.0 / len(CLIENTS) * math.sqrt(6 / 4))
    assert abs(ratio - 1.0) < 7.0 / math.sqrt(2 * found.size)


def test_with_next_to_no_noise_the_mean_is_that_of_all_rows_wherever_they_are() -> None:
    every = Gradient()
    quiet = shared(noise_multiplier=0.01, max_grad_norm=1e4)
    found = run(Kept(rounds=1, lr=1.0, local=every), quiet).state["gradient"]
    plain = run(Kept(rounds=1, lr=1.0, local=every), fedkit.Privacy()).state["gradient"]
    spread = 0.01 * 1e4 / run_rows() * math.sqrt(6 / 4)
    assert np.abs(found - plain).max() < 7 * spread


def test_the_same_seed_gives_other_noise_each_time() -> None:
    first, again = (run(FedSGD(rounds=1, lr=1.0, local=BATCH), shared()).weights for _ in range(2))
    assert first != again


def test_training_with_shared_noise_learns_and_each_record_says_what_it_cost_each_client() -> None:
    strategy = FedSGD(rounds=12, lr=1.0, local=Gradient(batch_size=24))
    outcome = run(strategy, shared(noise_multiplier=None, epsilon=60.0))
    costs = [record.epsilon for record in outcome.history]
    assert all(set(cost) == set(CLIENTS) for cost in costs)
    assert costs[0]["site-0"] < costs[-1]["site-0"] <= 60.0
    assert costs[-1]["site-0"] > 0.97 * 60.0  # the plan uses what it may
    assert outcome.test["loss"] < 0.8
    assert {record.loss for record in outcome.history} == {None}


def test_statistics_are_noised_by_each_client_itself_before_the_noise_is_shared() -> None:
    task = toy_task(prepare=fedkit.Standardize(bounds=[(-5.0, 5.0)] * 5))
    outcome = run(FedSGD(rounds=2, lr=0.1, local=BATCH), shared(noise_multiplier=None, epsilon=6.0), task)
    assert 0.9 * 6.0 < outcome.history[-1].epsilon["site-0"] <= 6.0


def test_whole_clients_cost_what_they_do_against_a_coordinator_that_knows_who_was_drawn() -> None:
    local, half = fedkit.Fit(steps=2, lr=0.1), fedkit.Participation(fraction=0.9, attempts=20)
    rule = whole(noise_multiplier=None, epsilon=30.0, dropouts=0, delta=0.01)
    every = run(FedAvg(rounds=3, local=local), rule).history
    drawn = run(FedAvg(rounds=3, local=local, participation=half), rule).history
    assert [record.epsilon[EVERY_CLIENT] for record in every] == [record.epsilon[EVERY_CLIENT] for record in drawn]
    assert every[0].epsilon[EVERY_CLIENT] < every[-1].epsilon[EVERY_CLIENT] <= 30.0
    assert every[-1].epsilon[EVERY_CLIENT] > 29.0


# -- who drops out -----------------------------------------------------------------------------------------------------


# A sum takes five answers of each client, and round 0 has one for the rows: 7 is before the second sum's vector.
@pytest.mark.parametrize("step", [5, 6, 7, 8, 9])
@pytest.mark.parametrize("privacy", [shared(), whole()], ids=["rows", "clients"])
def test_a_round_goes_on_with_as_many_dropouts_as_planned_for_and_not_with_one_more(
    step: int, privacy: fedkit.Privacy
) -> None:
    once = fedkit.Participation(attempts=1)
    local: Any = BATCH if privacy.dp is not None and privacy.dp.level == "example" else fedkit.Fit(steps=1, lr=0.1)
    strategy = (
        FedSGD(rounds=1, lr=0.1, local=local, participation=once)
        if isinstance(local, Gradient)
        else FedAvg(rounds=1, local=local, participation=once)
    )
    [record] = run(strategy, privacy, site_1=drops(step)).history
    assert set(record.clients) >= set(CLIENTS) - {"site-1"}
    with pytest.raises(RunFailed, match="members"):
        run(strategy, privacy, site_1=drops(step), site_4=drops(9))


def test_a_crash_costs_nothing_and_is_not_paid_twice() -> None:
    strategy, steps = FedSGD(rounds=2, lr=0.1, local=BATCH), Fuse()
    reference = InMemoryFederation(toy_task(), CLIENTS[:4], seed=3)
    expected = reference.run(strategy, privacy=shared(), fuse=steps)
    for step in range(9, steps.steps, 61):
        world = InMemoryFederation(toy_task(), CLIENTS[:4], seed=3)
        with pytest.raises(Crash):
            world.run(strategy, privacy=shared(), fuse=Fuse(step))
        again = world.run(strategy, privacy=shared())
        assert again.history[-1].epsilon == expected.history[-1].epsilon
        assert world.trained == reference.trained


# -- what cannot be ----------------------------------------------------------------------------------------------------

FEW = fedkit.Participation(fraction=0.5)


@pytest.mark.parametrize(
    ("strategy", "privacy", "said"),
    [
        (FedAvg(), shared(), "noise='shared' and FedAvg: .* one sum of gradients, as in FedSGD"),
        (FedAvgM(), shared(), "noise='shared' and FedAvgM"),
        (Scaffold(), shared(), "noise='shared' and Scaffold"),
        (CyclicWeightTransfer(), shared(), "noise='shared' and CyclicWeightTransfer"),
        (Krum(), shared(), "noise='shared' and Krum"),
        (FedBuff(), shared(), "FedBuff|noise='shared' and FedBuff"),
        (Krum(), whole(), "level client and Krum"),
        (Scaffold(), whole(), "level client and Scaffold"),
        (FedSGD(lr=1.0), shared(dropouts=3), "noise='shared' and FedSGD: 3 dropouts and 1 colluders of 6 clients"),
        (FedSGD(lr=1.0, participation=FEW), shared(), "noise='shared' and FedSGD: 1 dropouts and 1 colluders of 3"),
        (FedSGD(lr=1.0, participation=fedkit.Participation(over_select=1.5)), shared(), "over_select=1.5"),
    ],
)
def test_what_cannot_share_noise_is_refused_naming_both(strategy: Strategy, privacy: fedkit.Privacy, said: str) -> None:
    with pytest.raises(IncompatibleStrategy, match=said):
        fedkit.simulate(toy_task(), strategy, clients=CLIENTS, privacy=privacy, progress=False)


def test_noise_is_not_shared_in_plain_sums() -> None:
    for rule in (shared(), whole()):
        with pytest.raises(IncompatibleStrategy, match="noise='shared' and aggregation plain"):
            fedkit.simulate(
                toy_task(),
                FedSGD(lr=0.1) if rule == shared() else FedAvg(),
                clients=CLIENTS,
                privacy=rule.replace(aggregation="plain"),
                progress=False,
            )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"noise": "local", "dropouts": 0, "colluders": 2}, "colluders has no meaning with noise 'local'"),
        ({"noise": "local", "dropouts": 1, "colluders": 1}, "dropouts has no meaning"),
        ({"level": "client", "clip_quantile": 0.5}, "clip_quantile has no meaning with noise 'shared'"),
        ({"dropouts": -1}, "dropouts"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shared(**settings)


def test_a_strategy_that_asks_for_anything_else_ends_its_run() -> None:
    class Odd(FedSGD):
        async def round(self, federation: Federation, model: Weights) -> Weights:
            await federation.mean(federation.clients, model, self.local, weights="uniform")
            return model

    with pytest.raises(fedkit.FedkitError, match="shared noise covers the mean gradient of all rows"):
        run(Odd(rounds=1, lr=0.1, local=BATCH), shared())


def test_a_client_with_too_few_rows_for_delta_adds_nothing() -> None:
    with pytest.raises(RunFailed, match=r"delta 0\.1 is more than one over"):
        run(FedSGD(rounds=1, lr=0.1, local=BATCH), shared(delta=0.1))


def test_a_client_that_lies_about_nothing_is_not_told_apart() -> None:
    """What one client sends of a noised sum is as random as of any masked one."""
    seen: list[np.ndarray] = []

    def peek(answer: Answer) -> Answer:
        weights = getattr(answer, "weights", None)
        if weights is not None:
            seen.append(weights.vector.view(np.uint32).copy())
        return answer

    run(FedSGD(rounds=2, lr=0.1, local=BATCH), shared(), wide(), site_1=peek)
    words = np.concatenate(seen)
    ones = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 6 * 0.5 / math.sqrt(32 * words.size)


def test_a_refusal_to_share_costs_its_own_part_only() -> None:
    def later(answer: Answer) -> Answer:
        raise Refused(Reason.POLICY, "noise: a part of it")

    [record] = run(FedSGD(rounds=1, lr=0.1, local=BATCH), shared(), site_5=later).history
    assert record.clients == tuple(CLIENTS[:5])
