"""fedkit on Flower's simulation engine: the same bits as fedkit's own, and the weight transfer that Flower lacks."""

from __future__ import annotations

import argparse

import fedkit
from fedkit.demo import heart
from fedkit.engines import flower
from fedkit.strategies import CyclicWeightTransfer, FedAvg


def main() -> None:
    """Trains each strategy on both engines and compares the models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    about = {"clients": heart.HOSPITALS, "seed": 42, "threads": 1}
    for strategy in (
        FedAvg(rounds=rounds, local=fedkit.Fit(steps=100, batch_size=4, lr=0.003)),
        CyclicWeightTransfer(rounds=rounds, local=fedkit.Fit(steps=100, batch_size=4, lr=0.001)),
    ):
        own = fedkit.simulate(heart.task, strategy, **about)
        there = flower.run(heart.task, strategy, workers=2, **about)
        same = "the same model, bit for bit" if there.weights == own.weights else "another model"
        print(f"{type(strategy).__name__:<21} test accuracy {there.test['accuracy']:.3f} on Flower's engine: {same}")


if __name__ == "__main__":
    main()
