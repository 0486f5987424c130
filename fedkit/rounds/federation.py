"""The federation a strategy sees: its questions become assignments, their outcomes are journaled, replays are answered.

The same class serves simulation and every network; only the `Transport` differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from fedkit.aggregation import KeepFold, Mean, MeanFold, SumFold, Total, Weighting
from fedkit.config import Participation
from fedkit.crypto.ceremony import BoxKey
from fedkit.errors import ConfigError, Reason, Refused, RoundAbandoned, RunError
from fedkit.gate import BEFORE, Gate
from fedkit.queries import Query
from fedkit.rounds.asking import Each
from fedkit.rounds.assignment import (
    Clip,
    Parcel,
    Sealing,
    Transport,
)
from fedkit.rounds.call import Refusal, State
from fedkit.rounds.flights import Flights, Landed
from fedkit.rounds.hops import SealedHops, can_open, readers
from fedkit.rounds.journal import Entry, Journal, Started
from fedkit.rounds.masked import RepliesFold
from fedkit.rounds.question import NO_MODEL, Question, RunIdentity, reasons_of, too_few, vectors_of
from fedkit.rounds.secure import SecureSums
from fedkit.rounds.shield import EVERY_CLIENT, Shield
from fedkit.strategy import Arrival, Handed, Send
from fedkit.weights import Weights
from fedkit.work import Evaluate, Fit, Gradient, Summarize, Update

__all__ = ["JournaledFederation"]


class JournaledFederation(SecureSums):
    """Implements `fedkit.strategy.Federation` over a `Transport` and a `Journal`, but for `commit`."""

    def __init__(self, identity: RunIdentity, transport: Transport, journal: Journal) -> None:
        super().__init__(identity, transport, journal)
        self.hops: SealedHops | None = None  # where models are sealed on their way from client to client
        self._flights = Flights()
        self._boxes_asked = asyncio.Lock()

    @property
    def idle(self) -> tuple[str, ...]:
        """The round's clients that have no work from `start` under way."""
        busy = self._flights.clients()
        return tuple(client for client in self.clients if client not in busy)

    # -- questions to a group --------------------------------------------------------------------------------------

    async def mean(
        self,
        cohort: Collection[str],
        model: Weights,
        work: Fit | Gradient,
        send: Send | None = None,
        weights: Weighting = "examples",
    ) -> Mean:
        """The weighted mean of the cohort's updates; raises `RoundAbandoned` below the quorum.

        Under client-level privacy, the noised sum of clipped updates over the expected number of clients.
        """
        if self.identity.shield is not None:
            return await self._shielded(self.identity.shield, cohort, Parcel(model, vectors_of(send)), work)
        if self.identity.secret is not None:
            return await self._secret_mean(self.identity.secret, cohort, Parcel(model, vectors_of(send)), work, weights)
        fold = MeanFold(cohort, model.manifest, weights)
        question = self._ask(work, "update", Parcel(model, vectors_of(send)), cohort)
        await self._group(question, fold, self.identity.participation)
        mean = await self.transport.aside("fold", fold.result)
        self.now.contributed(mean.clients, mean.examples, mean.loss)
        return mean

    async def _shielded(self, shield: Shield, cohort: Collection[str], parcel: Parcel, work: Fit | Gradient) -> Mean:
        """The noised mean of the clients that privacy has drawn; raises `RunError` for any others, or a second one."""
        if self.now.releases or sorted(cohort) != sorted(self.drawn or ()):
            raise RunError("client-level privacy covers one mean a round, over the clients it has drawn: self.cohort()")
        shield.require(len(self.clients))
        if self.identity.sharing is not None:
            return await self._shared_by_clients(shield, self.identity.sharing, cohort, parcel, work)
        cost = shield.epsilon(1 + sum(one.releases for one in (*self.journal.history(), *self.journal.abandoned())))
        clip, expected = Clip(self._clip(shield), shield.tells), max(shield.rate * len(self.clients), 1.0)
        fold = MeanFold(cohort, parcel.model.manifest, "uniform", over=expected)
        question = Question(self.identity, self.now, work, "update", parcel, list(cohort), clip)
        if cohort:
            rule = Participation(quorum=1, deadline_s=self.identity.participation.deadline_s, max_update_norm=clip.norm)
            await self._group(question, fold, rule, optional=True)
        key = self._secret("noise", question.key)
        release = await self.transport.aside("fold", lambda: shield.released(fold.result(), clip.norm, expected, key))
        self.now.releases, self.now.clip, self.now.epsilon = 1, release.clip, {EVERY_CLIENT: cost}
        self.now.contributed(release.mean.clients, release.mean.examples, None)
        return release.mean

    def _clip(self, shield: Shield) -> float:
        """The clip after the last round that had one."""
        known = (record.clip for record in reversed(self.journal.history()))
        return next((clip for clip in known if clip is not None), shield.first_clip)

    def _secret(self, *purpose: str) -> bytes:
        """A key for one purpose in this attempt, the same if it is replayed."""
        info = "\x1f".join((*purpose, self.identity.name, str(self.round), str(self.now.opened.attempt)))
        return HKDFExpand(hashes.SHA256(), 32, info.encode()).derive(self.journal.secret)

    @property
    def drawn(self) -> tuple[str, ...] | None:
        """Whom client-level privacy has drawn for this round, in secret; None where the strategy draws."""
        shield = self.identity.shield
        return None if shield is None else shield.drawn(self.clients, self._secret("cohort"))

    async def updates(
        self, cohort: Collection[str], model: Weights, work: Fit | Gradient, send: Send | None = None
    ) -> AsyncIterator[tuple[str, Update]]:
        """Single updates as (client, update), as they come; raises `RoundAbandoned` below the quorum."""
        question = self._ask(work, "update", Parcel(model, vectors_of(send)), cohort)
        call = self._new_call(question, self.identity.participation, self.identity.least)
        async with self.now.replay.call(question.key, question.label) as entry:
            async for client, update in self._singly(question, call, is_over=entry is not None):
                self.now.contributed([client], update.examples, update.loss)
                yield client, update
        self.now.refusals += entry.refusals if entry else call.refusals
        if entry is None and call.state is State.ABANDONED:
            raise RoundAbandoned(too_few(self.round, call, call.refusals))
        if entry is None:
            self.journal.note(Entry("call", question.key, question.label, (), tuple(call.refusals)))

    async def hop(
        self, client: str, model: Weights, work: Fit, gate: Gate | None = None, then: Sequence[str] = ()
    ) -> Weights:
        """The model after one visit; the model unchanged, and the skip on record, where the client cannot."""
        try:
            sealing = await self._sealing(client, model, work, then)
            after = await self._visited(client, model, work, gate, sealing)
        except Refused as refused:
            self.now.refusals.append(Refusal(client, refused.reason, refused.detail))
            after = None
        if after is None:
            self._require_open(model, then)
        return model if after is None else after

    async def _visited(
        self, client: str, model: Weights, work: Fit, gate: Gate | None, sealing: Sealing | None
    ) -> Weights | None:
        """The model after a visit, None where there was none; raises `Refused` for an answer that makes no sense."""
        fold, send = KeepFold([client]), {}
        judged = model if gate is not None and isinstance(model, Handed) and model.by != client else None
        if judged is not None and can_open(client, judged.before):
            work, send = work.replace(gate=gate), {BEFORE: judged.before.vector}
        else:
            judged = None
        rule = self.identity.participation
        question = self._ask(work, "weights", Parcel(model, send), [client], sealing=sealing)
        alone = Participation(deadline_s=rule.deadline_s, max_update_norm=rule.max_update_norm)
        await self._group(question, fold, alone, optional=True)
        answer = fold.result()
        if answer is None:
            return None
        if sealing is None or self.hops is None:
            after = model.with_vector(answer.weights.vector)
        else:
            after = self.hops.taken(answer.weights, client, question.ids[client], sealing)
        base = self._base(client, model, judged, question, answer)
        self.now.contributed([client], answer.examples, answer.loss)
        return after if gate is None else Handed(after, before=base, by=client, assignment=question.ids[client])

    def _base(self, client: str, model: Weights, judged: Handed | None, question: Question, answer: Update) -> Weights:
        """The model before this visit, for the next client's eyes; raises `Refused` where the answer tells none.

        A visit that the client did not accept is undone, on record. Nobody judges its own: two visits of one client in
        a row are judged as one.
        """
        if judged is None:
            return model.before if isinstance(model, Handed) and model.by == client else model
        complaint = question.complaint(answer)
        if not complaint:
            return model
        self.undo(judged, f"{client} did not accept it: {complaint}")
        return judged.before

    async def _sealing(self, client: str, model: Weights, work: Fit, then: Sequence[str]) -> Sealing | None:
        """For whom a client is to seal; raises `Refused` where it cannot take part, None where hops are not sealed."""
        if self.hops is None:
            return None
        sealing = self.hops.sealing(client, then, await self._boxes(self.hops, work))
        if not can_open(client, model):
            raise Refused(Reason.ENCRYPTION, f"the model was sealed before {client} came, or for others")
        return sealing

    async def _boxes(self, hops: SealedHops, work: Fit) -> Mapping[str, BoxKey]:
        """The box keys of the round's clients, who are asked once in each attempt."""
        async with self._boxes_asked:  # strategies may gather several chains of hops
            if self.now.boxes is None:
                fold, rule = RepliesFold(self.clients), self.identity.participation
                question = self._ask(work, "reply", Parcel(NO_MODEL), self.clients, sealing=Sealing())
                alone = Participation(quorum=1, deadline_s=rule.deadline_s)
                await self._group(question, fold, alone, optional=True)
                self.now.boxes = hops.boxes(fold.messages, self.now.refusals.append)
            return self.now.boxes

    def _require_open(self, model: Weights, then: Sequence[str]) -> None:
        """Raises `RoundAbandoned` where nobody is left who could go on from a sealed model."""
        if self.hops is not None and self.hops.is_stuck(model, self.round, then, self.now.boxes or ()):
            names = ", ".join(sorted(readers(model) or ()))
            text = f"round {self.round}: nobody is left of those for whom the model was sealed ({names}). "
            raise RoundAbandoned(text + reasons_of(self.now.refusals[-5:]))

    def undo(self, hop: Handed, why: str) -> None:
        """A visit does not count after all, on record."""
        self.now.refusals.append(Refusal(hop.by, Reason.GATE, why))
        self.now.withdrawn(hop.by, hop.assignment)

    async def sums(
        self,
        cohort: Collection[str],
        model: Weights,
        work: Evaluate,
        size: int,
        each: Each | None = None,
        send: Send | None = None,
    ) -> Total | None:
        """The `size` metric sums of all who have data; `each` sees single answers, where sites release them."""
        cohort = self._who_can_open(cohort, model)
        if not cohort:
            return None
        parcel = Parcel(model, vectors_of(send))
        rule = Participation(quorum=1, deadline_s=self.identity.participation.deadline_s)
        if self.identity.secret is not None:
            return await self._secret_scores(self.identity.secret, cohort, parcel, work, size, rule)
        fold = SumFold(cohort, size)
        await self._group(self._ask(work, "sums", parcel, cohort), fold, rule, each=each, optional=True)
        return fold.result()

    def _who_can_open(self, cohort: Collection[str], model: Weights) -> Collection[str]:
        """Those of the cohort who can score a model; the others are on record."""
        known = readers(model)
        if known is None:
            return cohort
        text = "the model was sealed before it came, or for others"
        self.now.refusals += [Refusal(name, Reason.ENCRYPTION, text) for name in sorted(set(cohort) - known)]
        return [name for name in cohort if name in known]

    async def summarize(self, cohort: Collection[str], query: Query, model: Weights | None = None) -> Any:
        """The answer to a query about the cohort's training data; raises `RoundAbandoned` below the quorum.

        Queries about what a model makes of the data take the `model`.
        """
        work, rule = Summarize(query=query), self.identity.participation
        parcel = Parcel(NO_MODEL if model is None else model)
        total: Total | None
        if self.identity.secret is not None:
            if query.size is None:
                raise ConfigError("sums without public bounds cannot be added up securely: give the query bounds")
            layout = self.identity.secret.sums("integers", query.size, len(cohort))
            total = await self._secret_total(cohort, parcel, work, layout, rule)
        else:
            fold = SumFold(cohort, query.size)
            question = self._ask(work, "sums", parcel, cohort)
            await self._group(question, fold, rule)
            total = fold.result()
        if total is None:
            raise RoundAbandoned(f"round {self.round}: nobody answered {work}")
        return query.finish(total.vector, noised=self.identity.private is not None)

    # -- asynchronous work -----------------------------------------------------------------------------------------

    def start(self, client: str, model: Weights, work: Fit) -> None:
        """Begins work at one client without waiting for it."""
        question = self._ask(work, "update", Parcel(model), [client])
        key = question.ids[client]
        if not self.now.replay.start(key, question.label):
            self.journal.note(Entry("start", key, question.label))
        self._flights.launch(Started(question.assignment(client), model), self._perform)

    async def next(self) -> Arrival:
        """The next update of work that was started; failures are on record and passed over."""
        while True:
            entry = self.now.replay.arrival()
            landed = self._measured(await self._flights.land(entry.key if entry else None))
            flown, outcome = landed.started.assignment, landed.outcome
            if entry is None:
                done = () if isinstance(outcome, Refusal) else ((flown.client, flown.id),)
                entry = Entry("arrival", flown.id, f"arrival from {flown.client}", done, landed.refusals)
                self.journal.note(entry)
            if not entry.accepted:
                self.now.refusals += entry.refusals
            elif isinstance(outcome, Refusal):
                raise RoundAbandoned(f"round {self.round}: {flown.client} had answered before, and now refuses")
            else:
                return self._arrived(landed.started, outcome)

    def _measured(self, landed: Landed) -> Landed:
        """Refuses what is larger than the run allows."""
        limit, outcome = self.identity.participation.max_update_norm, landed.outcome
        if limit is None or isinstance(outcome, Refusal) or outcome.weights.norm() <= limit:
            return landed
        client = landed.started.assignment.client
        return Landed(landed.started, Refusal(client, Reason.NORM, f"the norm is above {limit:.4g}"))

    def _arrived(self, started: Started, update: Update) -> Arrival:
        flown = started.assignment
        self._take(flown.client, flown.id, update)
        self.now.contributed([flown.client], update.examples, update.loss)
        return Arrival(flown.client, update.weights, update.examples, self.round - flown.round)

    # -- ends ------------------------------------------------------------------------------------------------------

    def dropped(self) -> tuple[str, ...]:
        """The ids that were asked in this round and count for nothing."""
        kept = {*self.now.accepted, *self._flights.ids()}
        return tuple(sent for sent in dict.fromkeys(self.now.sent) if sent not in kept)

    def undone(self) -> tuple[str, ...]:
        """The ids of everything asked or taken in this round, for one that does not stand."""
        flying = self._flights.ids()
        return tuple(key for key in dict.fromkeys([*self.now.sent, *self.now.accepted]) if key not in flying)

    def airborne(self) -> tuple[Started, ...]:
        """The asynchronous work under way."""
        return self._flights.started()

    def resume(self, started: Sequence[Started]) -> None:
        """Takes up asynchronous work that was under way at the last commit, and drops all other."""
        self._flights.ground()
        for flight in started:
            self._flights.launch(flight, self._perform)

    def abandon(self) -> None:
        """Ends the attempt: nothing of it counts, and the next one draws anew."""
        self.transport.committed([], list(dict.fromkeys(self.now.sent)))
        self.journal.abandon(self.now.record())
        self.enter(self.round, self.now.opened.attempt + 1)
