"""fedkit: privacy-preserving federated learning, from the first simulation to the deployed ONNX model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedkit.config import DP, Evaluation, Participation, Privacy, Settings
from fedkit.errors import FedkitError
from fedkit.exam import Questions
from fedkit.gate import Gate
from fedkit.queries import Histogram, LabelCounts, Moments
from fedkit.strategy import Federation, Strategy
from fedkit.task import Data, Site, Standardize, Task, Tensor
from fedkit.weights import Manifest, Weights
from fedkit.work import Evaluate, Fit, Gradient, Summarize

if TYPE_CHECKING:
    from fedkit.crypto.box import Owner
    from fedkit.crypto.sealing import SealedModel
    from fedkit.deploy.settings import Export, Limits
    from fedkit.remote import connect
    from fedkit.result import Result
    from fedkit.rounds.journal import RoundRecord
    from fedkit.simulation import simulate

__version__ = "0.1.0"

__all__ = [
    "DP",
    "Data",
    "Evaluate",
    "Evaluation",
    "Export",
    "Federation",
    "FedkitError",
    "Fit",
    "Gate",
    "Gradient",
    "Histogram",
    "LabelCounts",
    "Limits",
    "Manifest",
    "Moments",
    "Owner",
    "Participation",
    "Privacy",
    "Questions",
    "Result",
    "RoundRecord",
    "SealedModel",
    "Settings",
    "Site",
    "Standardize",
    "Strategy",
    "Summarize",
    "Task",
    "Tensor",
    "Weights",
    "connect",
    "simulate",
]

# What runs things is loaded when it is first used, so that describing a task or a strategy stays quick.
_LATER = {
    "Export": "fedkit.deploy.settings",
    "Limits": "fedkit.deploy.settings",
    "Owner": "fedkit.crypto.box",
    "Result": "fedkit.result",
    "RoundRecord": "fedkit.rounds.journal",
    "SealedModel": "fedkit.crypto.sealing",
    "connect": "fedkit.remote",
    "simulate": "fedkit.simulation",
}
_LATER_MODULES = frozenset({"privacy"})


def __getattr__(name: str) -> Any:
    if name in _LATER_MODULES:
        return importlib.import_module(f"fedkit.{name}")
    if name not in _LATER:
        raise AttributeError(f"module 'fedkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
