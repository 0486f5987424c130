"""Sums that nobody sees into, as a run asks for them: means, scores and statistics, masked or encrypted."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from fedkit.aggregation import Mean, Total, Weighting
from fedkit.config import Participation
from fedkit.crypto.ceremony import Ceremony
from fedkit.crypto.masked_sum import Sum
from fedkit.crypto.ring import Words
from fedkit.errors import BelowThreshold, ConfigError, Reason, RoundAbandoned, RoundLost, RunError, SumSpoiled
from fedkit.rounds.asking import Asking
from fedkit.rounds.assignment import (
    WORDS_STEPS,
    WORKED_STEPS,
    Clip,
    Masking,
    Parcel,
    Returns,
)
from fedkit.rounds.call import Refusal
from fedkit.rounds.encrypted import EncryptedSum
from fedkit.rounds.layout import Layout, Secret
from fedkit.rounds.masked import Asked, MaskedSum
from fedkit.rounds.question import NO_MODEL, Question, reasons_of
from fedkit.rounds.shared import clients_mean, rate_of, rows_mean
from fedkit.rounds.shield import EVERY_CLIENT, Sharing, Shield
from fedkit.work import Evaluate, Fit, Gradient, Summarize, Work

__all__ = ["SecureSums"]


class SecureSums(Asking):
    """A run whose answers are added up so that nobody sees a single one."""

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
        """The rows from which a client's weight grows no more: four times as many as clients have on average."""
        return max(math.ceil(4 * self._rows_each()), 1)

    async def _secret_sum(
        self,
        work: Work,
        parcel: Parcel,
        cohort: Collection[str],
        layout: Layout,
        rule: Participation,
        clip: Clip | None = None,
    ) -> tuple[Words, tuple[str, ...]]:
        """The opened sum of the cohort's words, and whose they are."""
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
            about = (ceremony, told, members, layout.words, self.round + self.now.opened.attempt)
            return await EncryptedSum(*about, ask, self.transport.add_up, refuse).opened(base.cohort, rule)
        except (BelowThreshold, RoundLost) as error:
            text = f"round {self.round}: {error}. {reasons_of(self.now.refusals)}".strip()
            raise type(error)(text) from None

    async def _step(self, first: Masking, asked: Asked, work: Work, parcel: Parcel, clip: Clip | None) -> None:
        """One step of a secure sum, a call of its own."""
        masking = {name: replace(first, step=asked.step, message=text) for name, text in asked.messages.items()}
        is_worked = asked.step in WORKED_STEPS
        sent = asked.parcel or (parcel if is_worked else Parcel(NO_MODEL))
        returns: Returns = "words" if asked.step in WORDS_STEPS else "reply"
        cut = clip if is_worked else None
        question = Question(self.identity, self.now, work, returns, sent, list(masking), cut, masking)
        await self._group(question, asked.fold, asked.rule, optional=not is_worked or isinstance(work, Evaluate))

    async def _aside(self, work: Callable[[], Any]) -> Any:
        return await self.transport.aside("fold", work)

    async def _secret_total(
        self, cohort: Collection[str], parcel: Parcel, work: Evaluate | Summarize, layout: Layout, rule: Participation
    ) -> Total:
        total, clients = await self._secret_sum(work, parcel, cohort, layout, rule)
        return layout.sums(total, clients)

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
