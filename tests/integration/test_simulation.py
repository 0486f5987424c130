"""Simulation: the same bits for any number of workers, bounded memory, one result object."""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedkit
from fedkit import codec
from fedkit.errors import ConfigError, ManifestMismatch, RefusalWarning, RunError, RunFailed
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedBuff, Scaffold
from fedkit.strategy import Strategy
from fedkit.testing import toy_task

CLIENTS = ["ann", "bob", "cyd", "dan", "eve"]
FIT = fedkit.Fit(steps=4, batch_size=8, lr=0.1)


def simulate(strategy: Strategy, **more: object) -> fedkit.Result:
    settings = {"clients": CLIENTS, "seed": 5, "threads": 1, "progress": False} | more
    task = settings.pop("task", None) or toy_task(prepare=fedkit.Standardize())
    return fedkit.simulate(task, strategy, **settings)


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    "strategy",
    [
        FedAvg(rounds=2, local=FIT, participation=fedkit.Participation(fraction=0.6, over_select=1.6)),
        Scaffold(rounds=2, local=FIT),
        FedBuff(rounds=4, local=FIT, concurrency=3, buffer=2),
        CyclicWeightTransfer(rounds=2, local=FIT),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_worker_processes_give_the_bits_of_one_process(strategy: Strategy) -> None:
    evaluate = fedkit.Evaluation(best="loss:min")
    alone, spread = simulate(strategy, evaluate=evaluate), simulate(strategy, evaluate=evaluate, workers=2)
    assert alone.weights == spread.weights
    assert alone.best == spread.best
    assert alone.test == spread.test
    assert [r.clients for r in alone.history] == [r.clients for r in spread.history]


@pytest.mark.unmeasured
def test_calls_that_close_early_do_not_hold_up_later_rounds_of_worker_processes() -> None:
    rule = fedkit.Participation(fraction=0.2, over_select=4)
    strategy = FedAvg(rounds=4, local=FIT, participation=rule)
    settings = {
        "clients": [f"c{i:02d}" for i in range(40)],
        "latency": lambda assignment: 1.0 + int(assignment.client[1:]),
    }
    alone, spread = simulate(strategy, **settings), simulate(strategy, **settings, workers=2)
    assert alone.weights == spread.weights
    assert [len(record.clients) for record in spread.history] == [8] * 4


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_the_data_of_a_run_goes_with_its_result_and_waits_for_no_garbage_collector(private: bool) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def data(client: str) -> fedkit.Data:
        found = toy_task().data(client)
        alive.append(weakref.ref(found.train.tensors[0]))  # type: ignore[attr-defined]
        return found

    privacy = fedkit.Privacy(dp=fedkit.DP(noise_multiplier=1.0, delta=1e-3) if private else None)
    simulate(FedAvg(rounds=1, local=FIT), task=toy_task(data=data), privacy=privacy)  # loads what is loaded once
    gc.collect()
    alive.clear()
    gc.disable()
    try:
        result = simulate(FedAvg(rounds=1, local=FIT), task=toy_task(data=data), privacy=privacy)
        assert result.test
        assert len(alive) == len(CLIENTS)
        del result
        assert [one() for one in alive] == [None] * len(CLIENTS)
    finally:
        gc.enable()


def test_a_run_that_fails_in_the_tasks_own_code_shows_its_traceback() -> None:
    def broken(client: str) -> fedkit.Data:
        raise ZeroDivisionError(f"no disk at {client}")

    with pytest.raises(RunFailed, match="no disk at ann") as caught:
        simulate(FedAvg(rounds=1, local=FIT), task=toy_task(data=broken))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.__cause__.__traceback__ is not None


def test_one_client_that_fails_is_a_warning() -> None:
    def data(client: str) -> fedkit.Data:
        if client == "bob":
            raise ZeroDivisionError("no disk")
        return toy_task().data(client)

    with pytest.warns(RefusalWarning, match="1 clients failed .* bob: ZeroDivisionError: no disk"):
        result = simulate(FedAvg(rounds=1, local=FIT), task=toy_task(data=data))
    assert [refusal.client for refusal in result.refusals] == ["bob"]


def test_a_thousand_clients_fit_in_bounded_memory() -> None:
    rows = fedkit.Data((torch.zeros(4, 4), torch.zeros(4, 1)))

    def train(model: nn.Module, batches: object, site: fedkit.Site) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(len(site.client))

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(200_000))

    task = fedkit.Task(name="wide", model=Wide, data=lambda client: rows, train=train)
    clients = [f"client-{i:04d}" for i in range(1000)]
    simulate(FedAvg(rounds=1), task=task, clients=clients[:10])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = simulate(FedAvg(rounds=1), task=task, clients=clients)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 100 * 200_000 * 4  # all updates together are 1,000 models
    assert np.all(result.weights.vector == len(clients[0]))


def test_global_random_numbers_and_threads_are_as_before() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    threads = torch.get_num_threads()
    simulate(FedAvg(rounds=1, local=FIT))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert torch.get_num_threads() == threads


def test_simulate_runs_inside_a_running_event_loop() -> None:
    async def notebook_cell() -> fedkit.Result:
        return simulate(FedAvg(rounds=1, local=FIT))

    assert asyncio.run(notebook_cell()).weights == simulate(FedAvg(rounds=1, local=FIT)).weights


def test_the_history_counts_clients_examples_and_bytes() -> None:
    result = simulate(FedAvg(rounds=2, local=FIT), task=toy_task())
    model_bytes = result.weights.vector.nbytes
    counts = [len(toy_task().data(client).train) for client in CLIENTS]
    for record in result.history:
        assert record.clients == tuple(CLIENTS)
        assert record.examples == sum(counts)
        assert (record.bytes_down, record.bytes_up) == (5 * model_bytes, 5 * model_bytes)
        assert record.seconds > 0
        assert record.loss > 0
    assert result.history[1].loss < result.history[0].loss


def test_the_test_scores_are_those_of_the_final_model_on_all_test_rows() -> None:
    result = simulate(FedAvg(rounds=3, local=FIT))
    rows = [toy_task().data(client).test.tensors for client in CLIENTS]
    features, labels = (torch.cat(columns) for columns in zip(*rows, strict=True))
    with torch.inference_mode():
        expected = nn.functional.cross_entropy(result.model(features), labels)
    assert result.test["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert sorted(result.test_per_client) == CLIENTS


def test_standardize_is_the_first_layer_and_holds_the_pooled_statistics() -> None:
    bounds = [(-8.0, 8.0)] * 5
    result = simulate(FedAvg(rounds=1, local=FIT), task=toy_task(prepare=fedkit.Standardize(bounds=bounds)))
    rows = torch.cat([toy_task().data(client).train.tensors[0] for client in CLIENTS])
    np.testing.assert_allclose(result.weights["prepare.mean"], rows.mean(dim=0), atol=2e-5)
    np.testing.assert_allclose(result.weights["prepare.scale"], rows.std(dim=0, unbiased=False), atol=2e-4)
    raw = torch.randn(4, 5)
    inner = result.model.model((raw - result.model.prepare.mean) / result.model.prepare.scale)
    assert torch.equal(result.model(raw), inner)


def test_the_best_round_is_the_one_with_the_best_validation_score() -> None:
    result = simulate(FedAvg(rounds=6, local=FIT.replace(lr=2.0)), evaluate=fedkit.Evaluation(best="loss:min"))
    losses = [record.metrics["loss"] for record in result.history]
    assert result.best.round == 1 + int(np.argmin(losses))
    assert result.best.metrics["loss"] == min(losses)
    assert [record.best for record in result.history][result.best.round - 1]


def test_patience_ends_a_run_that_no_longer_gets_better() -> None:
    rule = fedkit.Evaluation(best="loss:min", patience=2)
    result = simulate(FedAvg(rounds=50, local=FIT.replace(lr=3.0)), evaluate=rule)
    assert len(result.history) == result.best.round + 2 < 50


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(RunError, match=r"no metric 'auroc'; there are loss"):
        simulate(FedAvg(rounds=1, local=FIT), evaluate=fedkit.Evaluation(best="auroc:max"))


def test_a_warm_start_takes_weights_a_module_or_a_file(tmp_path: Path) -> None:
    first = simulate(FedAvg(rounds=2, local=FIT))
    codec.save(tmp_path / "w.fedkit", first.weights)
    found = [
        simulate(FedAvg(rounds=1, local=FIT), init=init).weights
        for init in (first.weights, first.model, tmp_path / "w.fedkit")
    ]
    assert found[0] == found[1] == found[2] != simulate(FedAvg(rounds=1, local=FIT)).weights
    with pytest.raises(ManifestMismatch, match="init has"):
        simulate(FedAvg(rounds=1), init=nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clients": []}, "one or more names"),
        ({"clients": "ann"}, "one or more names"),
        ({"clients": ["a", "a"]}, "occurs twice"),
        ({"workers": 0}, "workers must be 1 or more"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"device": "tpu"}, "device 'tpu' is not to be had here; there is cpu"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(FedAvg(rounds=1), **settings)


def test_a_result_is_saved_and_exported_as_onnx_that_agrees(tmp_path: Path) -> None:
    import onnxruntime

    result = simulate(FedAvg(rounds=1, local=FIT), evaluate=fedkit.Evaluation(best="loss:min"))
    result.save(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["strategy"]["local"]["steps"] == 4
    assert codec.load(tmp_path / "run" / "model.fedkit") == result.weights
    handed = result.export(tmp_path / "bundle", quantize="none")
    session = onnxruntime.InferenceSession(handed.folder / "model.onnx")
    raw = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    (found,) = session.run(["output"], {"features": raw})
    with torch.inference_mode():
        np.testing.assert_allclose(found, result.model(torch.from_numpy(raw)).numpy(), atol=1e-5)


def test_export_refuses_what_it_cannot_do_and_writes_nothing(tmp_path: Path) -> None:
    result = simulate(FedAvg(rounds=1, local=FIT))
    with pytest.raises(ConfigError, match="quantize"):
        result.export(tmp_path, quantize="int4")
    blind = simulate(FedAvg(rounds=1, local=FIT), task=toy_task(inputs={}))
    with pytest.raises(ConfigError, match="export needs inputs="):
        blind.export(tmp_path)
    assert list(tmp_path.iterdir()) == []
