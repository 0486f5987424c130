"""Every error fedkit raises on purpose.

FedkitError
├── ConfigError            a setting, run file or argument is wrong (also a ValueError)
│   ├── NameTaken          there is a run of this name already
│   └── NoSuchRun          there is no run of this name
├── TaskError              a task cannot be trained, evaluated or prepared as described
│   ├── DataError          a client's data set does not fit the task
│   └── MetricNotSummable  a metric keeps raw predictions instead of sums
├── ModelSealed            a model is sealed, and was to be read where nobody can
├── ManifestMismatch       two models, or a model and a module, do not hold the same tensors
├── PayloadError           bytes that claim to be a model are refused
├── StorageError           a file or database that must be durable cannot be written or read
├── TrustError             an identity, token or certificate is not what it must be
├── Refused                a client, or a check on its answer, refuses one assignment
├── RunError
│   ├── RoundAbandoned     a round fell below its quorum; it is tried again
│   │   ├── BelowThreshold a secure sum has lost more members than it can do without
│   │   ├── RoundLost      an encrypted sum stays closed; the round is passed over
│   │   └── SumSpoiled     a secure sum cannot be opened, or is no sum of honest answers
│   ├── RunFailed          a round was abandoned as often as the run allows
│   ├── RunCancelled       an operator ended the run; its last committed model stands
│   ├── IncompatibleStrategy     a strategy and a task or setting cannot work together
│   ├── NonDeterministicStrategy a replay asked for something else than the journal holds
│   └── StateError         a strategy keeps state that cannot be committed
├── RemoteError            a coordinator answered something that makes no sense here
│   └── Unreachable        a coordinator does not answer at all
└── ExportError            the exported model does not do what the trained one does
    └── NotAccepted        a model misses a criterion of its release

CastWarning (a UserWarning): parameters that are not float32 travel as float32.
RefusalWarning (a UserWarning): a client's own code failed, so the result was made without it.
TrackingWarning (a UserWarning): a tracker failed, so the rest of the run is not written down there.
"""

from __future__ import annotations

import enum
from typing import Any

__all__ = [
    "BelowThreshold",
    "CastWarning",
    "ConfigError",
    "DataError",
    "ExportError",
    "FedkitError",
    "IncompatibleStrategy",
    "ManifestMismatch",
    "MetricNotSummable",
    "ModelSealed",
    "NameTaken",
    "NoSuchRun",
    "NonDeterministicStrategy",
    "NotAccepted",
    "PayloadError",
    "Reason",
    "RefusalWarning",
    "Refused",
    "RemoteError",
    "RoundAbandoned",
    "RoundLost",
    "RunCancelled",
    "RunError",
    "RunFailed",
    "StateError",
    "StorageError",
    "SumSpoiled",
    "TaskError",
    "TrackingWarning",
    "TrustError",
    "Unreachable",
]


class FedkitError(Exception):
    """The root of every error fedkit raises on purpose."""


class ConfigError(FedkitError, ValueError):
    """A setting is wrong; the message names the field and what would be right."""


class NameTaken(ConfigError):
    """There is a run of this name already; names are given once."""


class NoSuchRun(ConfigError):
    """There is no run of this name."""


class TaskError(FedkitError):
    """A task cannot be trained, evaluated or prepared as it is described."""


class DataError(TaskError):
    """A client's data set does not fit the task."""


class MetricNotSummable(TaskError):
    """A metric keeps raw predictions; only states that add up may leave a client."""


class ManifestMismatch(FedkitError):
    """Two models, or a model and a module, do not hold the same tensors."""


class ModelSealed(FedkitError):
    """A sealed model was to be computed with, or read, where it can only be passed on."""


class PayloadError(FedkitError):
    """Bytes that claim to be a model are refused before they are used."""


class StorageError(FedkitError):
    """What must be durable cannot be written or read; the message names the file and says what to do."""


class TrustError(FedkitError):
    """An identity, token, certificate or roster is not what it must be; the message says what to do."""


class Reason(enum.StrEnum):
    """Why an assignment brought no contribution; one word each, in logs and history alike."""

    FAILED = "failed"  # the client's own code raised
    LOST = "lost"  # the client went away
    LATE = "late"  # it answered after the call had closed
    DUPLICATE = "duplicate"  # it answered the same assignment twice
    UNKNOWN = "unknown"  # nobody asked for this answer
    NORM = "norm"  # the update is larger than the run allows
    NOT_FINITE = "not_finite"  # NaN or infinity
    SHAPE = "shape"  # names, shapes or dtypes are not the model's
    EXAMPLES = "examples"  # the example count is not a plausible one
    NO_DATA = "no_data"  # the client has no rows for this work
    DONE = "done"  # the assignment was committed before; it is never done twice
    DEADLINE = "deadline"  # no answer before the call closed
    SURPLUS = "surplus"  # enough others had answered
    ABANDONED = "abandoned"  # too few could still answer, so nobody was waited for any more
    GATE = "gate"  # the next client did not accept this hop, and went on from the model before
    POLICY = "policy"  # the site does not allow it
    PRIVACY = "privacy"  # it would cost more privacy than the site's budget has left
    PAYLOAD = "payload"  # the bytes are not those that were announced
    MASKING = "masking"  # the masking protocol does not allow it: a lie, a mistake, or too few members
    ENCRYPTION = "encryption"  # what encrypts sums or sealed models does not allow it: keys, recipients, what came
    CANCELLED = "cancelled"  # it was called off while under way


class Refused(FedkitError):
    """One assignment brings no contribution: `reason` is typed, `detail` says it in words."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[Refused], tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


class RunError(FedkitError):
    """A run cannot go on."""


class RoundAbandoned(RunError):
    """Fewer clients than the quorum answered; nothing is averaged and the round is tried again."""


class BelowThreshold(RoundAbandoned):
    """Fewer members than the threshold are left in a secure sum: it stays closed, and nothing of it can be read."""


class RoundLost(RoundAbandoned):
    """Members have signed an encrypted sum that nobody can open, and sign no other in its round: it is passed over."""


class SumSpoiled(RoundAbandoned):
    """A secure sum cannot be opened, or is none of honest answers; `members` are those whose part is wrong."""

    def __init__(self, text: str, members: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.members = members


class RunFailed(RunError):
    """A round was abandoned as often as the run allows; the last committed model stands."""


class RunCancelled(RunError):
    """An operator ended the run; its last committed model stands."""


class IncompatibleStrategy(RunError):
    """A strategy and a task or setting cannot work together; the message names both sides."""


class NonDeterministicStrategy(RunError):
    """A replay asked for something else than the journal holds; the message names both."""


class StateError(RunError):
    """A strategy keeps an attribute that cannot be committed with the round."""


class RemoteError(FedkitError):
    """A coordinator answered something that makes no sense here; another version, or not a coordinator at all."""


class Unreachable(RemoteError):
    """A coordinator does not answer; the message says what to check. A run that has begun goes on without us."""


class ExportError(FedkitError):
    """The exported model is not written, or does not compute what the trained one does."""


class NotAccepted(ExportError):
    """A model misses criteria of its release, or was not measured for them; `verdicts` are those over all criteria."""

    def __init__(self, text: str, verdicts: tuple[Any, ...] = ()) -> None:
        super().__init__(text)
        self.verdicts = verdicts


class CastWarning(UserWarning):
    """Parameters that are not float32 travel, and are aggregated, as float32."""


class RefusalWarning(UserWarning):
    """A client's own code failed in a run that went on without it; the message names the first one."""


class TrackingWarning(UserWarning):
    """A tracker failed in a run that goes on without it; the message says what it said."""
