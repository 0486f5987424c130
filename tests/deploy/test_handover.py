"""The hand-over over simulated clients: what they answer decides, and what the passport says is what they answered."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import fedkit
from bench.architectures import NETWORKS, same_classes
from fedkit import rng
from fedkit.config import DP
from fedkit.deploy.bundle import MODELS, verify_bundle
from fedkit.deploy.convert import TOLERANCE, convert, difference
from fedkit.deploy.passport import Passport
from fedkit.deploy.quantize import build
from fedkit.deploy.runtime import session
from fedkit.deploy.settings import Export, Limits
from fedkit.deploy.site import Deployed, SiteModel, _agreeing
from fedkit.errors import ConfigError, ExportError, Reason, Refused
from fedkit.exam import Exam, Questions
from fedkit.result import Result, load
from fedkit.simulation.run import asking
from fedkit.strategies import FedAvg, HandOver
from fedkit.testing import toy_task
from fedkit.trainer.deployed import _groups
from fedkit.work import Evaluate

CLIENTS = ("ada", "bea", "cyd")
ANY_SPEED = Limits(cpu=1e6, agreement=0.95, drop=0.03)  # which variant is faster is for benchmarks
WEIGHTS = torch.randn(12, 4, generator=rng.torch_generator(0, "handover"))


def rows(client: str) -> fedkit.Data:
    """Four classes in twelve features, of which each client has its own scale."""
    source = rng.torch_generator(1, "handover", client)
    features = torch.randn(240, 12, generator=source) * {"ada": 0.5, "bea": 1.0, "cyd": 2.0}.get(client, 1.0)
    labels = (features @ WEIGHTS).argmax(dim=1)
    groups = ["old" if i % 3 else "young" for i in range(80)]
    return fedkit.Data(train=(features[:160], labels[:160]), test=(features[160:], labels[160:]), groups=groups)


task = fedkit.Task(
    name="scaled",
    model=lambda: nn.Sequential(nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4)),
    data=rows,
    loss=nn.CrossEntropyLoss(),
    metrics={"accuracy": lambda: MulticlassAccuracy(num_classes=4, average="micro")},
    inputs={"features": fedkit.Tensor("float32", (12,))},
    outputs=["scores"],
)


@pytest.fixture(scope="module")
def result() -> Result:
    fit = fedkit.Fit(epochs=4, batch_size=16, lr=0.1)
    return fedkit.simulate(task, FedAvg(rounds=4, local=fit), clients=CLIENTS, seed=1, threads=1, progress=False)


@pytest.fixture(scope="module")
def handed(result: Result, tmp_path_factory: pytest.TempPathFactory) -> tuple[Passport, Path]:
    folder = tmp_path_factory.mktemp("handed") / "bundle"
    questions = Questions(criteria=("accuracy>=0.5", "loss<=0.0001"), groups=("old", "young"), noise=(2.0,))
    export = Export(quantize="int8", limits=ANY_SPEED)
    found = result.export(folder, settings=export, questions=questions)
    verified = verify_bundle(folder, found.signer)
    assert verified.passport.to_json() == found.passport.replace(files=verified.passport.files).to_json()
    return verified.passport, folder


def test_a_quantised_model_is_calibrated_scored_and_shipped(handed: tuple[Passport, Path]) -> None:
    passport, folder = handed
    int8 = passport.measured("int8")
    assert passport.shipped == "int8"
    assert passport.calibration.method == "mean"
    assert (int8.passed, int8.operators) == (True, 3)
    assert int8.size_bytes < 0.5 * passport.measured("fp32").size_bytes
    assert int8.agreement >= 0.95
    assert abs(int8.drop) <= 0.03
    model = onnx.load(folder / MODELS["int8"])
    assert sum(one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 2 for one in model.graph.initializer) == 3


def test_the_examination_is_of_the_shipped_file_on_all_test_rows(handed: tuple[Passport, Path]) -> None:
    passport, folder = handed
    running = session((folder / MODELS["int8"]).read_bytes())
    right, rights = [], {"old": [], "young": []}
    for client in CLIENTS:
        data = rows(client)
        features, labels = data.test.tensors
        (scores,) = running.run(None, {"features": features.numpy()})
        own = scores.argmax(1) == labels.numpy()
        right.append(own)
        for name, found in rights.items():
            found.append(own[[group == name for group in data.groups]])
    examined = passport.examined
    assert examined.sites == 3
    assert examined.pooled["accuracy"] == pytest.approx(np.concatenate(right).mean())
    for name, found in rights.items():
        assert examined.groups[name]["accuracy"] == pytest.approx(np.concatenate(found).mean())
    assert examined.passing == {"accuracy>=0.5": sum(own.mean() >= 0.5 for own in right), "loss<=0.0001": 0}
    assert examined.noise["2"]["accuracy"] < examined.pooled["accuracy"]
    assert set(examined.latency_s) == {"1", "64"}


def test_extremes_are_those_that_pytorch_makes_of_each_row(result: Result) -> None:
    converted = convert(result.model, task)
    train = rows("ada").train.tensors
    batches = [([one[:100] for one in train], 100), (train, 160)]
    extremes = SiteModel(result.model, task).extremes(converted.graph, batches)
    assert extremes.shape == (260, len(converted.tensors), 2)
    at = next(i for i, name in enumerate(converted.tensors) if "relu" in name)
    with torch.inference_mode():
        hidden = result.model[1](result.model[0](train[0])).numpy()
    np.testing.assert_allclose(extremes[100:, at, 0], hidden.min(axis=1), atol=1e-6)
    np.testing.assert_allclose(extremes[100:, at, 1], hidden.max(axis=1), atol=1e-6)
    assert np.array_equal(extremes[:100], extremes[100:200])


@pytest.mark.unmeasured
def test_a_row_counts_once_however_often_a_task_looks_at_it(result: Result) -> None:
    def predict(model: nn.Module, batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return model(torch.cat([batch[0], 2 * batch[0]]))[: len(batch[0])], batch[1]

    twice = dataclasses.replace(task, predict=predict)
    graph = convert(result.model, task).graph
    train = rows("ada").train.tensors
    site = SiteModel(result.model, twice)
    single = site.extremes(graph, [([one[i : i + 1] for one in train], 1) for i in range(20)])
    assert single.shape[0] == 20
    plain = SiteModel(result.model, task).extremes(graph, [([one[:20] for one in train], 20)])
    assert (single[..., 1] >= plain[..., 1] - 1e-6).all()  # of the row and of its double
    assert site.extremes(graph, [([one[:20] for one in train], 20)]).shape[0] == 20


@pytest.mark.unmeasured
def test_masked_sums_of_ranges_are_the_plain_ones(result: Result) -> None:
    passports = {}
    from fedkit.handover import _Work
    from fedkit.result import subject

    for aggregation in ("plain", "masked"):
        work = _Work(subject(result), Export(quantize="int8", limits=ANY_SPEED), Questions())
        work.convert()
        passports[aggregation] = result.ask(work.plan(), result.weights, fedkit.Privacy(aggregation=aggregation))
    plain, masked = passports["plain"], passports["masked"]
    assert np.array_equal(plain.ranges, masked.ranges)
    assert plain.agreement == masked.agreement
    assert plain.scores["int8"]["accuracy"] == masked.scores["int8"]["accuracy"]


def test_a_private_run_is_calibrated_without_data_or_at_a_price(tmp_path: Path) -> None:
    private = fedkit.Privacy(dp=DP(epsilon=8.0, delta=1e-3))
    fit = fedkit.Fit(epochs=1, batch_size=40, lr=0.1)
    strategy = FedAvg(rounds=1, local=fit)
    about = {"clients": CLIENTS, "seed": 1, "threads": 1, "progress": False}
    result = fedkit.simulate(task, strategy, privacy=private, **about)
    limits = ANY_SPEED.replace(agreement=0.0, drop=1.0)
    free = result.export(tmp_path / "free", settings=Export(quantize="int8", limits=limits)).passport
    assert (free.calibration.method, free.calibration.clients, free.calibration.epsilon) == ("noise", 0, None)
    paid = result.export(tmp_path / "paid", settings=Export(quantize="int8", epsilon=4.0, limits=limits)).passport
    assert (paid.calibration.method, paid.calibration.epsilon, paid.calibration.delta) == ("rows", 4.0, 1e-3)
    assert {one.epsilon is not None for one in paid.clients} == {True}
    with pytest.raises(ConfigError, match="give epsilon for what the ranges may cost"):
        result.export(tmp_path / "exact", settings=Export(quantize="int8", calibration="mean"))
    assert not (tmp_path / "exact").exists()


@pytest.mark.unmeasured
def test_what_nobody_has_scored_is_not_shipped(result: Result, tmp_path: Path) -> None:
    alone = dataclasses.replace(result, ask=None)
    found = alone.export(tmp_path / "b", settings=Export(quantize="int8", limits=ANY_SPEED)).passport
    assert found.shipped == "fp32"
    assert (found.measured("int8").passed, found.measured("int8").why) == (False, "no client has scored it")
    assert found.examined is None


def test_what_is_tried_goes_before_the_settings_and_too_few_rows_are_said_at_once(
    result: Result, tmp_path: Path
) -> None:
    found = dataclasses.replace(result, ask=None).export(tmp_path / "b", "none", settings=Export(quantize="int8"))
    assert [one.variant for one in found.passport.gate] == ["fp32"]
    with pytest.raises(ConfigError, match="rows"):  # before anybody is asked, and not at the sites
        Export(rows=63)


@pytest.mark.unmeasured
def test_a_variant_that_answers_worse_is_refused_with_the_number(result: Result, tmp_path: Path) -> None:
    strict = Limits(cpu=1e6, agreement=1.0, drop=0.0)
    export = Export(quantize="int8", calibration="noise", limits=strict, criterion="loss:min")
    found = result.export(tmp_path / "b", settings=export).passport
    int8 = found.measured("int8")
    assert int8.passed == (int8.drop <= 0 and int8.agreement == 1.0)
    assert not int8.passed
    assert "is worse by" in int8.why or "it answers as PyTorch on" in int8.why
    assert found.shipped == "fp32"
    assert found.examined.variant == "fp32"


@pytest.mark.unmeasured
def test_a_saved_run_is_handed_over_as_it_would_have_been_at_once(
    result: Result, handed: tuple[Passport, Path], tmp_path: Path
) -> None:
    result.save(tmp_path / "run")
    again = load(tmp_path / "run", task, asking(task, CLIENTS, 1))
    two = again.export(tmp_path / "two", settings=Export(quantize="int8", limits=ANY_SPEED))
    names = ("model.onnx", "model.int8.onnx")
    stripped = [[_without_facts(folder / name) for name in names] for folder in (handed[1], two.folder)]
    assert stripped[0] == stripped[1]
    same = {"created": "", "gate": [], "files": {}, "examined": None}
    assert handed[0].replace(**same) == two.passport.replace(**same)
    with pytest.raises(ConfigError, match="holds a run of scaled"):
        load(tmp_path / "run", toy_task())


def _without_facts(path: Path) -> bytes:
    model = onnx.load(path)
    del model.metadata_props[:]
    return model.SerializeToString()


class Reading(nn.Module):
    """The next of 20 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(20, 8), nn.LSTM(8, 64, batch_first=True), nn.Linear(64, 20)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.embed(text))[0])


@pytest.mark.unmeasured
def test_a_recurrent_network_is_quantised_as_it_runs_and_not_by_ranges(tmp_path: Path) -> None:
    from fedkit.deploy.gate import measured, noise_ranges

    text = toy_task(name="text", model=Reading, inputs={"text": fedkit.Tensor("int64", (12,))})
    module = text.build(0).eval()
    converted = convert(module, text)
    about = (converted, module, text)
    found = measured(*about, noise_ranges(*about), ("int8", "int8-dynamic", "fp16"), ANY_SPEED)
    gate = {one.variant: one for one in found}
    assert not gate["int8"].passed
    assert "of fp32, at most 0.7 is allowed" in gate["int8"].why  # the LSTM itself has stayed as it was
    assert gate["int8-dynamic"].passed
    assert gate["int8-dynamic"].size_ratio < 0.35
    assert not gate["fp16"].passed
    assert "ONNX Runtime" in gate["fp16"].why  # which dies of it, in a process of its own


@pytest.mark.parametrize(
    ("kind", "other", "agrees"),
    [
        ("classes", [0.2, 0.9, 0.1], True),
        ("classes", [0.9, 0.2, 0.1], False),
        ("logits", [-3.0, 1.0, -9.0], True),
        ("logits", [-3.0, 1.0, 9.0], False),
        ("numbers", [-1.0, 2.001, -1.0], True),
        ("numbers", [-1.0, 2.5, -1.0], False),
        ("numbers", [float("nan")] * 3, False),
        (None, [-3.0, 1.0, 0.5], True),
        (None, [float("nan")] * 3, False),
    ],
)
def test_what_agrees_depends_on_what_outputs_are(kind: str | None, other: list[float], agrees: bool) -> None:
    wanted = [torch.tensor([[-1.0, 2.0, -1.0]])]
    assert _agreeing([torch.tensor([other])], wanted, kind).tolist() == [agrees]


def test_a_group_is_not_told_where_what_it_leaves_out_is_a_few_rows() -> None:
    def told(*groups: str) -> dict[str, int]:
        data = fedkit.Data(train=(torch.zeros(1), torch.zeros(1)), groups=groups)
        exam = Exam(graph="0" * 64, groups=("a", "b", "c"))
        return {name: len(index) for name, index in _groups(data, len(groups), exam, Evaluate(split="test"))}

    assert told(*"a" * 50, *"b" * 30) == {"a": 50, "b": 30}
    assert told(*"a" * 50, *"b" * 9) == {}
    assert told(*"a" * 50, *"b" * 30, "c") == {"a": 50}
    assert told(*"a" * 50, *"x" * 10) == {"a": 50}
    assert told(*"a" * 9) == {}


def test_a_model_of_which_a_part_stays_at_the_clients_is_not_handed_over(tmp_path: Path) -> None:
    shared = dataclasses.replace(task, exchange=lambda name: not name.startswith("4."))
    about = {"clients": CLIENTS, "seed": 1, "threads": 1, "progress": False}
    found = fedkit.simulate(shared, FedAvg(rounds=1, local=fedkit.Fit(steps=1)), **about)
    with pytest.raises(ExportError, match=r"4.weight, 4.bias stay at each client"):
        found.export(tmp_path / "b")


def test_a_folder_that_is_taken_is_said_before_anybody_is_asked(result: Result, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    asked: list[object] = []
    with pytest.raises(ConfigError, match="holds other files"):
        dataclasses.replace(result, ask=lambda *about: asked.append(about)).export(tmp_path)
    assert not asked


def test_scores_of_other_sites_are_not_compared() -> None:
    found = HandOver(graph="0" * 64, bounds=[1.0], variants=("int8",), criterion="loss:min")
    found.scores, found.agreement = {"fp32": {"loss": 1.0}, "int8": {"loss": 0.5}}, {"fp32": 1.0, "int8": 1.0}
    found.sites = {"fp32": 3, "int8": 2}
    assert found.objection("int8") == "2 clients have scored it, and 3 float32: export again"
    found.sites["int8"] = 3
    assert found.objection("int8") == ""


@pytest.mark.unmeasured
@pytest.mark.parametrize("name", ["CNN", "transformer"])
def test_float32_gives_what_pytorch_gives(name: str) -> None:
    (make, given) = next((make, given) for known, make, given, _ in NETWORKS if known == name)
    network = toy_task(name=name, model=make, inputs={"x": given})
    module = network.build(0).eval()
    content = convert(module, network).content
    assert difference(content, module, network) <= TOLERANCE
    assert same_classes(content, module, network) == 1.0


def test_a_site_that_converts_to_another_graph_refuses(result: Result) -> None:
    with pytest.raises(Refused, match="another graph") as refused:
        SiteModel(result.model, task).variant("1" * 64, "fp32", None)
    assert refused.value.reason is Reason.FAILED


def test_agreement_counts_rows_whose_answer_is_another(result: Result) -> None:
    converted = convert(result.model, task)
    ranges = np.tile([-0.01, 0.01], (len(converted.tensors), 1))  # which cut nearly everything off
    deployed = Deployed(result.model, build(converted, "int8", ranges), task=task)
    features = rows("bea").test.tensors[0]
    with torch.inference_mode():
        got, wanted = deployed(features), result.model(features)
    assert deployed.tally.rows == 80
    assert deployed.tally.agreeing == int((got.argmax(1) == wanted.argmax(1)).sum()) < 80
