"""The demo's task: heart disease from 13 features, at four hospitals that keep their data.

Data, features and split are those of FLamby's Fed-Heart-Disease (Ogier du Terrail et al. 2022). `data/LICENCE.md` says
where the rows come from.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedkit.errors import DataError
from fedkit.task import Data, Standardize, Task, Tensor

__all__ = ["BOUNDS", "FEATURES", "HOSPITALS", "load", "rows", "task"]

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")

# Public ranges, from what the quantities can be and not from the data.
RANGES = {
    "age": (0, 120),
    "sex": (0, 1),
    "trestbps": (0, 300),
    "chol": (0, 700),
    "fbs": (0, 1),
    "thalach": (0, 250),
    "exang": (0, 1),
    "oldpeak": (-5, 10),
    "cp_2": (0, 1),
    "cp_3": (0, 1),
    "cp_4": (0, 1),
    "restecg_1": (0, 1),
    "restecg_2": (0, 1),
}
FEATURES = tuple(RANGES)
BOUNDS = [(float(low), float(high)) for low, high in RANGES.values()]

_COLUMNS = {"age": 0, "sex": 1, "trestbps": 3, "chol": 4, "fbs": 5, "thalach": 7, "exang": 8, "oldpeak": 9}
_ONE_HOT = {"cp": (2, (2, 3, 4)), "restecg": (6, (1, 2))}  # column, values that get a feature (the first has none)
_DROPPED = (10, 11, 12)  # slope, ca, thal: missing nearly everywhere outside Cleveland
_LABEL = 13

Table: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def rows(hospital: str) -> Table:
    """All complete rows of one hospital: features (n, 13) and labels (n, 1), 1 for disease."""
    if hospital not in HOSPITALS:
        raise DataError(f"there is no hospital {hospital!r}; there are {', '.join(HOSPITALS)}")
    text = _file(f"processed.{hospital}.data")
    kept = [line.split(",") for line in text.split()]
    kept = [row for row in kept if not any(row[i].strip() == "?" for i in range(14) if i not in _DROPPED)]
    columns = {name: [float(row[i]) for row in kept] for name, i in _COLUMNS.items()}
    for name, (i, values) in _ONE_HOT.items():
        columns |= {f"{name}_{value}": [float(float(row[i]) == value) for row in kept] for value in values}
    features = np.array([columns[name] for name in FEATURES], dtype=np.float32).T
    labels = np.array([[float(float(row[_LABEL]) > 0)] for row in kept], dtype=np.float32)
    return features, labels


@functools.cache
def load(hospital: str) -> Data:
    """One hospital's rows, split into training and test."""
    features, labels = rows(hospital)
    train = np.zeros(len(labels), dtype=bool)
    train[json.loads(_file("split.json"))[hospital]] = True
    return Data(train=(features[train], labels[train]), test=(features[~train], labels[~train]))


def _file(name: str) -> str:
    return resources.files("fedkit.demo").joinpath("data", name).read_text()


def _accuracy() -> object:
    from torchmetrics.classification import BinaryAccuracy

    return BinaryAccuracy()


def _auroc() -> object:
    from torchmetrics.classification import BinaryAUROC

    return BinaryAUROC(thresholds=200)


task = Task(
    name="heart",
    model=lambda: nn.Linear(len(FEATURES), 1),
    data=load,
    loss=nn.BCEWithLogitsLoss(),
    optimizer=torch.optim.SGD,
    metrics={"accuracy": _accuracy, "auroc": _auroc},
    inputs={"features": Tensor("float32", (len(FEATURES),))},
    outputs=["risk"],
    prepare=Standardize(bounds=BOUNDS),
)
