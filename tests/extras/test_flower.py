"""Flower, both ways, with Flower itself and Ray: the same models, and what either keeps between rounds."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

pytest.importorskip("flwr")
pytest.importorskip("ray")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.server import strategy as older
from flwr.serverapp import strategy as flowers

import fedkit
from fedkit.demo import heart
from fedkit.engines import flower
from fedkit.engines.flower.library import identify
from fedkit.errors import IncompatibleStrategy, RefusalWarning, RunError, RunFailed, StateError
from fedkit.loopback import Loopback
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedBuff, Scaffold, TrimmedMean
from fedkit.testing import Crash, Fuse, InMemoryFederation, toy_task
from tests.extras.flowered import CLIENTS, TOY, Trimmed, Yogi, app_task, flowered, older_task, plain_task
from tests.extras.grids import DirectGrid

# Ray leaves files and processes of its own to the garbage collector, which may find them in any test here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
]

ROOT = Path(__file__).parents[2]
FIT = fedkit.Fit(steps=3, batch_size=8, lr=0.1)
DESCENT = fedkit.Fit(epochs=3, batch_size="all", lr=0.1)
HEART = fedkit.Fit(steps=100, batch_size=4, lr=0.003)


def simulate(task: fedkit.Task, strategy: fedkit.Strategy, **more: Any) -> fedkit.Result:
    return fedkit.simulate(task, strategy, **{"clients": CLIENTS, "seed": 3, "threads": 1, "progress": False, **more})


def distance(left: fedkit.Result, right: fedkit.Result) -> float:
    return (left.weights - right.weights).norm()


# -- fedkit on Flower's simulation engine ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        (FedAvg(rounds=3, local=HEART), {"evaluate": fedkit.Evaluation(best="auroc:max")}),
        (CyclicWeightTransfer(rounds=2, local=HEART.replace(lr=0.001)), {}),
    ],
    ids=["FedAvg", "weight transfer"],
)
def test_heart_on_rays_processes_ends_with_the_bits_of_fedkits_own_engine(
    strategy: fedkit.Strategy, more: dict[str, Any]
) -> None:
    about = {"clients": heart.HOSPITALS, "seed": 42, "threads": 1, **more}
    records: list[fedkit.RoundRecord] = []
    there = flower.run(heart.task, strategy, workers=2, on_round=records.append, **about)
    own = fedkit.simulate(heart.task, strategy, progress=False, **about)
    assert distance(there, own) <= 1e-6
    assert there.weights == own.weights
    assert (there.test, there.test_per_client, there.outcome.best) == (own.test, own.test_per_client, own.outcome.best)
    assert [record.clients for record in there.history] == [record.clients for record in own.history]
    assert [record.round for record in records] == list(range(1, strategy.rounds + 1))


def test_a_run_that_fails_on_rays_processes_says_why_and_leaves_the_engine_in_order() -> None:
    def broken(client: str) -> fedkit.Data:
        raise ValueError(f"the disk of {client} is full")

    with pytest.raises(RunFailed, match=r"the disk of .* is full"):
        flower.run(toy_task(data=broken), FedAvg(rounds=1, local=FIT), clients=CLIENTS[:2])


# -- the same over a grid in this process ------------------------------------------------------------------------------


class Federated:
    """Both apps over a `DirectGrid`; `result` is what the ServerApp has given."""

    def __init__(
        self, task: fedkit.Task, strategy: fedkit.Strategy, configs: list[dict[str, Any]] | None = None, **more: Any
    ) -> None:
        fault = more.pop("fault", None)
        self.results: list[fedkit.Result] = []
        about = {"clients": CLIENTS, "seed": 3, "on_result": self.results.append, **more}
        server, client = flower.apps(task, strategy, **about)
        identify()
        named = [{"client": name} for name in CLIENTS]
        self.grid = DirectGrid(client, named if configs is None else configs, fault)
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        server(self.grid, context)

    @property
    def result(self) -> fedkit.Result:
        [found] = self.results
        return found


def with_local_state() -> nn.Module:
    """BatchNorm's counter stays at a client, its statistics travel."""
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    "strategy",
    [
        Scaffold(rounds=3, local=FIT),
        CyclicWeightTransfer(rounds=2, local=FIT, gate=fedkit.Gate(max_drop=0.5, metric="loss:min")),
        FedBuff(rounds=3, local=FIT, concurrency=1, buffer=2),
        FedAvg(rounds=3, local=FIT, participation=fedkit.Participation(fraction=0.5)),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_what_stays_at_clients_lies_in_flowers_context_and_gives_the_same_bits(strategy: fedkit.Strategy) -> None:
    task = toy_task(
        model=with_local_state, prepare=fedkit.Standardize(), exchange=lambda name: not name.startswith("3.")
    )
    there, own = Federated(task, strategy), simulate(task, strategy)
    assert there.result.weights == own.weights
    assert there.result.test == own.test
    assert there.result.to_dict()["engine"] == "federation"
    kept = [len(context.state["fedkit"]["fedkit"]) for context in there.grid.contexts.values()]
    assert max(kept) < 4000  # what is settled is forgotten, or it would grow with the rounds


def test_work_of_an_abandoned_attempt_is_undone_at_the_clients() -> None:
    lost: list[int] = []

    def once(node: int, message: Message) -> Message | None:
        if message.metadata.message_type != "train" or message.metadata.group_id != "2" or node != 4 or lost:
            return None
        lost.append(node)
        return Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message)

    strategy = Scaffold(rounds=3, local=FIT, participation=fedkit.Participation(quorum=4))
    there = Federated(toy_task(), strategy, fault=once).result
    assert [(record.round, record.refusals[0].reason) for record in there.abandoned] == [(2, "lost")]
    own = InMemoryFederation(toy_task(), CLIENTS, seed=3, faults={"dan": Forgetful(lost)}).run(strategy)
    assert len(own.abandoned) == 1
    assert there.weights == own.weights


class Forgetful:
    """Loses one answer to the second round of training."""

    def __init__(self, _: list[int]) -> None:
        self.count = 0

    def __call__(self, answer: Any) -> Any:
        self.count += 1
        if self.count == 2:
            raise fedkit.errors.Refused(fedkit.errors.Reason.LOST, "gone")
        return answer


def test_privacy_is_accounted_for_over_all_rounds_though_each_message_may_have_its_own_process() -> None:
    privacy = fedkit.Privacy(dp=fedkit.DP(epsilon=3.0, delta=1e-3))
    task = toy_task(prepare=fedkit.Standardize(bounds=[(-3.0, 3.0)] * 5))
    there = Federated(task, FedAvg(rounds=3, local=FIT), privacy=privacy).result
    own = simulate(task, FedAvg(rounds=3, local=FIT), privacy=privacy)
    spent = [record.epsilon for record in there.history]
    assert [set(one) for one in spent] == [set(CLIENTS)] * 3
    for name in CLIENTS:
        assert spent[0][name] < spent[1][name] < spent[2][name] <= 3.0
        assert spent[2][name] == pytest.approx(own.history[-1].epsilon[name], rel=1e-9)


def test_a_site_that_cannot_train_costs_its_own_contribution_and_nothing_else() -> None:
    def load(client: str) -> fedkit.Data:
        if client == "bea":
            raise OSError("no such table")
        return TOY.data(client)

    with pytest.warns(RefusalWarning, match="no such table"):
        own = simulate(toy_task(data=load), FedAvg(rounds=2, local=FIT))
    there = Federated(toy_task(data=load), FedAvg(rounds=2, local=FIT)).result
    assert there.weights == own.weights
    refused = there.history[0].refusals
    assert [(one.client, one.reason, one.detail) for one in refused] == [("bea", "failed", "OSError: no such table")]


def replaced(content: RecordDict, **records: Any) -> RecordDict:
    return RecordDict({**{name: content[name] for name in content}, **records})


def payload(values: Any, **about: Any) -> ArrayRecord:
    raw = np.asarray(values, dtype="<f4").tobytes()
    given = {"dtype": "float32", "shape": (len(values),), "stype": "fedkit.float32", "data": raw, **about}
    return ArrayRecord({"payload": Array(**given)})


SIZE = fedkit.Weights.from_module(TOY.build(0)).manifest.size
LIES: dict[str, tuple[Callable[[RecordDict], RecordDict], str]] = {
    "no message": (lambda content: RecordDict(), "payload"),
    "another message": (lambda content: replaced(content, message=ConfigRecord({"message": b"\xff\xff"})), "payload"),
    "text": (lambda content: replaced(content, message=ConfigRecord({"message": "hello"})), "payload"),
    "other values": (lambda content: replaced(content, payload=payload(np.ones(SIZE))), "payload"),
    "too few": (lambda content: replaced(content, payload=payload(np.ones(SIZE - 1))), "payload"),
    "none": (lambda content: RecordDict({"message": content["message"]}), "payload"),
    "numpy's format": (lambda content: replaced(content, payload=ArrayRecord([np.ones(SIZE, "f4")])), "payload"),
    "pickled": (lambda content: replaced(content, payload=payload([1.0], stype="numpy.ndarray")), "payload"),
    "a claimed shape": (lambda content: replaced(content, payload=payload([1.0], shape=(1 << 30,))), "payload"),
    "a negative shape": (lambda content: replaced(content, payload=payload([1.0], shape=(-1,))), "payload"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_node_that_answers_nonsense_is_refused_and_the_others_go_on(lie: str) -> None:
    change, reason = LIES[lie]

    def fault(node: int, message: Message) -> Message | None:
        if node != 2 or message.metadata.message_type != "train":
            return None
        honest = there_app(message, nodes[node])
        return Message(change(honest.content), reply_to=message)

    nodes = {2: Context(run_id=1, node_id=2, node_config={"client": "bea"}, state=RecordDict(), run_config={})}
    _, there_app = flower.apps(toy_task(), FedAvg(), clients=CLIENTS, seed=3, on_result=print)
    found = Federated(toy_task(), FedAvg(rounds=1, local=FIT), fault=fault).result
    assert [(one.client, one.reason.value) for one in found.history[0].refusals] == [("bea", reason)]
    assert found.history[0].clients == ("ada", "cyd", "dan")


def test_a_message_that_is_not_fedkits_is_refused_by_the_client_app() -> None:
    _, app = flower.apps(toy_task(), FedAvg(), clients=CLIENTS, on_result=print)
    identify()
    context = Context(run_id=1, node_id=2, node_config={"client": "bea"}, state=RecordDict(), run_config={})
    with pytest.raises(fedkit.errors.PayloadError, match="is it another app's"):
        app(Message(RecordDict(), 2, "train"), context)


def test_a_state_that_is_not_fedkits_is_named_before_any_work_is_done() -> None:
    seen: list[Message] = []
    Federated(toy_task(), FedAvg(rounds=1, local=FIT), fault=lambda node, message: seen.append(message))
    _, app = flower.apps(toy_task(), FedAvg(), clients=CLIENTS, on_result=print)
    context = Context(run_id=1, node_id=1, node_config={"client": "ada"}, state=RecordDict(), run_config={})
    context.state["fedkit"] = ConfigRecord({"fedkit": b"FEDPACK1 and what else"})
    [message] = [one for one in seen if one.metadata.message_type == "train" and one.metadata.dst_node_id == 1]
    with pytest.raises(fedkit.errors.ConfigError, match="state is none of fedkit's"):
        app(message, context)


def test_a_node_of_an_unknown_name_and_a_second_one_of_the_same_take_no_part(caplog: Any) -> None:
    configs = [{"client": name} for name in (*CLIENTS, "eve", "ada")]
    there = Federated(toy_task(), FedAvg(rounds=1, local=FIT), configs)
    assert there.result.weights == simulate(toy_task(), FedAvg(rounds=1, local=FIT)).weights
    assert not [kind for node, kind in there.grid.asked if node > 4 and kind != "query.attend"]
    assert "is client='eve'" in caplog.text


def test_a_grid_that_fails_ends_the_run_with_what_it_said() -> None:
    def fault(node: int, message: Message) -> None:
        if message.metadata.message_type == "train":
            raise ConnectionError("the SuperLink is gone")

    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        Federated(toy_task(), FedAvg(rounds=1, local=FIT), fault=fault)


# -- Flower's strategies on fedkit -------------------------------------------------------------------------------------

EIGHT = [f"client-{i}" for i in range(8)]
STRATEGIES: dict[str, Callable[[], Any]] = {
    "FedAvg": lambda: flowers.FedAvg(),
    "half of them": lambda: flowers.FedAvg(fraction_train=0.5, fraction_evaluate=0.0),
    "FedAvgM": lambda: flowers.FedAvgM(server_momentum=0.9),
    "FedAdagrad": lambda: flowers.FedAdagrad(),
    "FedAdam": lambda: flowers.FedAdam(),
    "FedYogi": lambda: flowers.FedYogi(),
    "FedProx": lambda: flowers.FedProx(proximal_mu=0.1),
    "FedMedian": lambda: flowers.FedMedian(),
    "FedTrimmedAvg": lambda: flowers.FedTrimmedAvg(beta=0.25),
    "Krum": lambda: flowers.Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: flowers.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
    "Bulyan": lambda: flowers.Bulyan(num_malicious_nodes=1),
    "QFedAvg": lambda: flowers.QFedAvg(client_learning_rate=0.1),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_of_flowers_strategies_learns_and_goes_on_as_before_after_a_crash(name: str) -> None:
    strategy = flower.FlowerStrategy(make=STRATEGIES[name], rounds=2, local=FIT)
    counted = Fuse()
    whole = InMemoryFederation(toy_task(), EIGHT).run(strategy, fuse=counted)
    assert whole.test["loss"] < math.log(3) + 0.05
    assert all(len(record.clients) == (4 if name == "half of them" else 8) for record in whole.history)
    federation, at = (
        InMemoryFederation(toy_task(), EIGHT),
        random.Random(name).randrange(counted.steps // 2, counted.steps),
    )
    with pytest.raises(Crash):
        federation.run(strategy, fuse=Fuse(at))
    again = federation.run(strategy)
    assert again.weights == whole.weights
    assert str(again.state) == str(whole.state)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (STRATEGIES["FedAvg"], FedAvg(rounds=3, local=FIT)),
        (STRATEGIES["FedProx"], FedAvg(rounds=3, local=FIT.replace(proximal=0.1))),
        (STRATEGIES["FedTrimmedAvg"], TrimmedMean(rounds=3, local=FIT, trim=2)),
    ],
    ids=["FedAvg", "FedProx", "FedTrimmedAvg"],
)
def test_flowers_strategy_comes_to_the_model_of_fedkits(theirs: Callable[[], Any], ours: fedkit.Strategy) -> None:
    there = simulate(toy_task(), flower.FlowerStrategy(make=theirs, rounds=3, local=FIT), clients=EIGHT)
    assert distance(there, simulate(toy_task(), ours, clients=EIGHT)) <= 1e-6


def test_a_flower_strategy_runs_on_flowers_engine_too() -> None:
    strategy = Yogi(rounds=2, local=FIT)
    assert Federated(toy_task(), strategy).result.weights == simulate(toy_task(), strategy).weights


def test_a_strategy_that_was_made_once_is_not_changed_by_a_run() -> None:
    one = flowers.FedAvgM(server_momentum=0.9)
    strategy = flower.FlowerStrategy(make=lambda: one, rounds=2, local=FIT)
    first, second = simulate(toy_task(), strategy), simulate(toy_task(), strategy)
    assert first.weights == second.weights
    assert one.momentum_vector is None


class Personal(flowers.FedAvg):
    """Gives each node its own model."""

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        for message in super().configure_train(server_round, arrays, config, grid):
            own = {name: Array(np.zeros(array.shape, "f4")) for name, array in arrays.items()}
            yield Message(RecordDict({"arrays": ArrayRecord(own)}), message.metadata.dst_node_id, "train")


class Chatty(flowers.FedAvg):
    """Asks the grid itself."""

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        return grid.send_and_receive([])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: older.FedTrimmedAvg(), "no strategy of flwr.serverapp.strategy: take its namesake there"),
        (lambda: FedAvg(), "no strategy of flwr.serverapp.strategy"),
        (lambda: flowers.FedXgbBagging(), "joins trees"),
        (lambda: Personal(), "another model than the run's"),
        (lambda: Chatty(), "uses grid.send_and_receive itself"),
        (
            lambda: flowers.DifferentialPrivacyServerSideFixedClipping(flowers.FedAvg(), 1.0, 1.0, 4),
            "adds noise that fedkit's accounting does not see",
        ),
    ],
)
def test_what_fedkit_cannot_run_as_a_flower_strategy_is_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(IncompatibleStrategy, match=sentence):
        simulate(toy_task(), flower.FlowerStrategy(make=make, rounds=1, local=FIT))


def test_a_strategy_that_waits_for_more_clients_than_there_are_is_refused() -> None:
    with pytest.raises(IncompatibleStrategy, match="needs 6 clients"):
        simulate(toy_task(), flower.FlowerStrategy(make=lambda: flowers.FedAvg(min_available_nodes=6), local=FIT))


def test_bulyan_of_too_few_answers_makes_no_round() -> None:
    with pytest.raises(RunFailed, match="Bulyan has made no model of 4 answers"):
        simulate(toy_task(), flower.FlowerStrategy(make=STRATEGIES["Bulyan"], rounds=1, local=FIT))


class Odd(flowers.FedAvg):
    """Keeps what cannot be stored, or makes another model."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if self.arrayrecord_key == "arrays":
            self.thing = threading.Event()
        else:
            del arrays["0.bias"]
        return arrays, metrics


def test_state_that_cannot_be_committed_is_named() -> None:
    with pytest.raises(StateError, match=r"kept\['thing'\] is a Event"):
        simulate(toy_task(), flower.FlowerStrategy(make=Odd, rounds=1, local=FIT))


def test_a_model_of_other_tensors_is_named() -> None:
    strategy = flower.FlowerStrategy(make=lambda: Odd(arrayrecord_key="model"), rounds=1, local=FIT)
    with pytest.raises(RunError, match=r"Flower's Odd has made another model .* 0\.bias"):
        simulate(toy_task(), strategy)


# -- Flower's clients on fedkit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [app_task, older_task], ids=["ClientApp", "client_fn"])
@pytest.mark.parametrize(
    "strategy",
    [FedAvg(rounds=3, local=DESCENT), CyclicWeightTransfer(rounds=2, local=DESCENT), Trimmed(rounds=2, local=DESCENT)],
    ids=lambda strategy: type(strategy).__name__,
)
def test_a_flower_client_trains_the_model_that_fedkits_own_loop_trains(
    task: fedkit.Task, strategy: fedkit.Strategy
) -> None:
    there, own = simulate(task, strategy), simulate(plain_task, strategy)
    assert distance(there, own) <= 1e-6
    assert there.test["loss"] == pytest.approx(own.test["loss"], abs=1e-6)
    assert there.history[-1].loss is not None


@pytest.mark.parametrize("task", [app_task, older_task], ids=["ClientApp", "client_fn"])
def test_a_flower_client_hears_what_a_flower_strategy_tells(task: fedkit.Task) -> None:
    told = Trimmed(rounds=2, beta=0.0, config={"lr": 0.2, "local-epochs": 2, "text": "any"})
    local = fedkit.Fit(epochs=2, batch_size="all", lr=0.2)
    uniform = TrimmedMean(rounds=2, local=local, trim=1)
    assert distance(simulate(task, told), simulate(plain_task, told.replace(local=local))) <= 1e-6
    assert distance(simulate(task, told), simulate(plain_task, uniform)) > 1e-6


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda message: RecordDict(), "answered with 0 ArrayRecords"),
        (lambda message: RecordDict({"arrays": ArrayRecord([np.ones(2, "f4")])}), "Error.* in loading state_dict"),
    ],
)
def test_a_flower_client_that_gives_back_no_model_is_refused(content: Callable[[Any], Any], sentence: str) -> None:
    app = ClientApp()
    app.train()(lambda message, context: Message(content(message), reply_to=message))
    with pytest.raises(RunFailed, match=sentence):
        simulate(flowered(app, "bad"), FedAvg(rounds=1, local=DESCENT))


def test_a_flower_client_is_refused_under_example_level_privacy() -> None:
    privacy = fedkit.Privacy(dp=fedkit.DP(epsilon=3.0, delta=1e-3))
    with pytest.raises(IncompatibleStrategy, match="its own train loop"):
        simulate(app_task, FedAvg(rounds=1, local=DESCENT), privacy=privacy)


# -- on a coordinator --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    here = "tests.extras.flowered"
    tasks, strategies = [f"{here}:app_task", f"{here}:older_task"], [f"{here}:Trimmed", f"{here}:Yogi"]
    about = {"strategies": strategies, "environment": {"PYTHONPATH": str(ROOT)}, "heartbeat_s": 2.0}
    with Loopback(tmp_path_factory.mktemp("federation"), tasks, CLIENTS, **about) as running:
        yield running


@pytest.mark.parametrize("task", [app_task, older_task], ids=["ClientApp", "client_fn"])
@pytest.mark.parametrize(
    "strategy", [Trimmed(rounds=2, local=DESCENT), Yogi(rounds=2, local=DESCENT)], ids=["trimmed mean", "FedYogi"]
)
def test_flowers_clients_and_strategies_run_on_a_coordinator_with_the_bits_of_simulation(
    federation: Loopback, task: fedkit.Task, strategy: fedkit.Strategy
) -> None:
    about = {"seed": 3, "privacy": fedkit.Privacy(aggregation="plain")}
    with fedkit.connect(federation.address) as coordinator:
        there = coordinator.run(task, strategy, min_clients=4, progress=False, **about)
    assert there.weights == simulate(task, strategy, **about).weights


# -- the examples ------------------------------------------------------------------------------------------------------


def example(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / "flower" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_do_what_their_readme_says() -> None:
    readme = (ROOT / "examples" / "flower" / "README.md").read_text()
    assert example("from_flower.py") in readme
    shown = example("on_flower.py", "--rounds", "1")
    assert shown.count("the same model, bit for bit") == 2
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "examples/flower").rglob("*.py")}
    assert max(lengths.values()) <= 40, lengths
