"""A strategy of one's own in six lines, Nesterov momentum at the coordinator, and what becomes of its memory."""

from __future__ import annotations

import argparse
import contextlib

import numpy as np
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import fedkit
from fedkit.rounds.journal import Journal, MemoryJournal, RoundRecord
from fedkit.strategies import FedAvg

FEATURES, CLASSES = 20, 4
CLIENTS = [f"client-{i}" for i in range(8)]
LOCAL = fedkit.Fit(epochs=1, batch_size=20, lr=0.1)


class FedNesterov(fedkit.Strategy):
    """Clients train from where momentum is about to carry the model: v <- momentum v + mean update; w <- w + v."""

    momentum: float = 0.9  # an annotated attribute of the class is a setting

    async def round(self, federation: fedkit.Federation, model: fedkit.Weights) -> fedkit.Weights:
        """One round, as a paper would write it."""
        velocity = getattr(self, "velocity", 0 * model)
        ahead = model + self.momentum * velocity
        mean = await federation.mean(self.cohort(federation), ahead, self.local)
        self.velocity = self.momentum * velocity + mean.update  # any other attribute is state, committed with the round
        return model + self.velocity


def load(client: str) -> fedkit.Data:
    """Rows whose label depends on the features in the same way everywhere; the features differ between clients."""
    teacher = np.random.default_rng(99).normal(size=(FEATURES, CLASSES))
    rng = np.random.default_rng(CLIENTS.index(client))
    features = rng.normal(loc=rng.normal(size=FEATURES) / 2, size=(200, FEATURES)).astype(np.float32)
    labels = (features @ teacher).argmax(axis=1)
    return fedkit.Data(train=(features[:100], labels[:100]), test=(features[100:], labels[100:]))


TASK = fedkit.Task(
    name="synthetic",
    model=lambda: nn.Linear(FEATURES, CLASSES),
    data=load,
    loss=nn.CrossEntropyLoss(),
    metrics={"accuracy": lambda: MulticlassAccuracy(CLASSES, average="micro")},
)


def run(strategy: fedkit.Strategy, journal: Journal | None = None, stop_after: int | None = None) -> fedkit.Result:
    """The simulation, interrupted after a round where one is given; `journal` is what it can be taken up from."""

    def watch(record: RoundRecord) -> None:
        if record.round == stop_after:
            raise KeyboardInterrupt

    return fedkit.simulate(TASK, strategy, clients=CLIENTS, seed=0, journal=journal, on_round=watch)


def interrupted(strategy: fedkit.Strategy, stop_after: int) -> fedkit.Result:
    """The same run in two halves, as after a power cut; in between, all that is left is the journal."""
    journal = MemoryJournal()
    with contextlib.suppress(KeyboardInterrupt):
        run(strategy, journal, stop_after)
    print(f"stopped after round {journal.history()[-1].round}")
    return run(strategy, journal)


def main() -> None:
    """Prints the comparison, then what survives an interruption."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--momentum", type=float, default=0.9)
    arguments = parser.parse_args()
    try:
        nesterov = FedNesterov(rounds=arguments.rounds, local=LOCAL, momentum=arguments.momentum)
    except fedkit.FedkitError as error:
        parser.error(str(error))
    plain, result = run(FedAvg(rounds=arguments.rounds, local=LOCAL)), run(nesterov)
    print(f"FedAvg       test accuracy {plain.test['accuracy']:.3f}")
    print(f"FedNesterov  test accuracy {result.test['accuracy']:.3f}")
    print("its state, as norms:", {name: round(kept.norm(), 3) for name, kept in result.strategy.state_dict().items()})
    again = interrupted(nesterov, stop_after=(arguments.rounds + 1) // 2)
    same = again.weights == result.weights and again.strategy.state_dict() == result.strategy.state_dict()
    found = "the same" if same else "another"
    print(f"taken up again: {len(again.history)} rounds, {found} model and state, bit for bit")


if __name__ == "__main__":
    main()
