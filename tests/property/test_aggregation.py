"""Means and sums have the same bits in whatever order answers arrive, and one odd answer costs only itself."""

from __future__ import annotations

import gc
import os
import resource
import tracemalloc
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkit.aggregation import _THREADS, Fold, KeepFold, Mean, MeanFold, SumFold
from fedkit.errors import Reason
from fedkit.spool import reopen
from fedkit.weights import Entry, Manifest, Weights
from fedkit.work import MetricSums, Summary, Update

MANIFEST = Manifest((Entry("w", (2, 2)), Entry("b", (3,), trainable=False)))
SIZE = MANIFEST.size
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
COUNTS = st.integers(1, 1 << 40)
NAMES = st.lists(st.text("abcxyz", min_size=1, max_size=3), min_size=1, max_size=6, unique=True)
WEIGHTINGS = st.sampled_from(["examples", "uniform"])

Answers = dict[str, Update | None]


@st.composite
def updates(draw: st.DrawFn) -> Update:
    vector = draw(hnp.arrays(np.float32, SIZE, elements=FLOATS))
    extra = {"control": draw(hnp.arrays(np.float32, 2, elements=FLOATS)), "tau": np.ones(1, dtype=np.float32)}
    loss = draw(st.none() | st.floats(0, 1e6))
    return Update(Weights(MANIFEST, vector), draw(COUNTS), loss, extra)


@st.composite
def cohorts(draw: st.DrawFn) -> Answers:
    """The answer of each client of a cohort, None for those who give none."""
    return {name: draw(st.none() | updates()) for name in draw(NAMES)}


def mean_of(answers: Answers, order: Sequence[str], weighting: str = "examples", cohort: Sequence[str] = ()) -> Mean:
    fold = MeanFold(cohort or list(answers), MANIFEST, weighting)
    for client in order:
        fold.add(client, answers[client])
    return fold.result()


def bits(mean: Mean) -> tuple[object, ...]:
    extra = {name: vector.tobytes() for name, vector in sorted(mean.extra.items())}
    loss = None if mean.loss is None else np.float64(mean.loss).tobytes()
    return mean.update.vector.tobytes(), mean.examples, mean.clients, loss, extra


def there(answers: Answers) -> dict[str, Update]:
    return {name: answer for name, answer in sorted(answers.items()) if answer is not None}


# -- means -------------------------------------------------------------------------------------------------------------


@given(cohorts(), WEIGHTINGS, st.data())
def test_a_mean_has_the_same_bits_in_every_order_of_arrival(answers, weighting, data):
    order = data.draw(st.permutations(list(answers)))
    assert bits(mean_of(answers, order, weighting)) == bits(mean_of(answers, sorted(answers), weighting))


@given(cohorts(), WEIGHTINGS, st.data())
def test_a_client_that_is_said_to_be_absent_one_that_never_answers_and_one_never_asked_are_the_same(
    answers, weighting, data
):
    answering = data.draw(st.permutations(list(there(answers))))
    silent = mean_of(answers, answering, weighting)
    assert bits(silent) == bits(mean_of(answers, data.draw(st.permutations(list(answers))), weighting))
    if answering:
        assert bits(silent) == bits(mean_of(answers, answering, weighting, cohort=answering))


@given(cohorts(), WEIGHTINGS)
def test_a_mean_is_the_weighted_sum_in_float64_by_name_rounded_once(answers, weighting):
    mean, given_answers = mean_of(answers, list(answers), weighting), there(answers)
    share = {name: u.examples if weighting == "examples" else 1 for name, u in given_answers.items()}
    total = np.zeros(SIZE)
    control = np.zeros(2)
    for name, update in given_answers.items():
        total = total + update.weights.vector.astype(np.float64) * np.float64(share[name])
        control = control + update.extra["control"].astype(np.float64) * np.float64(share[name])
    divisor = sum(share.values()) or 1
    assert mean.update.vector.tobytes() == (total / divisor).astype(np.float32).tobytes()
    assert mean.clients == tuple(given_answers)
    assert mean.examples == sum(update.examples for update in given_answers.values())
    if given_answers:
        assert mean.extra["control"].tobytes() == (control / divisor).astype(np.float32).tobytes()


@given(cohorts(), WEIGHTINGS)
def test_a_mean_lies_between_the_smallest_and_the_largest_update(answers, weighting):
    given_answers = there(answers)
    mean = mean_of(answers, list(answers), weighting)
    if not given_answers:
        assert not mean.update.vector.any()
        return
    stack = np.stack([update.weights.vector for update in given_answers.values()]).astype(np.float64)
    slack = 1e-6 * np.abs(stack).max(axis=0)
    assert np.all(mean.update.vector >= stack.min(axis=0) - slack)
    assert np.all(mean.update.vector <= stack.max(axis=0) + slack)


@given(cohorts())
def test_the_mean_loss_is_by_examples_over_those_who_report_one(answers):
    told = [(u.loss, u.examples) for u in there(answers).values() if u.loss is not None]
    mean = mean_of(answers, list(answers), "uniform")
    if not told:
        assert mean.loss is None
        return
    assert mean.loss == pytest.approx(sum(loss * n for loss, n in told) / sum(n for _, n in told), rel=1e-9)


def test_a_count_that_float32_cannot_hold_weighs_what_it_says():
    many = 1 << 24
    up, down = Weights(MANIFEST, np.ones(SIZE)), Weights(MANIFEST, -np.ones(SIZE))
    mean = mean_of({"a": Update(up, many + 1), "b": Update(down, many)}, ["a", "b"])
    assert mean.update.vector.tolist() == np.full(SIZE, 1 / (2 * many + 1), dtype=np.float32).tolist()


def test_a_product_that_float32_cannot_hold_does_not_overflow():
    large = Update(Weights(MANIFEST, np.full(SIZE, 1e30)), 10**12)
    assert mean_of({"a": large}, ["a"]).update.vector.tolist() == large.weights.vector.tolist()


def test_the_gradient_is_the_update_under_another_name():
    one = Update(Weights(MANIFEST, np.ones(SIZE)), 3)
    mean = mean_of({"a": one}, ["a"])
    assert mean.gradient is mean.update


# -- updates in files --------------------------------------------------------------------------------------------------


def in_file(folder: Path, name: str, update: Update) -> Update:
    """The same update as its upload leaves it: weights and extras one behind the other in a file."""
    path = folder / f"{name}.update"
    path.write_bytes(b"".join(v.tobytes() for v in (update.weights.vector, *update.extra.values())))
    found = reopen(path, update.weights.manifest, update.sizes)
    assert found is not None
    return Update(found[0], update.examples, update.loss, found[1])


def large(size: int, clients: int, extra: int = 0) -> tuple[Manifest, dict[str, Update]]:
    manifest, source = Manifest((Entry("w", (size,)),)), np.random.default_rng(size)

    def one() -> Update:
        vectors = {"control": source.standard_normal(extra).astype(np.float32)} if extra else {}
        weights = Weights(manifest, source.standard_normal(size).astype(np.float32))
        return Update(weights, int(source.integers(1, 1 << 40)), None, vectors)

    return manifest, {f"c{i:03}": one() for i in range(clients)}


def folded(manifest: Manifest, answers: dict[str, Update], weighting: str = "examples") -> Mean:
    fold = MeanFold(list(answers), manifest, weighting)
    for client, answer in answers.items():
        fold.add(client, answer)
    return fold.result()


@given(cohorts(), WEIGHTINGS, st.data())
def test_a_mean_has_the_same_bits_whichever_updates_lie_in_files(tmp_path_factory, answers, weighting, data):
    folder = tmp_path_factory.mktemp("files")
    some = data.draw(st.sets(st.sampled_from(sorted(answers))))
    stored: Answers = {
        name: in_file(folder, str(i), answer) if answer is not None and name in some else answer
        for i, (name, answer) in enumerate(answers.items())
    }
    order = data.draw(st.permutations(list(answers)))
    assert bits(mean_of(stored, order, weighting)) == bits(mean_of(answers, list(answers), weighting))


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("size", [1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, (1 << 18) - 1, (1 << 18) + 1, 600_011])
def test_a_mean_of_any_size_is_numpys_bit_by_bit_in_files_and_in_memory(tmp_path, size, weighting):
    manifest, answers = large(size, 4, extra=size)
    vectors, control, divisor = np.zeros(size), np.zeros(size), 0
    for answer in answers.values():
        weight = answer.examples if weighting == "examples" else 1
        vectors = vectors + answer.weights.vector.astype(np.float64) * weight
        control = control + answer.extra["control"].astype(np.float64) * weight
        divisor += weight
    in_files = {name: in_file(tmp_path, name, answer) for name, answer in answers.items()}
    mixed = {**in_files, "c000": answers["c000"], "c003": answers["c003"]}
    for some in (answers, in_files, mixed):
        mean = folded(manifest, some, weighting)
        assert mean.update.vector.tobytes() == (vectors / divisor).astype(np.float32).tobytes()
        assert mean.extra["control"].tobytes() == (control / divisor).astype(np.float32).tobytes()


def test_a_fold_of_more_files_than_a_process_may_open_opens_fewer_and_leaves_none_open(tmp_path):
    manifest, answers = large(3, 400)
    in_files = {name: in_file(tmp_path, name, answer) for name, answer in answers.items()}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + 270, hard))
    try:
        mean = folded(manifest, in_files)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert bits(mean) == bits(folded(manifest, answers))
    assert len(os.listdir("/proc/self/fd")) == there


@pytest.mark.parametrize("clients", [2, 20])
def test_a_fold_of_files_takes_the_memory_of_its_result_and_a_little_whoever_sends_how_much(tmp_path, clients):
    size = 1 << 20
    manifest, answers = large(size, 1, extra=size)
    one = in_file(tmp_path, "one", answers.popitem()[1])
    gc.collect()
    tracemalloc.start()
    mean = folded(manifest, {f"c{i}": one for i in range(clients)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mean.update.vector.nbytes + mean.extra["control"].nbytes <= peak < 8 * size + ((1 + _THREADS) << 22)


def test_a_file_that_is_gone_ends_the_fold_and_leaves_no_other_open(tmp_path):
    manifest, answers = large(10, 3)
    in_files = {name: in_file(tmp_path, name, answer) for name, answer in answers.items()}
    (tmp_path / "c001.update").unlink()
    there = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        folded(manifest, in_files)
    assert len(os.listdir("/proc/self/fd")) == there


# -- odd answers -------------------------------------------------------------------------------------------------------


def odd_extras(update: Update) -> st.SearchStrategy[dict[str, np.ndarray]]:
    shorter = {**update.extra, "control": np.ones(1, dtype=np.float32)}
    more = {**update.extra, "backdoor": np.ones(2, dtype=np.float32)}
    less = {"tau": update.extra["tau"]}
    return st.sampled_from([shorter, more, less, {}])


@given(cohorts(), updates(), WEIGHTINGS, st.data())
def test_other_extra_vectors_are_refused_and_the_rest_is_as_if_that_client_had_not_answered(
    answers, update, weighting, data
):
    answers = {**answers, "0": update, "zz": Update(update.weights, 5, 1.0, data.draw(odd_extras(update)))}
    fold = MeanFold(list(answers), MANIFEST, weighting)
    for client in data.draw(st.permutations(list(answers))):
        fold.add(client, answers[client])
    assert bits(fold.result()) == bits(mean_of({**answers, "zz": None}, list(answers), weighting))
    assert [(client, refused.reason) for client, refused in fold.rejected.items()] == [("zz", Reason.SHAPE)]


@pytest.mark.parametrize("odd", ["0", "bb", "z"])
def test_one_odd_client_does_not_cost_the_others_theirs_wherever_its_name_sorts(odd):
    control = np.ones(2, dtype=np.float32)
    answers: Answers = {
        name: Update(Weights(MANIFEST, np.ones(SIZE)), 3, extra={"control": control}) for name in ("a", "b", "c")
    }
    answers[odd] = Update(Weights(MANIFEST, np.ones(SIZE)), 5, extra={"control": control, "more": control})
    assert bits(mean_of(answers, list(answers))) == bits(mean_of({**answers, odd: None}, list(answers)))


# -- sums --------------------------------------------------------------------------------------------------------------


def sums(kind: str) -> st.SearchStrategy[MetricSums | Summary]:
    if kind == "metrics":
        vectors = hnp.arrays(np.float64, 4, elements=st.floats(-1e6, 1e6))
        return st.builds(MetricSums, vectors, st.integers(0, 1000))
    vectors = hnp.arrays(np.int64, 4, elements=st.integers(-(2**50), 2**50))
    return st.builds(Summary, vectors, st.integers(0, 1000))


def total_of(cohort: Sequence[str], answers: dict[str, object], order: Sequence[str]) -> SumFold:
    fold = SumFold(cohort)
    for client in order:
        fold.add(client, answers[client])
    return fold


@given(NAMES, st.sampled_from(["metrics", "summary"]), st.data())
def test_a_sum_has_the_same_bits_in_every_order_and_is_numpys_by_name(names, kind, data):
    answers = {name: data.draw(st.none() | sums(kind)) for name in names}
    total = total_of(names, answers, data.draw(st.permutations(names))).result()
    given_answers = [answers[name] for name in sorted(names) if answers[name] is not None]
    if not given_answers:
        assert total is None
        return
    expected = given_answers[0].vector.copy()
    for answer in given_answers[1:]:
        expected = expected + answer.vector
    assert total.vector.tobytes() == expected.tobytes()
    assert total.vector.dtype == given_answers[0].vector.dtype
    assert total.examples == sum(answer.examples for answer in given_answers)
    assert total.clients == tuple(name for name in sorted(names) if answers[name] is not None)


@pytest.mark.parametrize("odd", [np.ones(3), np.ones(4, dtype=np.int64), np.ones((2, 2)), np.ones(1)])
def test_sums_of_another_length_or_kind_are_refused_and_the_rest_is_added(odd):
    answers = {name: MetricSums(np.arange(4.0), 2) for name in "abc"} | {"d": MetricSums(odd, 2)}
    fold = total_of("abcd", answers, "dcba")
    assert fold.result().vector.tolist() == [0, 3, 6, 9]
    assert fold.result().clients == ("a", "b", "c")
    assert fold.rejected["d"].reason is Reason.SHAPE


def test_one_odd_sum_does_not_cost_the_others_theirs_wherever_its_name_sorts():
    answers = {name: MetricSums(np.arange(4.0), 2) for name in "bcd"} | {"a": MetricSums(np.ones(3), 2)}
    fold = SumFold("abcd", size=4)
    for name in "abcd":
        fold.add(name, answers[name])
    assert fold.result().clients == ("b", "c", "d")
    assert fold.rejected["a"].reason is Reason.SHAPE


def test_the_answers_themselves_are_left_as_they_were():
    answers = {name: MetricSums(np.arange(4.0), 2) for name in "ab"}
    total_of("ab", answers, "ab").result()
    assert answers["a"].vector.tolist() == [0, 1, 2, 3]


# -- memory ------------------------------------------------------------------------------------------------------------


def held(fold: Fold[Update], clients: str) -> int:
    """How many of the answers, added in this order, are still in memory."""
    alive = []
    for client in clients:
        answer = Update(Weights(MANIFEST, np.ones(SIZE)), 1)
        alive.append(weakref.ref(answer.weights.vector))
        fold.add(client, answer)
        del answer
    gc.collect()
    return sum(reference() is not None for reference in alive)


def test_an_answer_that_comes_in_order_is_added_and_forgotten():
    assert held(MeanFold("abcdef", MANIFEST, "examples"), "abcdef") == 0


def test_an_answer_ahead_of_its_turn_waits_until_the_others_are_there_or_said_to_be_absent():
    fold = MeanFold("abcd", MANIFEST, "examples")
    assert held(fold, "cd") == 2
    assert held(fold, "a") == 0
    fold.add("b", None)
    assert not fold._early
    assert fold.result().clients == ("a", "c", "d")


def test_the_answer_of_a_client_outside_the_cohort_is_neither_added_nor_kept():
    fold = MeanFold("ab", MANIFEST, "examples")
    assert held(fold, "xab") == 0
    assert fold.result().clients == ("a", "b")


def test_a_second_answer_of_one_client_is_neither_added_nor_kept():
    fold = MeanFold("ab", MANIFEST, "examples")
    assert held(fold, "aab") == 0
    assert fold.result().examples == 2


def test_a_hop_keeps_its_answer_as_it_is():
    fold = KeepFold(["a"])
    answer = Update(Weights(MANIFEST, np.ones(SIZE)), 1)
    fold.add("a", answer)
    assert fold.result() is answer
    nobody = KeepFold(["a"])
    nobody.add("a", None)
    assert nobody.result() is None
