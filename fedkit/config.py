"""Settings: frozen values that check themselves when they are made.

A subclass of `Settings` is a dataclass whose annotations are enforced by pydantic, at construction and when it is read
from a run file alike. A wrong value raises `ConfigError`, which names the field and what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeAlias,
    TypeVar,
    dataclass_transform,
    get_args,
    get_type_hints,
)

import pydantic
import pydantic.dataclasses
from pydantic import Field

from fedkit.errors import ConfigError

__all__ = [
    "DP",
    "NAME",
    "Criterion",
    "Engine",
    "Evaluation",
    "Fraction",
    "Name",
    "NotNegative",
    "Participation",
    "PositiveFloat",
    "PositiveInt",
    "Privacy",
    "Settings",
    "explain",
    "metric_of",
    "parse",
    "read_toml",
    "require_name",
    "worsening",
]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # of clients, runs, tasks: never a path, an option or a command
Name = Annotated[str, Field(pattern=rf"^{NAME.pattern}$")]

PositiveInt = Annotated[int, Field(ge=1, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Engine: TypeAlias = Literal["simulation", "federation"]  # where a run's clients were: simulated, or sites of their own
Criterion = Annotated[str, Field(pattern=r"^[^:]+:(max|min)$")]  # a metric and which way is better: "auroc:max"

T = TypeVar("T")

_RULES = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def require_name(text: str, what: str) -> str:
    """`text`, which names something; raises `ConfigError` for what could be taken for a path or a command."""
    if not NAME.fullmatch(text):
        raise ConfigError(f"{what} must be 1 to 100 of A-Z a-z 0-9 _ . - and begin with a letter or digit")
    return text


@dataclass_transform(kw_only_default=True)
class Settings:
    """The base of everything a person sets: keyword-only, checked, comparable, printable.

    Class annotations are the fields. `frozen=False` in the class line allows attributes that are not settings.
    """

    _frozen: ClassVar[bool] = True

    def __init_subclass__(cls, *, frozen: bool | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if frozen is not None:
            cls._frozen = frozen
        pydantic.dataclasses.dataclass(kw_only=True, frozen=cls._frozen, config=_RULES)(cls)
        cls.__init__ = _explained(cls, cls.__init__)  # type: ignore[method-assign]

    def replace(self, **changes: Any) -> Self:
        """The same settings with `changes`, checked again; raises `ConfigError`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return type(self)(**(fields | changes))

    def to_dict(self) -> dict[str, Any]:
        """The settings as values JSON and TOML can hold; raises `ConfigError` for code, such as a function."""
        adapter = _adapter(type(self))
        try:
            return dict(adapter.dump_python(self, mode="json"))
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None
        except pydantic.errors.PydanticSchemaGenerationError as error:  # pragma: no cover
            raise ConfigError(str(error)) from None
        except ValueError as error:
            raise ConfigError(f"{type(self).__name__}: a setting cannot be written down: {error}") from None


_adapter: Callable[[Any], pydantic.TypeAdapter[Any]] = functools.lru_cache(maxsize=256)(pydantic.TypeAdapter)


def _explained(cls: type, init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, cls)) from None

    return checked


def parse(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """An instance of `cls` from plain values, as a run file holds them; raises `ConfigError`."""
    try:
        found: T = _adapter(cls).validate_python(dict(values))
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, cls, where=where)) from None
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file; raises `ConfigError` where it cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def explain(error: pydantic.ValidationError, cls: type, *, where: str | None = None) -> str:
    """One line a problem: the field, what was given, what would be right."""
    where = cls.__name__ if where is None else where
    lines = [_line(problem, cls, where) for problem in error.errors(include_url=False)]
    return "\n".join(dict.fromkeys(lines))


def _line(problem: Any, cls: type, where: str) -> str:
    is_unknown = problem["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    *above, last = problem["loc"] or [""]
    path = [str(part) for part in above if str(part).isidentifier() or isinstance(part, int)]
    if problem["loc"] and (is_unknown or str(last).isidentifier() or isinstance(last, int)):
        path.append(str(last))
    field = ".".join([where, *path] if where else path)
    if is_unknown:
        return f"{field}: there is no such setting{_suggestion(path, cls)}"
    if problem["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return f"{field}: must be given"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    given = problem.get("input")
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool | None) else ""
    return f"{field}: {message}{shown}"


def _suggestion(path: list[str], cls: type) -> str:
    kinds = [cls] if dataclasses.is_dataclass(cls) else []
    for part in path[:-1]:
        named = [kind for kind in kinds if getattr(kind, "kind", None) == part]
        kinds = named or [inner for kind in kinds for inner in _nested(kind, part)] or kinds
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    close = difflib.get_close_matches(path[-1], known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def _nested(cls: type, part: str) -> list[type]:
    """The settings classes that the field `part` of `cls` may hold."""
    hint = get_type_hints(cls).get(part)
    return [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


def metric_of(criterion: str) -> str:
    """The metric of a criterion: "auroc" of "auroc:max"."""
    return criterion.rpartition(":")[0]


def worsening(criterion: str, before: float, after: float) -> float:
    """By how much a score is worse than the one before under a criterion such as "auroc:max"; below 0 it is better."""
    return before - after if criterion.endswith(":max") else after - before


class Participation(Settings):
    """Who is asked, when a round closes, and what is too large.

    `fraction` of the round's clients is wanted; `over_select` times as many are asked and the first ones count.
    `quorum` is the least number whose answers make a round (None: half of those wanted, at least one). A round below it
    is abandoned and drawn anew, `attempts` times in all. `deadline_s` closes a call; `max_update_norm` bounds the
    Euclidean norm of one client's update.
    """

    fraction: Fraction = 1.0
    quorum: PositiveInt | None = None
    over_select: Annotated[float, Field(ge=1, le=10)] = 1.0
    deadline_s: PositiveFloat | None = None
    max_update_norm: PositiveFloat | None = None
    attempts: PositiveInt = 3


class DP(Settings):
    """Differential privacy of each row (`level="example"`), or of each client with all its rows (`"client"`).

    Give `epsilon`, and the noise is planned before the first step so that the run costs at most that much; or give
    `noise_multiplier`, and the cost is what it comes to.

    Of rows: each client keeps and accounts for it by itself. Gradients of single rows are clipped to a Euclidean norm
    of `max_grad_norm`; noise is that times the multiplier. `delta` must not exceed one over any client's rows.
    Guarantee: for adding or removing one row at one client, against whoever sees all that its training sends.
    Does not protect against: what example counts and evaluation metrics tell, which are not covered; a person whose
    rows are at two clients.

    Of clients: each round draws every client with the probability `participation.fraction`; they clip their updates to
    `max_update_norm`, and the coordinator adds that times the multiplier to their sum. With `clip_quantile`, the clip
    follows that quantile of the updates' norms. It takes many clients; below 100 a round `few_clients` must insist.
    `delta` must not exceed one over the clients. Guarantee: for adding or removing one client, against whoever sees the
    models. Does not protect against: the coordinator, which sees the updates.

    `noise="shared"`, with masked aggregation: each client adds only its part, in whole numbers inside the masked sum.
    Of n clients up to `dropouts` may be missing, and up to `colluders` may tell what they added: the others still bring
    the planned noise. Of rows it takes FedSGD. Of clients, epsilon then holds against the coordinator too, which adds
    nothing and sees the noised sum; as it knows who was drawn, drawing makes nothing cheaper. Does not protect against:
    more colluders, who take their parts off. With more dropouts nothing is opened.
    """

    delta: Annotated[float, Field(gt=0, lt=1)]
    epsilon: PositiveFloat | None = None
    noise_multiplier: PositiveFloat | None = None
    max_grad_norm: PositiveFloat = 1.0
    level: Literal["example", "client"] = "example"
    max_update_norm: PositiveFloat = 1.0
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    few_clients: bool = False
    noise: Literal["local", "shared"] = "local"
    dropouts: Annotated[int, Field(ge=0, le=1 << 20, strict=True)] = 0
    colluders: Annotated[int, Field(ge=0, le=1 << 20, strict=True)] = 1

    def __post_init__(self) -> None:
        """Epsilon or the noise multiplier: one follows from the other; and no setting of the other level."""
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give epsilon or noise_multiplier, and not both")
        unused = {"example": ("max_update_norm", "clip_quantile", "few_clients"), "client": ("max_grad_norm",)}
        for name in unused[self.level]:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} has no meaning at level {self.level!r}")
        if self.noise == "shared" and self.clip_quantile is not None:
            raise ValueError("clip_quantile has no meaning with noise 'shared': give a fixed max_update_norm")
        for name in ("dropouts", "colluders") if self.noise == "local" else ():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} has no meaning with noise 'local'")


class Privacy(Settings):
    """What protects the clients' data in a run: `dp`, and how answers are added up (`aggregation`).

    "plain": the coordinator sees each update. "masked": nobody, the coordinator included, sees more of updates, scores
    and statistics than their sum over at least three clients (Bonawitz et al. 2017). "bfv": clients encrypt under a key
    that they share, and the coordinator, which has none, adds up ciphertexts; whoever has the key, together with the
    coordinator, sees all. "ckks": the same with floats, in simulation alone. None: "masked" on a federation whose
    roster has three members or more, for whatever needs no more than sums; else "plain".

    But for "plain", each element of an update is clipped to +-`clip`, and kept to as many bits as the cohort leaves
    room for, 24 at most, or to `bits`.
    """

    dp: DP | None = None
    aggregation: Literal["plain", "masked", "bfv", "ckks"] | None = None
    clip: PositiveFloat = 16.0
    bits: Annotated[int, Field(ge=8, le=24)] | None = None
    sealed: bool = False
    owner: Name | None = None
    owner_box: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,1000}$")] | None = None

    def __post_init__(self) -> None:
        """Only what is sealed has an owner."""
        if self.owner is not None and not self.sealed:
            raise ValueError(
                "owner has a meaning with sealed=True alone: whoever runs the coordinator reads other models"
            )
        if self.owner_box is not None and self.owner is None:
            raise ValueError("owner_box is the key of an owner, and none is named")


class Evaluation(Settings):
    """How often the model is scored on validation data, which round is best, when to stop, and which rounds stand.

    `best` names a metric and a direction, as in "auroc:max" or "loss:min". `patience` ends the run after that many
    evaluations without a better one. With `max_drop`, a round stands only if that metric is worse than that of the
    model before by at most so much, over the same clients; else model and strategy stay as they were, on record.
    """

    every: PositiveInt = 1
    best: Criterion | None = None
    patience: PositiveInt | None = None
    max_drop: NotNegative | None = None

    def __post_init__(self) -> None:
        """Patience and `max_drop` compare by `best`; a round that nobody scores would slip past `max_drop`."""
        for name in ("patience", "max_drop"):
            if getattr(self, name) is not None and self.best is None:
                raise ValueError(f'{name} needs best, for example best="loss:min"')
        if self.max_drop is not None and self.every > 1:
            raise ValueError(f"max_drop judges every round, so every must be 1, got {self.every}")

    @property
    def metric(self) -> str | None:
        """The name of the metric that decides, or None."""
        return metric_of(self.best) if self.best else None

    @property
    def direction(self) -> Literal["max", "min"]:
        """Whether more is better."""
        return "max" if self.best and self.best.endswith(":max") else "min"

    def stands(self, score: float, before: float) -> bool:
        """Whether a model with this score may follow one with the score `before`; NaN only follows NaN."""
        if self.best is None or self.max_drop is None or before != before:
            return True
        return worsening(self.best, before, score) <= self.max_drop

    def better(self, score: float, than: float | None) -> bool:
        """Whether `score` beats the best so far; NaN never does."""
        if than is None:
            return score == score
        return score > than if self.direction == "max" else score < than
