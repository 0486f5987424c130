"""Weight transfer: the model itself goes from client to client, and each trains it in turn.

Chang et al. 2018, "Distributed deep learning networks among institutions for medical imaging".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fedkit.config import PositiveInt
from fedkit.strategy import Federation, Strategy
from fedkit.weights import Weights

__all__ = ["CyclicWeightTransfer", "SingleWeightTransfer", "StochasticWeightTransfer"]


class _WeightTransfer(Strategy):
    """One round passes the model through the clients of `order`; a client that cannot train is skipped, on record."""

    uses: ClassVar[frozenset[str]] = frozenset({"hop"})

    def order(self, federation: Federation) -> list[str]:
        """The clients of this round, in the order of their visits."""
        return self.cohort(federation)

    async def round(self, federation: Federation, model: Weights) -> Weights:
        """Hop after hop."""
        for client in self.order(federation):
            model = await federation.hop(client, model, self.local)
        return model


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
