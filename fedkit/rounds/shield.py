"""What a run with client-level differential privacy does around each mean.

`fedkit.privacy.clients` implements it; here it is only used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedkit.aggregation import Mean
from fedkit.rounds.layout import Layout

__all__ = ["EVERY_CLIENT", "Release", "Sharing", "Shield"]

EVERY_CLIENT = "every client"  # under which a record has the epsilon that is the same for all


@dataclass(frozen=True, slots=True)
class Release:
    """A noised mean, and the clip from then on."""

    mean: Mean
    clip: float


class Sharing(Protocol):
    """The noise of a run to which each client adds its part; `fedkit.privacy.shared` implements it."""

    def of_rows(self, size: int, cohort: int, rate: float, rows: float) -> Layout:
        """Of a sum of gradients of `rows` rows a client on average, each of which takes part with probability `rate`.

        Raises `ConfigError` where so many clients cannot share it.
        """
        ...

    def of_clients(self, size: int, cohort: int) -> Layout:
        """Of a sum of clipped updates; raises `ConfigError` where so many clients cannot share it."""
        ...

    def epsilon(self, layout: Layout, releases: int) -> float:
        """What so many such sums cost a client that has a part in each; raises `RunError` beyond what was planned."""
        ...


class Shield(Protocol):
    """Clip, noise and price of each mean of one run."""

    @property
    def rate(self) -> float:
        """With what probability each client takes part in a round."""
        ...

    @property
    def first_clip(self) -> float:
        """The norm to which the first round's updates are clipped."""
        ...

    @property
    def tells(self) -> bool:
        """Whether clients say along with their update if it was within the clip."""
        ...

    def require(self, clients: int) -> None:
        """Raises `IncompatibleStrategy` where so many clients cannot be protected."""
        ...

    def drawn(self, clients: Sequence[str], key: bytes) -> tuple[str, ...]:
        """Those of `clients` who take part, each by itself with probability `rate`, under a secret key of 32 bytes."""
        ...

    def released(self, mean: Mean, clip: float, expected: float, key: bytes) -> Release:
        """The sum of updates of norm <= `clip`, divided by `expected` clients, with noise under a secret key."""
        ...

    def epsilon(self, releases: int) -> float:
        """What so many noised means have cost; raises `RunError` where that is more than was planned."""
        ...
