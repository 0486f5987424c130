"""FedBuff: asynchronous training with a buffer."""

from __future__ import annotations

import math
from typing import ClassVar

from fedkit.config import PositiveFloat, PositiveInt
from fedkit.strategy import Federation, Strategy
from fedkit.weights import Weights

__all__ = ["FedBuff"]


class FedBuff(Strategy):
    """Buffered asynchronous aggregation (Nguyen et al. 2022, algorithm 1). One round is one full buffer.

    `concurrency` clients train at any time; when `buffer` updates have come, the model takes server_lr times their
    mean, each scaled by 1 / sqrt(1 + staleness), staleness being the commits since that client began.
    """

    concurrency: PositiveInt = 10
    buffer: PositiveInt = 3
    server_lr: PositiveFloat = 1.0

    uses: ClassVar[frozenset[str]] = frozenset({"start"})
    unused: ClassVar[frozenset[str]] = frozenset({"deadline_s", "fraction"})

    async def run(self, federation: Federation, model: Weights) -> Weights:
        """Keeps clients busy, and commits whenever the buffer is full."""
        while federation.round <= self.rounds:
            step = 0.0 * model
            for _ in range(self.buffer):
                self.keep_busy(federation, model)
                arrival = await federation.next()
                step = step + arrival.update * (1 / math.sqrt(1 + arrival.staleness))
            model = await federation.commit(model + (self.server_lr / self.buffer) * step)
        return model

    def keep_busy(self, federation: Federation, model: Weights) -> None:
        """Starts randomly drawn idle clients until `concurrency` are training."""
        idle = federation.idle
        missing = min(self.concurrency, len(federation.clients)) - (len(federation.clients) - len(idle))
        for client in self.draw(federation, idle, max(missing, 0)):
            federation.start(client, model, self.local)
