"""Writes the four small CSV files that come with this example: invented loans of four branches."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

HOUSING = ["own", "rent", "mortgage"]
EMPLOYMENT = ["salaried", "self-employed", "retired", "unemployed"]
BRANCHES = {"harbour": (160, 48_000), "hills": (90, 71_000), "market": (200, 39_000), "station": (120, 33_000)}


def rows(count: int, income: float, rng: np.random.Generator) -> list[list[object]]:
    """Applicants of one branch, who differ from the others' in what they earn."""
    found: list[list[object]] = []
    for _ in range(count):
        age, earned = int(rng.integers(19, 80)), round(float(rng.lognormal(np.log(income), 0.5)))
        debt, house = round(float(rng.beta(2, 3)), 3), rng.choice(3, p=[0.3, 0.45, 0.25])
        work = 2 if age > 66 else rng.choice([0, 1, 3], p=[0.7, 0.2, 0.1])
        score = 5 * debt - 1.2 * np.log(earned / 20_000) - 0.02 * age + [-0.5, 0.4, 0][house] + [0, 0.5, 0, 1.5][work]
        late = int(rng.random() < 1 / (1 + np.exp(-2 * (score - 0.8))))
        found.append([age, min(earned, 250_000), debt, HOUSING[house], EMPLOYMENT[work], late])
    return found


def main() -> None:
    """Writes one file a branch."""
    folder = Path(__file__).with_name("data")
    folder.mkdir(exist_ok=True)
    for seed, (branch, (count, income)) in enumerate(BRANCHES.items()):
        with (folder / f"{branch}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["age", "income", "debt_ratio", "housing", "employment", "defaulted"])
            writer.writerows(rows(count, income, np.random.default_rng(seed)))


if __name__ == "__main__":
    main()
