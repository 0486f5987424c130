"""Splits are partitions, a function of their arguments, and as skewed as their papers say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkit.errors import ConfigError
from fedkit.simulation import splits

Split = dict[str, npt.NDArray[np.int64]]
Deal = Callable[[list[object], list[str], int], Split]

DEALS: dict[str, Deal] = {
    "iid": lambda labels, clients, seed: splits.iid(len(labels), clients, seed),
    "dirichlet": lambda labels, clients, seed: splits.dirichlet(labels, clients, 0.1, seed),
    "dirichlet, no skew": lambda labels, clients, seed: splits.dirichlet(labels, clients, 1e6, seed),
    "dirichlet, all skew": lambda labels, clients, seed: splits.dirichlet(labels, clients, 1e-6, seed),
    "equal sizes": lambda labels, clients, seed: splits.dirichlet(labels, clients, 0.1, seed, equal_sizes=True),
    "equal sizes, no skew": lambda labels, clients, seed: splits.dirichlet(labels, clients, 1e6, seed, True),
    "equal sizes, all skew": lambda labels, clients, seed: splits.dirichlet(labels, clients, 1e-6, seed, True),
    "shards": lambda labels, clients, seed: splits.shards(labels, clients, seed=seed),
}
EQUAL = ["iid", "equal sizes", "equal sizes, no skew", "equal sizes, all skew"]
SEEDS = st.integers(-(2**65), 2**65)

every_deal = pytest.mark.parametrize("deal", DEALS.values(), ids=DEALS)


def named(count: int) -> list[str]:
    return [f"c{i:03}" for i in range(count)]


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[object], list[str]]:
    """Labels, numbers or text, common and rare ones; clients, at most half as many as rows."""
    kinds = st.sampled_from([-1, 0, 7]) | st.integers(0, 40), st.sampled_from(["yes", "no", "?"])
    labels = draw(st.one_of(*(st.lists(kind, min_size=2, max_size=120) for kind in kinds)))
    return labels, named(draw(st.integers(1, len(labels) // 2)))


def largest_share(split: Split, labels: npt.NDArray[np.int64]) -> float:
    """The share of a client's rows that has its commonest label, mean over clients: 1 where each has one label."""
    return float(np.mean([np.bincount(labels[rows]).max() / len(rows) for rows in split.values()]))


# -- what holds for all of them ----------------------------------------------------------------------------------------


@every_deal
@given(table=tables(), seed=SEEDS)
def test_every_row_goes_to_exactly_one_client_and_every_client_gets_one(deal, table, seed):
    labels, clients = table
    split = deal(labels, clients, seed)
    assert list(split) == clients
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(len(labels)))
    for rows in split.values():
        assert rows.dtype == np.int64
        assert len(rows) > 0
        assert np.all(np.diff(rows) > 0)


@every_deal
@given(table=tables(), seed=SEEDS, order=st.randoms(use_true_random=False))
def test_a_split_is_a_function_of_its_arguments_whatever_the_order_of_the_names(deal, table, seed, order):
    labels, clients = table
    first, again = deal(labels, clients, seed), deal(labels, order.sample(clients, len(clients)), seed)
    assert list(first) == list(again)
    assert all(np.array_equal(first[name], again[name]) for name in first)


@every_deal
def test_another_seed_gives_another_split(deal):
    labels = [row % 5 for row in range(100)]
    first, second = deal(labels, named(4), 1), deal(labels, named(4), 2)
    assert any(not np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("deal", [DEALS[name] for name in EQUAL], ids=EQUAL)
@given(table=tables(), seed=SEEDS)
def test_where_equal_sizes_are_promised_no_client_gets_two_rows_more_than_another(deal, table, seed):
    sizes = [len(rows) for rows in deal(*table, seed).values()]
    assert max(sizes) - min(sizes) <= 1


@every_deal
def test_no_draw_depends_on_what_else_was_drawn(deal):
    labels = [row % 3 for row in range(30)]
    first = deal(labels, named(3), 0)
    np.random.seed(5)
    torch.manual_seed(5)
    assert all(np.array_equal(rows, deal(labels, named(3), 0)[name]) for name, rows in first.items())


def test_labels_may_be_a_tensor_or_an_array_of_any_numbers():
    split = splits.dirichlet([0, 1] * 20, named(4), 0.5)
    for labels in (torch.tensor([0, 1] * 20), np.array([0.5, 1.5] * 20), np.array([False, True] * 20)):
        other = splits.dirichlet(labels, named(4), 0.5)
        assert all(np.array_equal(split[name], other[name]) for name in split)


# -- how skewed they are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal_sizes", [False, True])
@given(seed=SEEDS)
def test_labels_are_the_more_skewed_the_smaller_alpha_is(equal_sizes, seed):
    labels = np.arange(2000) % 10
    deals = [splits.dirichlet(labels, named(10), alpha, seed, equal_sizes) for alpha in (100, 1, 0.01)]
    none, some, strong = (largest_share(deal, labels) for deal in deals)
    assert 0.1 <= none < some - 0.05
    assert some + 0.1 < strong <= 1


def test_a_class_is_divided_in_shares_whose_mean_square_is_that_of_a_dirichlet_draw():
    clients, classes, rows, alpha = 4, 500, 200, 0.7
    labels = np.repeat(np.arange(classes), rows)
    split = splits.dirichlet(labels, named(clients), alpha)
    shares = np.array([np.bincount(labels[part], minlength=classes) / rows for part in split.values()])
    expected = (alpha + 1) / (clients * (clients * alpha + 1))
    assert np.mean(shares**2) == pytest.approx(expected, rel=0.03)


def test_with_equal_sizes_a_client_has_class_shares_whose_mean_squares_are_those_of_hsus_dirichlet_draw():
    """Classes of unequal size. Only the first clients are looked at, for whom no class is used up yet."""
    size, alpha, prior = 100, 0.7, np.array([0.5, 0.3, 0.2])
    labels = np.repeat(np.arange(3), (prior * 2000 * size).astype(int))
    split = splits.dirichlet(labels, [f"{i:04}" for i in range(2000)], alpha, equal_sizes=True)
    shares = np.array([np.bincount(labels[part], minlength=3) / size for part in list(split.values())[:800]])
    drawn = prior * (prior * 3 * alpha + 1) / (3 * alpha + 1)  # E[q²] of Dirichlet(3 alpha prior)
    expected = drawn * (1 - 1 / size) + prior / size  # of `size` rows with these shares
    assert np.mean(shares, axis=0) == pytest.approx(prior, rel=0.08)
    assert np.mean(shares**2, axis=0) == pytest.approx(expected, rel=0.08)


def test_classes_of_a_single_row_go_to_every_client_alike():
    counts = np.zeros(3)
    for seed in range(300):
        counts += [len(rows) for rows in splits.dirichlet(range(9), named(3), 1e6, seed).values()]
    assert counts / counts.sum() == pytest.approx(np.full(3, 1 / 3), abs=0.03)


@given(
    clients=st.integers(1, 12),
    per_client=st.integers(1, 4),
    classes=st.integers(1, 8),
    rows=st.integers(1, 60),
    seed=SEEDS,
)
def test_shards_of_equal_classes_hold_as_many_labels_as_shards_and_one_more_for_each_border(
    clients, per_client, classes, rows, seed
):
    rows = max(rows, clients * per_client)
    labels = np.tile(np.arange(classes), rows)
    split = splits.shards(labels, named(clients), per_client, seed)
    found = [len(np.unique(labels[part])) for part in split.values()]
    if clients * per_client % classes == 0:
        assert max(found) <= per_client
    assert sum(found) <= clients * per_client + classes - 1
    if clients * per_client >= classes:  # a shard is no larger than a class
        assert max(found) <= 2 * per_client


def test_shards_leave_file_order_behind_within_a_class():
    split = splits.shards([0] * 100, ["a", "b"], per_client=1)
    assert 10 < np.sum(split["a"] < 50) < 40


def test_which_shards_a_client_gets_is_drawn():
    labels = np.arange(100) % 10
    hands = {tuple(np.unique(labels[splits.shards(labels, named(5), seed=seed)["c000"]])) for seed in range(50)}
    assert len(hands) > 20


# -- bad arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clients", "complaint"),
    [
        ("ab", r"clients must be one or more names, such as \[.*\], got 'ab'"),
        ([], r"clients must be one or more names, .*got \[\]"),
        (5, "clients must be one or more names, .*got 5"),
        (["a", ""], "clients must be one or more names"),
        (["a", 1], "clients must be one or more names"),
        (["a", "b", "a"], "clients must be different names, and one occurs twice"),
    ],
)
def test_clients_that_are_no_different_names_are_refused(clients, complaint):
    for deal in DEALS.values():
        with pytest.raises(ConfigError, match=complaint):
            deal([0, 1] * 10, clients, 0)


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ([[0], [1]], r"labels must be one class a row, .*got int64 of shape \(2, 1\)"),
        (7, r"labels must be .*got int64 of shape \(\)"),
        ([[0], [1, 2]], "labels must be one class a row"),
        ([0, None], "labels must be .*got object"),
        ([0.0, float("nan")], "labels must be .*got NaN in row 1"),
        ([], "labels: 0 rows are too few for"),
    ],
)
def test_labels_that_are_not_one_class_a_row_are_refused(labels, complaint):
    for deal in (splits.dirichlet, splits.shards):
        with pytest.raises(ConfigError, match=complaint):
            deal(labels, ["a"], 1)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), 1e-7, 1e7, True, "0.1", None])
@pytest.mark.parametrize("equal_sizes", [False, True])
def test_an_alpha_out_of_range_is_refused(alpha, equal_sizes):
    with pytest.raises(ConfigError, match=r"alpha must be a number from 1e-06 .* to 1e\+06 .*, got "):
        splits.dirichlet([0, 1], ["a"], alpha, equal_sizes=equal_sizes)


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    for deal in DEALS.values():
        with pytest.raises(ConfigError, match="seed must be a whole number, got "):
            deal([0, 1] * 10, ["a"], seed)


@pytest.mark.parametrize("count", [0, -1, 2.0, "7", True])
def test_a_count_of_rows_that_is_none_is_refused(count):
    with pytest.raises(ConfigError, match="count must be a whole number of 1 or more, got "):
        splits.iid(count, ["a"])


@pytest.mark.parametrize("per_client", [0, -1, 2.0, "2", True])
def test_a_number_of_shards_that_is_none_is_refused(per_client):
    with pytest.raises(ConfigError, match="per_client must be a whole number of 1 or more, got "):
        splits.shards([0, 1], ["a"], per_client)


def test_fewer_rows_than_clients_or_shards_are_refused():
    with pytest.raises(ConfigError, match="count: 2 rows are too few for 3 clients: each must get one or more"):
        splits.iid(2, named(3))
    for equal_sizes in (False, True):
        with pytest.raises(ConfigError, match="labels: 2 rows are too few for 3 clients"):
            splits.dirichlet([0, 1], named(3), 1.0, equal_sizes=equal_sizes)
    with pytest.raises(ConfigError, match=r"labels: 5 rows are too few for 6 shards \(3 clients, per_client=2\)"):
        splits.shards([0, 1, 0, 1, 0], named(3))
