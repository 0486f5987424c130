"""Client-level differential privacy: whether a client took part at all is what the model does not tell.

DP-FedAvg (McMahan et al. 2018) with a fixed clip, or one that follows a quantile of the updates' norms (Andrew et al.
2021). Each client clips its update, the coordinator adds the noise to their sum, and accounts for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedkit.aggregation import Mean
from fedkit.config import DP
from fedkit.errors import IncompatibleStrategy, RunError
from fedkit.privacy.accounting import epsilon_of, noise_for, rdp_of
from fedkit.privacy.randomness import Randomness
from fedkit.rounds.assignment import WITHIN
from fedkit.rounds.shield import Release
from fedkit.strategy import Strategy
from fedkit.task import Task
from fedkit.weights import Vector
from fedkit.work import Steps

__all__ = ["FEWEST", "ClientLevel", "require_client_level"]

FEWEST = 100  # clients a round on average, below which the noise drowns the model
_BITS_SHARE = 1 / 20  # of the expected clients: the noise on their count of updates within the clip (Andrew et al.)
_CLIP_RATE = 0.2  # by which the clip follows (eta_C, as in the paper)
_PIECE = 1 << 18  # elements that are noised at a time


class ClientLevel:
    """Implements `fedkit.rounds.shield.Shield` by the Poisson-sampled Gaussian mechanism over clients.

    With a noise multiplier z, each parameter of a sum of updates of norm <= C gets Gaussian noise of z C. Where the
    clip follows a quantile, the count of updates within it gets noise of m / 20 for m expected clients, and the updates
    (z^-2 - (2 m / 20)^-2)^(-1/2) C, so that both together cost what z costs (Andrew et al. 2021, theorem 1).

    Guarantee: for adding or removing one client with all its rows, against whoever sees the models and no more, such
    as the other clients.
    Does not protect against: the coordinator, which sees each update and adds the noise; what example counts and scores
    tell.
    """

    def __init__(self, dp: DP, rate: float, rounds: int) -> None:
        self._dp = dp
        self._rate = rate
        self._noise = 0.0  # where clients bring it along
        if dp.noise == "local":
            self._noise = dp.noise_multiplier or noise_for(dp.epsilon or 0.0, dp.delta, rate, rounds)

    @property
    def noise_multiplier(self) -> float:
        """The noise on a sum, in clips."""
        return self._noise

    @property
    def rate(self) -> float:
        """With what probability each client takes part in a round."""
        return self._rate

    @property
    def first_clip(self) -> float:
        """The norm to which the first round's updates are clipped."""
        return self._dp.max_update_norm

    @property
    def tells(self) -> bool:
        """Whether clients say along with their update if it was within the clip."""
        return self._dp.clip_quantile is not None

    def require(self, clients: int) -> None:
        """Raises `IncompatibleStrategy` where so many clients cannot be protected."""
        if self._dp.delta > 1.0 / clients:
            text = f"delta {self._dp.delta:g} is more than one over {clients} clients"
            raise IncompatibleStrategy(f"dp: {text}, so that one could be given away outright")
        if self._rate * clients < FEWEST and not self._dp.few_clients:
            raise IncompatibleStrategy(
                f"dp at level client: {self._rate * clients:g} clients a round on average share one noise that has to "
                f"hide any of them, and below {FEWEST} little of the model is left: let more take part, use "
                "level='example', or insist with few_clients=True"
            )
        if self.tells:
            _remaining(self._noise, self._bits(clients))

    def _bits(self, clients: int) -> float:
        """The noise on the count of updates within the clip."""
        return _BITS_SHARE * max(self._rate * clients, 1.0)

    def drawn(self, clients: Sequence[str], key: bytes) -> tuple[str, ...]:
        """Those of `clients` who take part, each by itself with probability `rate`, under a secret key of 32 bytes."""
        chosen = Randomness(key).chosen(len(clients), self._rate)
        return tuple(clients[i] for i in chosen.tolist())

    def released(self, mean: Mean, clip: float, expected: float, key: bytes) -> Release:
        """The sum of updates of norm <= `clip`, divided by `expected` clients, with noise under a secret key."""
        random = Randomness(key)
        spread, after = self._noise, clip
        if self._dp.clip_quantile is not None:
            bits = _BITS_SHARE * expected
            spread = _remaining(self._noise, bits)
            within = mean.extra.get(WITHIN, np.zeros(1))[0] + 0.5  # the sum of +-1/2, over the expected clients
            noised = within + float(random.normal(1)[0]) * bits / expected
            after = clip * math.exp(-_CLIP_RATE * (noised - self._dp.clip_quantile))
        vector = _noised(mean.update.vector, spread * clip / expected, random)
        update = mean.update.with_vector(vector)
        return Release(dataclasses.replace(mean, update=update, loss=None, extra=_without_bit(mean.extra)), after)

    def epsilon(self, releases: int) -> float:
        """What so many noised means have cost; raises `RunError` where that is more than was planned."""
        cost = epsilon_of(rdp_of([Steps(self._noise, self._rate, releases)]), self._dp.delta)
        if self._dp.epsilon is not None and cost > self._dp.epsilon:
            raise RunError(
                f"epsilon {self._dp.epsilon:g} is spent: rounds that were tried again have cost it too; the last "
                "committed model stands"
            )
        return cost


def _noised(vector: Vector, spread: float, random: Randomness) -> Vector:
    """The vector with noise drawn and added in float64, rounded once."""
    out: npt.NDArray[np.float32] = np.empty_like(vector)
    for start in range(0, len(vector), _PIECE):
        part = vector[start : start + _PIECE]
        out[start : start + len(part)] = part + random.normal(len(part)).numpy() * spread
    return out


def _without_bit(extra: Mapping[str, Vector]) -> dict[str, Vector]:
    return {name: vector for name, vector in extra.items() if name != WITHIN}


def _remaining(noise: float, bits: float) -> float:
    """The noise on the updates, so that together with `bits` on the count of +-1/2 it costs what `noise` does."""
    left = noise**-2 - (2.0 * bits) ** -2
    if left <= 0.0:
        raise IncompatibleStrategy(
            f"dp: a noise multiplier of {noise:g} is too much for a clip that follows a quantile of so few clients: "
            "give a fixed one (clip_quantile=None)"
        )
    return math.sqrt(1.0 / left)


def require_client_level(strategy: Strategy, task: Task) -> None:
    """Raises `IncompatibleStrategy` where this strategy or task cannot be trained so; the message names both."""
    name, rule = type(strategy).__name__, strategy.participation
    if strategy.uses != {"mean"} or type(strategy).cohort is not Strategy.cohort:
        raise IncompatibleStrategy(
            f"dp at level client and {name}: noise goes on means over clients that are drawn at random, as in FedAvg"
        )
    if getattr(strategy.local, "control_variates", False):
        raise IncompatibleStrategy(f"dp at level client and {name}: control variates are sent without a clip")
    if task.prepare is not None:
        raise IncompatibleStrategy(
            f"dp at level client and the statistics of {task.name}: what one client adds to them has no bound; "
            "standardise with public numbers in the model instead"
        )
    for setting, plain in (("quorum", None), ("over_select", 1.0), ("max_update_norm", None)):
        if getattr(rule, setting) != plain:
            raise IncompatibleStrategy(
                f"dp at level client and participation.{setting}: who takes part is drawn, and the clip is dp's"
            )
