"""The base class of strategies, and the federation they talk to.

A strategy is one coroutine that reads like the paper: it asks a `Federation` for work and returns the next model. The
annotated attributes of its class are its settings; every other attribute it sets is its state, committed with the round
and rolled back when a round is abandoned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import nn

from fedkit.aggregation import Mean, Weighting
from fedkit.config import Participation, PositiveInt, Settings
from fedkit.errors import IncompatibleStrategy, StateError
from fedkit.examination import Examination
from fedkit.gate import Gate
from fedkit.queries import Query
from fedkit.task import Task
from fedkit.weights import Vector, Weights
from fedkit.work import Evaluate, Fit, Gradient, Summarize, Update, Work

__all__ = ["Arrival", "Federation", "Handed", "Send", "Strategy"]

Send: TypeAlias = Mapping[str, Vector | Weights]


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One update of asynchronous work: who sent it and how many commits happened since it was started."""

    client: str
    update: Weights
    examples: int
    staleness: int


class Handed(Weights):
    """The model after a visit that the next client is to judge: made by client `by` from the model `before`.

    Only as long as it is handed on as it is: what is computed from it are plain weights. `assignment` is the visit's id
    in the open round.
    """

    def __init__(self, after: Weights, *, before: Weights, by: str, assignment: str = "") -> None:
        super().__init__(after.manifest, after.vector)
        self.before = Weights(before.manifest, before.vector)  # plain: it holds no chain of models
        self.by = by
        self.assignment = assignment


@runtime_checkable
class Federation(Protocol):
    """What a strategy may ask for. Simulation and every engine implement it; nothing else differs between them."""

    @property
    def round(self) -> int:
        """The number of the round, from 1."""
        ...

    @property
    def clients(self) -> tuple[str, ...]:
        """The round's clients, sorted by name."""
        ...

    @property
    def idle(self) -> tuple[str, ...]:
        """Those of the round's clients that have no work from `start` under way."""
        ...

    @property
    def rng(self) -> np.random.Generator:
        """A generator seeded by (run seed, round, attempt); use it for every draw."""
        ...

    @property
    def drawn(self) -> tuple[str, ...] | None:
        """Whom client-level privacy has drawn for this round, in secret; None where the strategy draws."""
        ...

    async def mean(
        self,
        cohort: Collection[str],
        model: Weights,
        work: Fit | Gradient,
        send: Send | None = None,
        weights: Weighting = "examples",
    ) -> Mean:
        """The weighted mean of the cohort's updates; raises `RoundAbandoned` below the quorum."""
        ...

    def updates(
        self, cohort: Collection[str], model: Weights, work: Fit | Gradient, send: Send | None = None
    ) -> AsyncIterator[tuple[str, Update]]:
        """Single updates as (client, update), as they come; raises `RoundAbandoned` below the quorum."""
        ...

    async def hop(
        self, client: str, model: Weights, work: Fit, gate: Gate | None = None, then: Sequence[str] = ()
    ) -> Weights:
        """The model after one visit; the model unchanged, and the skip on record, where the client cannot.

        `then` says who comes next in this round, in order. Where hops are sealed, the model is sealed for the first
        three of them, or, where they are fewer, for all of the round's clients; it is a `SealedModel`, to be passed on.

        With a gate, the client first judges the visit that made `model`, if it is one of a gated hop (`Handed`): where
        that does not keep to the gate, it trains from the model before, and that visit is undone, on record.
        """
        ...

    async def evaluate(self, cohort: Collection[str], model: Weights) -> dict[str, float]:
        """Loss and metrics on the cohort's validation data, pooled."""
        ...

    async def examine(
        self, cohort: Collection[str], model: Weights, work: Evaluate, send: Send | None = None
    ) -> Examination | None:
        """Scores of the ONNX file that the model exports to, as `work.exam` says; None where nobody has such rows."""
        ...

    async def summarize(self, cohort: Collection[str], query: Query, model: Weights | None = None) -> Any:
        """The answer to a query about the cohort's training data, and the model where the query is about that too."""
        ...

    def start(self, client: str, model: Weights, work: Fit) -> None:
        """Begins work at one client without waiting for it."""
        ...

    async def next(self) -> Arrival:
        """The next update of work that was started; failures are on record and passed over."""
        ...

    async def commit(self, model: Weights) -> Weights:
        """Ends the round durably with `model`, and begins the next; returns what that goes on from.

        That is `model`, or the one before where the run's `Evaluation.max_drop` says that this round does not stand.
        """
        ...


class Strategy(Settings, frozen=False):
    """Override `round` (or, for asynchronous strategies, `run`); annotate settings; set any other attribute as state.

    State may be numbers, strings, None, numpy arrays, `Weights`, and lists and dicts of these.
    """

    rounds: PositiveInt = 10
    local: Fit = Fit()
    participation: Participation = Participation()

    uses: ClassVar[frozenset[str]] = frozenset({"mean"})  # of mean, updates, hop, start, and send for own vectors
    unused: ClassVar[frozenset[str]] = frozenset()  # settings of participation that would be ignored
    trains: ClassVar[bool] = True  # else it begins with a finished model: nothing is prepared, nor scored at the end

    @property
    def visits(self) -> int:
        """How often the strategy asks one client to train at most, as far as it has a plan."""
        return self.rounds

    @property
    def least(self) -> int:
        """How many single updates a round needs; one with fewer is abandoned, as one below its quorum."""
        return 1

    @property
    def needs_valid(self) -> bool:
        """Whether clients need validation rows for it; a tenth of their training rows is then set aside."""
        return False

    def asks(self) -> tuple[Work, ...]:
        """The questions it asks besides training, for sites that look at a run before they take part."""
        return ()

    def questions(self, task: Task) -> int:
        """How many questions about training data a client answers, those of preprocessing among them."""
        return int(self.trains and task.prepare is not None) + sum(isinstance(one, Summarize) for one in self.asks())

    async def round(self, federation: Federation, model: Weights) -> Weights:
        """One round: the next model from this one."""
        raise NotImplementedError(f"{type(self).__name__} must define async def round(self, federation, model)")

    async def run(self, federation: Federation, model: Weights) -> Weights:
        """All rounds from `federation.round` on, so that a run resumes where it was committed last."""
        while federation.round <= self.rounds:
            model = await federation.commit(await self.round(federation, model))
        return model

    def cohort(self, federation: Federation) -> list[str]:
        """As many of the round's clients as are `asked`, drawn without replacement; or those whom privacy has drawn."""
        if federation.drawn is not None:
            return list(federation.drawn)
        return self.draw(federation, federation.clients, self.asked(len(federation.clients)))

    def asked(self, clients: int) -> int:
        """How many of K clients are asked: max(fraction * K, quorum, `least`), times `over_select`."""
        rule = self.participation
        wanted = max(int(rule.fraction * clients + 1e-9), self.least, rule.quorum or 1)
        return min(math.ceil(wanted * rule.over_select - 1e-9), clients)

    def draw(self, federation: Federation, clients: Sequence[str], count: int) -> list[str]:
        """`count` of `clients` at random without replacement, sorted by name."""
        if count >= len(clients):
            return sorted(clients)
        return sorted(federation.rng.choice(np.array(clients, dtype=object), size=count, replace=False).tolist())

    def check(self, task: Task, module: nn.Module) -> None:  # noqa: ARG002
        """Raises `IncompatibleStrategy` where this strategy cannot train `task`, before anything is asked."""
        name, rule, plain = type(self).__name__, self.participation, Participation()
        grouped = bool(self.uses & {"mean", "updates"})
        for setting in sorted(self.unused | (set() if grouped else {"quorum", "over_select"})):
            if getattr(rule, setting) != getattr(plain, setting):
                raise IncompatibleStrategy(f"{name} has no use for participation.{setting}={getattr(rule, setting)}")
        if rule.quorum is not None and rule.quorum < self.least:
            few = f"participation.quorum={rule.quorum} would make a round of fewer: raise it, or leave it out"
            raise IncompatibleStrategy(f"{name} needs {self.least} answers in a round, and {few}")
        if isinstance(self.local, Fit):
            self._check_fit(self.local)
        if task.train is not None:
            self._check_loop(task)

    def _check_fit(self, fit: Fit) -> None:
        name = type(self).__name__
        if fit.gate is not None:
            raise IncompatibleStrategy(
                f"a gate belongs to a strategy that hands the model on, not to {name}'s local work"
            )
        if fit.quantize_from is not None and fit.quantize_from > self.rounds:
            rounds = f"{self.rounds} round{'s' * (self.rounds > 1)}"
            raise IncompatibleStrategy(
                f"local.quantize_from={fit.quantize_from} would never begin: {name} makes {rounds} here"
            )

    def _check_loop(self, task: Task) -> None:
        if isinstance(self.local, Gradient):
            raise IncompatibleStrategy(
                f"{type(self).__name__} asks for gradients, and {task.name} has its own train loop: use FedAvg"
            )
        if self.local.proximal or self.local.control_variates:
            raise IncompatibleStrategy(
                f"proximal and control_variates change the built-in loop, and {task.name} has its own train loop"
            )

    def require_clients(self, count: int) -> None:
        """Raises `IncompatibleStrategy` where a round that may begin with `count` clients cannot be made."""
        if count < self.least:
            few = f"a round may begin with {count}: let more take part, or withstand fewer liars"
            raise IncompatibleStrategy(f"{type(self).__name__} needs {self.least} clients in a round, and {few}")

    def state_dict(self) -> dict[str, Any]:
        """The strategy's lasting state: every attribute that is not a setting; raises `StateError` for odd ones."""
        settings = {field.name for field in dataclasses.fields(self)}
        return {name: _kept(value, name) for name, value in vars(self).items() if name not in settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back exactly what `state_dict` gave; attributes set since then are gone."""
        settings = {field.name for field in dataclasses.fields(self)}
        for name in [name for name in vars(self) if name not in settings]:
            delattr(self, name)
        for name, value in state.items():
            setattr(self, name, _kept(value, name))


def _kept(value: Any, name: str) -> Any:
    """A copy that later changes of the strategy do not reach."""
    if isinstance(value, np.ndarray):
        return _array(value, name)
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {key: _kept(inner, f"{name}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_kept(inner, f"{name}[{i}]") for i, inner in enumerate(value))
    if value is None or isinstance(value, bool | int | float | str | Weights):
        return value
    text = "keep numbers, text, arrays, Weights, or lists and dicts of them, or override state_dict and load_state_dict"
    raise StateError(f"{name} is a {type(value).__name__}, which cannot be committed with the round: {text}")


def _array(value: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    if value.dtype.hasobject:
        raise StateError(f"{name} is an array of objects, which cannot be committed with the round")
    return value.copy()
