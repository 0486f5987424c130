"""What is asked of clients when a finished model is handed over: ranges, scores of its variants, an examination."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedkit.config import Criterion, NotNegative, PositiveFloat, metric_of, worsening
from fedkit.exam import Exam, Questions, Variant, number_key
from fedkit.examination import Examination
from fedkit.ranges import RANGES, Ranges, Rows
from fedkit.strategy import Federation, Strategy
from fedkit.weights import Weights
from fedkit.work import Evaluate, Summarize, Work

__all__ = ["HandOver"]


class HandOver(Strategy):
    """Trains nothing: the model it begins with (`init`) is the one it ends with. Each question is a round.

    `graph` and `bounds` say what the model converts to (`fedkit.ranges.Ranges`). `variants`, the most wanted first, are
    scored on validation rows beside fp32; the first one of which `criterion` is worse than that of fp32 by at most
    `max_drop`, and which answers as PyTorch does on `least_agreement` of the rows, is `chosen`, and is examined on test
    rows as `exam` says. `given` are the ranges, (low, high) of each tensor, where clients are not to be asked for them.

    Afterwards it has `ranges` (tensors, 2), how many clients were asked for them (`calibrated`), `scores` and
    `agreement` by variant, `chosen`, and what the `exam` found.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    unused: ClassVar[frozenset[str]] = frozenset({"quorum", "over_select"})
    trains: ClassVar[bool] = False

    graph: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bounds: list[PositiveFloat]
    variants: tuple[Variant, ...] = ()
    method: Literal["mean", "clipped"] = "mean"
    rows: Rows = 512
    per_row: bool = False
    given: list[tuple[float, float]] | None = None
    criterion: Criterion = "loss:min"
    max_drop: NotNegative = 0.005
    least_agreement: Annotated[float, Field(ge=0, le=1)] = 0.99
    exam: Questions = Questions()

    def __post_init__(self) -> None:
        """One round for each question."""
        self.ranges = None if self.given is None else np.asarray(self.given, dtype=np.float64)
        self.scores: dict[str, dict[str, float]] = {}
        self.agreement: dict[str, float] = {}
        self.sites: dict[str, int] = {}
        self.chosen: Variant = "fp32"
        self.calibrated = 0
        self.examined: dict[str, Any] = {}
        self.rounds = len(self._questions())

    @property
    def visits(self) -> int:
        """Nobody trains."""
        return 0

    @property
    def needs_valid(self) -> bool:
        """Variants are chosen by scores on validation rows, so that test rows decide nothing."""
        return True

    @property
    def query(self) -> Ranges | None:
        """What calibration asks; None where it asks nothing."""
        if "int8" not in self.variants or self.given is not None:
            return None
        about: dict[str, Any] = {"graph": self.graph, "bounds": self.bounds, "rows": self.rows}
        return Ranges(**about, method=self.method, per_row=self.per_row)

    def asks(self) -> tuple[Work, ...]:
        """What it asks besides training."""
        return tuple(self._questions())

    def _questions(self) -> list[Work]:
        """One a round. Which variant the last ones examine is only known then."""
        query = self.query
        asked: list[Work] = [] if query is None else [Summarize(query=query)]
        asked += [Evaluate(exam=Exam(graph=self.graph, variant=one)) for one in ("fp32", *self.variants)]
        asked.append(self._examination(criteria=self.exam.criteria, groups=self.exam.groups))
        return asked + [self._examination(noise=one) for one in self.exam.noise]

    def _examination(self, **about: Any) -> Evaluate:
        return Evaluate(split="test", exam=Exam(graph=self.graph, variant=self.chosen, **about))

    async def round(self, federation: Federation, model: Weights) -> Weights:
        """Asks one question of everybody."""
        asked = self._questions()[federation.round - 1]
        if isinstance(asked, Summarize):
            self.ranges = await federation.summarize(federation.clients, asked.query, model)
            self.calibrated = len(federation.clients)
            return model
        assert isinstance(asked, Evaluate)  # there is no other question
        assert asked.exam is not None
        send = {} if asked.exam.variant != "int8" else {RANGES: np.asarray(self.ranges, dtype=np.float32).ravel()}
        self._note(asked, asked.exam, await federation.examine(federation.clients, model, asked, send))
        return model

    def _note(self, asked: Evaluate, exam: Exam, found: Examination | None) -> None:
        """Keeps what was found, and chooses once all variants have their scores."""
        if asked.split == "valid":
            if found is not None:
                self.scores[exam.variant], self.agreement[exam.variant] = found.pooled, found.agreement
                self.sites[exam.variant] = found.sites
            if exam.variant == ("fp32", *self.variants)[-1]:
                self.chosen = next((one for one in self.variants if not self.objection(one)), "fp32")
        elif found is not None and exam.noise and found.sites == self.examined.get("sites"):
            self.examined.setdefault("noise", {})[number_key(exam.noise)] = found.pooled
        elif found is not None and not exam.noise:
            about = {"passing": found.passing, "groups": found.groups}
            self.examined |= {"sites": found.sites, "pooled": found.pooled, **about}

    def drop(self, variant: str) -> float | None:
        """By how much the criterion's metric is worse than that of fp32; None where either has no score."""
        metric = metric_of(self.criterion)
        scores: Mapping[str, float] = self.scores.get(variant, {})
        if metric not in scores or metric not in self.scores.get("fp32", {}):
            return None
        return worsening(self.criterion, self.scores["fp32"][metric], scores[metric])

    def objection(self, variant: str) -> str:
        """Why a variant is not to be shipped by what clients have found; empty where it may be."""
        drop, agreement = self.drop(variant), self.agreement.get(variant)
        metric = metric_of(self.criterion)
        if drop is None or agreement is None:
            return f"no client has scored it by {metric}"
        if self.sites[variant] != self.sites["fp32"]:
            return f"{self.sites[variant]} clients have scored it, and {self.sites['fp32']} float32: export again"
        if not drop <= self.max_drop:
            return f"{metric} is worse by {drop:.4f}, at most {self.max_drop:g} is allowed"
        if not agreement >= self.least_agreement:
            return (
                f"it answers as PyTorch on {agreement:.2%} of the rows, at least {self.least_agreement:.2%} are asked"
            )
        return ""
