"""Robust strategies: what they make of a round, how many answers they need, and what memory they take."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import fedkit
from fedkit import robust
from fedkit.config import parse
from fedkit.errors import ConfigError, IncompatibleStrategy, RunFailed
from fedkit.robust import Stack
from fedkit.rounds.conduct import Outcome
from fedkit.runfile import RunFile
from fedkit.strategies import CoordinateMedian, Krum, MultiKrum, NormClipping, TrimmedMean
from fedkit.strategy import Federation, Strategy
from fedkit.testing import InMemoryFederation, refuse, toy_task
from fedkit.weights import Weights

CLIENTS = ["ann", "bob", "cyd", "dan", "eve"]
FIT = fedkit.Fit(steps=3, batch_size=8, lr=0.1)
ONE_ROUND = {"rounds": 1, "local": FIT}
STRATEGIES: list[tuple[Strategy, int]] = [
    (CoordinateMedian(**ONE_ROUND, byzantine=2), 5),
    (TrimmedMean(**ONE_ROUND, trim=2), 5),
    (Krum(**ONE_ROUND), 5),
    (MultiKrum(**ONE_ROUND), 5),
    (MultiKrum(**ONE_ROUND, keep=4), 7),
    (NormClipping(**ONE_ROUND, max_norm=1.0), 2),
]
LEAST = pytest.mark.parametrize(
    ("strategy", "least"), STRATEGIES, ids=lambda value: type(value).__name__ if isinstance(value, Strategy) else ""
)


def run(strategy: Strategy, clients: list[str] = CLIENTS, **more: object) -> Outcome:
    return InMemoryFederation(toy_task(), clients, seed=3, **more).run(strategy)


class Collected(Strategy):
    """Keeps what each client would send."""

    async def round(self, federation: Federation, model: Weights) -> Weights:
        found = {name: u.weights async for name, u in federation.updates(federation.clients, model, self.local)}
        self.updates, self.start = {name: found[name] for name in sorted(found)}, model
        return model


@pytest.fixture(scope="module")
def sent() -> tuple[Weights, np.ndarray]:
    """The initial model, and each client's update of it as a row."""
    state = run(Collected(**ONE_ROUND)).state
    return state["start"], np.array([update.vector for update in state["updates"].values()], dtype=np.float64)


def assert_steps(strategy: Strategy, sent: tuple[Weights, np.ndarray], step: np.ndarray) -> None:
    np.testing.assert_allclose(run(strategy).weights.vector, sent[0].vector + step, atol=1e-6)


def test_the_median_is_that_of_what_clients_send(sent: tuple[Weights, np.ndarray]) -> None:
    assert_steps(CoordinateMedian(**ONE_ROUND), sent, np.median(sent[1], axis=0))


def test_the_trimmed_mean_leaves_out_both_ends(sent: tuple[Weights, np.ndarray]) -> None:
    assert_steps(TrimmedMean(**ONE_ROUND), sent, np.sort(sent[1], axis=0)[1:4].mean(axis=0))


def test_krum_takes_the_update_nearest_to_its_neighbours_and_multi_krum_the_mean_of_several(
    sent: tuple[Weights, np.ndarray],
) -> None:
    apart = ((sent[1][:, None] - sent[1][None]) ** 2).sum(axis=2)
    order = np.argsort(np.sort(apart, axis=1)[:, 1:3].sum(axis=1))  # n - f - 2 = 2 others, after oneself
    assert_steps(Krum(**ONE_ROUND), sent, sent[1][order[0]])
    assert_steps(MultiKrum(**ONE_ROUND), sent, sent[1][order[:2]].mean(axis=0))
    assert_steps(MultiKrum(**ONE_ROUND, keep=1), sent, sent[1][order[0]])
    assert run(Krum(**ONE_ROUND)).state["chosen"] == [CLIENTS[order[0]]]


def test_clipping_shortens_what_is_longer_and_nothing_else(sent: tuple[Weights, np.ndarray]) -> None:
    norms = np.sqrt((sent[1] ** 2).sum(axis=1))
    bound = float(np.median(norms))
    step = (np.minimum(1, bound / norms)[:, None] * sent[1]).mean(axis=0)
    assert_steps(NormClipping(**ONE_ROUND, max_norm=bound), sent, step)


def test_the_rule_of_the_docs_is_one(sent: tuple[Weights, np.ndarray]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text()
    (program,) = re.findall(r"```python\n(class Midrange.*?)```", text, re.DOTALL)
    names = {"Strategy": Strategy, "Stack": Stack, "np": np}
    exec(program, names)
    assert_steps(names["Midrange"](**ONE_ROUND), sent, (sent[1].min(axis=0) + sent[1].max(axis=0)) / 2)
    with pytest.raises(IncompatibleStrategy, match="Midrange needs 3 clients"):
        run(names["Midrange"](**ONE_ROUND), CLIENTS[:2])


# -- how many answers are needed ---------------------------------------------------------------------------------------


@LEAST
def test_too_few_clients_are_refused_before_anything_is_asked(strategy: Strategy, least: int) -> None:
    world = InMemoryFederation(toy_task(), [f"c{i}" for i in range(least - 1)])
    name = type(strategy).__name__
    with pytest.raises(
        IncompatibleStrategy, match=f"{name} needs {least} clients in a round, and .* begin with {least - 1}"
    ):
        world.run(strategy)
    assert world.trained == 0
    assert world.journal.last() is None


@LEAST
def test_a_quorum_below_the_breakdown_point_is_refused_with_both_numbers(strategy: Strategy, least: int) -> None:
    rule = fedkit.Participation(quorum=least - 1)
    message = f"needs {least} answers in a round, and participation.quorum={least - 1} would"
    with pytest.raises(IncompatibleStrategy, match=message):
        fedkit.simulate(
            toy_task(), strategy.replace(participation=rule), clients=[f"c{i}" for i in range(9)], progress=False
        )


@LEAST
def test_the_least_number_is_enough(strategy: Strategy, least: int) -> None:
    for rule in (fedkit.Participation(), fedkit.Participation(quorum=least)):
        found = run(strategy.replace(participation=rule), [f"c{i}" for i in range(least)])
        assert len(found.history[0].clients) == least


@LEAST
def test_a_round_in_which_too_few_answer_is_abandoned_and_not_made_of_them(strategy: Strategy, least: int) -> None:
    world = InMemoryFederation(toy_task(), [f"c{i}" for i in range(least + 1)], faults={"c0": refuse, "c1": refuse})
    with pytest.raises(RunFailed, match=f"the quorum is {least}"):
        world.run(strategy)
    assert world.journal.last().round == 0
    assert len(world.journal.abandoned()) == 3


def test_a_fraction_never_draws_fewer_than_the_rule_needs() -> None:
    rule = fedkit.Participation(fraction=0.1)
    found = run(Krum(**ONE_ROUND, participation=rule), [f"c{i}" for i in range(20)])
    assert len(found.history[0].clients) == 5


def test_half_of_a_large_cohort_must_still_answer() -> None:
    clients = [f"c{i}" for i in range(12)]
    with pytest.raises(RunFailed, match="the quorum is 6"):
        run(TrimmedMean(**ONE_ROUND), clients, faults=dict.fromkeys(clients[:7], refuse))


def test_a_robust_rule_says_that_it_needs_single_updates() -> None:
    assert all(strategy.uses == {"updates"} for strategy, _ in STRATEGIES)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "Krum", "byzantine": 0}, "strategy.byzantine: should be greater than or equal to 1, got 0"),
        ({"name": "TrimmedMean", "trim": 0.5}, "strategy.trim: should be a valid integer, got 0.5"),
        ({"name": "MultiKrum", "keeps": 3}, "there is no such setting; did you mean 'keep'?"),
        ({"name": "NormClipping"}, "strategy.max_norm: must be given"),
        ({"name": "NormClipping", "max_norm": 0}, "strategy.max_norm: should be greater than 0, got 0"),
    ],
)
def test_a_wrong_setting_in_a_run_file_is_named(settings: dict[str, object], says: str) -> None:
    file = parse(RunFile, {"run": {"name": "one", "task": "toy"}, "strategy": settings})
    with pytest.raises(ConfigError) as caught:
        file.build_strategy()
    assert says in str(caught.value)


# -- the bits and the memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [strategy for strategy, least in STRATEGIES if least < 7])
def test_neither_the_order_of_arrival_nor_claimed_rows_change_a_bit(strategy: Strategy) -> None:
    expected = run(strategy)
    found = run(strategy, latency=lambda assignment: 200.0 - ord(assignment.client[0]))
    assert found.weights == expected.weights
    assert [record.loss for record in found.history] == [record.loss for record in expected.history]


def test_a_simulation_holds_a_few_updates_and_not_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 clients with a model of 1.2 MB send 94 MB."""
    monkeypatch.setattr(robust, "_IN_MEMORY", 1 << 19)
    task = toy_task(model=lambda: nn.Sequential(nn.Linear(5, 1 << 15), nn.Linear(1 << 15, 3)))
    clients = [f"c{i:02}" for i in range(80)]
    strategy = CoordinateMedian(rounds=1, local=FIT.replace(steps=1))
    tracemalloc.start()
    try:
        sent = fedkit.simulate(task, strategy, clients=clients, threads=1, progress=False).history[0].bytes_up
        assert tracemalloc.get_traced_memory()[1] <= sent / 2.5
    finally:
        tracemalloc.stop()
