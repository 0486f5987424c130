"""What a ledger says about one data set, in the numbers a data protection officer asks for."""

from __future__ import annotations

from dataclasses import dataclass

from fedkit.privacy.accounting import Spent, Tally, epsilon_of, rdp_of
from fedkit.privacy.ledger import Account, Budget
from fedkit.work import Steps

__all__ = ["NOT_COVERED", "Report", "RunCost", "affordable", "report"]

NOT_COVERED = (
    "example counts; scores, where the policy allows them: they are exact, and may be of rows that were trained on",
    "a person whose rows are at two sites: each site's epsilon counts its own rows alone (parallel composition)",
    "a person with several rows: epsilon is for one row (example level)",
)
_MOST_ROUNDS = 1 << 20


@dataclass(frozen=True, slots=True)
class RunCost:
    """One run: what it has asked, and what that alone has cost.

    `clipped_share` is the part of all gradients that were longer than the clip, None where none is known: next to
    none, and the clip could be less, with less noise; next to all, and the model learns from directions alone. It is
    exact, for the site's own eyes. `shared` is (clients, dropouts, colluders) of each sum in which it shared the noise,
    `is_whole` that it was for the whole client.
    """

    run: str
    assignments: int
    open: int  # of them, those whose work has not ended
    steps: int
    noise_multipliers: tuple[float, ...]
    sampling_rates: tuple[float, ...]
    clips: tuple[float, ...]
    clipped_share: float | None
    spent: Spent
    shared: tuple[tuple[int, int, int], ...] = ()
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """One data set. `left` is what the budget leaves, None without one; so is `rounds`, at the last run's setting."""

    data: str
    rows: int
    fingerprint: str
    spent: Spent
    budget: Budget | None
    left: float | None
    rounds: int | None
    runs: tuple[RunCost, ...]


def report(account: Account, budget: Budget | None, delta: float) -> Report:
    """What the data set has cost at the budget's delta, or at `delta` without a budget."""
    at = delta if budget is None else budget.delta
    whole = account.spent(at)
    runs = dict.fromkeys(one.run for one in account.reservations)
    left = rounds = None
    if budget is not None:
        enforced = epsilon_of(rdp_of(account.steps), at)
        left = max(budget.epsilon - enforced, 0.0)
        last = account.reservations[-1:]
        rounds = affordable(account.steps, last[0].steps, budget) if last else None
    costs = tuple(_cost(account, run, at) for run in runs)
    return Report(account.data, account.rows, account.fingerprint, whole, budget, left, rounds, costs)


def _cost(account: Account, run: str, delta: float) -> RunCost:
    mine = [one for one in account.reservations if one.run == run]
    clipped, gradients = account.clipped.get(run, (0, 0))
    parts = {one.steps.parts for one in mine}
    return RunCost(
        run=run,
        assignments=len(mine),
        open=sum(one.assignment in account.open for one in mine),
        steps=sum(one.steps.count for one in mine),
        noise_multipliers=tuple(sorted({one.steps.noise_multiplier for one in mine})),
        sampling_rates=tuple(sorted({one.steps.q for one in mine})),
        clips=tuple(sorted({one.clip for one in mine})),
        clipped_share=clipped / gradients if gradients else None,
        spent=account.spent(delta, run=run),
        shared=tuple(sorted({(one.cohort, one.dropouts, one.colluders) for one in parts if one is not None})),
        is_whole=any(one.is_whole for one in mine),
    )


def affordable(spent: Tally, more: Steps, budget: Budget) -> int:
    """How many times `more` still fits into the budget, at most 2^20 times."""
    before, each = rdp_of(spent), rdp_of([more])

    def fits(times: int) -> bool:
        return epsilon_of(before + times * each, budget.delta) <= budget.epsilon

    low, high = 0, 1
    while high < _MOST_ROUNDS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
