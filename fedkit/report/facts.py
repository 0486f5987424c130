"""What a page says of a run, from wherever it is known: a folder, a `Result`, a coordinator."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkit import saved
from fedkit.deploy.passport import Passport
from fedkit.deploy.verify import Examination
from fedkit.errors import ConfigError, FedkitError
from fedkit.rounds.journal import RoundRecord
from fedkit.saved import SavedRun
from fedkit.status import ENDED, RunState, RunStatus

__all__ = ["Facts", "Handed", "handed", "of_status", "read"]


class Facts(SavedRun):
    """A run as it was saved, or as it stands now.

    `state`, `detail` and `rounds`, how many are planned (None: not known), are for a run that may not be over.
    """

    state: RunState = "finished"
    detail: str = ""
    rounds: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be added."""
        return self.state in ENDED

    @property
    def planned(self) -> int | None:
        """How many rounds there were to be; None where that is not known."""
        found = self.rounds or self.strategy.get("rounds")
        return found if isinstance(found, int) else None

    @functools.cached_property
    def seen(self) -> list[str]:
        """Everybody of whom the run says anything, by name."""
        names = {*self.clients, *self.test_per_client, *(one.client for one in self.refusals)}
        for record in (*self.history, *self.abandoned):
            names |= {*record.clients, *record.per_client, *(one.client for one in record.refusals)}
        return sorted(names)


@dataclass(frozen=True, slots=True)
class Handed:
    """What became of a run's model: its passport, and who signed it (hexadecimal)."""

    passport: Passport
    signer: str = field(repr=False)


def read(folder: Path) -> Facts:
    """A run that `fedkit.Result.save` wrote; raises what `fedkit.saved.read` raises."""
    return Facts(**vars(saved.read(folder)))


def of_status(status: RunStatus, history: Sequence[RoundRecord], **known: Any) -> Facts:
    """A run as a coordinator tells of it, and what else is `known`: fields of `Facts`."""
    about: dict[str, Any] = {"privacy": None, "evaluate": None, "strategy": {"name": status.strategy}}
    about |= {"abandoned": (), "test": {}, "test_per_client": {}, "refusals": (), "best": None, "clients": ()}
    about |= {"state": status.state, "detail": status.detail, "rounds": status.rounds or None}
    about |= {"name": status.name, "task": status.task, "seed": status.seed, "engine": "federation"}
    return Facts(**(about | known), history=tuple(one for one in history if one.round > 0))


def handed(folder: Path, run: Facts) -> Handed:
    """The passport of a bundle of that run, whose signature holds.

    Its other files are not looked at: `fedkit verify` does that. Raises `TrustError`, and `ConfigError` for a bundle of
    another run.
    """
    examination = Examination(folder)
    for check in itertools.islice(examination.checks(), 2):
        if check.error is not None:
            raise check.error
    passport, signer = examination.passport, examination.signer
    if passport is None or signer is None:
        raise FedkitError(f"{folder}: nothing is signed here")
    of = (passport.run.name, passport.task.name, passport.run.seed)
    if of != (run.name, run.task, run.seed):
        raise ConfigError(
            f"{folder} is a bundle of {of[0]} (task {of[1]}, seed {of[2]}), not of {run.name} "
            f"(task {run.task}, seed {run.seed}): name its own with --bundle"
        )
    return Handed(passport, signer)
