"""What the operators' service needs from a coordinator: begin, end and look at runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from fedkit.rounds.conduct import Outcome
from fedkit.rounds.journal import RoundRecord
from fedkit.runfile import RunFile
from fedkit.status import ClientStatus, JobStatus, RunStatus
from fedkit.weights import Weights

__all__ = ["ClientStatus", "JobStatus", "RunBook", "RunStatus"]


class RunBook(Protocol):
    """All runs of a coordinator, those that go on and those that are over.

    The operators' service calls it on its event loop, with names that have the form of `RunSection.name`.
    """

    def submit(self, file: RunFile, init: Weights | None) -> RunStatus:
        """Begins a run; raises `ConfigError`, `TaskError`, `IncompatibleStrategy`, `NameTaken`."""
        ...

    def cancel(self, name: str) -> RunStatus:
        """Ends a run, one that is over stays as it is; raises `NoSuchRun`."""
        ...

    def runs(self, name: str = "") -> list[RunStatus]:
        """All runs, or the one of that name; raises `NoSuchRun`, or returns none, where there is none of that name."""
        ...

    def clients(self) -> list[ClientStatus]:
        """Everybody who attends or has attended."""
        ...

    def watch(self, name: str, after_round: int) -> AsyncIterator[RoundRecord | RunStatus]:
        """Records after that round as they are committed, past ones first; the last item is a run that is over.

        Other statuses may come in between. Raises `NoSuchRun` with the first item.
        """
        ...

    def file(self, name: str) -> RunFile:
        """What was submitted; raises `NoSuchRun`."""
        ...

    def outcome(self, name: str) -> Outcome:
        """What a run ended with; raises `NoSuchRun`, and `RunError` where it goes on or failed."""
        ...

    def model(self, name: str, which: str) -> Weights | bytes:
        """The "final" (last committed) or "best" weights, or the strategy's "state" as `fedkit.packing` packs it.

        Raises `NoSuchRun`, and `RunError` where there is no such model.
        """
        ...
