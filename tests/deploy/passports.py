"""Passports to judge and to compare: one of everything, and changes to it."""

from __future__ import annotations

from typing import Any

from fedkit.deploy.passport import (
    Calibrated,
    ClientFacts,
    Examined,
    Measured,
    ModelFacts,
    Parity,
    Passport,
    PrivacyFacts,
    RunFacts,
    TaskFacts,
    TensorFacts,
)

EXAMINED = Examined(
    variant="int8",
    sites=4,
    pooled={"accuracy": 0.8, "auroc": None, "loss": 0.5, "mae": 2.0},
    passing={"accuracy>=0.7": 3, "loss<=0.7": 4},
    groups={
        "female": {"accuracy": 0.82, "loss": 0.4, "auroc": None},
        "male": {"accuracy": 0.76, "loss": 0.6, "auroc": 0.9},
    },
    noise={"0.1": {"accuracy": 0.79, "loss": 0.52, "mae": 1.9}},
    latency_s={"1": 0.004, "64": 0.02},
)
_FP32 = Measured(variant="fp32", passed=True, why="the base", valid={"accuracy": 0.8, "loss": 0.5}, agreement=1.0)
_INT8 = Measured(variant="int8", passed=True, why="it won", valid={"accuracy": 0.797, "loss": 0.51}, agreement=0.995)


def passport(**changes: Any) -> Passport:
    """A passport of a model that was quantised, examined and made private, but for `changes`."""
    scores = {"a": 0.85, "b": 0.75, "c": 0.8}
    found = Passport(
        created="2026-11-22T00:00:00+00:00",
        run=RunFacts(name="heart-1", seed=42, engine="simulation", rounds=15, round=15, strategy="FedAvg"),
        task=TaskFacts(
            name="heart",
            source=None,
            inputs=[TensorFacts(name="features", dtype="float32", shape=[None, 13])],
            outputs=[TensorFacts(name="risk", dtype="float32", shape=[None, 1])],
            metrics=["accuracy"],
        ),
        model=ModelFacts(weights="0" * 64, parameters=14),
        clients=[
            ClientFacts(pseudonym=name, rounds=15, test={"accuracy": score, "auroc": None}, epsilon=2.0 + score)
            for name, score in scores.items()
        ],
        test={"accuracy": 0.8, "loss": 0.5},
        privacy=PrivacyFacts(aggregation="masked", dp={"epsilon": 3.0, "delta": 1e-5}),
        calibration=Calibrated(method="mean", clients=3, rows=100, epsilon=0.1, delta=1e-6),
        parity=Parity(difference=1e-7, allowed=1e-5, batches=[1, 2, 64]),
        gate=[_FP32, _INT8],
        shipped="int8",
        examined=EXAMINED,
        versions={"torch": "2.13.0"},
    )
    return found.replace(**changes)
