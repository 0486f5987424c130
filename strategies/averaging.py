"""FedAvg: local training in parallel, then the mean."""

from __future__ import annotations

import numpy as np

from fedkit.strategy import Federation, Strategy
from fedkit.weights import Weights

__all__ = ["FedAvg"]


class FedAvg(Strategy):
    """Federated averaging (McMahan et al. 2017, algorithm 1).

    w <- sum over those that answered of n_k / n times w_k. With `local=Fit(proximal=mu)` it is FedProx
    (Li et al. 2020).
    """

    async def round(self, federation: Federation, model: Weights) -> Weights:
        """Each client of the cohort trains from the global model; the result is the mean by examples."""
        mean = await federation.mean(self.cohort(federation), model, self.local)
        # In the mean's own memory, which nobody else sees: a third model would cost fresh memory every round.
        return model.with_vector(np.add(model.vector, mean.update.vector, out=mean.update.vector))
