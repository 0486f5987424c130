"""fedkit: privacy-preserving federated learning, from the first simulation to the deployed ONNX model."""

from __future__ import annotations

from fedkit.config import Evaluation, Participation, Settings
from fedkit.errors import FedkitError
from fedkit.queries import Histogram, LabelCounts, Moments
from fedkit.result import Result
from fedkit.rounds.journal import RoundRecord
from fedkit.simulation import simulate
from fedkit.strategy import Federation, Strategy
from fedkit.task import Data, Site, Standardize, Task, Tensor
from fedkit.weights import Manifest, Weights
from fedkit.work import Evaluate, Fit, Gradient, Summarize

__version__ = "0.1.0"

__all__ = [
    "Data",
    "Evaluate",
    "Evaluation",
    "Federation",
    "FedkitError",
    "Fit",
    "Gradient",
    "Histogram",
    "LabelCounts",
    "Manifest",
    "Moments",
    "Participation",
    "Result",
    "RoundRecord",
    "Settings",
    "Site",
    "Standardize",
    "Strategy",
    "Summarize",
    "Task",
    "Tensor",
    "Weights",
    "simulate",
]
