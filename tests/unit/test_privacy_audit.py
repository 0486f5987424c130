"""Attacks on private training: what they find of a claim that holds, and that they find one that does not.

Statistical tests state how often chance alone fails them: at most once in 10^9 runs.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import nn
from typer.testing import CliRunner

import fedkit
from fedkit.cli import app
from fedkit.demo.heart import load
from fedkit.errors import DataError
from fedkit.privacy import accounting
from fedkit.privacy.audit import Members, allowed_advantage, canaries, inversion, membership
from fedkit.privacy.dpsgd import PrivateSteps
from fedkit.privacy.plan import planned
from fedkit.privacy.randomness import Randomness
from fedkit.rounds.assignment import Assignment, Parcel, Private
from fedkit.strategies import FedAvg
from fedkit.trainer.client import LocalClient, MemoryStore
from fedkit.trainer.trainer import Trainer
from fedkit.weights import Weights
from fedkit.work import Fit

CHANCE = 1e-9
CLAIM, DELTA = 3.0, 1e-5
DP = fedkit.DP(epsilon=CLAIM, delta=DELTA)
COUNT = 1000


def plan_of(steps: int = 10, **fields: Any) -> PrivateSteps:
    """What a client plans for the claim."""
    found = planned(Private(DP, visits=1), Fit(steps=steps, **({"batch_size": "all"} | fields)), COUNT).training
    assert found is not None
    return found


# -- canaries ----------------------------------------------------------------------------------------------------------


def test_the_bound_of_1000_canaries_is_below_the_claim_with_the_noise() -> None:
    """The theorem allows a false alarm in one run of twenty; at this noise it takes one in 10^12.

    Steps over all rows are one Gaussian of mean sqrt(steps) / noise = 2/3 for each canary. A bound above 3 takes all of
    the 124 outermost guesses right, of which each is so with probability .80, or all but two of 250, less likely yet.
    """
    plan = plan_of()
    assert plan.q == 1.0
    assert math.sqrt(plan.steps) / plan.noise_multiplier == pytest.approx(2 / 3, rel=1e-2)
    found = canaries(plan, DELTA)
    assert found.canaries == COUNT
    assert found.epsilon < CLAIM


def test_it_is_above_the_claim_without_the_noise() -> None:
    assert canaries(replace(plan_of(), noise_multiplier=0.0), DELTA).epsilon > CLAIM


def test_it_is_above_the_claim_with_a_fifth_of_the_noise() -> None:
    """Of the 500 outermost guesses less than one is wrong on average, and 14 may be."""
    plan = plan_of()
    assert canaries(replace(plan, noise_multiplier=plan.noise_multiplier / 5), DELTA).epsilon > CLAIM


def test_it_is_above_the_claim_where_the_noise_is_drawn_and_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Randomness, "normal", lambda self, count, device="cpu": torch.zeros(count).double())
    assert canaries(plan_of(), DELTA).epsilon > CLAIM


def test_it_is_above_the_claim_where_nothing_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedkit.privacy.clipping._factors_of", lambda norms, clip: torch.ones_like(norms))
    assert canaries(plan_of(), DELTA).epsilon > CLAIM


def test_it_is_above_the_claim_where_the_accounting_forgets_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise for one step, and 36 are taken: six times the signal of the claim."""
    monkeypatch.setattr("fedkit.privacy.plan.noise_for", lambda e, d, q, count, *_: accounting.noise_for(e, d, q, 1))
    assert canaries(plan_of(36), DELTA).epsilon > CLAIM


def test_canaries_are_sampled_as_rows_are() -> None:
    """Without noise each canary that was there in any step stands out: at q = 1/2 and 60 steps all of them."""
    plan = plan_of(60, batch_size=COUNT // 2)
    assert plan.q == 0.5
    assert canaries(replace(plan, noise_multiplier=0.0), DELTA).epsilon > CLAIM
    assert canaries(plan, DELTA).epsilon < CLAIM


# -- the update --------------------------------------------------------------------------------------------------------


def test_the_update_that_a_client_sends_moves_by_the_planned_noise() -> None:
    """Rows without a gradient, so that the update is its noise: lr / expected rows * noise * clip * sqrt(steps).

    Bounds of the chi-squared distribution.
    """
    rows, features, lr, clip = 40, 20_000, 0.3, 0.7
    empty = torch.zeros(rows, features), torch.zeros(rows, dtype=torch.int64)
    task = fedkit.Task(
        name="toy",
        model=lambda: nn.Linear(features, 2, bias=False),
        data=lambda client: fedkit.Data(empty),
        loss=nn.CrossEntropyLoss(),
    )
    dp = fedkit.DP(epsilon=CLAIM, delta=DELTA, max_grad_norm=clip)
    work = Fit(steps=4, batch_size=8, lr=lr)
    asked = Assignment("1", "run", 7, 1, "a", work, "update", private=Private(dp, visits=3))
    client = LocalClient("a", Trainer(task, 7, device="cpu"), MemoryStore())
    sent = client.perform(asked, Parcel(Weights.from_module(task.build(0)))).weights.vector.astype(np.float64)
    noise = accounting.noise_for(CLAIM, DELTA, 8 / rows, 3 * 4)  # three visits of four steps
    squares = float(np.square(sent / (lr / 8 * noise * clip * math.sqrt(4))).sum())
    assert chi2.ppf(CHANCE / 2, sent.size) < squares < chi2.isf(CHANCE / 2, sent.size)


# -- membership --------------------------------------------------------------------------------------------------------


def memorisable(client: str) -> fedkit.Data:
    """Sixty rows of as many features as it takes to learn random labels by heart."""
    source = torch.Generator().manual_seed(5)
    return fedkit.Data((torch.randn(60, 300, generator=source), torch.randint(2, (60,), generator=source)))


def task_of(**fields: Any) -> fedkit.Task:
    usual = {"name": "toy", "model": lambda: nn.Linear(300, 2), "data": memorisable, "loss": nn.CrossEntropyLoss()}
    return fedkit.Task(**usual | fields)


def halved() -> Members:
    """Every other row is trained on."""
    members = Members.of(task_of(), "a", COUNT)
    return replace(members, coins=torch.arange(len(members.coins)) % 2 == 0)


def trained(members: Members, privacy: fedkit.Privacy) -> nn.Module:
    work = FedAvg(rounds=1, local=Fit(steps=40, batch_size="all", lr=0.3))
    run = partial(fedkit.simulate, clients=["a"], seed=1, threads=1, device="cpu", progress=False)
    return run(members.training, work, privacy=privacy).model


def test_a_row_learned_by_heart_is_known_by_its_loss_and_not_under_the_claim() -> None:
    """Without privacy nothing is drawn; with it, a bound above 3 takes more than sixty right guesses."""
    members = halved()
    assert members.training.data("a").train[:][0].shape == (30, 300)
    plain = membership(members, trained(members, fedkit.Privacy()), DELTA)
    assert (plain.rows, plain.trained_on, plain.auc) == (60, 30, 1.0)
    assert plain.advantage > 0.3
    assert plain.bound.epsilon > 1.0
    private = membership(members, trained(members, fedkit.Privacy(dp=DP)), DELTA)
    assert private.bound.epsilon < CLAIM
    assert private.auc < plain.auc


def test_a_model_that_is_not_finite_tells_nothing() -> None:
    module = task_of().build(0)
    nn.init.constant_(module.weight, math.nan)
    found = membership(halved(), module, DELTA)
    assert (found.auc, found.advantage, found.bound.epsilon) == (0.5, 0.0, 0.0)


def test_so_many_rows_are_drawn_at_most_and_too_few_are_refused() -> None:
    members = Members.of(task_of(), "a", 25)
    assert len(members.rows) == len(members.coins) == 25
    assert 0 < len(members.training.data("a").train) == int(members.coins.sum()) < 25
    few = task_of(data=lambda client: fedkit.Data((torch.zeros(19, 300), torch.zeros(19, dtype=torch.int64))))
    with pytest.raises(DataError, match="a has 19 training rows; an audit needs 20 or more"):
        Members.of(few, "a", COUNT)


def test_the_advantage_that_a_claim_allows_is_none_at_0_and_all_in_the_end() -> None:
    assert allowed_advantage(0.0, 0.0) == 0.0
    assert allowed_advantage(0.0, 0.01) == pytest.approx(0.01)
    e = math.exp(3.0)
    assert allowed_advantage(3.0, 1e-3) == pytest.approx((e - 1 + 2e-3) / (e + 1), rel=1e-12)
    assert allowed_advantage(1000.0, 0.5) == 1.0


# -- gradient inversion ------------------------------------------------------------------------------------------------


def inverted(model: Any, data: Any = memorisable, noise: float = 1.0) -> tuple[str | None, int, int, int]:
    task = task_of(model=model, data=data)
    plan = PrivateSteps(noise, 1.0, "all", 1, COUNT)
    found = inversion(Members.of(task, "a", COUNT), task.build(3), plan)
    return found.layer, found.rows, found.recovered, found.recovered_private


def test_a_row_is_read_off_a_plain_gradient_of_a_batch_of_one_and_not_off_a_noisy_one() -> None:
    assert inverted(lambda: nn.Sequential(nn.Linear(300, 8), nn.Tanh(), nn.Linear(8, 2))) == ("0", 20, 20, 0)
    assert inverted(lambda: nn.Linear(300, 2)) == ("", 20, 20, 0)


def test_a_clip_alone_protects_no_row() -> None:
    assert inverted(lambda: nn.Linear(300, 2), noise=0.0) == ("", 20, 20, 20)


def test_an_image_is_read_where_the_first_linear_layer_sees_it_and_else_what_that_layer_sees() -> None:
    def images(client: str) -> fedkit.Data:
        x, y = memorisable(client).train[:]
        return fedkit.Data((x.reshape(60, 3, 10, 10), y))

    flat = nn.Sequential(nn.Flatten(), nn.Linear(300, 2))
    assert inverted(lambda: flat, images) == ("1", 20, 20, 0)
    folded = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(256, 2))
    assert inverted(lambda: folded, images) == ("3", 20, 20, 0)


def test_without_a_linear_layer_with_a_bias_nothing_is_tried() -> None:
    assert inverted(lambda: nn.Linear(300, 2, bias=False)) == (None, 0, 0, 0)


def test_a_layer_that_sees_several_words_gives_none_of_them_away_so_simply() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = nn.Linear(30, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.each(x.reshape(len(x), 10, 30)).mean(1)

    assert inverted(Words) == ("each", 20, 0, 0)


# -- the command -------------------------------------------------------------------------------------------------------


def audit(*options: str) -> Any:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["privacy", "audit", "--steps", "5", *options])


def test_the_command_attacks_the_demo_and_ends_well() -> None:
    done = audit("--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["task"], facts["client"], facts["epsilon"], facts["holds"]) == ("heart", "cleveland", 3.0, True)
    assert facts["noise_multiplier"] == accounting.noise_for(3.0, 1e-5, 1.0, 5)
    hidden, members, read = facts["attacks"]
    assert hidden["epsilon_at_least"] < 3.0 < hidden["figures"]["without_noise"]["epsilon"]
    assert members["figures"]["with_noise"]["rows"] == len(load("cleveland").train)
    assert (read["figures"]["recovered"], read["figures"]["recovered_private"]) == (20, 0)


def test_the_command_ends_with_1_and_a_sentence_where_the_claim_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Randomness, "normal", lambda self, count, device="cpu": torch.zeros(count).double())
    done = audit("--task", "heart", "--client", "va")
    assert done.exit_code == 1
    told = " ".join(done.stdout.split())  # where lines break is the terminal's business
    assert re.search(r"The claim of 3 does not hold: by canaries, epsilon is [4-9]\.\d\d or more", told)
    assert "beyond the claim" in told


def test_the_command_says_what_an_audit_cannot_show() -> None:
    done = audit("--batch-size", "20", "--canaries", "100")
    assert done.exit_code == 0, done.output
    told = " ".join(done.stdout.split())
    assert "5 steps of 10 % of the rows" in told
    assert "with sampling one run shows far less than there may be" in told
    assert "it cannot refute this claim" in told
    assert "Nothing contradicts the claim" in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--task", "heart"), "say whose rows of heart"),
        (("--task", "hart", "--client", "va"), "did you mean 'heart'?"),
        (("--task", "fedkit.demo.heart:FEATURES", "--client", "va"), "not a fedkit.Task"),
        (("--delta", "0.01"), "delta 0.01 is audited by 100 canaries at most, got 1000"),
    ],
)
def test_what_cannot_be_audited_is_said_before_anything_is_trained(options: tuple[str, ...], said: str) -> None:
    done = audit(*options)
    assert done.exit_code == 1
    assert said in " ".join(done.stderr.split())
