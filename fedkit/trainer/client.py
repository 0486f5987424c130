"""One client's side of the protocol without I/O: work is done once, and what stays at the client is kept with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from fedkit.crypto.box import Box
from fedkit.crypto.encrypted import SecretKey
from fedkit.crypto.holder import require_kept
from fedkit.errors import DataError, IncompatibleStrategy, Reason, Refused
from fedkit.privacy.accounting import Tally, epsilon_of, rdp_of
from fedkit.privacy.plan import Planned
from fedkit.privacy.shared import part_of, planned_for
from fedkit.rounds.assignment import WORDS_STEPS, Assignment, Parcel
from fedkit.rounds.sealing import answered_box, letters_for
from fedkit.rounds.seat import Key, Seat
from fedkit.trainer.trainer import ClientState, Trainer
from fedkit.work import Answer, Steps, Update

__all__ = ["ClientStore", "LocalClient", "MemoryStore"]


class ClientStore(Protocol):
    """A client's outbox and memory. An answer and the state it leaves are stored together, before anything is sent."""

    def answer(self, assignment_id: str) -> Answer | None:
        """The stored answer to an assignment that is not settled yet."""
        ...

    def is_settled(self, assignment_id: str) -> bool:
        """Whether the assignment was committed or dropped before; its id is kept for ever."""
        ...

    def state(self) -> ClientState:
        """The state after the last work done, settled or not."""
        ...

    def put(self, assignment_id: str, answer: Answer, state: ClientState) -> None:
        """Stores an answer with the state it leaves."""
        ...

    def settle(self, accepted: list[str], dropped: list[str]) -> None:
        """Accepted work stands and its answer is forgotten; dropped work is undone."""
        ...


class MemoryStore:
    """A client store in memory; `keeps_answers=False` is for simulations that are never taken up again."""

    def __init__(self, *, keeps_answers: bool = True) -> None:
        self._keeps_answers = keeps_answers
        self._answers: dict[str, Answer] = {}
        self._pending: list[tuple[str, ClientState]] = []
        self._settled: set[str] = set()
        self._state: ClientState = {}

    def answer(self, assignment_id: str) -> Answer | None:
        """The stored answer to an assignment that is not settled yet."""
        return self._answers.get(assignment_id)

    def is_settled(self, assignment_id: str) -> bool:
        """Whether the assignment was committed or dropped before."""
        return assignment_id in self._settled

    def state(self) -> ClientState:
        """The state after the last work done, settled or not."""
        return self._pending[-1][1] if self._pending else self._state

    def put(self, assignment_id: str, answer: Answer, state: ClientState) -> None:
        """Stores an answer with the state it leaves."""
        if self._keeps_answers:
            self._answers[assignment_id] = answer
        if state is not self.state():
            self._pending.append((assignment_id, state))

    def settle(self, accepted: list[str], dropped: list[str]) -> None:
        """Accepted work stands and its answer is forgotten; dropped work is undone."""
        if not self._pending and not self._keeps_answers:
            return
        stands, gone = set(accepted), set(accepted) | set(dropped)
        for key, state in self._pending:
            if key in stands:
                self._state = state
        self._pending = [(key, state) for key, state in self._pending if key not in gone]
        if self._keeps_answers:
            self._settled |= gone & self._answers.keys()
            for key in gone:
                self._answers.pop(key, None)


class LocalClient:
    """Answers assignments: from its store where it has the answer, else by doing the work.

    An error in the task's own code becomes a refusal, so that one client never ends a run; `failure` is the last one.
    """

    def __init__(
        self, name: str, trainer: Trainer, store: ClientStore, seat: Seat | None = None, box: Box | None = None
    ) -> None:
        self.name = name
        self.trained = 0
        self.failure: Exception | None = None
        self.spent: dict[str, Tally] = {}  # what private work has cost, by run
        self._trainer = trainer
        self._store = store
        self._sums: dict[str, bytes] = {}  # what it keeps of secure sums, by call
        self._vows: dict[bytes, bytes] = {}  # which sums it has signed
        self._seat = seat
        self._box = box

    def perform(self, assignment: Assignment, parcel: Parcel) -> Answer:
        """The answer; raises `Refused`."""
        stored = self._store.answer(assignment.id)
        if stored is not None:
            return stored
        if self._store.is_settled(assignment.id):
            raise Refused(Reason.DONE, f"{self.name} has done this assignment and its round is over")
        answer, state = self._work(assignment, parcel)
        self.trained += 1
        self._store.put(assignment.id, answer, state)
        return answer

    def _work(self, assignment: Assignment, parcel: Parcel) -> tuple[Answer, ClientState]:
        if assignment.sealing is not None and assignment.returns == "reply":
            return answered_box(assignment, self._box), self._store.state()
        letters = letters_for(assignment, parcel, self._box)
        masking = assignment.masking
        if masking is None:
            answer, state = self._worked(assignment, letters.open(parcel))
            return letters.close(answer), state
        if self._seat is None:
            raise Refused(Reason.MASKING, f"{self.name} has no seat in secure sums")
        left = self._sums.get(masking.call)
        if masking.step not in WORDS_STEPS:
            secret = SecretKey.make(masking.layout.encryption) if masking.step == "deliver" else None
            reply, after = self._seat.reply(assignment, left, secret)
            self._vow(self._seat.vow(assignment, after))
            self._sums[masking.call] = after
            return reply, self._store.state()
        cover, after = self._seat.cover(assignment, parcel.payload_digest, left)
        if masking.step == "open":
            assert isinstance(cover, Key)  # of that step
            self._sums[masking.call] = after
            return cover.opened(masking.layout, parcel.model), self._store.state()
        answer, state = self._worked(assignment, letters.open(parcel))
        covered = cover.cover(masking.layout, answer, part_of(masking.layout))
        self._sums[masking.call] = after
        return covered, state

    def _vow(self, vow: tuple[bytes, bytes] | None) -> None:
        """Raises `Refused` where another sum of the same round was signed before."""
        if vow is not None:
            require_kept(vow[1], self._vows.setdefault(*vow))

    def _worked(self, assignment: Assignment, parcel: Parcel) -> tuple[Answer, ClientState]:
        try:
            plan = self._planned(assignment)
            if plan is None:
                return self._trainer.perform(assignment, parcel, self._store.state())
            answer, state = self._trainer.perform(
                assignment, parcel, self._store.state(), plan.training, question=plan.cost
            )
            return self._charged(assignment, answer, plan.cost), state
        except (Refused, IncompatibleStrategy):
            raise
        except Exception as error:  # the task's own code runs here, and may raise anything
            self.failure = error
            kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            raise Refused(Reason.FAILED, f"{kind}{error}") from error

    def _planned(self, assignment: Assignment) -> Planned | None:
        if not assignment.is_noised:
            return None
        return planned_for(assignment, self._trainer.rows(self.name))

    def _charged(self, assignment: Assignment, answer: Answer, steps: Steps) -> Answer:
        """The answer with what the run has cost so far; a simulated client has no budget but the run's."""
        if assignment.private is None:  # whole clients' privacy is the run's to account for
            return answer
        spent = self.spent[assignment.run] = self.spent.get(assignment.run, Tally()).plus(steps)
        if not isinstance(answer, Update):
            return answer
        return replace(answer, loss=None, epsilon=epsilon_of(rdp_of(spent), assignment.private.dp.delta))

    def settle(self, accepted: list[str], dropped: list[str]) -> None:
        """A round is durable or abandoned: forget and undo accordingly."""
        self._sums.clear()
        self._store.settle(accepted, dropped)
