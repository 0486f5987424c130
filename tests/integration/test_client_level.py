"""Client-level privacy: who is drawn, how updates are clipped, what noise goes on their sum, and what it costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest

import fedkit
from fedkit.aggregation import Mean
from fedkit.errors import ConfigError, IncompatibleStrategy, RoundAbandoned, RunError
from fedkit.privacy.accounting import epsilon_of, noise_for, rdp_of
from fedkit.privacy.clients import ClientLevel
from fedkit.rounds.assignment import WITHIN
from fedkit.rounds.conduct import Outcome
from fedkit.rounds.shield import EVERY_CLIENT
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedAvgM, FedBuff, FedSGD, Krum, Scaffold
from fedkit.strategy import Federation, Strategy
from fedkit.testing import Crash, Fuse, InMemoryFederation, toy_task
from fedkit.weights import Entry, Manifest, Weights
from fedkit.work import Answer, Steps, Update

CLIENTS = [f"phone-{number:02}" for number in range(20)]
FIT = fedkit.Fit(steps=2, batch_size=8, lr=0.1)
ALMOST_NONE = 1e-12  # a noise multiplier that shows the sum
DELTA = 1e-3
NOTHING = Mean(Weights.zeros(Manifest((Entry("w", (40_000,)),))), 0, ())


def level(**changes: Any) -> fedkit.Privacy:
    fields = {"delta": DELTA, "noise_multiplier": 1.0, "level": "client", "few_clients": True} | changes
    return fedkit.Privacy(dp=fedkit.DP(**fields))


def half(**changes: Any) -> FedAvg:
    return FedAvg(**({"rounds": 3, "local": FIT, "participation": fedkit.Participation(fraction=0.5)} | changes))


def run(strategy: Strategy, world: InMemoryFederation | None = None, **changes: Any) -> Outcome:
    return (world or InMemoryFederation(toy_task(), CLIENTS, seed=3)).run(strategy, privacy=level(**changes))


# -- the sum -----------------------------------------------------------------------------------------------------------


class Kept(FedAvg):
    """FedAvg that keeps what came of the mean."""

    async def round(self, federation: Federation, model: Weights) -> Weights:
        mean = await federation.mean(self.cohort(federation), model, self.local)
        self.start, self.update, self.clients = model, mean.update, list(mean.clients)
        assert (mean.loss, dict(mean.extra)) == (None, {})
        return model + mean.update


class Collected(Strategy):
    """Keeps what each client would send without a clip."""

    uses = frozenset({"updates"})

    async def round(self, federation: Federation, model: Weights) -> Weights:
        found = {name: u.weights async for name, u in federation.updates(federation.clients, model, FIT)}
        self.updates = {name: found[name] for name in sorted(found)}
        return model


@pytest.fixture(scope="module")
def unclipped() -> dict[str, Weights]:
    state = InMemoryFederation(toy_task(), CLIENTS, seed=3).run(Collected(rounds=1)).state
    return dict(state["updates"])


@pytest.mark.parametrize("clip", [0.02, 0.06, 100.0])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_the_mean_is_the_clipped_sum_over_the_expected_clients(
    unclipped: dict[str, Weights], clip: float, fraction: float
) -> None:
    strategy = Kept(rounds=1, local=FIT, participation=fedkit.Participation(fraction=fraction))
    state = run(strategy, noise_multiplier=ALMOST_NONE, max_update_norm=clip).state
    expected = np.zeros_like(state["update"].vector, dtype=np.float64)
    for client in state["clients"]:
        vector = unclipped[client].vector.astype(np.float64)
        expected += vector * min(1.0, clip / np.linalg.norm(vector))
    assert np.abs(state["update"].vector - expected / (fraction * len(CLIENTS))).max() <= 2e-6 * clip
    assert (fraction == 1.0) == (len(state["clients"]) == len(CLIENTS))


def test_the_noise_is_gaussian_and_as_planned() -> None:
    quiet = ClientLevel(level(noise_multiplier=2.0, max_update_norm=0.5).dp, 0.5, 1)
    found = quiet.released(NOTHING, 0.5, 10.0, bytes(32)).mean.update.vector
    assert kstest(found / (2.0 * 0.5 / 10.0), "norm").pvalue > 1e-6
    assert np.array_equal(quiet.released(NOTHING, 0.5, 10.0, bytes(32)).mean.update.vector, found)
    assert not np.any(quiet.released(NOTHING, 0.5, 10.0, b"x" * 32).mean.update.vector == found)


def test_a_round_that_draws_nobody_is_noise_alone() -> None:
    strategy = Kept(rounds=1, local=FIT, participation=fedkit.Participation(fraction=1e-9))
    state = run(strategy).state
    assert state["clients"] == []
    assert 0.5 < state["update"].vector.std() < 1.5  # divided by one client at least


# -- who takes part ----------------------------------------------------------------------------------------------------


def test_every_client_is_drawn_by_itself_and_never_by_the_seed() -> None:
    rule = ClientLevel(level().dp, 0.3, 1)
    counts = [len(rule.drawn(CLIENTS, number.to_bytes(32, "big"))) for number in range(400)]
    assert binom(400 * len(CLIENTS), 0.3).interval(1 - 1e-9)[0] <= sum(counts)
    assert sum(counts) <= binom(400 * len(CLIENTS), 0.3).interval(1 - 1e-9)[1]
    assert len(set(counts)) > 5
    first, again = (run(half(rounds=4), noise_multiplier=ALMOST_NONE) for _ in range(2))
    assert [record.clients for record in first.history] != [record.clients for record in again.history]


def test_a_client_is_not_told_who_else_was_drawn() -> None:
    told: list[tuple[str, ...]] = []

    def latency(assignment: Any) -> float:
        told.append(assignment.cohort)
        return 0.0

    run(half(rounds=1), InMemoryFederation(toy_task(), CLIENTS, latency=latency))
    training = told[: -len(CLIENTS)]
    assert training
    assert set(training) == {()}


@pytest.mark.parametrize("fault", ["too long", "odd bit"])
def test_an_update_that_is_not_clipped_is_refused(fault: str) -> None:
    def unclip(answer: Answer) -> Answer:
        if not isinstance(answer, Update):
            return answer
        if fault == "too long":
            return Update(1.001 * answer.weights, answer.examples, extra=answer.extra)
        return Update(answer.weights, answer.examples, extra={WITHIN: np.array([1e9], np.float32)})

    world = InMemoryFederation(toy_task(), CLIENTS, seed=3, faults={"phone-07": unclip})
    outcome = run(FedAvg(rounds=1, local=FIT), world, max_update_norm=0.02, clip_quantile=0.5)
    [refusal] = outcome.history[0].refusals
    assert (refusal.client, refusal.reason) == ("phone-07", "norm")
    assert len(outcome.history[0].clients) == len(CLIENTS) - 1


# -- the clip that follows a quantile ----------------------------------------------------------------------------------


@pytest.mark.unmeasured
@pytest.mark.parametrize(("quantile", "low", "high"), [(0.25, 2 / 8, 3 / 8), (0.75, 6 / 8, 7 / 8)])
@pytest.mark.parametrize("start", [0.1, 2.0])
def test_the_clip_comes_to_the_quantile_of_the_norms(start: float, quantile: float, low: float, high: float) -> None:
    fixed = toy_task(optimizer=lambda parameters, lr=0.1: _Still(parameters, lr))
    world = InMemoryFederation(fixed, CLIENTS, seed=3)
    given = {"clip_quantile": quantile, "max_update_norm": start, "noise_multiplier": 0.5}
    outcome = run(FedAvg(rounds=80, local=FIT), world, **given)
    clips = [record.clip for record in outcome.history]
    assert (clips[5] > start) == (start < 1.0)
    assert 0.85 * low < np.mean(clips[-20:]) < 1.15 * high


class _Still(torch.optim.SGD):
    """Moves one parameter by a length that goes round, whatever the gradient is: norms of 1/8 to 1."""

    turn = 0

    @staticmethod
    def norm_of(number: int) -> float:
        return number / 8.0

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        _Still.turn = _Still.turn % 8 + 1

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] += _Still.norm_of(_Still.turn) / FIT.steps


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_each_round_says_what_every_client_has_paid() -> None:
    outcome = run(half())
    expected = [epsilon_of(rdp_of([Steps(1.0, 0.5, count)]), DELTA) for count in (1, 2, 3)]
    assert [dict(record.epsilon) for record in outcome.history] == [{EVERY_CLIENT: epsilon} for epsilon in expected]
    assert [record.releases for record in outcome.history] == [1, 1, 1]


def test_the_noise_is_planned_so_that_all_rounds_cost_epsilon() -> None:
    outcome = run(half(rounds=5), epsilon=4.0, noise_multiplier=None)
    cost = outcome.history[-1].epsilon[EVERY_CLIENT]
    assert 3.9 < cost <= 4.0
    assert ClientLevel(level(epsilon=4.0, noise_multiplier=None).dp, 0.5, 5).noise_multiplier == noise_for(
        4.0, DELTA, 0.5, 5
    )


def test_a_round_that_is_tried_again_costs_again_and_the_plan_is_kept_to() -> None:
    class Unlucky(FedAvg):
        async def round(self, federation: Federation, model: Weights) -> Weights:
            after = await super().round(federation, model)
            raise RoundAbandoned(f"round {federation.round}: bad luck with {after.digest[:8]}.")

    world = InMemoryFederation(toy_task(), CLIENTS, seed=3)
    with pytest.raises(RunError, match="epsilon 4 is spent"):
        run(Unlucky(rounds=1, local=FIT), world, epsilon=4.0, noise_multiplier=None)
    assert [record.releases for record in world.journal.abandoned()] == [1]


def test_the_noise_on_the_count_is_taken_from_that_on_the_updates() -> None:
    both = ClientLevel(level(clip_quantile=0.5).dp, 1.0, 1)
    found = both.released(NOTHING, 1.0, 20.0, bytes(32)).mean.update.vector * 20.0
    assert kstest(found * math.sqrt(1.0 - (2.0 * 1.0) ** -2), "norm").pvalue > 1e-6
    with pytest.raises(IncompatibleStrategy, match="clip_quantile=None"):
        fedkit.simulate(toy_task(), FedAvg(), clients=CLIENTS[:5], privacy=level(clip_quantile=0.5), progress=False)


# -- a coordinator that dies -------------------------------------------------------------------------------------------


@pytest.mark.unmeasured
@pytest.mark.parametrize("keep_answers", [False, True], ids=["asked again", "kept"])
def test_a_crash_at_any_step_changes_neither_cohorts_nor_noise_nor_cost(keep_answers: bool) -> None:
    strategy = half(rounds=2)
    first, steps = InMemoryFederation(toy_task(), CLIENTS[:6], seed=3, keep_answers=keep_answers), Fuse()
    expected = first.run(strategy, privacy=level(clip_quantile=0.5, noise_multiplier=0.3), fuse=steps)
    for step in range(1, steps.steps + 1, 5):
        world = InMemoryFederation(toy_task(), CLIENTS[:6], seed=3, keep_answers=keep_answers)
        world.journal.secret = first.journal.secret
        with pytest.raises(Crash):
            world.run(strategy, privacy=level(clip_quantile=0.5, noise_multiplier=0.3), fuse=Fuse(step))
        again = world.run(strategy, privacy=level(clip_quantile=0.5, noise_multiplier=0.3))
        assert again.weights == expected.weights, step
        assert [(r.clients, r.clip, dict(r.epsilon), r.releases) for r in again.history] == [
            (r.clients, r.clip, dict(r.epsilon), r.releases) for r in expected.history
        ]


# -- what cannot be ----------------------------------------------------------------------------------------------------


class OwnDraw(FedAvg):
    def cohort(self, federation: Federation) -> list[str]:
        return list(federation.clients[:2])


@pytest.mark.parametrize(
    ("strategy", "task", "said"),
    [
        (CyclicWeightTransfer(), {}, "level client and CyclicWeightTransfer"),
        (Krum(), {}, "level client and Krum"),
        (FedBuff(), {}, "level client and FedBuff"),
        (Scaffold(), {}, "level client and Scaffold"),
        (OwnDraw(), {}, "level client and OwnDraw"),
        (FedAvg(participation=fedkit.Participation(quorum=3)), {}, "participation.quorum"),
        (FedAvg(participation=fedkit.Participation(over_select=2.0)), {}, "participation.over_select"),
        (FedAvg(), {"prepare": fedkit.Standardize()}, "the statistics of toy"),
    ],
)
def test_what_it_does_not_cover_is_refused_before_anybody_is_asked(
    strategy: Strategy, task: dict[str, Any], said: str
) -> None:
    with pytest.raises(IncompatibleStrategy, match=said):
        fedkit.simulate(toy_task(**task), strategy, clients=CLIENTS, privacy=level(), progress=False)


def test_few_clients_take_insistence_and_delta_is_at_most_one_over_them() -> None:
    with pytest.raises(IncompatibleStrategy, match="20 clients a round on average share one noise"):
        fedkit.simulate(toy_task(), FedAvg(rounds=1), clients=CLIENTS, privacy=level(few_clients=False), progress=False)
    with pytest.raises(IncompatibleStrategy, match="more than one over 20 clients"):
        fedkit.simulate(toy_task(), FedAvg(rounds=1), clients=CLIENTS, privacy=level(delta=0.06), progress=False)
    many = [f"phone-{number:03}" for number in range(120)]
    fedkit.simulate(
        toy_task(), FedAvg(rounds=1, local=FIT), clients=many, privacy=level(few_clients=False), progress=False
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"level": "client", "max_grad_norm": 2.0},
        {"max_update_norm": 2.0},
        {"clip_quantile": 0.5},
        {"few_clients": True},
    ],
)
def test_settings_of_the_other_level_are_a_mistake(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has no meaning at level"):
        fedkit.DP(epsilon=1.0, delta=1e-5, **fields)


class Twice(FedAvg):
    async def round(self, federation: Federation, model: Weights) -> Weights:
        await federation.mean(self.cohort(federation), model, self.local)
        return (await federation.mean(self.cohort(federation), model, self.local)).update


class Others(FedAvg):
    async def round(self, federation: Federation, model: Weights) -> Weights:
        return (await federation.mean(federation.clients[:2], model, self.local)).update


def test_vectors_that_a_train_loop_sends_have_no_clip() -> None:
    def train(model: Any, batches: Any, site: Any) -> None:
        site.send("own", np.ones(3))

    world = InMemoryFederation(toy_task(train=train), CLIENTS, seed=3)
    refusals = run(FedAvg(rounds=1), world).history[0].refusals
    assert {(one.reason, one.detail) for one in refusals} == {("shape", "no clip bounds the vectors own")}
    assert len(refusals) == len(CLIENTS)


@pytest.mark.parametrize("strategy", [Twice(rounds=1, local=FIT), Others(rounds=1, local=FIT)])
def test_one_mean_a_round_over_those_who_were_drawn(strategy: Strategy) -> None:
    with pytest.raises(RunError, match="one mean a round"):
        run(strategy)


@pytest.mark.parametrize("strategy", [FedAvgM(rounds=2, local=FIT), FedSGD(rounds=2, lr=0.1)])
def test_what_is_made_of_the_noised_mean_at_the_coordinator_is_free(strategy: Strategy) -> None:
    assert run(strategy).history[-1].epsilon[EVERY_CLIENT] == epsilon_of(rdp_of([Steps(1.0, 1.0, 2)]), DELTA)
