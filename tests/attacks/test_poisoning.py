"""Clients that send whatever they like ruin a plain mean, and not the model of a robust rule, on the demo's data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

import fedkit
from fedkit import rng
from fedkit.demo.heart import HOSPITALS, load, task
from fedkit.errors import Reason
from fedkit.rounds.conduct import Outcome
from fedkit.simulation import splits
from fedkit.strategies import CoordinateMedian, CyclicWeightTransfer, FedAvg, Krum, MultiKrum, NormClipping, TrimmedMean
from fedkit.strategy import Strategy
from fedkit.testing import InMemoryFederation
from fedkit.work import Answer, Update

CLIENTS = [f"site-{i:02}" for i in range(11)]
LIARS = CLIENTS[2:5]
FIT = fedkit.Fit(steps=12, batch_size=8, lr=0.05)
RULES: dict[str, Strategy] = {
    "median": CoordinateMedian(rounds=4, local=FIT, byzantine=3),
    "trimmed mean": TrimmedMean(rounds=4, local=FIT, trim=3),
    "Krum": Krum(rounds=4, local=FIT, byzantine=3),
    "Multi-Krum": MultiKrum(rounds=4, local=FIT, byzantine=3),
}
AVERAGE = FedAvg(rounds=4, local=FIT)
SCALED = NormClipping(rounds=4, local=FIT, max_norm=0.2)

Attack = Callable[[Answer], Answer]


@functools.cache
def _rows(split: str) -> tuple[torch.Tensor, ...]:
    parts = zip(*(getattr(load(hospital), split).tensors for hospital in HOSPITALS), strict=True)
    return tuple(torch.cat(columns) for columns in parts)


def _data(client: str) -> fedkit.Data:
    train = _rows("train")
    index = torch.from_numpy(splits.iid(len(train[0]), CLIENTS, seed=1)[client])
    held = torch.arange(len(index)) % 3 == 0  # a tenth would be four rows, too few to judge by
    kept, valid = (tuple(column[index[chosen]] for column in train) for chosen in (~held, held))
    return fedkit.Data(train=kept, valid=valid, test=_rows("test"))


def _sent(change: Callable[[fedkit.Weights], fedkit.Weights], **more: object) -> Attack:
    """A client that sends another update than the one it trained."""

    def lie(answer: Answer) -> Answer:
        if not isinstance(answer, Update):
            return answer
        return dataclasses.replace(answer, weights=change(answer.weights), **more)

    return lie


def _noise(update: fedkit.Weights) -> fedkit.Weights:
    draw = rng.generator(5, "noise", update.digest)
    return update.with_vector(10 * draw.standard_normal(update.vector.size))


ATTACKS: dict[str, Attack] = {
    "flipped": _sent(lambda update: -10 * update),
    "scaled": _sent(lambda update: -1e6 * update),
    "noise": _sent(_noise),
    "in agreement": _sent(lambda update: update.with_vector(np.full(update.vector.size, -0.5))),
    "a claim of rows": _sent(lambda update: -3 * update, examples=1 << 40),
}


PATIENT = _sent(lambda update: -3 * update)


def trained(
    strategy: Strategy,
    attack: Attack | None = None,
    liars: Sequence[str] = LIARS,
    evaluate: fedkit.Evaluation | None = None,
) -> Outcome:
    faults = {} if attack is None else dict.fromkeys(liars, attack)
    world = InMemoryFederation(dataclasses.replace(task, data=_data), CLIENTS, seed=1, faults=faults)
    return world.run(strategy, evaluate=evaluate)


@functools.cache
def honest_accuracy() -> float:
    return trained(AVERAGE).test["accuracy"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_plain_mean_is_ruined_by_three_of_eleven(attack: str) -> None:
    assert honest_accuracy() > 0.76
    assert trained(AVERAGE, ATTACKS[attack]).test["accuracy"] < 0.65


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", RULES)
def test_a_robust_rule_keeps_its_accuracy_against_three_of_eleven(rule: str, attack: str) -> None:
    assert trained(RULES[rule], ATTACKS[attack]).test["accuracy"] >= honest_accuracy() - 0.04


def test_multi_krum_averages_none_of_the_liars() -> None:
    found = trained(RULES["Multi-Krum"], ATTACKS["flipped"])
    assert len(found.state["chosen"]) == len(CLIENTS) - 3 - 2
    assert not set(found.state["chosen"]) & set(LIARS)


def test_clipping_bounds_what_a_huge_update_does_in_a_round() -> None:
    found, without = trained(SCALED, ATTACKS["scaled"]), trained(SCALED)
    assert (found.weights - without.weights).norm() <= 4 * 2 * 0.2
    assert found.test["loss"] < 1.0 < trained(AVERAGE, ATTACKS["scaled"]).test["loss"]


def test_one_liar_more_than_stated_may_ruin_a_trimmed_mean() -> None:
    rule = TrimmedMean(rounds=4, local=FIT, trim=2)
    assert trained(rule, ATTACKS["scaled"]).test["accuracy"] < 0.65


# -- weight transfer, and sums that hide single updates ----------------------------------------------------------------

HOPS = CyclicWeightTransfer(rounds=3, local=FIT)
GATED = HOPS.replace(gate=fedkit.Gate(max_drop=0.15))


def test_one_liar_in_a_chain_ruins_it_and_a_gate_undoes_its_hops() -> None:
    liar = CLIENTS[-1:]  # whose hop is the last of each round, and of the run
    ruined = trained(HOPS, ATTACKS["flipped"], liar)
    found = trained(GATED, ATTACKS["flipped"], liar, fedkit.Evaluation(best="loss:min", max_drop=0.15))
    assert all(record.stands for record in found.history)
    assert ruined.test["accuracy"] < 0.65
    assert found.test["accuracy"] >= honest_accuracy() - 0.04


@pytest.mark.parametrize("attack", ["flipped", "noise", "in agreement"])
def test_a_gate_undoes_the_hops_of_every_second_client(attack: str) -> None:
    liars = CLIENTS[1::2]
    found = trained(GATED, ATTACKS[attack], liars)
    assert trained(HOPS, ATTACKS[attack], liars).test["accuracy"] < 0.7
    assert found.test["accuracy"] >= honest_accuracy() - 0.04
    undone = [refusal.client for record in found.history for refusal in record.refusals]
    assert set(undone) == set(liars)
    assert all(refusal.reason is Reason.GATE for record in found.history for refusal in record.refusals)


def test_a_mean_that_cannot_be_inspected_is_kept_from_ruin_and_not_from_patience() -> None:
    gate = fedkit.Evaluation(best="loss:min", max_drop=0.05)
    ruined = trained(AVERAGE, ATTACKS["flipped"], evaluate=gate)
    assert not any(record.stands for record in ruined.history)
    assert ruined.test == trained(AVERAGE.replace(rounds=1), ATTACKS["flipped"], evaluate=gate).test  # as at the start
    patient = trained(AVERAGE.replace(rounds=8), PATIENT, evaluate=gate)
    assert all(record.stands for record in patient.history)
    assert patient.test["loss"] > trained(AVERAGE.replace(rounds=8), evaluate=gate).test["loss"] + 0.2
