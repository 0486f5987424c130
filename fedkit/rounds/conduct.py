"""Drives a run from its preparation to its test scores, and takes it up again from its journal.

Round 0 prepares (initial weights, federated preprocessing), rounds 1 .. R are the strategy's; round -1 comes last and
touches the test data, once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedkit.config import Evaluation, Privacy
from fedkit.errors import ConfigError, RoundAbandoned, RoundLost, RunError, RunFailed
from fedkit.examination import Examination, ExamSums
from fedkit.metrics import MetricSet
from fedkit.queries import RowCount
from fedkit.rounds.assignment import Private, Transport
from fedkit.rounds.call import Refusal
from fedkit.rounds.federation import JournaledFederation
from fedkit.rounds.hops import SealedHops
from fedkit.rounds.journal import Commit, Journal, RoundRecord
from fedkit.rounds.layout import Secret
from fedkit.rounds.question import RunIdentity
from fedkit.rounds.shield import Sharing, Shield
from fedkit.strategy import Handed, Send, Strategy
from fedkit.task import Prepared, Task
from fedkit.weights import Binding, Weights
from fedkit.work import Answer, Evaluate, MetricSums

__all__ = ["Best", "Outcome", "Plan", "conduct", "holds_out_valid"]

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
    privacy: Privacy = Privacy()
    shield: Shield | None = None
    sharing: Sharing | None = None
    min_clients: int = 1
    on_round: Observer | None = None

    @property
    def holds_out_valid(self) -> bool:
        """Whether clients without validation rows set some of their training rows aside."""
        return holds_out_valid(self.strategy, self.evaluate)


def holds_out_valid(strategy: Strategy, evaluate: Evaluation | None) -> bool:
    """Whether clients without validation rows set some of their training rows aside in such a run."""
    return evaluate is not None or strategy.needs_valid


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


@dataclass(frozen=True, slots=True)
class _Scores:
    """Loss and metrics of one model, over all `clients` that scored it and at each of them."""

    pooled: dict[str, float] = field(default_factory=dict)
    each: dict[str, dict[str, float]] = field(default_factory=dict)
    clients: tuple[str, ...] = ()


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
        dp = plan.privacy.dp
        of_rows = dp is not None and dp.level == "example"
        private = Private(dp, strategy.visits, strategy.questions(plan.task)) if dp and of_rows else None
        secret = Secret.of(plan.privacy)
        about = (strategy.participation, strategy.least, private, plan.shield, secret, plan.sharing)
        identity = RunIdentity(plan.name, plan.seed, *about)
        super().__init__(identity, transport, journal)
        self._plan = plan
        self._strategy = strategy
        self._metrics = MetricSet(plan.task)

    async def prepare(self) -> None:
        """Commits the initial weights as round 0, with the preprocessing that the clients' data asks for."""
        module = self._plan.task.build(self._plan.seed)
        self._strategy.check(self._plan.task, module)
        self._strategy.require_clients(self._plan.min_clients)
        if self._plan.privacy.sealed:
            about = (self._plan.privacy, self._plan.name, Binding(module, self._plan.task.travels).manifest)
            self.hops = SealedHops.of(*about, self.transport.members())
        while self.journal.last() is None:
            await self._assemble(0)
            try:
                if self.identity.secret is not None:
                    self.now.contributed(self.clients, await self.summarize(self.clients, RowCount()), None)
                if isinstance(module, Prepared) and self._plan.task.prepare is not None and self._strategy.trains:
                    moments = await self.summarize(self.clients, self._plan.task.prepare.query)
                    module.prepare.set(moments)
                model = self._initial(Weights.from_module(module, self._plan.task.travels))
                scores = await self._score(self.clients, model, Evaluate()) if self._is_gated else _Scores()
            except RoundAbandoned as error:
                self._give_up(error)
                continue
            await self._commit(model, scores)

    @property
    def _is_gated(self) -> bool:
        """Whether a round stands only if its model is not much worse than the one before."""
        return self._plan.evaluate is not None and self._plan.evaluate.max_drop is not None

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
            if self._plan.task.prepare is not None and name.startswith("prepare.") and self._strategy.trains:
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
        except RoundLost as error:
            await self._pass_over(error)
            return False
        except RoundAbandoned as error:
            self._give_up(error)
            return False
        return True

    async def _pass_over(self, error: RoundLost) -> None:
        """The round ends without a new model, on record: it cannot be tried again."""
        last = self._last()
        self._strategy.load_state_dict(last.state)
        await self._commit(last.model, _Scores(), rejected=str(error))

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
        return (await self._score(cohort, model, Evaluate())).pooled

    async def examine(
        self, cohort: Collection[str], model: Weights, work: Evaluate, send: Send | None = None
    ) -> Examination | None:
        """Scores of the ONNX file that the model exports to, pooled; None where nobody has such rows."""
        if work.exam is None:
            raise ConfigError("examine takes Evaluate(exam=Exam(...)): evaluate scores the model itself")
        sums = ExamSums(self._metrics, work.exam)
        total = await self.sums(cohort, model, work, sums.size, send=send)
        return None if total is None else sums.read(total.vector)

    async def _score(self, cohort: Collection[str], model: Weights, work: Evaluate) -> _Scores:
        single: dict[str, MetricSums] = {}

        def keep(client: str, answer: Answer) -> None:
            assert isinstance(answer, MetricSums)  # inspected against the assignment
            single[client] = answer

        total = await self.sums(cohort, model, work, self._metrics.size, each=keep)
        if total is None:
            return _Scores()
        shown = [client for client in total.clients if client in single and single[client].released]
        each = {client: self._metrics.compute(single[client].vector) for client in shown}
        return _Scores(self._metrics.compute(total.vector), each, total.clients)

    async def commit(self, model: Weights) -> Weights:
        """Scores the model where that is due, makes the round durable, and begins the next.

        Returns what the next round begins with: `model`, or the one before where this round does not stand.
        """
        rejected, scores = await self._judge(model)
        if rejected and isinstance(model, Handed):
            model, rejected, scores = await self._without_last_hop(model, rejected, scores)
        if rejected:
            model = self._last().model
            self._strategy.load_state_dict(self._last().state)
        best = not rejected and self._is_best(scores.pooled)
        await self._commit(model, scores, best=best, rejected=rejected)
        if self._is_over(self._last()):
            raise _Finished
        if self.round <= self._strategy.rounds:
            await self._assemble(self.round)
        return model

    def _require_model(self, model: Weights) -> str:
        """Raises `RunError` for what is no model; says why where one that is not finite only costs its round."""
        last = self._last()
        if not isinstance(model, Weights):
            raise RunError(f"round {self.round}: the strategy returned {type(model).__name__} where Weights are due")
        if not (self.hops is not None and model.manifest.is_sealed):
            last.model.manifest.require(model.manifest, f"the model of round {self.round}")
        if model.is_finite():
            return ""
        if self._is_gated:
            return "the new model holds NaN or infinity"
        raise RunError(f"round {self.round}: the new model holds NaN or infinity; round {last.round}'s stands")

    async def _judge(self, model: Weights) -> tuple[str, _Scores]:
        """Why a round with this model does not stand, empty where it does; and its scores, where they are due."""
        rejected, rule = self._require_model(model), self._plan.evaluate
        if rejected or rule is None or self.round % rule.every:
            return rejected, _Scores()
        scores = await self._score(self.clients, model, Evaluate())
        return await self._why_not(model, scores), scores

    async def _without_last_hop(self, model: Handed, why: str, scores: _Scores) -> tuple[Weights, str, _Scores]:
        """The round without its last hop, which no client has received and judged, where it stands without."""
        still, fewer = await self._judge(model.before)
        if still:
            return model, why, scores
        self.undo(model, f"the round does not stand with it: {why}")
        return model.before, "", fewer

    async def _why_not(self, model: Weights, scores: _Scores) -> str:
        """Why a round with this model does not stand; empty where it does."""
        rule = self._plan.evaluate
        if rule is None or not self._is_gated:
            return ""
        standing = next(record for record in reversed(self.journal.history()) if record.stands)
        before = _Scores(dict(standing.metrics), {}, standing.scored)
        while set(before.clients) != set(scores.clients):  # compared over the same clients, or not at all
            before = await self._score(scores.clients, self._last().model, Evaluate())
            if before.clients != scores.clients:
                scores = await self._score(before.clients, model, Evaluate())
        if not scores.clients:
            raise RoundAbandoned(f"round {self.round}: nobody scored the model, which max_drop={rule.max_drop} needs.")
        new, old = self._decisive(scores.pooled), self._decisive(before.pooled)
        if rule.stands(new, old):
            return ""
        return f"{rule.metric} is {new:.4g} after {old:.4g} in round {standing.round}, max_drop is {rule.max_drop:g}"

    def _decisive(self, pooled: Mapping[str, float]) -> float:
        """The metric that `best` names; raises `RunError` where there is none of that name."""
        rule = self._plan.evaluate
        assert rule is not None  # whoever asks has compared it
        assert rule.metric is not None
        if rule.metric not in pooled:
            raise RunError(f"best={rule.best!r}: there is no metric {rule.metric!r}; there are {', '.join(pooled)}")
        return pooled[rule.metric]

    async def _commit(self, model: Weights, scores: _Scores, *, best: bool = False, rejected: str = "") -> None:
        left = self.now.replay.left()
        if left is not None:
            raise self.now.replay.changed(f"commit of round {self.round}")
        about = {"metrics": scores.pooled, "per_client": scores.each, "scored": scores.clients}
        record = self.now.record(**about, best=best, rejected=rejected)
        state = self._strategy.state_dict()
        accepted, dropped = (tuple(self.now.accepted), self.dropped()) if record.stands else ((), self.undone())
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
        best = self.journal.best()
        return rule.better(self._decisive(pooled), None if best is None else best.record.metrics[rule.metric])

    def _is_over(self, last: Commit) -> bool:
        """Whether no scored round has beaten the best one for as long as the run's patience."""
        rule, best = self._plan.evaluate, self.journal.best()
        if rule is None or rule.patience is None or best is None:
            return False
        return (last.round - best.round) // rule.every >= rule.patience

    async def finish(self) -> Outcome:
        """Scores the final and the best model on test data, once, and hands everything over."""
        last, best = self._last(), self.journal.best()
        history = [record for record in self.journal.history() if record.round > 0]
        if not self._strategy.trains:
            return Outcome(last.model, history, self.journal.abandoned(), state=last.state)
        await self._assemble(_TEST_ROUND)
        test = await self._score(self.clients, last.model, Evaluate(split="test"))
        found = None
        if best is not None:
            same = best.round == last.round
            scores = test if same else await self._score(self.clients, best.model, Evaluate(split="test"))
            found = Best(best.round, best.model, dict(best.record.metrics), scores.pooled)
        refusals = tuple(self.now.refusals)
        abandoned, state = self.journal.abandoned(), last.state
        return Outcome(last.model, history, abandoned, test.pooled, test.each, found, refusals, state)
