"""Drives a run from its preparation to its test scores, and takes it up again from its journal.

Round 0 prepares (initial weights, federated preprocessing), rounds 1 .. R are the strategy's; round -1 comes last and
touches the test data, once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedkit.config import Evaluation
from fedkit.errors import RoundAbandoned, RunError, RunFailed
from fedkit.metrics import MetricSet
from fedkit.rounds.assignment import Transport
from fedkit.rounds.call import Refusal
from fedkit.rounds.federation import JournaledFederation, RunIdentity
from fedkit.rounds.journal import Commit, Journal, RoundRecord
from fedkit.strategy import Strategy
from fedkit.task import Prepared, Task
from fedkit.weights import Weights
from fedkit.work import Answer, Evaluate, MetricSums

__all__ = ["Best", "Outcome", "Plan", "conduct"]

_TEST_ROUND = -1

Observer: TypeAlias = Callable[[RoundRecord], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that defines a run but its clients; a round begins when `min_clients` are there."""

    name: str
    task: Task
    strategy: Strategy
    seed: int = 0
    init: Weights | None = None
    evaluate: Evaluation | None = None
    min_clients: int = 1
    on_round: Observer | None = None


@dataclass(frozen=True, slots=True)
class Best:
    """The round whose validation metric was best: its weights, the scores then, and its test scores."""

    round: int
    weights: Weights
    metrics: dict[str, float]
    test: dict[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run ends with. `test` is pooled over all clients' test data, `test_per_client` each one's own.

    `refusals` says who was not scored and why; `state` is the strategy's own after the last round.
    """

    weights: Weights
    history: list[RoundRecord]
    abandoned: list[RoundRecord]
    test: dict[str, float] = field(default_factory=dict)
    test_per_client: dict[str, dict[str, float]] = field(default_factory=dict)
    best: Best | None = None
    refusals: tuple[Refusal, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)


class _Finished(Exception):
    """No better round has come for as long as the run's patience."""


async def conduct(plan: Plan, transport: Transport, journal: Journal) -> Outcome:
    """Runs `plan` to its end, from wherever `journal` says it is.

    Raises `RunFailed` where a round cannot reach its quorum, `NonDeterministicStrategy` where a replay differs.
    """
    strategy = copy.copy(plan.strategy)
    strategy.load_state_dict(plan.strategy.state_dict())
    run = _Run(plan, strategy, transport, journal)
    try:
        run.notify()
        await run.prepare()
        while not await run.attempt():
            continue
        return await run.finish()
    finally:
        run.resume(())


class _Run(JournaledFederation):
    """The federation plus what only whoever knows the task can do: score, commit, prepare, finish."""

    def __init__(self, plan: Plan, strategy: Strategy, transport: Transport, journal: Journal) -> None:
        identity = RunIdentity(plan.name, plan.seed, strategy.participation, strategy.least)
        super().__init__(identity, transport, journal)
        self._plan = plan
        self._strategy = strategy
        self._metrics = MetricSet(plan.task)

    async def prepare(self) -> None:
        """Commits the initial weights as round 0, with the preprocessing that the clients' data asks for."""
        module = self._plan.task.build(self._plan.seed)
        self._strategy.check(self._plan.task, module)
        self._strategy.require_clients(self._plan.min_clients)
        while self.journal.last() is None:
            await self._assemble(0)
            try:
                if isinstance(module, Prepared) and self._plan.task.prepare is not None:
                    moments = await self.summarize(self.clients, self._plan.task.prepare.query)
                    module.prepare.set(moments)
            except RoundAbandoned as error:
                self._give_up(error)
                continue
            await self._commit(self._initial(Weights.from_module(module, self._plan.task.travels)))

    async def _assemble(self, round: int) -> None:
        """`round` is next, with everybody who is to be waited for; an open one goes on with those it began with."""
        opened = self.journal.open()
        if opened is None or opened.round != round:
            await self.transport.assemble(self._plan.min_clients)
        self.enter(round, self._next_attempt())

    def notify(self) -> None:
        """Tells clients what the last commit made durable; they may have missed it before."""
        last = self.journal.last()
        if last is not None:
            self.transport.committed(list(last.accepted), list(last.dropped))

    def _initial(self, fresh: Weights) -> Weights:
        init = self._plan.init
        if init is None:
            return fresh
        fresh.manifest.require_shapes(init.manifest, "init")
        vector = init.vector.copy()
        for name, where in fresh.manifest.slices.items():
            if self._plan.task.prepare is not None and name.startswith("prepare."):
                vector[where] = fresh.vector[where]
        return fresh.with_vector(vector)

    async def attempt(self) -> bool:
        """Runs the strategy from the last commit; False where a round was abandoned and is to be tried again."""
        if self._is_over(self._last()):
            return True
        self._strategy.load_state_dict(self._last().state)
        await self._assemble(self._last().round + 1)
        self.resume(self._last().started)
        try:
            await self._strategy.run(self, self._last().model)  # no name here may keep the first of these models
        except _Finished:
            return True
        except RoundAbandoned as error:
            self._give_up(error)
            return False
        return True

    def _give_up(self, error: RoundAbandoned) -> None:
        attempt = self.now.opened.attempt
        self.abandon()
        if attempt >= self.identity.participation.attempts:
            stands = "nothing was trained" if self.journal.last() is None else "the last committed model stands"
            raise RunFailed(f"{error} The round was tried {attempt} times; {stands}.") from error

    def _next_attempt(self) -> int:
        tried = self.journal.abandoned()
        last = self.journal.last()
        number = 0 if last is None else last.round + 1
        return 1 + max((record.attempt for record in tried if record.round == number), default=0)

    def _last(self) -> Commit:
        last = self.journal.last()
        assert last is not None  # prepare has committed round 0
        return last

    async def evaluate(self, cohort: Collection[str], model: Weights) -> dict[str, float]:
        """Loss and metrics on the cohort's validation data, pooled; empty where nobody has any."""
        return (await self._score(cohort, model, Evaluate()))[0]

    async def _score(
        self, cohort: Collection[str], model: Weights, work: Evaluate
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        single: dict[str, MetricSums] = {}

        def keep(client: str, answer: Answer) -> None:
            assert isinstance(answer, MetricSums)  # inspected against the assignment
            single[client] = answer

        total = await self.sums(cohort, model, work, self._metrics.size, each=keep)
        if total is None:
            return {}, {}
        shown = [client for client in total.clients if single[client].released]
        each = {client: self._metrics.compute(single[client].vector) for client in shown}
        return self._metrics.compute(total.vector), each

    async def commit(self, model: Weights) -> Weights:
        """Scores the model where that is due, makes the round durable, and begins the next."""
        self._require_model(model)
        pooled: dict[str, float] = {}
        each: dict[str, dict[str, float]] = {}
        rule = self._plan.evaluate
        if rule is not None and self.round % rule.every == 0:
            pooled, each = await self._score(self.clients, model, Evaluate())
        await self._commit(model, metrics=pooled, per_client=each, best=self._is_best(pooled))
        if self._is_over(self._last()):
            raise _Finished
        if self.round <= self._strategy.rounds:
            await self._assemble(self.round)
        return model

    def _require_model(self, model: Weights) -> None:
        last = self._last()
        if not isinstance(model, Weights):
            raise RunError(f"round {self.round}: the strategy returned {type(model).__name__} where Weights are due")
        last.model.manifest.require(model.manifest, f"the model of round {self.round}")
        if not model.is_finite():
            raise RunError(f"round {self.round}: the new model holds NaN or infinity; round {last.round}'s stands")

    async def _commit(self, model: Weights, **scores: object) -> None:
        left = self.now.replay.left()
        if left is not None:
            raise self.now.replay.changed(f"commit of round {self.round}")
        record = self.now.record(**scores)
        state, accepted, dropped = self._strategy.state_dict(), tuple(self.now.accepted), self.dropped()
        commit = Commit(self.round, model, state, record, self.airborne(), accepted, dropped)
        await self.transport.aside("commit", lambda: self.journal.commit(commit))
        self.notify()
        if self._plan.on_round is not None and self.round > 0:
            self._plan.on_round(record)
        self.enter(self.round + 1)

    def _is_best(self, pooled: dict[str, float]) -> bool:
        rule = self._plan.evaluate
        if rule is None or rule.metric is None or not pooled:
            return False
        if rule.metric not in pooled:
            raise RunError(f"best={rule.best!r}: there is no metric {rule.metric!r}; there are {', '.join(pooled)}")
        best = self.journal.best()
        return rule.better(pooled[rule.metric], None if best is None else best.record.metrics[rule.metric])

    def _is_over(self, last: Commit) -> bool:
        """Whether no scored round has beaten the best one for as long as the run's patience."""
        rule, best = self._plan.evaluate, self.journal.best()
        if rule is None or rule.patience is None or best is None:
            return False
        return (last.round - best.round) // rule.every >= rule.patience

    async def finish(self) -> Outcome:
        """Scores the final and the best model on test data, once, and hands everything over."""
        last, best = self._last(), self.journal.best()
        await self._assemble(_TEST_ROUND)
        test, each = await self._score(self.clients, last.model, Evaluate(split="test"))
        found = None
        if best is not None:
            same = best.round == last.round
            scores = test if same else (await self._score(self.clients, best.model, Evaluate(split="test")))[0]
            found = Best(best.round, best.model, dict(best.record.metrics), scores)
        history = [record for record in self.journal.history() if record.round > 0]
        refusals = tuple(self.now.refusals)
        return Outcome(last.model, history, self.journal.abandoned(), test, each, found, refusals, last.state)
