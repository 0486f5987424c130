"""Flower's engine as far as it goes without Flower: what is refused, and what its messages are made of."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedkit
from fedkit.engines import flower
from fedkit.engines.flower.config import config_from, config_to
from fedkit.engines.flower.node import name_of
from fedkit.errors import ConfigError, IncompatibleStrategy, PayloadError, Reason, Refused, TaskError
from fedkit.protos import whole
from fedkit.queries import RowCount
from fedkit.rounds.assignment import Assignment, Clip, Parcel, Private, assignment_id
from fedkit.rounds.journal import MemoryJournal
from fedkit.strategies import CyclicWeightTransfer, FedAvg
from fedkit.testing import toy_task
from fedkit.weights import Weights
from fedkit.work import Evaluate, Fit, Gradient, MetricSums, Reply, Summarize, Summary, Update

CLIENTS = ["ann", "bob", "cyd"]
MODEL = Weights.from_module(toy_task().build(0))
KEY = assignment_id("question", "ann", 0)


@pytest.fixture
def without_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    for name in [name for name in sys.modules if name.startswith("flwr.")]:
        monkeypatch.delitem(sys.modules, name)


def made() -> SimpleNamespace:
    return SimpleNamespace(min_available_nodes=2)


def client_task(**about: object) -> fedkit.Task:
    toy = toy_task()
    return flower.client_task(lambda context: None, name="toy", model=toy.model, data=toy.data, **about)


@pytest.mark.parametrize(
    "use",
    [
        lambda: flower.run(toy_task(), FedAvg(), clients=CLIENTS),
        lambda: flower.apps(toy_task(), FedAvg(), clients=CLIENTS, on_result=print),
        lambda: fedkit.simulate(toy_task(), flower.FlowerStrategy(make=made), clients=CLIENTS),
        lambda: client_task(),
    ],
    ids=["run", "apps", "FlowerStrategy", "client_task"],
)
@pytest.mark.usefixtures("without_flower")
def test_a_missing_flower_is_an_error_that_says_how_to_get_it(use: object) -> None:
    with pytest.raises(ConfigError, match=r"pip install fedkit\[flower\]"):
        use()


def test_naming_the_engine_loads_neither_flower_nor_ray() -> None:
    code = "import sys, fedkit.engines.flower; print(*{name.partition('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"flwr", "ray"} & set(found.stdout.split())


@pytest.mark.parametrize(
    ("about", "error", "sentence"),
    [
        ({"privacy": fedkit.Privacy(aggregation="masked")}, IncompatibleStrategy, "aggregation masked and Flower's"),
        ({"privacy": fedkit.Privacy(aggregation="bfv")}, IncompatibleStrategy, "aggregation bfv and Flower's"),
        ({"privacy": fedkit.Privacy(aggregation="ckks")}, IncompatibleStrategy, "aggregation ckks and Flower's"),
        ({"privacy": fedkit.Privacy(sealed=True)}, IncompatibleStrategy, "sealed hops and Flower's"),
        (
            {"privacy": fedkit.Privacy(dp=fedkit.DP(epsilon=1.0, delta=1e-4, noise="shared"))},
            IncompatibleStrategy,
            "noise='shared' and Flower's",
        ),
        ({"journal": MemoryJournal()}, ConfigError, "durable rounds"),
        ({"seed": -1}, ConfigError, "seed travels as 64 bits"),
        ({"workers": 0}, ConfigError, "workers must be 1 or more"),
        ({"clients": ["ann", "ann"]}, ConfigError, "one occurs twice"),
    ],
)
@pytest.mark.usefixtures("without_flower")
def test_what_the_two_cannot_share_is_refused_in_a_sentence_before_anything_else(
    about: dict[str, object], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        flower.run(toy_task(), CyclicWeightTransfer(), **{"clients": CLIENTS, **about})


@pytest.mark.parametrize(
    ("privacy", "sentence"),
    [
        (fedkit.Privacy(aggregation="masked"), "masked and FlowerStrategy: it needs single updates"),
        (fedkit.Privacy(sealed=True), "sealed and FlowerStrategy"),
        (fedkit.Privacy(dp=fedkit.DP(epsilon=1.0, delta=1e-4, level="client")), "level client and FlowerStrategy"),
    ],
)
def test_a_flower_strategy_is_refused_where_single_updates_are_hidden(privacy: fedkit.Privacy, sentence: str) -> None:
    with pytest.raises(IncompatibleStrategy, match=sentence):
        fedkit.simulate(toy_task(), flower.FlowerStrategy(make=made), clients=CLIENTS, privacy=privacy)


def test_a_flower_strategy_says_what_it_was_made_by_and_needs_something_to_make() -> None:
    assert flower.FlowerStrategy(make=made).to_dict()["make"].endswith("test_flower.made")
    with pytest.raises(ConfigError, match="needs make"):
        fedkit.simulate(toy_task(), flower.FlowerStrategy(), clients=CLIENTS)


def test_a_client_task_takes_no_layer_before_its_model() -> None:
    with pytest.raises(TaskError, match="prepare puts a layer before the model"):
        client_task(prepare=fedkit.Standardize())


# -- who a node is -----------------------------------------------------------------------------------------------------


def test_a_node_is_the_client_that_its_configuration_names() -> None:
    assert name_of({"client": "bob"}, tuple(CLIENTS)) == "bob"
    assert name_of({"partition-id": 2, "num-partitions": 3}, tuple(CLIENTS)) == "cyd"


@pytest.mark.parametrize("config", [{}, {"client": "eve"}, {"partition-id": 3}, {"partition-id": -1}, {"client": 1}])
def test_a_node_that_is_no_client_says_how_to_start_one(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="--node-config"):
        name_of(config, tuple(CLIENTS))


# -- config ------------------------------------------------------------------------------------------------------------

scalars = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)


@given(st.dictionaries(st.text(max_size=20), scalars | st.lists(scalars, max_size=4), max_size=8))
def test_a_config_arrives_as_it_was_sent(config: dict[str, object]) -> None:
    found = config_from(config_to(config))
    assert found == config
    assert [type(value) for value in found.values()] == [type(config[name]) for name in found]


@pytest.mark.parametrize("config", [{"key": b"bytes"}, {"key": object()}, {"long": "x" * (1 << 16)}])
def test_a_config_that_does_not_travel_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(IncompatibleStrategy, match="the config that goes to clients"):
        config_to(config)


@given(st.lists(st.floats(width=32), max_size=30) | st.binary(max_size=60).map(list))
def test_a_vector_that_is_no_config_is_refused(elements: list[float]) -> None:
    try:
        found = config_from(np.array(elements, dtype=np.float32))
    except PayloadError:
        return
    assert np.array_equal(config_to(found), np.array(elements, dtype=np.float32)) or isinstance(found, dict)


@pytest.mark.parametrize("text", ["[]", "1", '{"a": {}}', '{"a": null}', '{"a": [[1]]}', "[" * 60_000, "{"])
def test_json_that_is_no_flat_object_is_no_config(text: str) -> None:
    with pytest.raises(PayloadError, match="not a config"):
        config_from(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.float32))


# -- whole messages ----------------------------------------------------------------------------------------------------


def assignment(work: object, returns: str, **about: object) -> Assignment:
    return Assignment(KEY, "toy", 5, 3, "ann", work, returns, **about)


def asked(one: Assignment, parcel: Parcel, settled: whole.Settled = whole.Settled()) -> tuple[bytes, np.ndarray]:
    return whole.asked_to(one, parcel, settled, task="toy", strategy="FedAvg", holds_out_valid=True)


QUESTIONS = [
    (assignment(Fit(steps=3, lr=0.1), "update"), Parcel(MODEL, {"b": np.ones(3, "f4"), "a": np.zeros(2, "f4")})),
    (assignment(Fit(epochs=2, batch_size="all"), "weights"), Parcel(MODEL)),
    (assignment(Gradient(), "update", clip=Clip(2.0)), Parcel(MODEL)),
    (assignment(Fit(), "update", private=Private(fedkit.DP(epsilon=1.0, delta=1e-4), 4)), Parcel(MODEL)),
    (assignment(Evaluate(split="test"), "sums"), Parcel(MODEL)),
    (assignment(Summarize(query=RowCount()), "sums"), Parcel(MODEL.with_vector(MODEL.vector))),
]


@pytest.mark.parametrize(("one", "parcel"), QUESTIONS, ids=lambda value: getattr(value, "returns", ""))
def test_a_question_arrives_as_it_was_asked(one: Assignment, parcel: Parcel) -> None:
    news = whole.Settled([assignment_id("q", "ann", 1)], [assignment_id("q", "ann", 2)])
    found = whole.asked_from(*asked(one, parcel, news), "ann")
    assert (found.assignment, found.settled, found.holds_out_valid) == (one, news, True)
    assert found.parcel.model == parcel.model
    assert {name: vector.tolist() for name, vector in found.parcel.extra.items()} == {
        name: vector.tolist() for name, vector in parcel.extra.items()
    }


ANSWERS = [
    (QUESTIONS[0][0], Update(MODEL, 7, 0.25, {"x": np.arange(3, dtype="f4")}, 0.5)),
    (QUESTIONS[1][0], Update(MODEL, 7)),
    (QUESTIONS[4][0], MetricSums(np.array([1.5, 2.5]), 9, released=False)),
    (QUESTIONS[5][0], Summary(np.array([4], dtype=np.int64), 4)),
]


@pytest.mark.parametrize(("one", "answer"), ANSWERS, ids=lambda value: type(value).__name__)
def test_an_answer_arrives_as_it_was_given(one: Assignment, answer: object) -> None:
    found = whole.answer_from(*whole.answer_to(KEY, answer), one, MODEL.manifest)
    assert type(found) is type(answer)
    for name in answer.__dataclass_fields__:
        left, right = getattr(found, name), getattr(answer, name)
        assert np.array_equal(left, right) if isinstance(right, np.ndarray) else name == "extra" or left == right


def test_a_refusal_arrives_with_its_reason() -> None:
    raw = whole.refusal_to(KEY, Refused(Reason.NO_DATA, "ann has no training rows"))
    with pytest.raises(Refused, match="no_data: ann has no training rows"):
        whole.answer_from(raw, np.zeros(0, "f4"), QUESTIONS[0][0], MODEL.manifest)


@given(st.binary(max_size=200), st.integers(0, 80))
def test_other_bytes_are_no_message(raw: bytes, size: int) -> None:
    payload = np.zeros(size, dtype="f4")
    with pytest.raises(PayloadError):
        whole.asked_from(raw, payload, "ann")
    with pytest.raises((PayloadError, Refused)):
        whole.answer_from(raw, payload, QUESTIONS[0][0], MODEL.manifest)


@given(st.integers(0, MODEL.manifest.size - 1), st.sampled_from(["value", "short", "long", "matrix"]))
def test_another_payload_than_the_announced_one_is_refused(at: int, how: str) -> None:
    changed = {
        "value": lambda vector: np.where(np.arange(vector.size) == at, vector + np.float32(1.0), vector),
        "short": lambda vector: vector[:at],
        "long": lambda vector: np.append(vector, np.float32(0.0)),
        "matrix": lambda vector: vector[None],
    }[how]
    message, payload = asked(QUESTIONS[1][0], Parcel(MODEL))
    with pytest.raises(PayloadError, match=r"digest|were announced"):
        whole.asked_from(message, changed(payload), "ann")
    message, payload = whole.answer_to(KEY, Update(MODEL, 7))
    with pytest.raises(PayloadError, match=r"digest|were announced"):
        whole.answer_from(message, changed(payload), QUESTIONS[1][0], MODEL.manifest)


def test_an_answer_to_another_question_is_refused() -> None:
    other = assignment_id("question", "bob", 0)
    with pytest.raises(PayloadError, match="something else than what was asked"):
        whole.answer_from(*whole.answer_to(other, Update(MODEL, 7)), QUESTIONS[0][0], MODEL.manifest)
    with pytest.raises(Refused, match="expected sums, got an update"):
        whole.answer_from(*whole.answer_to(KEY, Update(MODEL, 7)), QUESTIONS[4][0], MODEL.manifest)
    with pytest.raises(Refused, match="not what was asked for"):
        whole.answer_from(*whole.answer_to(KEY, Reply(b"x")), QUESTIONS[4][0], MODEL.manifest)
