"""Ranges as sums: what clients answer adds up to what all rows together would have given, within the public bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedkit.config import DP
from fedkit.errors import ConfigError, Reason, Refused
from fedkit.privacy.plan import planned
from fedkit.ranges import BUCKETS, SCALE, Ranges, noised
from fedkit.rounds.assignment import Private
from fedkit.work import Fit, Summarize

GRAPH = "0" * 64
BOUNDS = [4.0, 0.5, 100.0]


def extremes(rows: int) -> st.SearchStrategy[np.ndarray]:
    values = arrays.arrays(np.float64, (rows, len(BOUNDS), 2), elements=st.floats(-200, 200, width=32))
    return values.map(lambda array: np.sort(array, axis=2))


def clipped_to_bounds(array: np.ndarray) -> np.ndarray:
    return np.clip(array, -np.array(BOUNDS)[:, None], np.array(BOUNDS)[:, None])


@given(st.lists(st.integers(1, 5).flatmap(extremes), min_size=1, max_size=5))
def test_the_mean_of_ranges_is_the_mean_over_clients_and_always_holds_zero(clients: list[np.ndarray]) -> None:
    query = Ranges(graph=GRAPH, bounds=BOUNDS)
    total = sum(query.answer(one) for one in clients)
    assert total.dtype == np.int64
    assert len(total) == query.size
    each = [clipped_to_bounds(np.stack([one[..., 0].min(0), one[..., 1].max(0)], 1)) for one in clients]
    wanted = np.mean(each, axis=0)
    wanted = np.stack([np.minimum(wanted[:, 0], 0), np.maximum(wanted[:, 1], 0)], 1)
    assert np.abs(query.finish(total) - wanted).max(axis=1) == pytest.approx(0.0, abs=1.01 * max(BOUNDS) / SCALE)


@given(st.lists(st.integers(1, 40).flatmap(extremes), min_size=1, max_size=4))
def test_a_clipped_range_leaves_out_a_row_and_no_more_than_a_thousandth(clients: list[np.ndarray]) -> None:
    query = Ranges(graph=GRAPH, bounds=BOUNDS, method="clipped")
    total = sum(query.answer(one) for one in clients)
    rows = np.concatenate(clients)
    assert total[0] == len(rows)
    assert len(total) == query.size == 1 + 2 * BUCKETS * len(BOUNDS)
    found, kept = query.finish(total), clipped_to_bounds(rows)
    beyond = (kept[..., 1] > found[:, 1] * (1 + 1e-9)).sum(0), (kept[..., 0] < found[:, 0] * (1 + 1e-9)).sum(0)
    assert max(map(max, beyond)) <= max(len(rows) // 1000, 1)
    narrower = found * 2 ** (-1 / 4)  # by a bucket, and more would be left out: no range is wider than it has to be
    for side, sign in ((1, 1), (0, -1)):
        left = (sign * kept[..., side] > sign * narrower[:, side]).sum(0)
        smallest = np.isclose(np.abs(found[:, side]), np.array(BOUNDS) * 2 ** (-(BUCKETS - 1) / 4))
        assert np.all((left > max(len(rows) // 1000, 1)) | smallest)


@given(st.integers(2, 12).flatmap(extremes), st.integers(0, 11))
def test_one_row_moves_the_answer_per_row_by_its_sensitivity_at_most(rows: np.ndarray, which: int) -> None:
    query = Ranges(graph=GRAPH, bounds=BOUNDS, per_row=True)
    without = np.delete(rows, which % len(rows), axis=0)
    units = np.concatenate([[1.0], np.full(2 * len(BOUNDS), float(SCALE))])
    moved = (query.answer(rows) - query.answer(without)) / units
    assert np.linalg.norm(moved) <= query.sensitivity + 1e-9


def test_noise_of_any_size_leaves_ranges_that_can_be_used() -> None:
    query = Ranges(graph=GRAPH, bounds=BOUNDS, per_row=True)
    answer = query.answer(np.tile([-1.0, 1.0], (20, 3, 1)))
    for strange in (np.full(query.size, 1e4), np.full(query.size, -1e4)):
        found = query.finish(noised(answer, strange), noised=True)
        assert np.isfinite(found).all()
        assert (found[:, 0] <= 0).all()
        assert (found[:, 1] >= 0).all()
    exact = query.finish(noised(answer, np.zeros(query.size)), noised=True)
    assert exact[2] == pytest.approx([-1.5, 1.5], rel=1e-4)  # one and a half times the mean


def test_a_row_that_makes_nan_is_no_error_where_that_would_tell_of_it() -> None:
    query = Ranges(graph=GRAPH, bounds=BOUNDS, per_row=True)
    rows = np.tile([-1.0, 1.0], (20, 3, 1))
    rows[7] = np.nan
    moved = query.answer(rows) - query.answer(np.delete(rows, 7, axis=0))
    assert moved.tolist() == [1, *[SCALE // 2] * 6]


def test_what_makes_no_sense_is_refused() -> None:
    query = Ranges(graph=GRAPH, bounds=BOUNDS)
    with pytest.raises(ValueError, match="NaN"):
        query.answer(np.full((1, 3, 2), np.nan))
    with pytest.raises(ValueError, match="3 bounds are given for 2 tensors"):
        query.answer(np.zeros((1, 2, 2)))
    with pytest.raises(ConfigError, match="method"):
        Ranges(graph=GRAPH, bounds=BOUNDS, method="clipped", per_row=True)
    with pytest.raises(ConfigError, match="rows"):
        Ranges(graph=GRAPH, bounds=BOUNDS, rows=1)
    with pytest.raises(ConfigError, match="graph"):
        Ranges(graph="../../x", bounds=BOUNDS)


def test_private_ranges_take_all_of_a_run_that_trains_nothing_and_a_sixth_of_another() -> None:
    dp, per_row = DP(epsilon=1.0, delta=1e-5), Summarize(query=Ranges(graph=GRAPH, bounds=BOUNDS, per_row=True))
    alone = planned(Private(dp, visits=0, questions=1), per_row, 500)
    before = planned(Private(dp, visits=10, questions=1), per_row, 500)
    with pytest.raises(Refused, match="train nothing"):
        planned(Private(dp, 0, 1), Fit(epochs=1), 500)
    assert alone.cost.noise_multiplier < before.cost.noise_multiplier / 4
    with pytest.raises(Refused) as refused:
        planned(Private(dp, 0, 1), Summarize(query=Ranges(graph=GRAPH, bounds=BOUNDS)), 500)
    assert refused.value.reason is Reason.PRIVACY
