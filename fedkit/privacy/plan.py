"""What one piece of private work will do, before it begins: how much noise, how many steps, at which sampling rate."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from fedkit.config import DP
from fedkit.errors import ConfigError, Reason, Refused
from fedkit.privacy.accounting import noise_for
from fedkit.privacy.dpsgd import PrivateSteps
from fedkit.queries import Moments, Ranges
from fedkit.rounds.assignment import Private
from fedkit.work import Evaluate, Parts, Steps, Summarize, Work

__all__ = ["QUESTION_SHARE", "Planned", "multiplier_for", "planned", "require_delta"]

QUESTION_SHARE = 1 / 6  # of epsilon, for one question about the data before training


@dataclass(frozen=True, slots=True)
class Planned:
    """What one piece of work costs, and how it is done where it is training."""

    cost: Steps
    training: PrivateSteps | None = None


def planned(private: Private, work: Work, rows: int) -> Planned:
    """The noisy steps of one piece of work on so many rows.

    In training, q is the batch size over the rows, at most 1; a question is one step over all rows. It has a sixth of
    epsilon, or all of it in a run that trains nothing. Where the run gives epsilon, the noise is what all its questions
    and `private.visits` pieces of this work need to stay within it.

    Raises `Refused` where delta is more than one over the rows, as a row could then be given away outright, and for a
    question whose answer has no bounds.
    """
    dp = private.dp
    require_delta(dp, rows)
    if isinstance(work, Summarize):
        return Planned(_question(dp, work, QUESTION_SHARE if private.visits else 1.0 / private.questions))
    if isinstance(work, Evaluate):
        raise ValueError("scores are not covered by differential privacy")
    if not private.visits:
        raise Refused(Reason.PRIVACY, "the run is said to train nothing, and asks for training")
    plain = PrivateSteps.of(work, rows, noise_multiplier=0.0, max_grad_norm=dp.max_grad_norm)
    noise = multiplier_for(dp, plain.q, private.visits * plain.steps, private.questions)
    training = replace(plain, noise_multiplier=noise)
    return Planned(training.cost, training)


def require_delta(dp: DP, rows: int) -> None:
    """Raises `Refused` where delta is so large that one of so many rows could be given away outright."""
    if dp.delta > 1.0 / rows:
        text = f"delta {dp.delta:g} is more than one over the {rows} rows: at most {1.0 / rows:.2g} makes sense here"
        raise Refused(Reason.PRIVACY, text)


def _question(dp: DP, work: Summarize, share: float) -> Steps:
    query = work.query
    if not ((isinstance(query, Moments) and query.bounds is not None) or (isinstance(query, Ranges) and query.per_row)):
        text = "only moments within public bounds are answered, and ranges per row"
        raise Refused(Reason.PRIVACY, f"with differential privacy {text}")
    return Steps(_question_noise(dp, share), 1.0, 1)


@functools.lru_cache(maxsize=64)
def _question_noise(dp: DP, share: float = QUESTION_SHARE) -> float:
    if dp.noise_multiplier is not None:
        return dp.noise_multiplier
    assert dp.epsilon is not None  # DP has one of the two
    return noise_for(dp.epsilon * share, dp.delta, 1.0, 1)


@functools.lru_cache(maxsize=256)
def multiplier_for(dp: DP, q: float, count: int, questions: int, parts: Parts | None = None) -> float:
    """The noise multiplier of `count` steps at rate `q` that come after so many questions; raises `Refused`."""
    if dp.noise_multiplier is not None:
        return dp.noise_multiplier
    assert dp.epsilon is not None  # DP has one of the two
    before = [Steps(_question_noise(dp), 1.0, questions)] if questions else []
    try:
        return noise_for(dp.epsilon, dp.delta, q, count, before, parts)
    except ConfigError as error:
        raise Refused(Reason.PRIVACY, str(error)) from None
