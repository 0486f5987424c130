"""What private work is planned to cost, and what cannot be planned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import fedkit
from fedkit.config import DP
from fedkit.errors import ConfigError, IncompatibleStrategy, Reason, Refused
from fedkit.gate import Gate
from fedkit.privacy.accounting import epsilon_of, rdp_of
from fedkit.privacy.plan import QUESTION_SHARE, planned
from fedkit.queries import LabelCounts, Moments
from fedkit.ranges import SCALE, noised
from fedkit.rounds.assignment import Private
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedBuff
from fedkit.testing import toy_task
from fedkit.work import Fit, Gradient, Steps, Summarize

DELTA = 1e-4
STATISTICS = Summarize(query=Moments(bounds=[(0.0, 1.0), (-1.0, 2.0)]))


def private(epsilon: float = 3.0, visits: int = 10, questions: int = 0) -> Private:
    return Private(DP(epsilon=epsilon, delta=DELTA), visits, questions)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.3, 10.0),
    st.integers(1, 30),
    st.integers(0, 2),
    st.integers(1, 64),
    st.integers(1, 20),
    st.integers(8, 5000),
)
def test_a_whole_run_costs_what_was_asked_and_not_much_less(
    epsilon: float, visits: int, questions: int, batch: int, steps: int, rows: int
) -> None:
    asked, work = private(epsilon, visits, questions), Fit(steps=steps, batch_size=batch)
    cost = planned(asked, work, rows).cost
    assert (cost.q, cost.count) == (min(batch / rows, 1.0), steps)
    answers = [planned(asked, STATISTICS, rows).cost] * questions
    assert all(one == Steps(one.noise_multiplier, 1.0, 1) for one in answers)
    assert epsilon_of(rdp_of(answers[:1]), DELTA) <= epsilon * QUESTION_SHARE
    total = epsilon_of(rdp_of([*answers, *[cost] * visits]), DELTA)
    assert 0.98 * epsilon <= total <= epsilon


@pytest.mark.parametrize(
    ("work", "count", "q"),
    [
        (Fit(epochs=2, batch_size=32), 8, 32 / 100),
        (Fit(epochs=3, batch_size="all"), 3, 1.0),
        (Fit(steps=5, batch_size=200), 5, 1.0),
        (Gradient(batch_size=10), 1, 0.1),
        (Gradient(), 1, 1.0),
    ],
)
def test_steps_and_rates_are_those_of_the_work(work: Fit | Gradient, count: int, q: float) -> None:
    cost = planned(private(), work, 100).cost
    assert (cost.count, cost.q) == (count, pytest.approx(q))


def test_noise_that_is_given_is_taken() -> None:
    asked = Private(DP(noise_multiplier=1.5, delta=DELTA), 10, 1)
    assert planned(asked, Fit(steps=5), 100).cost.noise_multiplier == 1.5
    assert planned(asked, STATISTICS, 100).cost == Steps(1.5, 1.0, 1)


@pytest.mark.parametrize(
    ("asked", "work", "rows", "why"),
    [
        (private(), Fit(), 1_000_000, "more than one over the 1000000 rows"),
        (private(1e-9, 1000), Fit(steps=1000, batch_size="all"), 100, "cannot be kept over 1000000 steps"),
        (private(), Summarize(query=LabelCounts(classes=2)), 100, "only moments within public bounds"),
        (private(), Summarize(query=Moments()), 100, "only moments within public bounds"),
    ],
)
def test_what_would_give_rows_away_is_refused(asked: Private, work: object, rows: int, why: str) -> None:
    with pytest.raises(Refused, match=why) as caught:
        planned(asked, work, rows)
    assert caught.value.reason is Reason.PRIVACY


@pytest.mark.parametrize("given", [{}, {"epsilon": 1.0, "noise_multiplier": 1.0}])
def test_epsilon_or_noise_must_be_given_and_not_both(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="give epsilon or noise_multiplier"):
        DP(delta=DELTA, **given)


# -- statistics --------------------------------------------------------------------------------------------------------

features = arrays.arrays(np.float64, st.tuples(st.integers(2, 8), st.just(2)), elements=st.floats(-3.0, 3.0))


@settings(max_examples=100, deadline=None)
@given(features, st.integers(0, 7))
def test_one_row_moves_the_statistics_by_no_more_than_their_sensitivity(rows: np.ndarray, which: int) -> None:
    query = STATISTICS.query
    assert isinstance(query, Moments)
    targets = np.zeros(len(rows))
    without = np.delete(rows, which % len(rows), axis=0)
    apart = query.answer([(rows, targets)]) - query.answer([(without, targets[1:])])
    units = np.array([1.0, *[SCALE] * 4])
    assert np.linalg.norm(apart / units) <= query.sensitivity


def test_statistics_under_noise_stay_within_their_bounds() -> None:
    query = Moments(bounds=[(0.0, 1.0), (-1.0, 2.0)])
    answer = query.answer([(np.full((50, 2), 0.5), np.zeros(50))])
    assert np.array_equal(noised(answer, np.zeros(5)), answer)
    for strange in (np.full(5, -1e6), np.full(5, 1e6), np.array([-60.0, 5.0, -5.0, 90.0, -90.0])):
        found = query.finish(noised(answer, strange), noised=True)
        assert (found.mean >= [0.0, -1.0]).all()
        assert (found.mean <= [1.0, 2.0]).all()
        assert (found.std >= [0.05, 0.15]).all()
        assert (found.std <= [0.5, 1.5]).all()


# -- runs --------------------------------------------------------------------------------------------------------------

CLIENTS = ["a", "b", "c"]


def simulated(strategy: object, task: fedkit.Task | None = None, **dp: object) -> fedkit.Result:
    privacy = fedkit.Privacy(dp=DP(**({"epsilon": 2.0, "delta": 1e-3} | dp)))
    return fedkit.simulate(task or toy_task(), strategy, clients=CLIENTS, privacy=privacy, progress=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_simulated_run_says_what_it_costs_each_client(workers: int) -> None:
    privacy = fedkit.Privacy(dp=DP(epsilon=2.0, delta=1e-3))
    strategy = FedAvg(rounds=3, local=Fit(steps=4, batch_size=8, lr=0.1))
    result = fedkit.simulate(
        toy_task(), strategy, clients=CLIENTS, privacy=privacy, workers=workers, threads=1, progress=False
    )
    assert [record.loss for record in result.history] == [None] * 3
    for client in CLIENTS:
        costs = [record.epsilon[client] for record in result.history]
        assert costs == sorted(costs)
        assert 1.9 < costs[-1] <= 2.0


def test_statistics_are_a_part_of_what_a_run_costs() -> None:
    task = toy_task(prepare=fedkit.Standardize(bounds=[(-4.0, 4.0)] * 5))
    strategy = FedAvg(rounds=1, local=Fit(steps=4, batch_size=8, lr=0.1))
    first, again = (simulated(strategy, task) for _ in range(2))
    assert all(1.9 < epsilon <= 2.0 for epsilon in first.history[-1].epsilon.values())
    assert not np.array_equal(first.weights["prepare.mean"], again.weights["prepare.mean"])


@pytest.mark.parametrize(
    ("strategy", "task", "why"),
    [
        (FedBuff(rounds=2), None, "give DP\\(noise_multiplier"),
        (CyclicWeightTransfer(rounds=2, gate=Gate(max_norm=1.0)), None, "gate of CyclicWeightTransfer"),
        (FedAvg(local=Fit(mixed_precision=True)), None, "mixed_precision"),
        (FedAvg(local=Fit(quantize_from=2)), None, "dp and quantize_from: a batch's range"),
        (FedAvg(), toy_task(prepare=fedkit.Standardize()), "needs public bounds"),
        (FedAvg(), toy_task(loss=None, train=lambda model, batches, site: None), "own train loop"),
    ],
    ids=["asynchronous", "gate", "bfloat16", "8 bits", "statistics", "own loop"],
)
def test_what_cannot_be_private_is_refused_before_anybody_is_asked(
    strategy: object, task: fedkit.Task | None, why: str
) -> None:
    with pytest.raises(IncompatibleStrategy, match=why):
        simulated(strategy, task)
