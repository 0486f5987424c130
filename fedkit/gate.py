"""What the next client must find in a hop before it trains on from it: judged where its data is, told in numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from fedkit.config import Criterion, NotNegative, PositiveFloat, Settings, metric_of, worsening
from fedkit.errors import Reason, Refused
from fedkit.weights import Vector, Weights

__all__ = ["BEFORE", "VERDICT", "Gate", "Verdict"]

Limit: TypeAlias = Literal["max_norm", "max_ratio", "max_drop"]

BEFORE = "hop/before"  # the extra vector that brings the model before along with a hop's
VERDICT = "hop/verdict"  # the extra vector in which the client says what it made of the hop before
_LIMITS: tuple[Limit | None, ...] = (None, "max_norm", "max_ratio", "max_drop")
_UNTOLD = -1.0  # in place of a norm
_BLOCK = 1 << 16  # elements that are compared at a time
_LARGEST = float(np.finfo(np.float32).max)


class Gate(Settings):
    """What a hop must keep to. The client that receives it goes on from the model before where it does not.

    The change since the model before may have a Euclidean norm of at most `max_norm`, and of at most `max_ratio` times
    the norm of that model. On the client's own validation data `metric`, as in "auroc:max" or "loss:min", may be worse
    than with the model before by at most `max_drop`; a score of NaN is worse unless it was NaN before. A limit that is
    None is not looked at; at least one must be given.

    Does not protect against: two liars in a row, of which the second accepts what the first made; a liar who rejects
    good work; many small steps below every limit; the last hop of a run, which nobody receives (`Evaluation.max_drop`
    judges its round with it and, if need be, without it).
    """

    max_norm: PositiveFloat | None = None
    max_ratio: PositiveFloat | None = None
    max_drop: NotNegative | None = None
    metric: Criterion = "loss:min"

    def __post_init__(self) -> None:
        """A gate without limits would let everything pass."""
        if self.max_norm is None and self.max_ratio is None and self.max_drop is None:
            raise ValueError("give max_norm, max_ratio or max_drop: a gate without any lets everything pass")

    @property
    def scored(self) -> str:
        """The name of the metric that is looked at."""
        return metric_of(self.metric)

    def base(self, model: Weights, sent: Mapping[str, Vector], answered: Mapping[str, Vector]) -> Weights:
        """What the client trained from: `model`, or the one before where it did not accept that; raises `Refused`."""
        accepted = Verdict.from_extra(answered, self).broken is None
        return model if accepted else model.with_vector(sent[BEFORE])

    def judge(self, model: Weights, before: Weights, score: Callable[[Weights], float]) -> Verdict:
        """What becomes of `model`, made from `before`; `score` is asked only where the norms are right."""
        norm = _distance(model, before)
        if self.max_norm is not None and not norm <= self.max_norm:
            return Verdict("max_norm", norm)
        if self.max_ratio is not None and not norm <= self.max_ratio * before.norm():
            return Verdict("max_ratio", norm)
        if self.max_drop is None:
            return Verdict(None, norm)
        scores = score(before), score(model)
        worse = worsening(self.metric, *scores)
        holds = math.isnan(scores[0]) or worse <= self.max_drop
        return Verdict(None if holds else "max_drop", norm, scores)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a client made of the hop before: the limit that was `broken`, if any, and the numbers it tells.

    `norm` is that of the change, below 0 where it is not told; `scores` are those of the model before and of this one,
    where the site releases them.
    """

    broken: Limit | None
    norm: float
    scores: tuple[float, float] | None = None

    def to_vector(self) -> Vector:
        """Two or four numbers; scores that are not finite do not travel."""
        scores = self.scores if self.scores is not None and all(map(math.isfinite, self.scores)) else ()
        return np.array([_LIMITS.index(self.broken), min(self.norm, _LARGEST), *scores], dtype=np.float32)

    @staticmethod
    def without_scores(extra: Mapping[str, Vector]) -> dict[str, Vector]:
        """An answer's extra vectors as a site sends them that does not release its scores."""
        return {name: vector[:2] if name == VERDICT else vector for name, vector in extra.items()}

    @staticmethod
    def without_numbers(extra: Mapping[str, Vector]) -> dict[str, Vector]:
        """An answer's extra vectors as they travel beside a sealed model, of which numbers would tell something."""
        untold = np.array([_UNTOLD], dtype=np.float32)
        return {name: np.append(vector[:1], untold) if name == VERDICT else vector for name, vector in extra.items()}

    @classmethod
    def from_extra(cls, extra: Mapping[str, Vector], gate: Gate) -> Verdict:
        """The verdict under `gate` that came with an answer; raises `Refused` where none came that makes sense."""
        vector = extra[VERDICT].tolist() if VERDICT in extra else []
        if len(vector) in (2, 4) and vector[0] in range(len(_LIMITS)):
            broken = _LIMITS[int(vector[0])]
            if broken is None or getattr(gate, broken) is not None:
                return cls(broken, vector[1], (vector[2], vector[3]) if len(vector) == 4 else None)
        raise Refused(Reason.SHAPE, "the answer does not say what became of the hop before")

    def explain(self, gate: Gate) -> str:
        """Why the hop was not accepted, with the limit of `gate` and the numbers that are known; empty if it was."""
        if self.broken is None:
            return ""
        if self.broken == "max_drop":
            told = "got worse" if self.scores is None else f"went from {self.scores[0]:.4g} to {self.scores[1]:.4g}"
            return f"its {gate.scored} on validation data {told}, max_drop is {gate.max_drop:g}"
        if self.norm < 0.0:
            return f"the change is above {self.broken}, {getattr(gate, self.broken):g}"
        if self.broken == "max_ratio":
            return f"the change has norm {self.norm:.4g}, max_ratio to the model before is {gate.max_ratio:g}"
        return f"the change has norm {self.norm:.4g}, max_norm is {gate.max_norm:g}"


def _distance(one: Weights, other: Weights) -> float:
    """The Euclidean norm of their difference, in float64."""
    one.manifest.require(other.manifest)
    total = 0.0
    for start in range(0, one.manifest.size, _BLOCK):
        apart = one.vector[start : start + _BLOCK].astype(np.float64) - other.vector[start : start + _BLOCK]
        total += float(apart @ apart)
    return math.sqrt(total)
