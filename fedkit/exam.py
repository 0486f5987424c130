"""What a model is examined in before its release: bounds on scores, and what is asked of clients for them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field

from fedkit.config import NotNegative, PositiveFloat, PositiveInt, Settings
from fedkit.errors import ConfigError

__all__ = ["VARIANTS", "Bound", "Exam", "Questions", "Variant", "Way", "number_key"]

Variant: TypeAlias = Literal["fp32", "int8", "int8-dynamic", "fp16"]  # of an exported model
VARIANTS: tuple[Variant, ...] = ("fp32", "int8", "int8-dynamic", "fp16")
Way: TypeAlias = Literal[">=", "<="]
GroupName = Annotated[str, Field(min_length=1, max_length=100)]

_BOUND = re.compile(r"([^\s<>=:]{1,100})(>=|<=)([-+.0-9eE]{1,30})")
_SLACK = 1e-6  # 7 of 10 are 0.69999999 in float32, and meet a floor of 0.7


def number_key(value: float) -> str:
    """The one way in which a number is written in a key: the shortest that gives the same number back."""
    return repr(float(value)).removesuffix(".0")


@dataclass(frozen=True, slots=True)
class Bound:
    """A floor (">=") or ceiling ("<=") of one metric; "loss" is one too. Written as in "accuracy>=0.7"."""

    metric: str
    way: Way
    number: float

    def __str__(self) -> str:
        return f"{self.metric}{self.way}{number_key(self.number)}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `str` writes; raises `ConfigError` for anything else. Spaces around the sign are left out."""
        found = _BOUND.fullmatch(re.sub(r"\s*([<>]=)\s*", r"\1", text.strip()))
        try:
            number = float(found[3]) if found else math.nan
        except ValueError:
            number = math.nan
        if found is None or not math.isfinite(number):
            raise ConfigError(f'a bound is written "accuracy>=0.7" or "loss<=0.5", got {text!r:.100}')
        return cls(found[1], ">=" if found[2] == ">=" else "<=", number)

    def holds(self, score: float | None) -> bool:
        """Whether a score keeps to it, to a millionth of it or of one; None and NaN never do."""
        if score is None or math.isnan(score):
            return False
        slack = _SLACK * max(abs(self.number), 1.0)
        return score >= self.number - slack if self.way == ">=" else score <= self.number + slack

    def passes(self, scores: Mapping[str, float | None]) -> bool:
        """Whether its metric is among `scores` and keeps to it."""
        return self.holds(scores.get(self.metric))


class Questions(Settings):
    """What is asked so that all criteria can be judged. Nothing in it may depend on data: clients are told it.

    `criteria`: bounds, as in "accuracy>=0.7", of which each client says whether its own test rows meet them; only how
    many do becomes known. `groups`: names of groups of rows whose scores are added up apart. `noise`: standard
    deviations of normal noise added to the inputs, in units of the inputs' own. `batches`: batch sizes of which one
    call is timed where the model is exported. Raises `ConfigError` for a bound that is not written as `str(Bound)`.
    """

    criteria: Annotated[tuple[str, ...], Field(max_length=32)] = ()
    groups: Annotated[tuple[GroupName, ...], Field(max_length=64)] = ()
    noise: Annotated[tuple[PositiveFloat, ...], Field(max_length=16)] = ()
    batches: Annotated[tuple[PositiveInt, ...], Field(max_length=16)] = ()

    def __post_init__(self) -> None:
        """Bounds are written in one way, so that an answer's key is the question's; nothing is asked twice."""
        for text in self.criteria:
            if str(Bound.parse(text)) != text:
                raise ValueError(f"criteria: write {str(Bound.parse(text))!r} for {text!r}")
        for name in ("criteria", "groups", "noise", "batches"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: each one once")
        if len({(one.metric, one.way) for one in self.bounds}) != len(self.criteria):
            raise ValueError(
                "criteria: one bound of a metric in each direction, as several would tell sites' own scores"
            )

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """The criteria, parsed."""
        return tuple(map(Bound.parse, self.criteria))


class Exam(Settings):
    """That scores are asked of an exported model, which each client makes by itself from the weights it is sent.

    `graph` is the digest of the converted network. `noise`, `criteria` and `groups` are those of `Questions`; groups
    are of test rows alone.
    """

    graph: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    variant: Variant = "fp32"
    noise: NotNegative = 0.0
    criteria: Annotated[tuple[str, ...], Field(max_length=32)] = ()
    groups: Annotated[tuple[GroupName, ...], Field(max_length=64)] = ()

    def __post_init__(self) -> None:
        """Refuses bounds that are not written as `str(Bound)`."""
        Questions(criteria=self.criteria, groups=self.groups)
