"""Robust averaging: a minority of clients that send whatever they like cannot steer the model.

Every rule sees single updates, so it is refused where updates are masked or encrypted. None uses example counts, which
a liar would choose: all clients weigh the same. A round in which fewer answer than the rule needs is abandoned and
drawn anew, as one below its quorum.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

import numpy as np

from fedkit.config import PositiveFloat, PositiveInt
from fedkit.robust import Stack, clipped_mean, coordinate_median, krum_scores, mean_of, trimmed_mean
from fedkit.strategy import Federation, Strategy
from fedkit.weights import Weights

__all__ = ["CoordinateMedian", "Krum", "MultiKrum", "NormClipping", "TrimmedMean"]


class _Robust(Strategy):
    """w <- w + rule(updates); a subclass says which rule."""

    uses: ClassVar[frozenset[str]] = frozenset({"updates"})

    async def round(self, federation: Federation, model: Weights) -> Weights:
        """Each client of the cohort trains from the global model; the rule makes one step of their updates."""
        with Stack(model.manifest) as stack:
            async for client, update in federation.updates(self.cohort(federation), model, self.local):
                stack.add(client, update.weights)
            step = await asyncio.to_thread(self.combine, stack)  # streams to clients go on meanwhile
        return model.with_vector(np.add(model.vector, step.vector, out=step.vector))

    def combine(self, stack: Stack) -> Weights:
        """One update from many."""
        raise NotImplementedError


class CoordinateMedian(_Robust):
    """w <- w + the median of the updates, coordinate by coordinate (Yin et al. 2018, algorithm 1, option I).

    Breakdown point: floor((n - 1) / 2) of n. With at most that many liars, each coordinate lies between two honest
    values. `byzantine` says how many liars a round must withstand: n >= 2 byzantine + 1, or the round is not made.
    Clients whose data differ pull the median away from the mean even where nobody lies.
    """

    byzantine: PositiveInt = 1

    @property
    def least(self) -> int:
        """2 byzantine + 1."""
        return 2 * self.byzantine + 1

    def combine(self, stack: Stack) -> Weights:
        """The median of each coordinate."""
        return coordinate_median(stack)


class TrimmedMean(_Robust):
    """w <- w + the mean of each coordinate without its `trim` largest and smallest values (Yin et al. 2018, option II).

    Breakdown point: `trim` of n, with n > 2 trim, or the round is not made. With at most `trim` liars each coordinate
    lies between two honest values; with one more, that liar alone decides how far it goes.
    """

    trim: PositiveInt = 1

    @property
    def least(self) -> int:
        """2 trim + 1."""
        return 2 * self.trim + 1

    def combine(self, stack: Stack) -> Weights:
        """The mean of the inner values of each coordinate."""
        return trimmed_mean(stack, self.trim)


class Krum(_Robust):
    """w <- w + the one update that is nearest to its n - f - 2 nearest others (Blanchard et al. 2017, section 4).

    f = `byzantine`. Breakdown point: f of n, with n >= 2 f + 3, or the round is not made: f liars may stand close
    together, and each still needs honest neighbours. The step is one client's, so where data differ between clients it
    learns from few of them; `MultiKrum` averages several. `chosen` names the client of the last round.
    """

    byzantine: PositiveInt = 1

    @property
    def least(self) -> int:
        """2 byzantine + 3."""
        return 2 * self.byzantine + 3

    def kept(self, answers: int) -> int:  # noqa: ARG002
        """How many of so many updates are averaged."""
        return 1

    def combine(self, stack: Stack) -> Weights:
        """The mean of those with the lowest scores, of equal ones the first by name."""
        order = np.argsort(krum_scores(stack, self.byzantine), kind="stable")
        self.chosen = sorted(stack.clients[i] for i in order[: self.kept(len(stack))])
        return mean_of(stack, self.chosen)


class MultiKrum(Krum):
    """w <- w + the mean of the `keep` updates with the lowest Krum scores (Blanchard et al. 2017).

    Breakdown point: f = `byzantine` of n, with n >= 2 f + 3 and keep <= n - f - 2 (the bound of the proof in Damaskinos
    et al. 2019), or the round is not made. Without `keep`, as many as that bound allows. `chosen` names those of the
    last round.
    """

    keep: PositiveInt | None = None

    @property
    def least(self) -> int:
        """2 byzantine + 3, or keep + byzantine + 2 where that is more."""
        return max(2 * self.byzantine + 3, (self.keep or 1) + self.byzantine + 2)

    def kept(self, answers: int) -> int:
        """`keep`, or all of them but byzantine + 2."""
        return self.keep or answers - self.byzantine - 2


class NormClipping(_Robust):
    """w <- w + the mean of the updates, each scaled down to `max_norm` where it is longer (Sun et al. 2019).

    Breakdown point: none in the strict sense. f liars of n add at most (f / n) max_norm to a round's step, so that no
    one round ruins the model, and may do so again every round: it bounds the speed of an attack. Needs two clients.
    `Participation.max_update_norm` refuses what is too long instead of shortening it.
    """

    max_norm: PositiveFloat

    @property
    def least(self) -> int:
        """2: what one client sends is not bounded by any other."""
        return 2

    def combine(self, stack: Stack) -> Weights:
        """The mean of the shortened updates."""
        return clipped_mean(stack, self.max_norm)
