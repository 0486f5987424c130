"""Noise that clients share: planned by the coordinator, checked, paid for and drawn by each client for itself.

Under masking the coordinator sees the sum alone, so that it is the sum that needs the noise. Each of n clients adds
1 / (n - d - c) of its variance; with up to d of them missing and the parts of up to c others known, what is left is at
least what was planned. `fedkit.privacy.skellam` has the noise and its cost.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedkit.config import Privacy
from fedkit.errors import ConfigError, IncompatibleStrategy, Reason, Refused, RunError
from fedkit.privacy.accounting import epsilon_of, rdp_of
from fedkit.privacy.dpsgd import PrivateSteps
from fedkit.privacy.plan import Planned, multiplier_for, planned, require_delta
from fedkit.privacy.randomness import Randomness
from fedkit.privacy.skellam import skellam
from fedkit.rounds.assignment import Assignment
from fedkit.rounds.layout import Layout
from fedkit.rounds.noise import SharedNoise, most_left_out
from fedkit.strategy import Strategy
from fedkit.work import Gradient, Parts, Steps, Summarize

__all__ = ["Sharing", "part_of", "planned_for", "require_shared"]

_LEAST_BITS = 8
_MOST_BITS = 30  # of a sum of many rows' gradients
_BITS_OF_CLIENTS = 20  # for up to some thousand clients, so that all rounds have one grid, and one price


# -- at the coordinator ------------------------------------------------------------------------------------------------


class Sharing:
    """Implements `fedkit.rounds.shield.Sharing` for one run, in which each client trains `visits` times at most.

    `questions` about the data come before (1 where preprocessing asks for statistics): each client noises its answers
    by itself, and the rest of epsilon is for what they share.
    """

    def __init__(self, privacy: Privacy, visits: int, questions: int) -> None:
        if privacy.dp is None:
            raise ConfigError("noise is shared under differential privacy: give dp")
        self._privacy, self._dp = privacy, privacy.dp
        self._visits, self._questions = visits, questions

    def of_rows(self, size: int, cohort: int, rate: float, rows: float) -> Layout:
        """The layout of a sum of clipped gradients, each element clamped to a clip times the rows drawn on average.

        A `privacy.clip` below the rows' own clip takes its place there. Raises `ConfigError`.
        """
        norm = self._dp.max_grad_norm
        clip = min(norm, self._privacy.clip) * max(rate * rows, 1.0)
        noise = (norm, rate, self._visits, self._questions)
        return _finest(self._privacy, size, cohort, clip, *noise, most_bits=_MOST_BITS)

    def of_clients(self, size: int, cohort: int) -> Layout:
        """The layout of a sum of clipped updates; raises `ConfigError`."""
        norm = self._dp.max_update_norm
        noise = (norm, 1.0, self._visits, 0)
        return _finest(self._privacy, size, cohort, min(norm, self._privacy.clip), *noise, most_bits=_BITS_OF_CLIENTS)

    def epsilon(self, layout: Layout, releases: int) -> float:
        """What so many sums have cost a client that had a part in each; raises `RunError` beyond the run's epsilon."""
        cost = epsilon_of(rdp_of([replace(_step(layout), count=releases)]), self._dp.delta)
        if self._dp.epsilon is not None and cost > self._dp.epsilon:
            raise RunError(
                f"epsilon {self._dp.epsilon:g} is spent: rounds that were tried again have cost it too; the last "
                "committed model stands"
            )
        return cost


@functools.lru_cache(maxsize=64)
def _finest(
    privacy: Privacy,
    size: int,
    cohort: int,
    clip: float,
    norm: float,
    rate: float,
    visits: int,
    questions: int,
    *,
    most_bits: int,
) -> Layout:
    """The layout of the finest grid on which the ring has room for values and noise; raises `ConfigError`."""
    why = ConfigError(f"shared noise of {cohort} clients does not fit the ring with {privacy.bits} bits: take fewer")
    assert privacy.dp is not None  # whoever shares noise has it
    dp = privacy.dp
    for bits in range(most_bits, _LEAST_BITS - 1, -1) if privacy.bits is None else [privacy.bits]:
        parts = Parts(cohort, dp.dropouts, dp.colluders, norm / clip * 2.0 ** (bits - 1), size)
        if cohort << (bits - 1) >= 1 << 31:
            continue
        try:
            multiplier = multiplier_for(dp, rate, visits, questions, parts)
            noise = SharedNoise(dp.dropouts, dp.colluders, multiplier, norm, rate)
            return Layout("mean", size, cohort, clip, bits, noise=noise)
        except Refused as refused:
            raise ConfigError(refused.detail) from None
        except ConfigError as error:
            why = error
    raise why


def require_shared(strategy: Strategy, privacy: Privacy, clients: int) -> None:
    """Raises `IncompatibleStrategy` where this strategy's clients cannot share noise; the message names both."""
    name, dp, rule = type(strategy).__name__, privacy.dp, strategy.participation
    assert dp is not None  # whoever shares noise has it
    if privacy.aggregation != "masked":
        kind = f"dp with noise='shared' and aggregation {privacy.aggregation or 'plain'}"
        text = f"{kind}: whoever sees one client's answer sees it"
        raise IncompatibleStrategy(f"{text} with a part of the noise: take aggregation='masked', or noise='local'")
    if dp.level == "example" and (strategy.uses != {"mean"} or not isinstance(strategy.local, Gradient)):
        text = f"dp with noise='shared' and {name}: noise that is shared goes on one sum of gradients, as in FedSGD"
        raise IncompatibleStrategy(f"{text}; local steps each need noise of their own (noise='local')")
    if rule.over_select != 1.0:
        text = "clients whose answers are not waited for are dropouts; give dropouts"
        raise IncompatibleStrategy(f"dp with noise='shared' and participation.over_select={rule.over_select:g}: {text}")
    why = most_left_out(strategy.asked(clients), dp.dropouts, dp.colluders)
    if why:
        raise IncompatibleStrategy(f"dp with noise='shared' and {name}: {why}")


# -- at a client -------------------------------------------------------------------------------------------------------


def planned_for(assignment: Assignment, rows: int) -> Planned | None:
    """What an assignment costs, and how its training is done; None where nothing of it is private.

    Raises `Refused` where what is asked does not fit together, or cannot be done so.
    """
    private, noise = assignment.private, assignment.noise
    is_shared = private is not None and private.dp.noise == "shared" and not isinstance(assignment.work, Summarize)
    if noise is None and not is_shared:
        return None if private is None else planned(private, assignment.work, rows)
    if noise is None or assignment.masking is None:
        raise Refused(Reason.PRIVACY, "noise is to be shared, and no sum is named in which the others have their parts")
    step = _step(assignment.masking.layout)
    if private is None:
        return _of_client(assignment, noise, step)
    dp = private.dp
    if not is_shared or (dp.dropouts, dp.colluders, dp.max_grad_norm) != (noise.dropouts, noise.colluders, noise.norm):
        raise Refused(Reason.PRIVACY, "the sum's noise is not the one that the run's privacy asks for")
    if not isinstance(assignment.work, Gradient):
        raise Refused(Reason.PRIVACY, "shared noise covers one gradient, and no training of several steps")
    require_delta(dp, rows)
    plain = PrivateSteps.of(assignment.work, rows, noise_multiplier=0.0, max_grad_norm=noise.norm)
    return Planned(step, replace(plain, rate=noise.rate))


def _of_client(assignment: Assignment, noise: SharedNoise, step: Steps) -> Planned:
    if assignment.clip is None or assignment.clip.norm != noise.norm or assignment.clip.tells or noise.rate != 1.0:
        raise Refused(Reason.PRIVACY, "the sum's noise is not for updates of the length to which this one is clipped")
    return Planned(step)


def part_of(layout: Layout) -> npt.NDArray[np.int64] | None:
    """This client's part of a sum's noise, from the operating system's randomness; None where it has none."""
    return None if layout.noise is None else skellam(layout.size, layout.noise_rate, Randomness())


def _step(layout: Layout) -> Steps:
    """What having a part in one such sum costs."""
    assert layout.noise is not None  # whoever asks has looked
    return Steps(layout.noise.multiplier, layout.noise.rate, 1, layout.parts)
