"""What an answer must be before it is folded. A bad one costs its own contribution and nothing else."""

from __future__ import annotations

import numpy as np

from fedkit.errors import Reason, Refused
from fedkit.rounds.assignment import Returns
from fedkit.weights import Manifest, require_plausible
from fedkit.work import Answer, MetricSums, Reply, Summary, Update

__all__ = ["MAX_EXAMPLES", "inspect"]

MAX_EXAMPLES = 1 << 40
_REPLY_BYTES = 1 << 20


def inspect(answer: Answer, returns: Returns, manifest: Manifest) -> None:
    """Raises `Refused` unless `answer` is what was asked for, shaped as the model, finite, with a plausible count."""
    if returns in ("words", "reply"):
        _inspect_masked(answer, returns, manifest)
        return
    if isinstance(answer, Reply) or isinstance(answer, Update) != (returns != "sums"):
        raise Refused(Reason.SHAPE, f"expected {returns}, got {type(answer).__name__}")
    if type(answer.examples) is not int or not 0 <= answer.examples <= MAX_EXAMPLES:
        raise Refused(Reason.EXAMPLES, f"an example count is 0 to {MAX_EXAMPLES}, got {answer.examples!r:.40}")
    if isinstance(answer, Update):
        _inspect_update(answer, manifest)
    else:
        _inspect_sums(answer)


def _inspect_masked(answer: Answer, returns: Returns, manifest: Manifest) -> None:
    """Of masked words any are as good as any others, and replies are read where they belong."""
    if isinstance(answer, Reply) and returns == "reply":
        if len(answer.message) > _REPLY_BYTES:
            raise Refused(Reason.SHAPE, f"a reply has at most {_REPLY_BYTES} bytes, not {len(answer.message)}")
    elif not isinstance(answer, Update) or returns != "words":
        raise Refused(Reason.SHAPE, f"expected {returns}, got {type(answer).__name__}")
    elif answer.weights.manifest.digest != manifest.digest or answer.sizes or answer.loss is not None:
        raise Refused(Reason.SHAPE, f"expected {manifest.size} masked words and nothing else")


def _inspect_update(answer: Update, manifest: Manifest) -> None:
    if answer.examples == 0:
        raise Refused(Reason.NO_DATA, "the update comes from no rows")
    if answer.weights.manifest is not manifest and answer.weights.manifest.digest != manifest.digest:
        raise Refused(Reason.SHAPE, "names, shapes or dtypes are not those of the model sent")
    if answer.loss is not None and not np.isfinite(answer.loss):
        raise Refused(Reason.NOT_FINITE, "the training loss is NaN or infinite: lower the learning rate")
    if answer.epsilon is not None and not 0.0 <= answer.epsilon < np.inf:
        raise Refused(Reason.SHAPE, f"epsilon is what privacy has cost, got {answer.epsilon!r:.40}")
    if answer.weights.is_stored:
        return  # its bytes were checked as they arrived
    if any(vector.dtype != np.float32 or vector.ndim != 1 for vector in answer.extra.values()):
        raise Refused(Reason.SHAPE, "an extra vector is not flat float32")
    seen = () if manifest.is_sealed else (answer.weights.vector,)  # of sealed words, any are as good as any others
    for vector in (*seen, *answer.extra.values()):
        require_plausible(vector)


def _inspect_sums(answer: MetricSums | Summary) -> None:
    if answer.vector.ndim != 1 or answer.vector.dtype not in (np.float64, np.int64):
        raise Refused(Reason.SHAPE, "sums are one flat vector of float64 or int64")
    if not np.isfinite(answer.vector).all():
        raise Refused(Reason.NOT_FINITE, "NaN or infinity in the sums: the loss or a metric overflowed")
