"""What a model must keep to before it is released: criteria in a TOML file, judged by what its passport says.

Which way is better follows from the criteria: a metric with a floor anywhere is better when it is more; one with a
ceiling, and "loss", when it is less. Of a metric with neither, a change either way counts as a drop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from fedkit.config import Fraction, NotNegative, PositiveFloat, PositiveInt, Settings, parse, read_toml, worsening
from fedkit.deploy.passport import Examined, Passport, Scores
from fedkit.exam import Bound, GroupName, Questions, number_key

__all__ = ["Criteria", "Groups", "Outcome", "Protection", "Quantization", "Sites", "Verdict", "cost", "read"]

Outcome: TypeAlias = Literal["passed", "missed", "not measured"]
Aggregation: TypeAlias = Literal["plain", "masked", "bfv", "ckks"]
Metric = Annotated[str, Field(pattern=r"^[^\s<>=:]{1,100}$")]
Limits: TypeAlias = dict[Metric, Annotated[float, Field(allow_inf_nan=False)]]
Drops: TypeAlias = dict[Metric, NotNegative]

_MEASURE = "fedkit export --acceptance FILE measures it"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one criterion: what was asked and what was found, in words. What was not measured did not pass."""

    criterion: str
    asked: str
    found: str
    outcome: Outcome

    @property
    def passed(self) -> bool:
        """Whether the model keeps to it."""
        return self.outcome == "passed"


class Sites(Settings):
    """`[sites]`: a `share` of the sites that answered meets each bound on its own test rows; `answered` did, at least.

    `gap` is the largest difference of a metric between two clients. It takes the scores of each client, which only
    sites that release them tell; bounds take no more than how many sites meet them.
    """

    share: Fraction = 1.0
    answered: PositiveInt = 1
    floors: Limits = field(default_factory=dict)
    ceilings: Limits = field(default_factory=dict)
    gap: Drops = field(default_factory=dict)


class Groups(Settings):
    """`[groups]`: bounds for the rows of each group at all clients together, and the largest gap between two groups.

    `names` are public: clients are asked for these groups and no others.
    """

    names: Annotated[tuple[GroupName, ...], Field(max_length=64)] = ()
    floors: Limits = field(default_factory=dict)
    ceilings: Limits = field(default_factory=dict)
    gap: Drops = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Bounds of groups need to know which; a gap takes two."""
        if (self.floors or self.ceilings) and not self.names:
            raise ValueError('name the groups: names = ["female", "male"]')
        if self.gap and len(self.names) < 2:
            raise ValueError('gap is between groups, so name two or more: names = ["female", "male"]')


class Quantization(Settings):
    """`[quantization]`: the largest drop of metrics against float32, and the least agreement, on validation rows."""

    drop: Drops = field(default_factory=dict)
    agreement: Fraction | None = None


class Protection(Settings):
    """`[privacy]`: what the model may have cost any client at most, and how answers were added up: one of these."""

    epsilon: PositiveFloat | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    aggregation: tuple[Aggregation, ...] = ()


class Criteria(Settings):
    """A whole file of criteria. Raises `ConfigError` for one that asks for nothing, or contradicts itself.

    `floors` and `ceilings` bound the shipped file's scores on the test rows of all clients together. `noise` has the
    largest drop of metrics by standard deviation of normal noise added to the inputs, in units of the inputs' own;
    `latency_ms` the longest time of one call by batch size, in milliseconds, on the machine that exports.
    """

    floors: Limits = field(default_factory=dict)
    ceilings: Limits = field(default_factory=dict)
    sites: Sites = Sites()
    groups: Groups = Groups()
    quantization: Quantization = Quantization()
    noise: dict[str, Annotated[Drops, Field(min_length=1)]] = field(default_factory=dict)
    latency_ms: dict[str, PositiveFloat] = field(default_factory=dict)
    privacy: Protection = Protection()

    def __post_init__(self) -> None:
        """More of a metric is better, or less, and not both; keys that are numbers are; something is asked."""
        both = self._named("floors") & (self._named("ceilings") | {"loss"})
        if both:
            raise ValueError(f"{min(both)}: a floor says that more is better, and less of it is: give one or the other")
        self.questions()
        if self._is_empty:
            raise ValueError("the criteria ask for nothing; give for example floors = { accuracy = 0.75 }")

    def _named(self, kind: Literal["floors", "ceilings"]) -> set[str]:
        return {metric for section in (self, self.sites, self.groups) for metric in getattr(section, kind)}

    @property
    def _is_empty(self) -> bool:
        return (
            not (self.floors or self.ceilings or self.noise or self.latency_ms)
            and self.sites == Sites(share=self.sites.share)
            and self.groups == Groups(names=self.groups.names)
            and self.quantization == Quantization()
            and self.privacy == Protection()
        )

    def questions(self) -> Questions:
        """What has to be asked at export so that every criterion can be judged."""
        return Questions(
            criteria=tuple(map(str, _bounds(self.sites))),
            groups=self.groups.names,
            noise=tuple(_number("noise", key) for key in self.noise),
            batches=tuple(int(_number("latency_ms", key, whole=True)) for key in self.latency_ms),
        )

    def judge(self, passport: Passport) -> list[Verdict]:
        """One verdict a criterion, in the order of the file's sections as this class lists them."""
        sections = (_pooled, _sites, _groups, _quantization, _noise, _latency, _privacy)
        return [verdict for section in sections for verdict in section(self, passport)]

    def drop(self, metric: str, before: float, after: float) -> float:
        """By how much `after` is worse than `before`; for a metric with neither floor nor ceiling, how far it is."""
        if metric in self._named("floors"):
            return worsening(f"{metric}:max", before, after)
        if metric in self._named("ceilings") or metric == "loss":
            return worsening(f"{metric}:min", before, after)
        return abs(after - before)


def read(path: Path) -> Criteria:
    """The criteria in a TOML file; raises `ConfigError`, which names the field and what would be right."""
    return parse(Criteria, read_toml(path), where=path.name)


def _number(section: str, key: str, *, whole: bool = False) -> float:
    try:
        return int(key) if whole else float(key)
    except ValueError:
        what = 'a batch size, as in "64"' if whole else 'a standard deviation, as in "0.1"'
        raise ValueError(f"{section}: each key is {what}, got {key!r:.40}") from None


def _bounds(section: Criteria | Sites | Groups) -> Iterator[Bound]:
    for metric, least in section.floors.items():
        yield Bound(metric, ">=", least)
    for metric, most in section.ceilings.items():
        yield Bound(metric, "<=", most)


def _judged(criterion: str, bound: Bound, found: float | str) -> Verdict:
    """The verdict over a number, or over the reason why there is none."""
    asked = f"{bound.way} {_shown(bound.number)}"
    if isinstance(found, str):
        return Verdict(criterion, asked, found, "not measured")
    return Verdict(criterion, asked, _shown(found), "passed" if bound.holds(found) else "missed")


def _shown(number: float) -> str:
    return f"{number:.6g}"


def _examined(passport: Passport) -> Examined | None:
    """The examination of the shipped file, not that of another one."""
    found = passport.examined
    return found if found is not None and found.variant == passport.shipped else None


def _score(metric: str, scores: Scores | None) -> float | str:
    """A metric's value, or why there is none."""
    if scores is None:
        return _MEASURE
    if metric not in scores:
        return f"{metric} is not measured; measured are {', '.join(sorted(scores)) or 'none'}"
    found = scores[metric]
    return f"{metric} is undefined on these rows" if found is None else found


def _scores(metric: str, tables: Mapping[str, Scores | None]) -> list[float] | str:
    """A metric's value in each table, or why there is none in one of them."""
    found = []
    for name, table in tables.items():
        score = _score(metric, table)
        if isinstance(score, str):
            return f"{name}: {score}"
        found.append(score)
    return found


def _gap(metric: str, tables: Mapping[str, Scores | None]) -> float | str:
    found = _scores(metric, tables)
    if isinstance(found, str):
        return found
    return max(found) - min(found) if len(found) > 1 else "there are not two to compare"


def _drop(criteria: Criteria, metric: str, before: Scores | None, after: Scores | None) -> float | str:
    found = _scores(metric, {"before": before, "after": after})
    return found if isinstance(found, str) else criteria.drop(metric, *found)


def _pooled(criteria: Criteria, passport: Passport) -> Iterator[Verdict]:
    exam = _examined(passport)
    for bound in _bounds(criteria):
        yield _judged(bound.metric, bound, _score(bound.metric, exam.pooled if exam else None))


def _sites(criteria: Criteria, passport: Passport) -> Iterator[Verdict]:
    rule, exam = criteria.sites, _examined(passport)
    if rule.answered > 1:
        yield _judged("sites that answered", Bound("sites", ">=", rule.answered), exam.sites if exam else _MEASURE)
    for bound in _bounds(rule):
        yield _at_sites(rule.share, bound, exam)
    hidden = sum(client.test is None for client in passport.clients)
    tables = {client.pseudonym: client.test for client in passport.clients}
    for metric, most in rule.gap.items():
        text = f"{hidden} of {len(tables)} sites release no scores of their own; floors of sites need none"
        yield _judged(
            f"gap in {metric} between sites", Bound(metric, "<=", most), text if hidden else _gap(metric, tables)
        )


def _at_sites(share: float, bound: Bound, exam: Examined | None) -> Verdict:
    name, asked = f"{bound} at each site", f"{100 * share:.4g} % of the sites"
    passing = exam.passing.get(str(bound)) if exam else None
    if exam is None or passing is None or not 0 <= passing <= exam.sites or not exam.sites:
        return Verdict(name, asked, _MEASURE, "not measured")
    is_met = Bound("share", ">=", share).holds(passing / exam.sites)
    return Verdict(name, asked, f"{passing} of {exam.sites}", "passed" if is_met else "missed")


def _groups(criteria: Criteria, passport: Passport) -> Iterator[Verdict]:
    rule, exam = criteria.groups, _examined(passport)
    tables = {name: exam.groups.get(name) if exam else None for name in rule.names}
    for bound in _bounds(rule):
        for name, scores in tables.items():
            yield _judged(f"{bound.metric} of group {name}", bound, _score(bound.metric, scores))
    for metric, most in rule.gap.items():
        yield _judged(f"gap in {metric} between groups", Bound(metric, "<=", most), _gap(metric, tables))


def _quantization(criteria: Criteria, passport: Passport) -> Iterator[Verdict]:
    rule, base, shipped = criteria.quantization, passport.measured("fp32"), passport.measured(passport.shipped)
    bounds = {f"drop in {metric} by quantisation": Bound(metric, "<=", most) for metric, most in rule.drop.items()}
    found = {
        name: _drop(criteria, bound.metric, base.valid if base else None, shipped.valid if shipped else None)
        for name, bound in bounds.items()
    }
    if rule.agreement is not None:
        name = "agreement with PyTorch"
        bounds[name] = Bound("agreement", ">=", rule.agreement)
        found[name] = _MEASURE if shipped is None or shipped.agreement is None else shipped.agreement
    for name, bound in bounds.items():
        verdict = _judged(name, bound, found[name])
        is_whole = passport.shipped == "fp32"  # nothing was quantised
        yield Verdict(name, verdict.asked, "float32 is shipped", "passed") if is_whole else verdict


def _noise(criteria: Criteria, passport: Passport) -> Iterator[Verdict]:
    exam = _examined(passport)
    for key, drops in criteria.noise.items():
        level = number_key(_number("noise", key))
        before, after = (exam.pooled, exam.noise.get(level)) if exam else (None, None)
        for metric, most in drops.items():
            name = f"drop in {metric} with noise of {level}"
            yield _judged(name, Bound(metric, "<=", most), _drop(criteria, metric, before, after))


def _latency(criteria: Criteria, passport: Passport) -> Iterator[Verdict]:
    exam = _examined(passport)
    for key, most in criteria.latency_ms.items():
        seconds = exam.latency_s.get(str(int(key))) if exam else None
        name = f"milliseconds of one call, batch of {int(key)}"
        yield _judged(name, Bound("ms", "<=", most), _MEASURE if seconds is None else 1000 * seconds)


def _privacy(criteria: Criteria, passport: Passport) -> Iterator[Verdict]:
    rule, name = criteria.privacy, passport.privacy.aggregation
    for which, most in (("epsilon", rule.epsilon), ("delta", rule.delta)):
        if most is not None:
            spent, text = cost(passport, which)
            outcome: Outcome = "not measured" if math.isnan(spent) else "passed" if spent <= most else "missed"
            yield Verdict(which, f"<= {_shown(most)}", text, outcome)
    if rule.aggregation:
        outcome = "passed" if name in rule.aggregation else "missed"
        yield Verdict("aggregation", " or ".join(rule.aggregation), name, outcome)


def cost(passport: Passport, which: str) -> tuple[float, str]:
    """Epsilon or delta of the client that it cost most, calibration added (basic composition), and how it came about.

    NaN where a client's cost is not known, infinity where something of the data is in the model without noise.
    """
    dp, calibration = passport.privacy.dp, passport.calibration
    if dp is None:
        return math.inf, "no differential privacy"
    planned = dp.get(which)
    own = [client.epsilon for client in passport.clients] if which == "epsilon" else [None]
    costs = [one for one in (planned if known is None else known for known in own) if isinstance(one, int | float)]
    if not costs or len(costs) < len(own):
        return math.nan, "what it cost is not known of each client"
    worst = max(costs)
    if calibration is None or calibration.method == "noise":
        return worst, _shown(worst)
    added = getattr(calibration, which)
    if added is None:
        return math.inf, "the calibration's ranges are not noised"
    return worst + added, f"{_shown(worst + added)}, of which {_shown(added)} for calibration"
