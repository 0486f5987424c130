"""The site's policy at work: every assignment passes here before its model is fetched and any data is touched."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
from collections.abc import Awaitable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import structlog
from blake3 import blake3

from fedkit.client.parcels import fetched_parcel
from fedkit.client.roster import KnownRoster
from fedkit.client.surroundings import Surroundings, objections_to_moment
from fedkit.client.visits import Visit, Visits
from fedkit.crypto.box import Box
from fedkit.errors import Reason, Refused
from fedkit.policy import Objection, Policy, Wish, kind_of, refuse
from fedkit.privacy.ledger import WHOLE_CLIENT, Budget, Ledger, Reservation
from fedkit.privacy.shared import planned_for
from fedkit.protos import agents_pb2 as pb
from fedkit.protos.convert import vouchers_from_proto
from fedkit.rounds.assignment import Assignment
from fedkit.rounds.sealing import Letters, letters_for
from fedkit.rounds.seat import Seat
from fedkit.source import source_of
from fedkit.task import Task
from fedkit.trust.vouchers import vouched
from fedkit.weights import Manifest
from fedkit.work import Evaluate, Steps, Work, counts_rows

__all__ = ["Permits", "objections_to_code"]

log = structlog.get_logger("fedkit.client")

T = TypeVar("T")

_LOOK_S = 10.0  # between two looks at what a device's policy asks of the moment


class Permits:
    """What one site lets through, by its policy, the tasks it has, its roster, and what it was asked before."""

    def __init__(
        self,
        policy: Policy,
        tasks: Mapping[str, Task],
        roster: KnownRoster,
        visits: Visits,
        surroundings: Surroundings,
        ledger: Ledger,
    ) -> None:
        self.policy = policy
        self.ledger = ledger
        self._tasks = tasks
        self._sources = {name: source_of(task) for name, task in tasks.items() if name in policy.tasks}
        self._roster = roster
        self._visits = visits
        self._surroundings = surroundings
        self._counted: set[str] = set()  # data sets whose rows the ledger knows as they are now

    async def admit(self, message: pb.Assignment, assignment: Assignment) -> None:
        """Raises `Refused` unless the policy allows the assignment, now too, which then counts as asked."""
        self._require(message, assignment)
        await self._require_moment(at_work=False)
        if not assignment.is_worked or counts_rows(assignment.work):
            return  # what this is for counts, or nothing does
        question = blake3(message.summarize.SerializeToString(deterministic=True) + _about(message)).hexdigest()
        at = (assignment.id, assignment.run, assignment.round)
        kind, data = kind_of(assignment.work, assignment.returns), self.policy.data_of(message.task)
        visit = Visit(*at, kind, data, question, is_charged=assignment.private is not None)
        self._visits.admit(visit, self.policy)

    def _require(self, message: pb.Assignment, assignment: Assignment) -> None:
        self._roster.require(message.roster_version, message.roster_digest)
        policy, task = self.policy, message.task
        aggregation = self._aggregation(message, assignment)
        wish = Wish(
            task=task,
            strategy=message.strategy,
            work=assignment.work,
            returns=assignment.returns if assignment.sealing is None else "weights",  # a box key belongs to a hop
            aggregation=aggregation,
            cohort=self._cohort(message),
            private=assignment.private is not None,
            colluders=_colluders(assignment),
            sealed=assignment.sealing is not None,
        )
        refuse(
            [
                *policy.objections(wish),
                *objections_to_code(policy, self._tasks.get(task), self._sources.get(task, ""), assignment.work),
                policy.objection_to_time(dt.datetime.now()),
            ]
        )
        self._require_budget(message, assignment)

    def _aggregation(self, message: pb.Assignment, assignment: Assignment) -> str:
        """How the answer is really added up: to do it in secret takes this side, not a coordinator's word."""
        masking = assignment.masking
        said, found = message.aggregation or "plain", "plain" if masking is None else masking.layout.scheme
        if assignment.sealing is not None:
            return said  # a sealed model is not added up, and nobody but its recipients reads it
        if said != found:
            raise Refused(Reason.POLICY, f"aggregation: the run is said to be {said:.20}, and this answer is {found}")
        if masking is not None:
            self.seat()
        if found == "ckks":
            raise Refused(Reason.ENCRYPTION, "ckks shows its key to whoever gets decrypted values: use bfv")
        return found

    def seat(self) -> Seat:
        """This site's seat in secure sums; raises `Refused` where it cannot have one."""
        found = self._roster.seat(self.policy.min_cohort)
        if found is None:
            raise Refused(
                Reason.MASKING, "secure aggregation is over members of this site's roster: give --roster, --identity"
            )
        return found

    def box(self) -> Box | None:
        """This site's box for sealed models; None where it cannot have one."""
        return self._roster.box()

    async def letters(
        self, message: pb.Assignment, assignment: Assignment, fetched: tuple[Path, Manifest] | None
    ) -> Letters:
        """What the work takes to open and seal models; raises `Refused` for what this site does not open, or seal."""
        if assignment.sealing is None and (fetched is None or not fetched[1].is_sealed):
            return Letters()
        return await asyncio.to_thread(letters_for, assignment, fetched_parcel(message, fetched), self.box())

    def _cohort(self, message: pb.Assignment) -> int | None:
        """The members asked together, this site among them, by what its own roster says of their vouchers."""
        known = self._roster.version
        if known is None or self.policy.min_cohort <= 1:
            return None
        return len(vouched(vouchers_from_proto(message.cohort), known) | {self._roster.name})

    def reserve(self, assignment: Assignment, task: str, facts: Mapping[str, Any]) -> None:
        """Puts what private work may spend on disk, before its first step; raises `Refused`."""
        private, data = assignment.private, self.policy.data_of(task)
        if private is None:
            self._reserve_whole(assignment, data, facts)
            return
        dp, rule = private.dp, self.policy.budgets.get(data)
        budget = Budget(math.inf, dp.delta) if rule is None else Budget(rule.epsilon, rule.delta)
        _require_delta(budget, data, facts["rows"])
        of_run = None if dp.epsilon is None else Budget(dp.epsilon, dp.delta)
        steps = Steps.from_dict(facts["steps"])
        self.ledger.identify(data, facts["rows"], facts["fingerprint"])
        self._counted.add(data)
        wish = Reservation(assignment.id, assignment.run, data, steps, dp.max_grad_norm)
        self.ledger.reserve(wish, budget, of_run)
        log.info("privacy reserved", run=assignment.run, assignment=assignment.id, data=data, head=self.ledger.head)

    def _reserve_whole(self, assignment: Assignment, data: str, facts: Mapping[str, Any]) -> None:
        """Notes that the whole client goes into a sum with shared noise, apart from what its rows have cost.

        No budget is for that: what it costs over the run is in the run's record.
        """
        assert assignment.clip is not None  # the plan has refused what is not clipped
        about = (
            assignment.id,
            assignment.run,
            f"{data}{WHOLE_CLIENT}",
            Steps.from_dict(facts["steps"]),
            assignment.clip.norm,
        )
        self.ledger.reserve(Reservation(*about, is_whole=True), Budget(math.inf, 0.5))
        log.info("noise shared", run=assignment.run, assignment=assignment.id, data=data, head=self.ledger.head)

    def cost(self, assignment: Assignment, task: str) -> float:
        """What the run has cost the task's data so far, an upper bound."""
        assert assignment.private is not None  # only private work asks
        account = self.ledger.account(self.policy.data_of(task))
        return account.spent(assignment.private.dp.delta, run=assignment.run, tight=False).rdp

    def _require_budget(self, message: pb.Assignment, assignment: Assignment) -> None:
        """Refuses what is beyond the budget before data is touched, where it is known how many rows there are."""
        account = self.ledger.account(self.policy.data_of(message.task))
        rule, private = self.policy.budgets.get(account.data), assignment.private
        if private is None or rule is None or account.data not in self._counted:
            return
        _require_delta(Budget(rule.epsilon, rule.delta), account.data, account.rows)
        plan = planned_for(assignment, account.rows)
        if plan is None:
            return
        steps = plan.cost
        wish = Reservation(assignment.id, assignment.run, account.data, steps, private.dp.max_grad_norm)
        self.ledger.check(wish, Budget(rule.epsilon, rule.delta))

    async def during(self, work: Awaitable[T]) -> T:
        """What `work` gives; it is cancelled, and `Refused` raised, once the moment is no longer right for it."""
        if not self._looks:
            return await work
        task = asyncio.ensure_future(work)
        looking = asyncio.create_task(self._looking())
        try:
            await asyncio.wait({task, looking}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else looking.result()
        finally:
            await _ended(task, looking)

    async def _looking(self) -> Any:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._require_moment(at_work=True)

    @property
    def _looks(self) -> bool:
        """Whether the policy asks anything of the moment."""
        return self.policy.only_on_mains or self.policy.only_unmetered or self.policy.only_idle

    async def _require_moment(self, *, at_work: bool) -> None:
        if self._looks:  # aside, because the tools that are asked may take their time
            found = objections_to_moment(self.policy, self._surroundings, at_work=at_work)
            refuse(await asyncio.to_thread(list, found))


def _about(message: pb.Assignment) -> bytes:
    """The model that a question is about: with another one it is another question."""
    return bytes(message.model_digest) if message.summarize.HasField("ranges") else b""


def objections_to_code(policy: Policy, task: Task | None, source: str, work: Work) -> Iterator[Objection]:
    """What the policy objects to in a task's own code: another version than it allows, scores that may not leave."""
    if task is None:
        return
    scored = ["loss", *task.metrics] if isinstance(work, Evaluate) else []
    for objection in (policy.objection_to_source(task.name, source), policy.objection_to_metrics(scored)):
        if objection is not None:
            yield objection


def _colluders(assignment: Assignment) -> int | None:
    """How many others may tell their parts, of any step of a sum with shared noise; None for all others."""
    noise = None if assignment.masking is None else assignment.masking.layout.noise
    return None if noise is None else noise.colluders


def _require_delta(budget: Budget, data: str, rows: int) -> None:
    """Raises `Refused` where the budget's delta is so large that a row could be given away outright."""
    if budget.delta > 1.0 / rows:
        text = f"the budget of {data} has delta {budget.delta:g}, and its {rows} rows allow at most {1.0 / rows:.2g}"
        raise Refused(Reason.PRIVACY, text)


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
