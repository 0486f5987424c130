"""What a tracker is told of a run, what it is not told, and that the run does not notice."""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fedkit
from fedkit.cli import app
from fedkit.errors import ConfigError, Reason, RunFailed, TrackingWarning
from fedkit.rounds.call import Refusal
from fedkit.rounds.conduct import Best, Outcome
from fedkit.rounds.journal import RoundRecord
from fedkit.rounds.shield import EVERY_CLIENT
from fedkit.strategies import FedAvg
from fedkit.strategy import Strategy
from fedkit.testing import toy_task
from fedkit.tracking import About, Begun, Ended, Event, Scored, Teller, Tracking, shipped, story, tracker_for
from fedkit.weights import Weights
from tests.deploy.passports import passport

FIT = fedkit.Fit(steps=3, batch_size=8, lr=0.1)
SCORES = {"loss": 0.5, "accuracy": 0.75}


def simulate(strategy: Strategy | None = None, **settings: object) -> fedkit.Result:
    settings = {"clients": ["ann", "bob"], "seed": 5, "threads": 1, "progress": False} | settings
    return fedkit.simulate(toy_task(), strategy or FedAvg(rounds=2, local=FIT), **settings)


def about(engine: str = "federation", **settings: object) -> About:
    settings = {"privacy": fedkit.Privacy(aggregation="masked")} | settings
    return About(run="r-1", task=toy_task(), strategy=FedAvg(rounds=2), seed=5, engine=engine, **settings)


def record(**fields: object) -> RoundRecord:
    known = {"clients": ("ann", "bob"), "examples": 90, "loss": 0.4, "metrics": SCORES, "scored": ("ann", "bob")}
    return RoundRecord(round=1, **(known | fields))


def outcome(*records: RoundRecord, **fields: object) -> Outcome:
    weights = Weights.from_module(torch.nn.Linear(1, 1))
    return Outcome(weights, list(records), [], **({"test": SCORES} | fields))


def told(record: RoundRecord, engine: str = "federation") -> dict[str, float]:
    events: list[Event] = []
    Tracking(events.append, about(engine))(record)
    [scored] = events
    assert isinstance(scored, Scored)
    return dict(scored.metrics)


class Spoiler:
    """A tracker that draws from every global generator, and fails at its nth event."""

    def __init__(self, fails_at: int = 0) -> None:
        self.events: list[Event] = []
        self.fails_at = fails_at

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        random.random(), np.random.rand(), torch.rand(3), torch.manual_seed(1)
        if len(self.events) == self.fails_at:
            raise OSError("http://ann:s3cret@host/api is gone")


def test_a_run_is_told_from_its_settings_to_its_test_scores() -> None:
    events: list[Event] = []
    seen: list[RoundRecord] = []
    evaluate = fedkit.Evaluation(best="loss:min")
    result = simulate(track=events.append, evaluate=evaluate, on_round=seen.append)
    begun, _, second, ended = events
    assert isinstance(begun, Begun)
    assert (begun.run, begun.task) == ("toy", "toy")
    assert begun.params["strategy.name"] == "FedAvg"
    assert (begun.params["strategy.local.steps"], begun.params["strategy.local.lr"]) == (3, 0.1)
    assert (begun.params["seed"], begun.params["clients"], begun.params["evaluate.best"]) == (5, 2, "loss:min")
    assert begun.tags["fedkit.engine"] == "simulation"
    assert begun.tags["fedkit.aggregation"] == "plain"
    assert len(begun.tags["fedkit.source"]) == 64
    assert isinstance(second, Scored)
    assert second.metrics["train/loss"] == result.history[1].loss
    assert second.metrics["valid/loss"] == result.history[1].metrics["loss"]
    assert second.metrics["client/ann/valid/loss"] == result.history[1].per_client["ann"]["loss"]
    assert second.metrics["bytes/up"] == result.history[1].bytes_up
    assert seen == result.history
    assert isinstance(ended, Ended)
    assert (ended.state, ended.round) == ("finished", 2)
    assert ended.metrics["test/loss"] == result.test["loss"]
    assert ended.tags["fedkit.model"] == result.weights.digest


def test_a_tracker_alters_no_bit_of_a_run_even_where_it_draws_random_numbers() -> None:
    plain, spoiler = simulate(), Spoiler()
    assert simulate(track=spoiler).weights == plain.weights
    assert len(spoiler.events) == 4


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_tracker_that_fails_costs_one_warning_and_is_told_nothing_more(fails_at: int) -> None:
    spoiler = Spoiler(fails_at)
    with pytest.warns(TrackingWarning, match="goes on without it") as caught:
        result = simulate(track=spoiler)
    assert len(caught) == 1
    assert "s3cret" not in str(caught[0].message)
    assert len(spoiler.events) == fails_at
    assert result.weights == simulate().weights


def test_a_run_that_fails_or_is_interrupted_is_told_so() -> None:
    events: list[Event] = []
    rule = fedkit.Participation(quorum=3, attempts=1)
    with pytest.raises(RunFailed):
        simulate(FedAvg(rounds=2, local=FIT, participation=rule), track=events.append)
    assert [event.state for event in events if isinstance(event, Ended)] == ["failed"]

    def stop(_: RoundRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(track=events.append, on_round=stop)
    assert [event.state for event in events if isinstance(event, Ended)] == ["failed", "stopped"]


def test_of_clients_that_release_nothing_no_name_and_no_number_of_their_own_is_told() -> None:
    refused = (Refusal("cyd", Reason.POLICY, "cyd does not allow it"),)
    private = record(refusals=refused, epsilon={"ann": 1.5, "bob": 2.5})
    alone = record(clients=("ann",), scored=("ann",))
    whole = story(about(), outcome(private, alone, refusals=refused), ["ann", "bob", "cyd"])
    assert not any(name in repr(whole) for name in ("ann", "bob", "cyd"))
    _, first, second, ended = whole
    assert first.metrics["privacy/epsilon"] == 2.5
    assert (first.metrics["clients"], first.metrics["refusals"], first.metrics["valid/loss"]) == (2, 1, 0.5)
    assert {"train/loss", "examples", "valid/loss"}.isdisjoint(second.metrics)
    assert ended.metrics["test/accuracy"] == 0.75


def test_what_is_pooled_over_one_client_is_told_where_it_releases_that_or_is_simulated() -> None:
    alone = {"clients": ("ann",), "scored": ("ann",)}
    released = told(record(**alone, per_client={"ann": SCORES}))
    assert (released["train/loss"], released["valid/loss"]) == (0.4, 0.5)
    assert released["client/ann/valid/accuracy"] == 0.75
    assert told(record(**alone), "simulation")["train/loss"] == 0.4


def test_test_scores_of_a_single_client_are_its_own() -> None:
    refusals = (Refusal("bob", Reason.LOST, ""),)
    best = Best(1, Weights.from_module(torch.nn.Linear(1, 1)), {}, SCORES)
    ended = story(about(), outcome(record(), refusals=refusals, best=best), ["ann", "bob"])[-1]
    assert ended.metrics == {"best/round": 1.0}
    shown = {"refusals": refusals, "test_per_client": {"ann": SCORES}}
    ended = story(about(), outcome(record(), **shown), ["ann", "bob"])[-1]
    assert (ended.metrics["test/loss"], ended.metrics["client/ann/test/loss"]) == (0.5, 0.5)


def test_scores_of_very_many_clients_are_left_to_the_history() -> None:
    many = {f"c{one:02d}": SCORES for one in range(33)}
    assert not any(name.startswith("client/") for name in told(record(per_client=many), "simulation"))


def test_epsilon_that_all_clients_share_is_told() -> None:
    assert told(record(epsilon={EVERY_CLIENT: 3.0}))["privacy/epsilon"] == 3.0


def test_how_a_coordinator_protects_a_run_is_known_at_its_end() -> None:
    begun, *_, ended = story(about(), outcome(record()), ["ann", "bob"])
    assert "fedkit.aggregation" not in begun.tags
    assert ended.tags["fedkit.aggregation"] == "masked"
    assert ended.tags["fedkit.dp"] == "none"


def test_a_bundle_is_told_by_what_its_passport_says(tmp_path: Path) -> None:
    whole = story(about(), outcome(record()), ["ann", "bob"])
    found = shipped(tmp_path, passport(), "ab" * 32, whole)
    assert found.model == whole[-1].tags["fedkit.model"]
    assert found.tags["fedkit.signer"] == "ab" * 32
    assert found.tags["fedkit.variant"] == passport().shipped
    assert float(found.tags["fedkit.epsilon"]) > 0
    open_run = passport(privacy=passport().privacy.replace(dp=None))
    assert shipped(tmp_path, open_run, "", whole).tags["fedkit.epsilon"] == "none"


@pytest.mark.parametrize(("track", "library"), [("mlflow", "mlflow"), ("tensorboard:x", "torch.utils.tensorboard")])
def test_a_library_that_is_not_there_is_named_before_anything_is_trained(
    track: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    extra = track.partition(":")[0]
    with pytest.raises(ConfigError, match=rf"pip install fedkit\[{extra}\]"):
        simulate(track=track, on_round=lambda _: pytest.fail("it was trained"))


def test_a_tracker_that_there_is_not_is_refused_without_the_password_in_its_name() -> None:
    with pytest.raises(ConfigError, match=r"mlflow:URI.*\*\*\*@host") as caught:
        tracker_for("wandb://me:s3cret@host")
    assert "s3cret" not in str(caught.value)
    assert tracker_for(None) is None


def test_nobody_is_told_where_there_is_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Teller(None)(lambda: pytest.fail("nobody asked"))


def test_the_command_line_takes_a_tracker_and_refuses_one_that_would_see_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text('[run]\nname = "r"\ntask = "heart"\n[strategy]\nname = "FedAvg"\n[simulation]\nclients = ["va"]\n')
    for command, said in (
        (["simulate", str(run), "--track", "wandb"], "mlflow:URI"),
        (["run", str(run), "--track", "wandb"], "mlflow:URI"),
        (["run", str(run), "--track", "mlflow", "--detach"], "--track to fedkit export"),
    ):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 1
        assert said in " ".join(found.output.split())
