"""One call of a run as it is asked, and what is said of how it went."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from blake3 import blake3

from fedkit.config import Participation
from fedkit.crypto.messages import to_mapping
from fedkit.errors import Reason, Refused
from fedkit.gate import Verdict
from fedkit.rounds.assignment import (
    WORKED_STEPS,
    Assignment,
    Clip,
    Masking,
    Parcel,
    Private,
    Returns,
    Sealing,
    question_digest,
)
from fedkit.rounds.call import GroupCall, Refusal
from fedkit.rounds.layout import Secret
from fedkit.rounds.open import Progress
from fedkit.rounds.shield import Sharing, Shield
from fedkit.strategy import Send
from fedkit.weights import Manifest, Vector, Weights
from fedkit.work import Answer, Evaluate, Fit, Update, Work, counts_rows

__all__ = ["NO_MODEL", "Question", "RunIdentity", "reasons_of", "too_few", "vectors_of"]

NO_MODEL = Weights.zeros(Manifest(()))


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


class Question:
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
        is_step = returns == "reply" or any(one.step not in WORKED_STEPS for one in self.masking.values())
        is_plain = isinstance(work, Evaluate) or is_step or counts_rows(work)
        self.private = None if is_plain else identity.private
        about = (work, returns, parcel, self.private, clip, _told_to_all(self.masking), sealing)
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


def _told_to_all(masking: Mapping[str, Masking]) -> Masking | None:
    """One step with the messages to all."""
    first = next(iter(masking.values()), None)
    return first and replace(first, message=to_mapping({name: one.message for name, one in masking.items()}))


def vectors_of(send: Send | None) -> dict[str, Vector]:
    """A strategy's own vectors, as they travel."""
    found = {name: v.vector if isinstance(v, Weights) else np.asarray(v) for name, v in (send or {}).items()}
    return {name: np.ascontiguousarray(vector, dtype=np.float32).reshape(-1) for name, vector in found.items()}


def reasons_of(refusals: Sequence[Refusal]) -> str:
    """The first few refusals in one line."""
    return "; ".join(f"{r.client}: {r.reason.value}{f' ({r.detail})' if r.detail else ''}" for r in refusals[:5])


def too_few(round: int, call: GroupCall, refusals: Sequence[Refusal]) -> str:
    """Why a round is below its quorum."""
    listed = [refusal for refusal in refusals if refusal.reason is not Reason.ABANDONED]
    reasons = reasons_of(listed)
    asked = len(call.cohort)
    few = (
        f"of {asked} clients asked {len(listed)} will not contribute" if listed else f"only {asked} clients were asked"
    )
    return f"round {round}: {few}, the quorum is {call.quorum}. {reasons}".strip()
