"""What a site allows: a value read from its own file, and the questions it is asked. Nothing here does I/O.

A wish that goes beyond it is refused before any data is touched, and never changed into something else.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from fedkit.config import Fraction, Name, PositiveFloat, PositiveInt, Settings, parse, read_toml
from fedkit.errors import Reason, Refused
from fedkit.ranges import Ranges
from fedkit.rounds.assignment import Returns
from fedkit.work import Evaluate, Fit, Gradient, Summarize, Work, counts_rows

__all__ = [
    "AGGREGATIONS",
    "BudgetRule",
    "Kind",
    "Objection",
    "Policy",
    "SharedNoiseRule",
    "TaskRule",
    "Wish",
    "kind_of",
    "read",
    "refuse",
]

Kind: TypeAlias = Literal["fit", "hop", "gradient", "evaluate", "summarize"]
Aggregation: TypeAlias = Literal["plain", "masked", "bfv", "ckks"]
Hours: TypeAlias = Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")]

AGGREGATIONS: tuple[Aggregation, ...] = ("plain", "masked", "bfv", "ckks")


@dataclass(frozen=True, slots=True)
class Objection:
    """One wish that goes beyond the policy: which rule, what is asked, what is allowed."""

    rule: str
    asked: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.asked} (allowed: {self.allowed})"


@dataclass(frozen=True, slots=True)
class Wish:
    """What an assignment asks, as far as can be known before any data is touched.

    `cohort` counts the members of the roster that are asked together, this site among them; None: it is not known.
    `colluders` is how many others may tell their parts of noise that is shared; None: it is not shared.
    """

    task: str
    strategy: str
    work: Work
    returns: Returns
    aggregation: str = "plain"
    cohort: int | None = None
    private: bool = False
    colluders: int | None = None
    sealed: bool = False

    @property
    def kind(self) -> Kind:
        """The work by the name that policies have for it."""
        return kind_of(self.work, self.returns)


def kind_of(work: Work, returns: Returns) -> Kind:
    """The name of a piece of work: training whose weights go on to the next client is a "hop"."""
    if isinstance(work, Fit):
        return "hop" if returns == "weights" else "fit"
    return "gradient" if isinstance(work, Gradient) else "evaluate" if isinstance(work, Evaluate) else "summarize"


class TaskRule(Settings):
    """One task that may be worked on. `source` is what `fedkit client source` prints for it (None: any version).

    `data` is the id of the data set its loader reads; counts and budgets go by it. None: the task's name.
    """

    source: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    data: Name | None = None


class BudgetRule(Settings):
    """What one data set may cost in all, over every run and task: `epsilon` at `delta`, for adding or removing one row.

    With a budget, nothing is learned from the data set but with differential privacy. `evaluate` allows scores all the
    same: they are exact, and the rows that are scored may be among those that were trained on.
    """

    epsilon: PositiveFloat
    delta: Annotated[float, Field(gt=0, lt=1)]
    evaluate: bool = False


class SharedNoiseRule(Settings):
    """That noise may be shared with other sites, if it holds though `min_colluders` of them tell their parts."""

    min_colluders: Annotated[int, Field(ge=0, strict=True)] = 1


class Policy(Settings):
    """What one site allows; the defaults are safe ones.

    * `tasks`: those that may be worked on, by name; empty: all that the agent was started with.
    * `budgets`: the privacy that each data set may cost, by its id. Private training needs one.
    * `strategies`, `work`, `aggregation`: their names; `strategies` None: all. "plain" must be named, because
      it shows the coordinator this site's updates; hops are plain unless they are sealed.
    * `min_cohort`: of members of the roster, this site among them, that must be asked together. It does not bound a
      hop, which hands one site's model to the next: leave "hop" out of `work` to forbid that.
    * `shared_noise`: whether this site's answer may leave with only its part of the noise that hides it, in a masked
      sum that holds the others' parts (`SharedNoiseRule`). None: no, it brings all of it, or none is asked of it.
    * `min_batch_size` and `min_steps`: what one row contributes to an update falls with both. The last batch of a pass
      may be smaller. A site with fewer rows than that does not train at all.
    * `max_lr`: of the rate a run asks for; `max_update_norm`: the Euclidean norm of what a result would change.
    * `ranges`: which ranges of activations may be told, for the calibration of int8: "mean" tells this site's own least
      and largest values, "clipped" how many rows have which, "noised" sums with noise, at a price from the budget. Of
      the first two, over `min_batch_size` rows at least.
    * `summaries_per_run`: different questions about one data set; the same one may be asked again.
    * `evaluations_per_round`; `rounds_per_day`: rounds of training on one data set within 24 hours (None: any number).
    * `metrics`: those that may leave, "loss" among them (None: all); a run that scores others is not scored here.
    * `metrics_per_client`: whether this site's own scores may be shown apart from the sum over sites; where it is true,
      only if every class has `min_rows_per_class` rows in the data that is scored.
    * `hours`: times of day, local ones, within which work may begin, such as "20:00-06:00"; empty: always.
    * `threads` of the processor, `gpu_memory_share` of one GPU's memory: None: all.
    * `only_on_mains`, `only_unmetered`, `only_idle`: for devices. Where it cannot be told, the answer is no.
    """

    tasks: dict[Name, TaskRule] = field(default_factory=dict)
    budgets: dict[Name, BudgetRule] = field(default_factory=dict)
    strategies: tuple[Name, ...] | None = None
    work: tuple[Kind, ...] = ("fit", "hop", "gradient", "evaluate", "summarize")
    aggregation: tuple[Aggregation, ...] = ("masked", "bfv")
    min_cohort: PositiveInt = 1
    shared_noise: SharedNoiseRule | None = None
    min_batch_size: PositiveInt = 8
    min_steps: PositiveInt = 1
    max_lr: PositiveFloat | None = None
    max_update_norm: PositiveFloat | None = None
    ranges: tuple[Literal["mean", "clipped", "noised"], ...] = ("mean", "clipped", "noised")
    summaries_per_run: PositiveInt | None = 1
    evaluations_per_round: PositiveInt | None = 4
    rounds_per_day: PositiveInt | None = None
    metrics: tuple[str, ...] | None = None
    metrics_per_client: bool = False
    min_rows_per_class: PositiveInt = 10
    hours: tuple[Hours, ...] = ()
    threads: PositiveInt | None = None
    gpu_memory_share: Fraction | None = None
    only_on_mains: bool = False
    only_unmetered: bool = False
    only_idle: bool = False
    needs_budgets: ClassVar[bool] = True  # for private training

    @staticmethod
    def unrestricted() -> Policy:
        """What holds on loopback where nobody wrote a policy: everything goes, because nothing leaves the machine."""
        uncounted: dict[str, Any] = {"summaries_per_run": None, "evaluations_per_round": None}
        shared = SharedNoiseRule(min_colluders=0)
        shown: dict[str, Any] = {"metrics_per_client": True, "min_rows_per_class": 1}
        allowed: dict[str, Any] = {"aggregation": AGGREGATIONS, "shared_noise": shared}
        return _Unrestricted(min_batch_size=1, **allowed, **shown, **uncounted)

    def data_of(self, task: str) -> str:
        """The id of the data set that a task reads."""
        rule = self.tasks.get(task)
        return task if rule is None or rule.data is None else rule.data

    # -- before any data is touched ------------------------------------------------------------------------------------

    def objections(self, wish: Wish) -> list[Objection]:
        """Every rule that a wish breaks, as far as it says."""
        return [*self._to_kind(wish), *self._to_work(wish)]

    def _to_kind(self, wish: Wish) -> Iterator[Objection]:
        yield from _unlisted("task", wish.task, tuple(self.tasks) or None)
        yield from _unlisted("strategy", wish.strategy, self.strategies)
        yield from _unlisted("work", wish.kind, self.work)
        if not wish.sealed:
            yield from _unlisted("aggregation", wish.aggregation, self.aggregation)
        yield from self._to_private(wish.task) if wish.private else self._to_exact(wish)
        if wish.colluders is not None:
            yield from self._to_shared(wish.colluders)
        if wish.kind != "hop" and wish.cohort is not None:
            yield from _below("members of the roster asked together", wish.cohort, self.min_cohort)

    def _to_shared(self, colluders: int) -> Iterator[Objection]:
        if self.shared_noise is None:
            yield Objection("noise", "a part of it, shared with other sites", "all of it, without [shared_noise]")
        else:
            yield from _below("colluders that shared noise holds against", colluders, self.shared_noise.min_colluders)

    def _to_exact(self, wish: Wish) -> Iterator[Objection]:
        """Objections to an answer without noise."""
        data = self.data_of(wish.task)
        budget = self.budgets.get(data)
        if budget is None:
            return
        if counts_rows(wish.work) or wish.returns == "reply":
            return  # as every mean tells, and no budget covers; a reply tells nothing of the data
        if wish.kind != "evaluate":
            yield Objection("privacy", "none", f"differential privacy, as {data} has a budget")
        elif not budget.evaluate:
            yield Objection("scores", "exact ones", f"none, as {data} has a budget without evaluate = true")

    def _to_private(self, task: str) -> Iterator[Objection]:
        if not self.needs_budgets:
            return
        rule = self.tasks.get(task)
        if rule is None or rule.data is None:
            yield Objection(f"data set of {task}", "one without an id", "one that the policy names")
        elif rule.data not in self.budgets:
            yield Objection(f"privacy of {rule.data}", "a part of its budget", "none, as it has no budget")

    def _to_work(self, wish: Wish) -> Iterator[Objection]:
        work = wish.work
        if isinstance(work, Summarize) and isinstance(work.query, Ranges):
            yield from _unlisted("ranges", "noised" if work.query.per_row else work.query.method, self.ranges)
        if isinstance(work, Fit | Gradient) and work.batch_size != "all" and not wish.private:
            yield from _below("batch size", work.batch_size, self.min_batch_size)
        if isinstance(work, Gradient):
            yield from _below("steps", 1, self.min_steps)
        if isinstance(work, Fit):
            if work.steps is not None:
                yield from _below("steps", work.steps, self.min_steps)
            if self.max_lr is not None and work.lr is not None and work.lr > self.max_lr:
                yield Objection("learning rate", f"{work.lr:g}", f"at most {self.max_lr:g}")

    def objection_to_source(self, task: str, source: str) -> Objection | None:
        """Whether a task's code is another than the one that is allowed."""
        rule = self.tasks.get(task)
        if rule is None or rule.source in (None, source):
            return None
        return Objection(f"source of {task}", source[:16], str(rule.source)[:16])

    def objection_to_time(self, now: dt.datetime) -> Objection | None:
        """Whether work may not begin at this time of day."""
        if not self.hours:
            return None
        time = f"{now:%H:%M}"
        if any(_holds(hours, time) for hours in self.hours):
            return None
        return Objection("time of day", time, " or ".join(self.hours))

    # -- once the data is loaded, and before anything leaves -----------------------------------------------------------

    def objections_to_rows(self, work: Work, rows: int, *, private: bool = False) -> list[Objection]:
        """Rules that training on so many rows would break; differential privacy needs no least batch size."""
        if isinstance(work, Summarize) and isinstance(work.query, Ranges) and not work.query.per_row:
            return list(_below("rows with ranges", min(rows, work.query.rows), self.min_batch_size))
        if not isinstance(work, Fit | Gradient):
            return []
        size = rows if work.batch_size == "all" else min(work.batch_size, rows)
        steps = 1 if isinstance(work, Gradient) else work.steps_on(rows)
        small = [] if private else _below("batch size", size, self.min_batch_size)
        return [*small, *_below("steps", steps, self.min_steps)]

    def objection_to_metrics(self, names: Sequence[str]) -> Objection | None:
        """Whether a task scores what may not leave."""
        hidden = [] if self.metrics is None else [name for name in names if name not in self.metrics]
        return Objection("metrics", ", ".join(hidden), ", ".join(self.metrics or ()) or "none") if hidden else None

    def objection_to_norm(self, norm: float) -> Objection | None:
        """Whether an update is larger than may leave."""
        if self.max_update_norm is None or norm <= self.max_update_norm:
            return None
        return Objection("norm of the update", f"{norm:.4g}", f"at most {self.max_update_norm:g}")

    def releases(self, smallest_class: int) -> bool:
        """Whether this site's own scores may be shown, where the rarest class has so many rows."""
        return self.metrics_per_client and smallest_class >= self.min_rows_per_class


class _Unrestricted(Policy):
    """On loopback every data set has a ledger, and none needs a budget; nobody can write that into a file."""

    needs_budgets: ClassVar[bool] = False


def _unlisted(rule: str, name: str, allowed: Sequence[str] | None) -> Iterator[Objection]:
    if allowed is not None and name not in allowed:
        yield Objection(rule, name, ", ".join(allowed) or "nothing")


def _below(rule: str, asked: int, least: int) -> Iterator[Objection]:
    if asked < least:
        yield Objection(rule, str(asked), f"at least {least}")


def _holds(hours: str, time: str) -> bool:
    begin, end = hours.split("-")
    return begin <= time < end if begin < end else time >= begin or time < end


def refuse(objections: Sequence[Objection | None]) -> None:
    """Raises `Refused` with the first objection, and how many more there are."""
    found = [one for one in objections if one is not None]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise Refused(Reason.POLICY, f"{found[0]}{more}")


def read(path: Path) -> Policy:
    """The policy in a TOML file; raises `ConfigError`, which names the field and what would be right."""
    return parse(Policy, read_toml(path), where=path.name)
