"""The federation a strategy sees: its questions become assignments, their outcomes are journaled, replays are answered.

The same class serves simulation and every network; only the `Transport` differs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
from blake3 import blake3
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from fedkit.aggregation import Fold, KeepFold, Mean, MeanFold, SumFold, Total, Weighting
from fedkit.config import Participation
from fedkit.crypto.ceremony import BoxKey, Ceremony
from fedkit.crypto.masked_sum import Sum
from fedkit.crypto.messages import to_mapping
from fedkit.crypto.ring import Words
from fedkit.errors import BelowThreshold, ConfigError, Reason, Refused, RoundAbandoned, RoundLost, RunError, SumSpoiled
from fedkit.gate import BEFORE, Gate, Verdict
from fedkit.queries import Query
from fedkit.rounds.assignment import (
    WORDS_STEPS,
    Assignment,
    Clip,
    Masking,
    Parcel,
    Private,
    Returns,
    Sealing,
    Transport,
    question_digest,
)
from fedkit.rounds.call import GroupCall, Refusal, State
from fedkit.rounds.checks import inspect
from fedkit.rounds.drive import drive
from fedkit.rounds.encrypted import EncryptedSum
from fedkit.rounds.flights import Flights, Landed
from fedkit.rounds.hops import SealedHops, can_open, readers
from fedkit.rounds.journal import Entry, Journal, OpenRound, Started
from fedkit.rounds.layout import Layout, Secret
from fedkit.rounds.masked import Asked, MaskedSum, RepliesFold
from fedkit.rounds.open import Progress
from fedkit.rounds.shared import clients_mean, rate_of, rows_mean
from fedkit.rounds.shield import EVERY_CLIENT, Sharing, Shield
from fedkit.strategy import Arrival, Handed, Send
from fedkit.weights import Manifest, Vector, Weights
from fedkit.work import Answer, Evaluate, Fit, Gradient, Summarize, Update, Work, counts_rows

__all__ = ["JournaledFederation", "RunIdentity"]

A = TypeVar("A", bound=Answer)
Each: TypeAlias = Callable[[str, Answer], None]

_NO_MODEL = Weights.zeros(Manifest(()))


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What names a run: its name, its seed, how clients take part, and the `least` single updates a round needs."""

    name: str
    seed: int
    participation: Participation = Participation()
    least: int = 1
    private: Private | None = None
    shield: Shield | None = None
    secret: Secret | None = None  # where nobody sees single answers: how
    sharing: Sharing | None = None  # where clients share the noise in such sums


class _Question:
    """One call as it is asked: the work, what travels, and an assignment id for each client of the cohort."""

    def __init__(
        self,
        identity: RunIdentity,
        now: Progress,
        work: Work,
        returns: Returns,
        parcel: Parcel,
        cohort: Sequence[str],
        clip: Clip | None = None,
        masking: Mapping[str, Masking] | None = None,
        sealing: Sealing | None = None,
    ) -> None:
        self.work, self.returns, self.parcel, self.cohort = work, returns, parcel, sorted(cohort)
        self.clip = clip
        self.masking = masking or {}
        self.sealing = sealing
        self._identity, self._round = identity, now.opened.round
        is_plain = isinstance(work, Evaluate) or returns == "reply" or counts_rows(work)
        self.private = None if is_plain else identity.private
        about = (work, returns, parcel, self.private, clip, _all(self.masking), sealing)
        digest = question_digest(identity.name, now.opened.round, now.opened.attempt, *about)
        self.ids = {client: now.next_id(digest, client) for client in self.cohort}
        self.key = blake3("".join(self.ids.values()).encode()).hexdigest(length=16)
        names = ", ".join(self.cohort[:4]) + (", ..." if len(self.cohort) > 4 else "")
        self.label = f"{work} of model {parcel.model.digest[:8]} from {len(self.cohort)} clients: {names}"

    def assignment(self, client: str) -> Assignment:
        """The assignment of one client."""
        run, seed = self._identity.name, self._identity.seed
        shield = self._identity.shield  # who was drawn is not for other clients' eyes: the draw is what hides them
        is_known = shield is None or shield.rate == 1.0 or self._identity.secret is not None
        cohort = tuple(self.cohort) if is_known else ()
        masking = self.masking.get(client)
        about = (self._round, client, self.work, self.returns, cohort, self.private, self.clip, masking, self.sealing)
        return Assignment(self.ids[client], run, seed, *about)

    def norm(self, answer: Answer) -> float:
        """How far an answer would move the model it was made from; 0 for sums."""
        if not isinstance(answer, Update) or self.returns == "words":
            return 0.0
        if self.clip is not None:
            return self.clip.length(answer)
        moved = answer.weights - self._base(answer) if self.returns == "weights" else answer.weights
        return moved.norm()

    def _base(self, answer: Update) -> Weights:
        """The model that was sent, or the one before it where the client did not accept that."""
        gate = self.work.gate if isinstance(self.work, Fit) else None
        with contextlib.suppress(Refused):  # `hop` will see that the answer makes no sense
            if gate is not None:
                return gate.base(self.parcel.model, self.parcel.extra, answer.extra)
        return self.parcel.model

    def complaint(self, answer: Update) -> str:
        """Why the client did not accept the hop that it was to judge; raises `Refused` where it does not say."""
        gate = self.work.gate if isinstance(self.work, Fit) else None
        return "" if gate is None else Verdict.from_extra(answer.extra, gate).explain(gate)


class JournaledFederation:
    """Implements `fedkit.strategy.Federation` over a `Transport` and a `Journal`, but for `commit`."""

    def __init__(self, identity: RunIdentity, transport: Transport, journal: Journal) -> None:
        self.identity = identity
        self.transport = transport
        self.journal = journal
        self.round = 0
        self._attempt = 1
        self.hops: SealedHops | None = None  # where models are sealed on their way from client to client
        self._now: Progress | None = None
        self._flights = Flights()
        self._boxes_asked = asyncio.Lock()

    def enter(self, round: int, attempt: int = 1) -> None:
        """`round` is next; nothing is journaled until it asks for something."""
        self.round, self._attempt, self._now = round, attempt, None

    @property
    def now(self) -> Progress:
        """The open round; it begins, and its client list is journaled, when it is first needed."""
        if self._now is None:
            opened = self.journal.open()
            if opened is None or opened.round != self.round:
                opened = OpenRound(self.round, self._attempt, tuple(sorted(self.transport.present())), ())
                self.journal.begin(opened.round, opened.attempt, opened.clients)
            self._now = Progress(self.identity.seed, opened)
        return self._now

    @property
    def clients(self) -> tuple[str, ...]:
        """The round's journaled client list, sorted by name."""
        return self.now.opened.clients

    @property
    def idle(self) -> tuple[str, ...]:
        """The round's clients that have no work from `start` under way."""
        busy = self._flights.clients()
        return tuple(client for client in self.clients if client not in busy)

    @property
    def rng(self) -> np.random.Generator:
        """A generator seeded by (run seed, round, attempt)."""
        return self.now.rng

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
            return await self._shielded(self.identity.shield, cohort, Parcel(model, _vectors(send)), work)
        if self.identity.secret is not None:
            return await self._secret_mean(self.identity.secret, cohort, Parcel(model, _vectors(send)), work, weights)
        fold = MeanFold(cohort, model.manifest, weights)
        question = self._ask(work, "update", Parcel(model, _vectors(send)), cohort)
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
        question = _Question(self.identity, self.now, work, "update", parcel, list(cohort), clip)
        if cohort:
            rule = Participation(quorum=1, deadline_s=self.identity.participation.deadline_s, max_update_norm=clip.norm)
            await self._group(question, fold, rule, optional=True)
        key = self._secret("noise", question.key)
        release = await self.transport.aside("fold", lambda: shield.released(fold.result(), clip.norm, expected, key))
        self.now.releases, self.now.clip, self.now.epsilon = 1, release.clip, {EVERY_CLIENT: cost}
        self.now.contributed(release.mean.clients, release.mean.examples, None)
        return release.mean

    # -- secure sums ------------------------------------------------------------------------------------------------

    async def _secret_mean(
        self, rule: Secret, cohort: Collection[str], parcel: Parcel, work: Fit | Gradient, weights: Weighting
    ) -> Mean:
        if self.identity.sharing is not None:
            return await self._shared_by_rows(self.identity.sharing, cohort, parcel, work, weights)
        extras = tuple(sorted((name, vector.size) for name, vector in parcel.extra.items()))
        cap = 0 if weights == "uniform" else self._cap()
        layout = rule.mean(parcel.model.manifest.size, len(cohort), cap, extras)
        total, clients = await self._secret_sum(work, parcel, cohort, layout, self.identity.participation)
        try:
            mean = await self.transport.aside("fold", lambda: layout.mean(total, clients, parcel.model.manifest))
        except SumSpoiled as error:
            raise (error if rule.scheme == "masked" else RoundLost(f"round {self.round}: {error}.")) from None
        self.now.contributed(mean.clients, mean.examples, mean.loss)
        return mean

    async def _shared_by_rows(
        self, sharing: Sharing, cohort: Collection[str], parcel: Parcel, work: Fit | Gradient, weights: Weighting
    ) -> Mean:
        """The mean gradient of all rows drawn, with the noise that all clients have added together."""
        if not isinstance(work, Gradient) or parcel.extra or weights != "examples":
            raise RunError(
                "shared noise covers the mean gradient of all rows: send nothing else, and weigh by examples"
            )
        rows = self._rows_each()
        layout = sharing.of_rows(parcel.model.manifest.size, len(cohort), rate_of(work, rows), rows)
        total, clients = await self._secret_sum(work, parcel, cohort, layout, self.identity.participation)
        mean = await self.transport.aside("fold", lambda: rows_mean(layout, total, clients, parcel.model.manifest))
        self.now.contributed(mean.clients, mean.examples, None)
        return mean

    async def _shared_by_clients(
        self, shield: Shield, sharing: Sharing, cohort: Collection[str], parcel: Parcel, work: Fit | Gradient
    ) -> Mean:
        """The sum of clipped updates over the expected clients, with the noise that all of them have added together."""
        try:
            layout = sharing.of_clients(parcel.model.manifest.size, len(cohort))
        except ConfigError as error:
            raise RoundAbandoned(f"round {self.round}: the {len(cohort)} clients drawn are too few: {error}.") from None
        releases = 1 + sum(one.releases for one in (*self.journal.history(), *self.journal.abandoned()))
        cost, expected = sharing.epsilon(layout, releases), max(shield.rate * len(self.clients), 1.0)
        rule = Participation(quorum=1, deadline_s=self.identity.participation.deadline_s)
        clip = Clip(shield.first_clip)
        total, clients = await self._secret_sum(work, parcel, cohort, layout, rule, clip)
        self.now.releases, self.now.clip, self.now.epsilon = 1, clip.norm, {EVERY_CLIENT: cost}
        over = (clients, parcel.model.manifest, expected)
        mean = await self.transport.aside("fold", lambda: clients_mean(layout, total, *over))
        self.now.contributed(mean.clients, mean.examples, None)
        return mean

    def _rows_each(self) -> float:
        """How many rows clients have on average; round 0 has counted them."""
        counted = next(iter(self.journal.history()), None)
        return 1.0 if counted is None or not counted.clients else counted.examples / len(counted.clients)

    def _cap(self) -> int:
        """The rows from which a client's weight does not grow any more: four times as many as clients have on average.

        Round 0 has counted them.
        """
        counted = next(iter(self.journal.history()), None)
        if counted is None or not counted.clients:
            return 1
        return max(-(-4 * counted.examples // len(counted.clients)), 1)

    async def _secret_sum(
        self,
        work: Work,
        parcel: Parcel,
        cohort: Collection[str],
        layout: Layout,
        rule: Participation,
        clip: Clip | None = None,
    ) -> tuple[Words, tuple[str, ...]]:
        """The opened sum of the cohort's masked words, and whose they are; scores may be those of nobody."""
        base = self._ask(work, "words", parcel, cohort, clip)
        first = Masking(base.key, "advertise" if layout.scheme == "masked" else "offer", layout)
        member = replace(base.assignment(base.cohort[0]), masking=first)
        session, told = first.session(self.identity.name, self.round), member.told(parcel.payload_digest)
        members, refuse = self.transport.members(), self.now.refusals.append

        async def ask(asked: Asked) -> None:
            await self._step(first, asked, work, parcel, clip)

        try:
            if layout.scheme == "masked":
                masked = MaskedSum(Sum(session, told, members, layout.least), ask, self._aside, refuse)
                return await masked.opened(base.cohort, layout, rule)
            ceremony = Ceremony(session, layout.encryption)
            about = (ceremony, told, members, layout.words)
            return await EncryptedSum(*about, ask, self.transport.add_up, refuse).opened(base.cohort, rule)
        except (BelowThreshold, RoundLost) as error:
            text = f"round {self.round}: {error}. {_reasons(self.now.refusals)}".strip()
            raise type(error)(text) from None

    async def _step(self, first: Masking, asked: Asked, work: Work, parcel: Parcel, clip: Clip | None) -> None:
        """One step of a secure sum, a call of its own."""
        masking = {name: replace(first, step=asked.step, message=text) for name, text in asked.messages.items()}
        is_worked = asked.step in ("vector", "encrypt")
        sent = asked.parcel or (parcel if is_worked else Parcel(_NO_MODEL))
        returns: Returns = "words" if asked.step in WORDS_STEPS else "reply"
        cut = clip if is_worked else None
        question = _Question(self.identity, self.now, work, returns, sent, list(masking), cut, masking)
        await self._group(question, asked.fold, asked.rule, optional=not is_worked or isinstance(work, Evaluate))

    async def _aside(self, work: Callable[[], Any]) -> Any:
        return await self.transport.aside("fold", work)

    async def _secret_total(
        self, cohort: Collection[str], parcel: Parcel, work: Evaluate | Summarize, layout: Layout, rule: Participation
    ) -> Total:
        total, clients = await self._secret_sum(work, parcel, cohort, layout, rule)
        return layout.sums(total, clients)

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
        question = self._ask(work, "update", Parcel(model, _vectors(send)), cohort)
        call = self._new_call(question, self.identity.participation, self.identity.least)
        async with self.now.replay.call(question.key, question.label) as entry:
            async for client, update in self._singly(question, call, is_over=entry is not None):
                self.now.contributed([client], update.examples, update.loss)
                yield client, update
        self.now.refusals += entry.refusals if entry else call.refusals
        if entry is None and call.state is State.ABANDONED:
            raise RoundAbandoned(_too_few(self.round, call, call.refusals))
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

    def _base(self, client: str, model: Weights, judged: Handed | None, question: _Question, answer: Update) -> Weights:
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
                question = self._ask(work, "reply", Parcel(_NO_MODEL), self.clients, sealing=Sealing())
                alone = Participation(quorum=1, deadline_s=rule.deadline_s)
                await self._group(question, fold, alone, optional=True)
                self.now.boxes = hops.boxes(fold.replies, self.now.refusals.append)
            return self.now.boxes

    def _require_open(self, model: Weights, then: Sequence[str]) -> None:
        """Raises `RoundAbandoned` where nobody is left who could go on from a sealed model."""
        if self.hops is not None and self.hops.is_stuck(model, self.round, then, self.now.boxes or ()):
            names = ", ".join(sorted(readers(model) or ()))
            text = f"round {self.round}: nobody is left of those for whom the model was sealed ({names}). "
            raise RoundAbandoned(text + _reasons(self.now.refusals[-5:]))

    def undo(self, hop: Handed, why: str) -> None:
        """A visit does not count after all, on record."""
        self.now.refusals.append(Refusal(hop.by, Reason.GATE, why))
        self.now.withdrawn(hop.by, hop.assignment)

    async def sums(
        self, cohort: Collection[str], model: Weights, work: Evaluate, size: int, each: Each | None = None
    ) -> Total | None:
        """The `size` metric sums of all who have data; `each` sees single answers, where sites release them."""
        cohort = self._who_can_open(cohort, model)
        if not cohort:
            return None
        rule = Participation(quorum=1, deadline_s=self.identity.participation.deadline_s)
        if self.identity.secret is not None:
            return await self._secret_scores(self.identity.secret, cohort, Parcel(model), work, size, rule)
        fold = SumFold(cohort, size)
        await self._group(self._ask(work, "sums", Parcel(model), cohort), fold, rule, each=each, optional=True)
        return fold.result()

    def _who_can_open(self, cohort: Collection[str], model: Weights) -> Collection[str]:
        """Those of the cohort who can score a model; the others are on record."""
        known = readers(model)
        if known is None:
            return cohort
        text = "the model was sealed before it came, or for others"
        self.now.refusals += [Refusal(name, Reason.ENCRYPTION, text) for name in sorted(set(cohort) - known)]
        return [name for name in cohort if name in known]

    async def _secret_scores(
        self, secret: Secret, cohort: Collection[str], parcel: Parcel, work: Evaluate, size: int, rule: Participation
    ) -> Total | None:
        """Scores that nobody can see for himself; None where they cannot be had, which costs nothing but them."""
        try:
            layout = secret.sums("reals", size, len(cohort))
            return await self._secret_total(cohort, parcel, work, layout, rule)
        except (BelowThreshold, RoundLost, SumSpoiled) as error:
            self.now.refusals.append(Refusal(EVERY_CLIENT, Reason.MASKING, f"no scores: {error}"))
            return None

    async def summarize(self, cohort: Collection[str], query: Query) -> Any:
        """The answer to a query about the cohort's training data; raises `RoundAbandoned` below the quorum."""
        work, parcel, rule = Summarize(query=query), Parcel(_NO_MODEL), self.identity.participation
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

    # -- below -----------------------------------------------------------------------------------------------------

    def _ask(
        self,
        work: Work,
        returns: Returns,
        parcel: Parcel,
        cohort: Collection[str],
        clip: Clip | None = None,
        sealing: Sealing | None = None,
    ) -> _Question:
        unknown = sorted(set(cohort) - set(self.clients))
        if unknown:
            there = ", ".join(self.clients[:5]) + (", ..." if len(self.clients) > 5 else "")
            raise ConfigError(f"round {self.round}: {unknown[0]!r} is not one of the round's clients ({there})")
        return _Question(self.identity, self.now, work, returns, parcel, list(cohort), clip, sealing=sealing)

    async def _group(
        self,
        question: _Question,
        fold: Fold[Any],
        rule: Participation,
        *,
        each: Each | None = None,
        optional: bool = False,
    ) -> None:
        """One call from its first question to its journaled end; an `optional` one may end without any answer."""
        async with self.now.replay.call(question.key, question.label) as entry:
            call = self._call(question, rule, entry)
            if call is not None:
                await self._drive(call, question, fold, each)
        fold.close()
        refusals = [Refusal(client, why.reason, why.detail) for client, why in fold.rejected.items()]
        refusals += entry.refusals if entry else call.refusals if call else []
        self.now.refusals += refusals
        if call is not None and len(fold.clients) < call.quorum and (entry or not optional):
            raise RoundAbandoned(_too_few(self.round, call, refusals))
        if entry is None and call is not None:
            accepted = tuple((client, question.ids[client]) for client in call.accepted)
            self.journal.note(Entry("call", question.key, question.label, accepted, tuple(call.refusals)))

    def _call(self, question: _Question, rule: Participation, entry: Entry | None) -> GroupCall | None:
        """A new call, or on replay one to exactly those who were accepted then (None where nobody was)."""
        if entry is None:
            return self._new_call(question, rule)
        names = [client for client, _ in entry.accepted]
        return GroupCall(names, Participation(quorum=len(names)), self.transport.now()) if names else None

    def _new_call(self, question: _Question, rule: Participation, least: int = 1) -> GroupCall:
        return GroupCall(question.cohort, rule, self.transport.now(), of=len(self.clients), least=least)

    async def _drive(self, call: GroupCall, question: _Question, fold: Fold[Any], each: Each | None) -> None:
        for client in set(question.cohort) - set(call.cohort):
            fold.add(client, None)

        def accept(client: str, answer: Answer) -> None:
            self._take(client, question.ids[client], answer)
            if each is not None:
                each(client, answer)
            fold.add(client, answer)

        perform = self._performer(call, question)
        await drive(call, self.transport, perform, question.norm, accept, lambda client: fold.add(client, None))

    def _performer(self, call: GroupCall, question: _Question) -> Callable[[str], Any]:
        race = call.is_race

        async def perform(client: str) -> Answer:
            return await self._perform(question.assignment(client), question.parcel, race=race)

        return perform

    async def _singly(
        self, question: _Question, call: GroupCall, *, is_over: bool
    ) -> AsyncIterator[tuple[str, Update]]:
        """Those journaled first, in their order; then the others as they come, unless the call is over."""
        asked = set(question.ids.values())
        before = [entry.accepted[0][0] for key, entry in self.now.replay.updates.items() if key in asked]
        for client in before:
            answer = await self._again(question, client)
            call.answered(client, self.transport.now())
            yield client, self._take_update(client, question.ids[client], answer)
        if not is_over:
            async for item in self._newly(question, call):
                yield item

    async def _again(self, question: _Question, client: str) -> Answer:
        """An answer that was accepted before; raises `RoundAbandoned` where it is not to be had any more."""
        try:
            return await self._perform(question.assignment(client), question.parcel)
        except Refused as refused:
            text = f"round {self.round}: {client} had answered {question.label} before, and now refuses: {refused}"
            raise RoundAbandoned(text) from refused

    async def _newly(self, question: _Question, call: GroupCall) -> AsyncIterator[tuple[str, Update]]:
        """Answers as they come, each journaled before it is given."""
        inbox: asyncio.Queue[tuple[str, Answer] | None] = asyncio.Queue()
        perform = self._performer(call, question)
        driving = asyncio.create_task(self._drive_into(inbox, call, question, perform))
        try:
            while (item := await inbox.get()) is not None:
                client, answer = item
                key = question.ids[client]
                self.journal.note(Entry("update", key, f"update from {client}", ((client, key),)))
                yield client, self._take_update(client, key, answer)
            await driving
        finally:
            driving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await driving

    async def _drive_into(
        self, inbox: asyncio.Queue[Any], call: GroupCall, question: _Question, perform: Callable[[str], Any]
    ) -> None:
        try:
            await drive(call, self.transport, perform, question.norm, lambda *item: inbox.put_nowait(item), _ignored)
        finally:
            inbox.put_nowait(None)

    async def _perform(self, assignment: Assignment, parcel: Parcel, *, race: bool = True) -> Answer:
        """One checked answer: from the journal where it is kept, else from the client."""
        now = self.now
        now.sent.append(assignment.id)
        kept = self.journal.answer(assignment.id)
        if kept is not None:
            return kept
        now.bytes_down += parcel.payload_bytes + (len(assignment.masking.message) if assignment.masking else 0)
        answer = await self.transport.perform(assignment, parcel, race=race)
        inspect(answer, assignment.returns, assignment.answer_manifest(parcel.model.manifest))
        return answer

    def _take(self, client: str, key: str, answer: A) -> A:
        if isinstance(answer, Update) and answer.epsilon is not None:
            self.now.epsilon[client] = answer.epsilon
        self.now.accepted.append(key)
        self.now.bytes_up += answer.payload_bytes
        self.journal.keep(key, answer)
        return answer

    def _take_update(self, client: str, key: str, answer: Answer) -> Update:
        assert isinstance(answer, Update)  # inspected against the assignment
        return self._take(client, key, answer)


def _ignored(_: str) -> None:
    """Single updates are given as they come; who brings none is in the call's refusals."""


def _all(masking: Mapping[str, Masking]) -> Masking | None:
    """One step with the messages to all."""
    first = next(iter(masking.values()), None)
    return first and replace(first, message=to_mapping({name: one.message for name, one in masking.items()}))


def _vectors(send: Send | None) -> dict[str, Vector]:
    found = {name: v.vector if isinstance(v, Weights) else np.asarray(v) for name, v in (send or {}).items()}
    return {name: np.ascontiguousarray(vector, dtype=np.float32).reshape(-1) for name, vector in found.items()}


def _reasons(refusals: Sequence[Refusal]) -> str:
    return "; ".join(f"{r.client}: {r.reason.value}{f' ({r.detail})' if r.detail else ''}" for r in refusals[:5])


def _too_few(round: int, call: GroupCall, refusals: Sequence[Refusal]) -> str:
    listed = [refusal for refusal in refusals if refusal.reason is not Reason.ABANDONED]
    reasons = _reasons(listed)
    asked = len(call.cohort)
    few = (
        f"of {asked} clients asked {len(listed)} will not contribute" if listed else f"only {asked} clients were asked"
    )
    return f"round {round}: {few}, the quorum is {call.quorum}. {reasons}".strip()
