"""Robust rules are what their papers define, to the bit in any order of arrival, with one block of each in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkit import robust
from fedkit.errors import ConfigError, ManifestMismatch, StorageError
from fedkit.robust import Stack, clipped_mean, coordinate_median, krum_scores, mean_of, norms, trimmed_mean
from fedkit.spool import reopen
from fedkit.weights import Entry, Manifest, Weights

FLOATS = st.floats(-(2.0**60), 2.0**60, width=32)


def manifest(size: int) -> Manifest:
    return Manifest((Entry("w", (size,)),))


def stack(rows: np.ndarray, order: list[int] | None = None) -> Stack:
    """The rows as updates of clients whose names sort as the rows do."""
    made = Stack(manifest(rows.shape[1]))
    for i in range(len(rows)) if order is None else order:
        made.add(f"{i:03}", Weights(made.manifest, rows[i]))
    return made


def tables(least: int = 1, elements: st.SearchStrategy[float] = FLOATS) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(least, 9), st.integers(0, 7))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=elements))


@pytest.fixture(params=[3, 1 << 20], ids=["many blocks", "one block"])
def any_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust, "_BLOCK", (request.param, request.param))


@pytest.mark.usefixtures("any_block")
@given(tables())
def test_the_median_is_that_of_each_coordinate(rows: np.ndarray) -> None:
    expected = np.median(rows.astype(np.float64), axis=0).astype(np.float32)
    assert np.array_equal(coordinate_median(stack(rows)).vector, expected)


@pytest.mark.usefixtures("any_block")
@given(tables(5), st.integers(1, 2))
def test_a_trimmed_mean_leaves_out_the_ends_of_each_coordinate(rows: np.ndarray, trim: int) -> None:
    inner = np.sort(rows.astype(np.float64), axis=0)[trim : len(rows) - trim]
    found = trimmed_mean(stack(rows), trim).vector
    size = np.abs(inner).max(axis=0, initial=0)
    assert np.all(np.abs(found - inner.mean(axis=0)) <= 1e-7 * size + 1e-45)
    assert np.all(found <= inner.max(axis=0))
    assert np.all(found >= inner.min(axis=0))


@given(tables(3), st.data())
def test_what_a_minority_sends_leaves_median_and_trimmed_mean_between_honest_values(
    rows: np.ndarray, data: st.DataObject
) -> None:
    liars = data.draw(st.sets(st.integers(0, len(rows) - 1), max_size=(len(rows) - 1) // 2))
    honest = np.delete(rows, sorted(liars), axis=0)
    for found in (coordinate_median(stack(rows)), trimmed_mean(stack(rows), len(liars))):
        assert np.all(found.vector <= honest.max(axis=0))
        assert np.all(found.vector >= honest.min(axis=0))


@pytest.mark.usefixtures("any_block")
@given(tables(5), st.integers(1, 3))
def test_a_krum_score_is_the_sum_of_squared_distances_to_the_nearest_others(rows: np.ndarray, byzantine: int) -> None:
    if len(rows) < 2 * byzantine + 3:
        with pytest.raises(ConfigError, match=f"at least {2 * byzantine + 3} updates, and there are {len(rows)}"):
            krum_scores(stack(rows), byzantine)
        return
    wide, expected = rows.astype(np.float64), []
    for i in range(len(rows)):
        others = sorted(float(((wide[i] - wide[j]) ** 2).sum()) for j in range(len(rows)) if j != i)
        expected.append(sum(others[: len(rows) - byzantine - 2]))
    np.testing.assert_allclose(krum_scores(stack(rows), byzantine), expected, rtol=1e-12)


@pytest.mark.usefixtures("any_block")
@given(tables(elements=st.floats(-1e6, 1e6, width=32)), st.floats(1e-3, 1e3))
def test_a_clipped_mean_is_that_of_shortened_updates_and_no_longer_than_the_bound(
    rows: np.ndarray, bound: float
) -> None:
    wide = rows.astype(np.float64)
    lengths = np.sqrt((wide**2).sum(axis=1))
    np.testing.assert_allclose(norms(stack(rows)), lengths, rtol=1e-12)
    scales = np.minimum(1, bound / np.maximum(lengths, 1e-300))
    found = clipped_mean(stack(rows), bound)
    np.testing.assert_allclose(found.vector, (scales[:, None] * wide).mean(axis=0), rtol=1e-5, atol=1e-6 * bound)
    assert found.norm() <= bound * (1 + 1e-6)


@given(tables(), st.data())
def test_a_mean_of_some_clients_is_theirs(rows: np.ndarray, data: st.DataObject) -> None:
    chosen = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    found = mean_of(stack(rows), [f"{i:03}" for i in chosen]).vector
    size = np.abs(rows).max(axis=0, initial=0)
    assert np.all(np.abs(found - rows[chosen].astype(np.float64).mean(axis=0)) <= 1e-7 * size + 1e-45)


RULES: dict[str, Callable[[Stack], object]] = {
    "median": lambda made: coordinate_median(made).vector.tobytes(),
    "trimmed mean": lambda made: trimmed_mean(made, 2).vector.tobytes(),
    "clipped mean": lambda made: clipped_mean(made, 10.0).vector.tobytes(),
    "mean": lambda made: mean_of(made, made.clients).vector.tobytes(),
    "Krum": lambda made: krum_scores(made, 1).tobytes(),
}


@pytest.mark.parametrize("name", RULES)
@given(tables(5, st.floats(-1e6, 1e6, width=32)), st.randoms())
def test_no_order_of_arrival_changes_a_bit(name: str, rows: np.ndarray, draw) -> None:
    order = list(range(len(rows)))
    draw.shuffle(order)
    assert RULES[name](stack(rows, order)) == RULES[name](stack(rows))


@pytest.mark.parametrize("name", RULES)
def test_updates_in_files_and_in_memory_give_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(1).standard_normal((7, 10_000), dtype=np.float32)
    spooled, filed, expected = Stack(manifest(10_000)), Stack(manifest(10_000)), RULES[name](stack(rows))
    for i, row in enumerate(rows):
        path = tmp_path / str(i)
        path.write_bytes(row.tobytes())
        found = reopen(path, spooled.manifest, {})
        assert found is not None
        spooled.add(f"{i:03}", found[0])
        assert "vector" not in vars(found[0])
    monkeypatch.setattr(robust, "_IN_MEMORY", 25_000)
    with filed:
        for i, row in enumerate(rows):
            filed.add(f"{i:03}", Weights(filed.manifest, row))
        assert RULES[name](filed) == RULES[name](spooled) == expected


CLIENTS, SIZE = 24, 1 << 20
RULES_IN_MEMORY: dict[str, Callable[[Stack], object]] = {
    "median": coordinate_median,
    "trimmed mean": lambda made: trimmed_mean(made, 5),
    "clipped mean": lambda made: clipped_mean(made, 1.0),
    "Krum": lambda made: (krum_scores(made, 10), mean_of(made, made.clients[:1])),
}


@pytest.mark.parametrize("name", RULES_IN_MEMORY)
def test_the_memory_of_a_rule_is_a_block_of_each_update_and_not_the_updates(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 updates of 4 MB: a result, and blocks, copies and sums of them for two threads, and nothing like 96 MB."""
    monkeypatch.setattr(robust, "_MATRIX", 1 << 17)
    monkeypatch.setattr(robust, "_THREADS", 2)
    monkeypatch.setattr(robust, "_IN_MEMORY", 0)
    row = np.random.default_rng(1).standard_normal(SIZE, dtype=np.float32)
    with Stack(manifest(SIZE)) as made:
        tracemalloc.start()
        for i in range(CLIENTS):
            made.add(f"{i:03}", Weights(made.manifest, row * np.float32(i)))
        RULES_IN_MEMORY[name](made)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 4 * SIZE + 2 * 24 * (1 << 17) + (1 << 20)


def test_a_stack_takes_one_update_a_client_of_one_model() -> None:
    made = stack(np.ones((2, 3), np.float32))
    with pytest.raises(ConfigError, match="000 has an update"):
        made.add("000", Weights.zeros(made.manifest))
    with pytest.raises(ManifestMismatch, match="the update of ann"):
        made.add("ann", Weights.zeros(manifest(4)))
    assert made.clients == ("000", "001")


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        (coordinate_median, 1),
        (lambda made: trimmed_mean(made, 2), 5),
        (lambda made: clipped_mean(made, 1.0), 1),
        (lambda made: krum_scores(made, 1), 5),
    ],
)
def test_too_few_updates_are_refused_with_both_numbers(rule: Callable[[Stack], object], least: int) -> None:
    with pytest.raises(ConfigError, match=f"needs at least {least} updates, and there are {least - 1}"):
        rule(stack(np.ones((least - 1, 2), np.float32)))


def test_a_mean_of_somebody_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="different clients of the stack's 2"):
        mean_of(stack(np.ones((2, 3), np.float32)), ["000", "dan"])


def test_a_full_disk_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust, "_IN_MEMORY", 0)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(robust.tempfile, "TemporaryFile", full)
    with pytest.raises(StorageError, match="No space left on device; free space, or set TMPDIR"):
        stack(np.ones((1, 3), np.float32))
