"""Queries give what numpy gives on the pooled rows, however the rows are spread over clients and batches."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkit.errors import ConfigError
from fedkit.queries import Histogram, LabelCounts, Moments

SCALE = 2**20  # fixed-point steps of the interval
STEP = 0.5 / SCALE  # the most that rounding to the fixed point moves a share of the interval
# var = E[s²] - E[s]² for shares s in [0, 1]: E[s²] moves by one STEP, E[s]² by at most 2 STEP + STEP²
VARIANCE_STEP = 3 * STEP + STEP**2
FLOAT = 1e-9  # what float64 itself may lose for the bounds drawn here, as a share of the interval

Rows = list[tuple[np.ndarray, np.ndarray]]


def tables(low: float = -1e3, high: float = 1e3) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(1, 40), st.integers(1, 3))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=st.floats(low, high)))


@st.composite
def split(draw: st.DrawFn, features: np.ndarray, targets: np.ndarray) -> list[Rows]:
    """The rows of each client, batch by batch; some batches are empty, and clients come in any order."""
    clients = draw(st.lists(st.integers(0, len(features)), max_size=4))
    parts = [batched(draw, features[where], targets[where]) for where in pieces(len(features), clients)]
    return draw(st.permutations(parts))


def batched(draw: st.DrawFn, features: np.ndarray, targets: np.ndarray) -> Rows:
    cuts = draw(st.lists(st.integers(0, len(features)), max_size=3))
    return [(features[where], targets[where]) for where in pieces(len(features), cuts)]


def pieces(count: int, cuts: list[int]) -> list[slice]:
    edges = [0, *sorted(cuts), count]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def asked(query: Moments | Histogram | LabelCounts, clients: list[Rows]) -> np.ndarray:
    return np.sum([query.answer(iter(rows)) for rows in clients], axis=0)


@st.composite
def bounded(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Rows, some of them outside the bounds drawn for their features."""
    table = draw(tables())
    lows = [draw(st.floats(-1e3, 1e3)) for _ in table.T]
    return table, [(low, low + draw(st.floats(1e-2, 1e4))) for low in lows]


# -- moments -----------------------------------------------------------------------------------------------------------


@given(tables(), st.data())
def test_unbounded_moments_are_numpys_over_any_split(table, data):
    clients = data.draw(split(table, table[:, :1]))
    found = Moments().finish(asked(Moments(), clients))
    square = (table**2).mean(axis=0)
    assert found.examples == len(table)
    assert np.all(np.abs(found.mean - table.mean(axis=0)) <= 1e-12 * np.abs(table).max())
    assert np.all(np.abs(found.std**2 - table.var(axis=0)) <= 1e-12 * square)


@given(bounded(), st.data())
def test_bounded_sums_are_the_same_integers_over_any_split_in_any_order(given_rows, data):
    table, bounds = given_rows
    query = Moments(bounds=bounds)
    clients = data.draw(split(table, table[:, :1]))
    total = asked(query, clients)
    assert total.dtype == np.int64
    assert np.array_equal(total, query.answer([(table, table[:, :1])]))
    assert total[0] == len(table)
    assert np.all((total[1:] >= 0) & (total[1:] <= len(table) * SCALE))


@given(bounded(), st.data())
def test_bounded_moments_are_numpys_of_the_clipped_rows_to_the_fixed_point(given_rows, data):
    table, bounds = given_rows
    query = Moments(bounds=bounds)
    found = query.finish(asked(query, data.draw(split(table, table[:, :1]))))
    low, high = np.array(bounds).T
    clipped = np.clip(table, low, high)
    assert found.examples == len(table)
    assert np.all(np.abs(found.mean - clipped.mean(axis=0)) <= (high - low) * (STEP + FLOAT))
    true, off = clipped.std(axis=0) / (high - low), found.std / (high - low)
    near_zero = math.sqrt(2 * VARIANCE_STEP)
    with np.errstate(divide="ignore"):
        allowed = np.where(true > near_zero, VARIANCE_STEP / true, near_zero)
    assert np.all(np.abs(off - true) <= allowed + FLOAT)


@given(st.floats(-1e6, 1e6), st.integers(1, 300))
def test_a_feature_that_never_varies_has_no_deviation(value, count):
    column = np.full((count, 1), value)
    moments = Moments()
    assert moments.finish(moments.answer([(column, column)])).std[0] <= 1e-12
    share = Moments(bounds=[(-2e6, 2e6)])
    assert share.finish(share.answer([(column, column)])).std[0] <= 1e-12


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.just(2)), elements=st.floats(-5, 5, width=32)))
def test_moments_of_any_dtype_are_taken_in_float64(table):
    assert np.array_equal(Moments().answer([(table, table)]), Moments().answer([(table.astype(np.float64), table)]))
    whole = table.astype(np.int8)
    assert np.array_equal(Moments().answer([(whole, whole)])[1:3], whole.astype(np.float64).sum(axis=0))


@pytest.mark.parametrize(
    "bounds",
    [
        [(1.0, 1.0)],
        [(2.0, 1.0)],
        [(0.0, math.nan)],
        [(math.nan, 1.0)],
        [(0.0, 1.0), (3.0, 2.0)],
        [(-math.inf, math.inf)],
        [(0.0, math.inf)],
        [(-1.7e308, 1.7e308)],
        [(0.0,)],
        [(0.0, 1.0, 2.0)],
        [0.0, 1.0],
        "01",
        3,
    ],
)
def test_bad_bounds_are_an_error_that_names_them(bounds):
    with pytest.raises(ConfigError, match="bounds"):
        Moments(bounds=bounds)


def test_another_number_of_bounds_than_of_features_is_an_error_that_names_both():
    with pytest.raises(ValueError, match="1 bounds are declared for 2 features"):
        Moments(bounds=[(0.0, 1.0)]).answer([(np.zeros((3, 2)), np.zeros(3))])


@pytest.mark.parametrize("odd", [math.nan, np.float32("nan")])
def test_a_missing_value_is_an_error_and_no_number(odd):
    with pytest.raises(ValueError, match="NaN"):
        Moments(bounds=[(0.0, 1.0)]).answer([(np.array([[0.5], [odd]]), np.zeros(2))])


def test_infinity_counts_as_the_bound_it_lies_beyond():
    query = Moments(bounds=[(0.0, 1.0)])
    rows = np.array([[math.inf], [-math.inf], [0.5]])
    assert query.finish(query.answer([(rows, rows)])).mean[0] == pytest.approx(0.5)


# -- histograms --------------------------------------------------------------------------------------------------------


@st.composite
def edges(draw: st.DrawFn) -> list[float]:
    found = draw(st.lists(st.floats(-100, 100), min_size=2, max_size=6, unique=True))
    return sorted(found)


@given(tables(-150, 150), edges(), st.data())
def test_a_histogram_is_numpys_with_the_outside_in_the_first_and_last_bin(table, limits, data):
    feature = data.draw(st.integers(0, table.shape[1] - 1))
    query = Histogram(edges=limits, feature=feature)
    total = query.finish(asked(query, data.draw(split(table, table[:, :1]))))
    open_ended = [-np.inf, *limits[1:-1], np.inf]
    assert total.tolist() == np.histogram(table[:, feature], open_ended)[0].tolist()
    assert total.sum() == len(table)
    assert total.dtype == np.int64


@given(edges(), st.sampled_from([np.float64, np.float32]))
def test_a_value_on_an_inner_edge_counts_in_the_bin_above_it(limits, dtype):
    limits = sorted({float(np.float32(edge)) for edge in limits})
    if len(limits) < 2:
        return
    on_edges = np.array(limits, dtype=dtype)[:, None]
    counts = Histogram(edges=limits).answer([(on_edges, on_edges)])
    assert counts.tolist() == [1] * (len(limits) - 2) + [2]


@pytest.mark.parametrize(
    "limits",
    [
        [0.0],
        [],
        [0.0, 0.0],
        [1.0, 0.0],
        [0.0, 2.0, 1.0],
        [0.0, math.nan, 1.0],
        [math.nan, 1.0],
    ],
)
def test_bad_edges_are_an_error_that_names_them(limits):
    with pytest.raises(ConfigError, match="edges"):
        Histogram(edges=limits)


def test_a_missing_value_falls_into_no_bin_and_is_an_error():
    rows = np.array([[0.5], [math.nan]])
    with pytest.raises(ValueError, match="NaN"):
        Histogram(edges=[0.0, 1.0]).answer([(rows, rows)])


# -- labels ------------------------------------------------------------------------------------------------------------


@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 40), st.sampled_from([1])), elements=st.integers(0, 4)),
    st.sampled_from([np.int64, np.uint8, np.float32, np.float64]),
    st.data(),
)
def test_label_counts_are_numpys_over_any_split(labels, dtype, data):
    query = LabelCounts(classes=6)
    clients = data.draw(split(labels.astype(np.float64), labels.astype(dtype)))
    assert query.finish(asked(query, clients)).tolist() == np.bincount(labels[:, 0], minlength=6).tolist()


@pytest.mark.parametrize(
    "label",
    [
        -1,
        3,
        10**12,
        0.5,
        -0.5,
        2.9,
        math.nan,
    ],
)
def test_a_label_that_is_none_of_the_classes_is_an_error(label):
    with pytest.raises(ValueError, match="label"):
        LabelCounts(classes=3).answer([(np.zeros((2, 1)), np.array([0, label]))])
