"""Telling a tracker of a run in such a way that the run cannot tell whether anybody listens."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from fedkit import rng
from fedkit.config import Privacy
from fedkit.errors import ConfigError, TrackingWarning
from fedkit.rounds.conduct import Outcome
from fedkit.rounds.journal import RoundRecord
from fedkit.tracking.events import About, Ended, Event, begun, ended, scored

__all__ = ["Teller", "Track", "Tracker", "Tracking", "tracker_for"]

Tracker: TypeAlias = Callable[[Event], object]
Track: TypeAlias = Tracker | str | None

_SECRET = re.compile(r"//\S*@")  # a user's name and password in a URI


def tracker_for(track: Track) -> Tracker | None:
    """A tracker itself, or the one that is named.

    * "mlflow", the server or store of MLFLOW_TRACKING_URI; "mlflow:URI", another one, as in "mlflow:sqlite:///runs.db".
    * "tensorboard:FOLDER", where TensorBoard reads; "tensorboard", the folder "runs" as in PyTorch.

    Raises `ConfigError` for any other name, and where the library is not installed.
    """
    if not isinstance(track, str):
        return track
    kind, _, where = track.partition(":")
    if kind == "mlflow":
        from fedkit.tracking.mlflow import MLflow

        return MLflow(where or None)
    if kind == "tensorboard":
        from fedkit.tracking.tensorboard import TensorBoard

        return TensorBoard(Path(where or "runs"))
    raise ConfigError(f"track: must be mlflow, mlflow:URI, tensorboard or tensorboard:FOLDER, got {_masked(track)!r}")


class Teller:
    """Tells a tracker, or nobody (None), and cannot fail.

    A tracker that fails costs one `TrackingWarning` and is told nothing more. The global random generators are as they
    were before it was told. Raises `ConfigError` for a tracker that there is not.
    """

    def __init__(self, track: Track) -> None:
        self._tracker = tracker_for(track)

    def __call__(self, make: Callable[[], Event]) -> None:
        """Tells of the event that `make` gives."""
        if self._tracker is None:
            return
        try:
            with rng.kept():
                self._tracker(make())
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is not the run's
            self._tracker = None
            text = f"{type(error).__name__}: {_masked(str(error)):.300}"
            warnings.warn(f"tracking has failed, and the run goes on without it ({text})", TrackingWarning, 2)


class Tracking:
    """An observer of one run's rounds that tells a tracker of it, in a `with` block; `on_round` is told first.

    A block that is left before `end` ends the run as "failed", or as "stopped" where a person interrupts it. Raises
    `ConfigError` for a tracker that there is not.
    """

    def __init__(self, track: Track, about: About, on_round: Callable[[RoundRecord], None] | None = None) -> None:
        self._tell = Teller(track)
        self._about = about
        self._on_round = on_round
        self._is_over = False

    def __enter__(self) -> Tracking:
        self._tell(lambda: begun(self._about))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._is_over:
            stopped = isinstance(error, KeyboardInterrupt)
            self._tell(lambda: Ended("stopped" if stopped else "failed"))

    def __call__(self, record: RoundRecord) -> None:
        """One more round is committed."""
        if self._on_round is not None:
            self._on_round(record)
        self._tell(lambda: scored(record, self._about.engine))

    def end(self, outcome: Outcome, clients: Collection[str], privacy: Privacy) -> None:
        """The run has finished; `clients` and `privacy` are those that it had."""
        self._is_over = True
        self._tell(lambda: ended(outcome, clients, privacy, self._about.engine))


def _masked(text: str) -> str:
    return _SECRET.sub("//***@", text)
