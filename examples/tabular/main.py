"""Tables, one CSV file a client: declared columns, federated standardisation, AUROC for all and for each client."""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

import fedkit
from fedkit.errors import DataError
from fedkit.strategies import FedAvg

# Declared for all clients together, so that nobody's data decides what a feature means.
NUMBERS = {"age": (18.0, 100.0), "income": (0.0, 250_000.0), "debt_ratio": (0.0, 1.0)}
CATEGORIES = {
    "housing": ["own", "rent", "mortgage"],
    "employment": ["salaried", "self-employed", "retired", "unemployed"],
}
LABEL = "defaulted"
BOUNDS = [*NUMBERS.values(), *[(0.0, 1.0) for values in CATEGORIES.values() for _ in values]]
TEST_EVERY = 4


# -- the files ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> fedkit.Data:
    """One client's rows, every fourth of them for testing; raises `DataError`, naming file, row and column.

    Rows are counted as a spreadsheet does: the header is row 1.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True, restval="")
            missing = {*NUMBERS, *CATEGORIES, LABEL} - set(table.fieldnames or [])
            if missing:
                raise DataError(f"{path}: there is no column {', '.join(sorted(missing))}")
            rows = [encode(row, f"{path}, row {table.line_num}") for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV file: {error}") from None
    if len(rows) < TEST_EVERY:
        raise DataError(f"{path}: {len(rows)} rows, at least {TEST_EVERY} are needed to train and test")
    features, labels = (np.array(column) for column in zip(*rows, strict=True))
    tests = np.arange(len(rows)) % TEST_EVERY == 0
    return fedkit.Data(train=(features[~tests], labels[~tests]), test=(features[tests], labels[tests]))


def encode(row: Mapping[str, str], where: str) -> tuple[list[float], float]:
    """(features, label) of one row: the numbers, then one feature for each category, 1 where it is the row's."""
    numbers = [number(row[column], bounds, f"{where}, column {column!r}") for column, bounds in NUMBERS.items()]
    chosen = [one_of(row[column], values, f"{where}, column {column!r}") for column, values in CATEGORIES.items()]
    label = one_of(row[LABEL], ["0", "1"], f"{where}, column {LABEL!r}")[1]
    return [*numbers, *itertools.chain(*chosen)], label


def number(text: str, bounds: tuple[float, float], where: str) -> float:
    """The number, which lies within its public bounds; raises `DataError`."""
    low, high = bounds
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"{where}: {text!r} is not a number") from None
    if not low <= value <= high:
        raise DataError(f"{where}: {text} lies outside the declared bounds {low:g} to {high:g}")
    return value


def one_of(text: str, values: list[str], where: str) -> list[float]:
    """A 1 at the place of the category and 0 elsewhere; raises `DataError`, naming the categories there are."""
    if text not in values:
        raise DataError(f"{where}: unknown category {text!r}, allowed are {', '.join(values)}")
    return [float(text == value) for value in values]


# -- the task ----------------------------------------------------------------------------------------------------------


def task(folder: Path) -> fedkit.Task:
    """Who will default? Each client reads its own file of `folder`; the model gives the logit of the risk."""
    return fedkit.Task(
        name="loans",
        model=lambda: nn.Sequential(nn.Linear(len(BOUNDS), 1), nn.Flatten(start_dim=0)),
        data=lambda client: read(folder / f"{client}.csv"),
        loss=nn.BCEWithLogitsLoss(),
        metrics={"auroc": lambda: BinaryAUROC(thresholds=200), "accuracy": BinaryAccuracy},
        inputs={"features": fedkit.Tensor("float32", (len(BOUNDS),))},
        outputs=["logit"],
        prepare=fedkit.Standardize(bounds=BOUNDS),
    )


def clients_of(folder: Path) -> list[str]:
    """The names of the folder's CSV files; raises `DataError` for one that cannot be used.

    A run goes on without a client whose data fails. Here, where all files are at hand, it is better to say so first.
    """
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise DataError(f"{folder}: there is no .csv file: give --data the folder that holds one file a client")
    for path in paths:
        read(path)
    return [path.stem for path in paths]


def main() -> None:
    """Prints a table of scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).with_name("data"), help="one CSV file a client")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    strategy = FedAvg(rounds=arguments.rounds, local=fedkit.Fit(epochs=1, batch_size=16, lr=0.1))
    try:
        names = clients_of(arguments.data)
        result = fedkit.simulate(task(arguments.data), strategy, clients=names, seed=arguments.seed)
    except fedkit.FedkitError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{'client':12}  auroc  accuracy")
    for name, scores in [*result.test_per_client.items(), ("all", result.test)]:
        print(f"{name:12}  {scores['auroc']:5.3f}  {scores['accuracy']:8.3f}")


if __name__ == "__main__":
    main()
