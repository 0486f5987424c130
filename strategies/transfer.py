"""Weight transfer: the model itself goes from client to client, and each trains it in turn.

Chang et al. 2018, "Distributed deep learning networks among institutions for medical imaging".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from fedkit.config import PositiveInt
from fedkit.errors import IncompatibleStrategy
from fedkit.gate import Gate
from fedkit.strategy import Federation, Handed, Strategy
from fedkit.task import Task
from fedkit.weights import Weights

__all__ = ["CyclicWeightTransfer", "SingleWeightTransfer", "StochasticWeightTransfer"]


class _WeightTransfer(Strategy):
    """One round passes the model through the clients of `order`; a client that cannot train is skipped, on record.

    With a `gate`, each client first judges the hop that brings it the model, also across rounds: one that does not keep
    to the gate is undone, and the client goes on from the model before. The very first hop has none before it.
    """

    gate: Gate | None = None

    uses: ClassVar[frozenset[str]] = frozenset({"hop"})

    @property
    def needs_valid(self) -> bool:
        """A gate that scores does."""
        return self.gate is not None and self.gate.max_drop is not None

    def check(self, task: Task, module: nn.Module) -> None:
        """Refuses a gate that looks at a metric the task does not have."""
        super().check(task, module)
        if self.gate is None or self.gate.max_drop is None:
            return
        name, known = self.gate.scored, ["loss", *task.metrics] if task.scores() else []
        if name not in known and name.rpartition("_")[0] not in known:  # one of several values of a metric
            there = f"there are {', '.join(known)}" if known else "and neither loss nor step to score with"
            raise IncompatibleStrategy(f"the gate looks at {name!r}, which {task.name} does not have; {there}")

    def order(self, federation: Federation) -> list[str]:
        """The clients of this round, in the order of their visits."""
        return self.cohort(federation)

    async def round(self, federation: Federation, model: Weights) -> Weights:
        """Hop after hop."""
        model = self.taken_up(model)
        order = self.order(federation)
        for i, client in enumerate(order, 1):
            model = await federation.hop(client, model, self.local, gate=self.gate, then=order[i:])
        if isinstance(model, Handed):
            self.last = {"before": model.before, "by": model.by}
        return model

    def taken_up(self, model: Weights) -> Weights:
        """The model, which the first client of a round judges as the last hop of the round before made it."""
        last = getattr(self, "last", None)
        return model if last is None else Handed(model, before=last["before"], by=last["by"])


class CyclicWeightTransfer(_WeightTransfer):
    """Clients train the model and pass it on; the cycle repeats. One round is one cycle.

    The order is that of the names, or drawn anew for each cycle with `reshuffle`.
    """

    reshuffle: bool = False

    def order(self, federation: Federation) -> list[str]:
        """The cohort by name, or shuffled."""
        names = self.cohort(federation)
        return [names[i] for i in federation.rng.permutation(len(names))] if self.reshuffle else names


class SingleWeightTransfer(_WeightTransfer):
    """The model passes each client once: there is one round."""

    rounds: Literal[1] = 1


class StochasticWeightTransfer(_WeightTransfer):
    """Each round draws `clients_per_round` clients at random without replacement and passes the model through them."""

    clients_per_round: PositiveInt

    unused: ClassVar[frozenset[str]] = frozenset({"fraction"})

    def order(self, federation: Federation) -> list[str]:
        """The drawn clients in random order."""
        names = self.draw(federation, federation.clients, self.clients_per_round)
        return [names[i] for i in federation.rng.permutation(len(names))]
