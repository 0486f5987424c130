"""A run with one of everything, and changes to it."""

from __future__ import annotations

from typing import Any

from fedkit.config import DP, Evaluation, Privacy
from fedkit.errors import Reason
from fedkit.report.facts import Facts
from fedkit.rounds.call import Refusal
from fedkit.rounds.journal import RoundRecord
from fedkit.saved import BestRound

CLIENTS = ("ada", "bea", "cyd")


def record(number: int, clients: tuple[str, ...] = CLIENTS, **changes: Any) -> RoundRecord:
    scores = {"loss": 1 / (number + 1), "accuracy": 1 - 1 / (number + 1)}
    found: dict[str, Any] = {
        "loss": 1 / number,
        "metrics": scores,
        "per_client": dict.fromkeys(clients, scores),
        "seconds": 2.0,
        "bytes_up": 3000,
        "bytes_down": 1000,
        "epsilon": dict.fromkeys(clients, 0.25 * number),
    }
    return RoundRecord(number, clients=clients, **(found | changes))


def facts(**changes: Any) -> Facts:
    late = Refusal("cyd", Reason.DEADLINE, "no answer within 2 s")
    found: dict[str, Any] = {
        "name": "heart-1",
        "task": "heart",
        "engine": "simulation",
        "privacy": Privacy(aggregation="masked", dp=DP(epsilon=3.0, delta=1e-4)),
        "evaluate": Evaluation(best="accuracy:max"),
        "strategy": {"name": "FedAvg", "rounds": 4},
        "seed": 42,
        "clients": CLIENTS,
        "history": (
            record(1),
            record(2, ("ada", "bea"), refusals=(late,)),
            record(3, rejected="accuracy is 0.1 after 0.7"),
            record(4, seconds=4.0),
        ),
        "abandoned": (record(4, ("ada",), seconds=1.5, refusals=(late,)),),
        "test": {"loss": 0.31, "accuracy": 0.87},
        "test_per_client": {"ada": {"loss": 0.3, "accuracy": 0.9}},
        "refusals": (Refusal("bea", Reason.POLICY, "scores stay here"),),
        "best": BestRound(round=4, metrics={"accuracy": 0.8}, test={"loss": 0.31, "accuracy": 0.87}),
    }
    return Facts(**(found | changes))
