"""The twins that tests use in place of a network: clients and a coordinator in memory, a small task, crashes on demand.

They run the same rounds, journal and local work as a real federation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedkit import rng
from fedkit.config import Evaluation, Privacy
from fedkit.errors import Reason, Refused
from fedkit.privacy.submission import sharing_for, shield_for
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.rounds.conduct import Outcome, Plan, conduct
from fedkit.rounds.journal import Commit, Entry, MemoryJournal, RoundRecord
from fedkit.simulation.transport import Latency, SimulatedTransport
from fedkit.simulation.workers import InProcess, Setting
from fedkit.strategy import Strategy
from fedkit.task import Data, Task, Tensor
from fedkit.work import Answer

__all__ = ["Crash", "Fuse", "InMemoryFederation", "refuse", "toy_task"]


class Crash(Exception):
    """The coordinator's process ends here, as under kill -9."""


class Fuse:
    """Counts the steps of a coordinator and crashes it at one of them; without `at`, it only counts."""

    def __init__(self, at: int | None = None) -> None:
        self.steps = 0
        self._at = at

    def burn(self) -> None:
        """One more step; raises `Crash` when it is the one."""
        self.steps += 1
        if self.steps == self._at:
            raise Crash(f"at step {self.steps}")


class _FusedJournal(MemoryJournal):
    """A journal whose owner may die just before or just after each write."""

    fuse = Fuse()

    def begin(self, round: int, attempt: int, clients: tuple[str, ...]) -> None:
        self.fuse.burn()
        super().begin(round, attempt, clients)
        self.fuse.burn()

    def note(self, entry: Entry) -> None:
        self.fuse.burn()
        super().note(entry)
        self.fuse.burn()

    def keep(self, assignment_id: str, answer: Answer) -> None:
        self.fuse.burn()
        super().keep(assignment_id, answer)

    def commit(self, commit: Commit) -> None:
        self.fuse.burn()
        super().commit(commit)
        self.fuse.burn()

    def abandon(self, record: RoundRecord) -> None:
        self.fuse.burn()
        super().abandon(record)
        self.fuse.burn()


class _Faulty(InProcess):
    """Clients of which some refuse, or answer something else than they should."""

    def __init__(
        self, setting: Setting, fuse: Callable[[], Fuse], faults: Mapping[str, Callable[[Answer], Answer]]
    ) -> None:
        super().__init__(setting)
        self._fuse = fuse
        self._faults = faults

    async def perform(self, assignment: Assignment, parcel: Parcel) -> Answer:
        """One client's answer, after whatever its fault makes of it; raises `Refused`."""
        self._fuse().burn()
        answer = self.answer(assignment, parcel)
        self._fuse().burn()
        fault = self._faults.get(assignment.client)
        return answer if fault is None else fault(answer)


class InMemoryFederation:
    """Clients that live on while coordinators come and go.

    `faults` maps a client to a function that changes its answers or raises `Refused`; `keep_answers` makes the journal
    keep accepted answers, as a coordinator's spool files do. `latency` gives virtual seconds per assignment.
    """

    def __init__(
        self,
        task: Task,
        clients: Sequence[str],
        *,
        seed: int = 0,
        latency: Latency | None = None,
        faults: Mapping[str, Callable[[Answer], Answer]] | None = None,
        keep_answers: bool = False,
        holds_out_valid: bool = False,
    ) -> None:
        self.task = task
        self.seed = seed
        self.journal = _FusedJournal(keep_answers=keep_answers)
        setting = Setting(task, seed, "cpu", holds_out_valid, keeps_answers=True)
        self.place = _Faulty(setting, lambda: self.journal.fuse, faults or {})
        self.transport = SimulatedTransport(clients, self.place, seed=seed, latency=latency)
        self._count = len(clients)

    def run(
        self,
        strategy: Strategy,
        *,
        fuse: Fuse | None = None,
        evaluate: Evaluation | None = None,
        privacy: Privacy = Privacy(),
    ) -> Outcome:
        """A coordinator takes the run up where the journal has it; raises `Crash` where `fuse` says so."""
        self.journal.fuse = fuse or Fuse()
        self.transport.restart()
        with rng.seeded(self.seed):
            plan = Plan(
                name="test",
                task=self.task,
                strategy=strategy,
                seed=self.seed,
                evaluate=evaluate,
                privacy=privacy,
                shield=shield_for(strategy, privacy.dp, self._count),
                sharing=sharing_for(strategy, self.task, privacy),
                min_clients=self._count,
            )
            return asyncio.run(conduct(plan, self.transport, self.journal))

    @property
    def trained(self) -> int:
        """How many assignments clients have really worked on."""
        return sum(client.trained for client in self.place.clients.values())


def refuse(_: Answer) -> Answer:
    """A fault: the client refuses whatever it is asked."""
    raise Refused(Reason.POLICY, "the site does not allow it")


def toy_task(**changes: Any) -> Task:
    """Three classes in five features, 40 to 60 rows at each client, learned in a few steps."""
    fields: dict[str, Any] = {
        "name": "toy",
        "model": lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
        "data": _toy_data,
        "loss": nn.CrossEntropyLoss(),
        "inputs": {"features": Tensor("float32", (5,))},
    }
    return Task(**(fields | changes))


def _toy_data(client: str) -> Data:
    truth = torch.randn(5, 3, generator=rng.torch_generator(0, "toy"))
    source = rng.torch_generator(0, "toy", client)
    count = 40 + int(torch.randint(20, (1,), generator=source))
    features = torch.randn(count + 20, 5, generator=source)
    labels = (features @ truth).argmax(dim=1)
    return Data(train=(features[:count], labels[:count]), test=(features[count:], labels[count:]))
