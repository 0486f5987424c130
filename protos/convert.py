"""Between the messages of `agents.proto` and the library's own values. What came over the wire is checked here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import numpy as np

from fedkit import config
from fedkit.codec import Header as CodecHeader
from fedkit.codec import Limits
from fedkit.config import DP, NAME, parse
from fedkit.crypto.ceremony import BoxKey
from fedkit.errors import ConfigError, PayloadError, Reason, Refused
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import tensors_pb2
from fedkit.queries import Histogram, LabelCounts, Moments, Query, Ranges, RowCount
from fedkit.rounds.assignment import (
    WORDS_STEPS,
    Assignment,
    Clip,
    Masking,
    MaskStep,
    Parcel,
    Private,
    Returns,
    Sealing,
)
from fedkit.rounds.layout import Layout
from fedkit.trust.vouchers import Voucher
from fedkit.weights import Manifest
from fedkit.work import Answer, Evaluate, Fit, Gradient, MetricSums, Reply, Summarize, Summary, Work

__all__ = [
    "assignment_from_proto",
    "assignment_to_proto",
    "extras_from_proto",
    "extras_to_proto",
    "header_from_proto",
    "header_to_proto",
    "refusal_from_proto",
    "refusal_to_proto",
    "require_id",
    "require_name",
    "sums_from_proto",
    "sums_to_proto",
    "voucher_to_proto",
    "vouchers_from_proto",
]

_ID = re.compile(r"[0-9a-f]{32}")
_RUN = re.compile(rf"{NAME.pattern}(\.[0-9a-f]{{8}})?")  # its name, and what tells it from others of that name
_DETAIL = 200  # characters
_MAX_EXTRAS = 16
_MOST_VISITS = 1_000_000
_MOST_QUESTIONS = 5  # each has a sixth of epsilon
_COUNTS = ("visits", "questions")
_DP_FIELDS = ("epsilon", "noise_multiplier", "delta", "max_grad_norm", "noise", "dropouts", "colluders")

_RETURNS: dict[Returns, Any] = {
    "update": pb.UPDATE,
    "weights": pb.WEIGHTS,
    "sums": pb.SUMS,
    "words": pb.WORDS,
    "reply": pb.REPLY,
}
_FROM_CLIENTS = frozenset(
    {
        Reason.FAILED,
        Reason.NO_DATA,
        Reason.POLICY,
        Reason.PRIVACY,
        Reason.DONE,
        Reason.EXAMPLES,
        Reason.SHAPE,
        Reason.MASKING,
        Reason.ENCRYPTION,
        Reason.CANCELLED,
        Reason.LOST,
        Reason.PAYLOAD,
    }
)


def require_name(text: str, what: str) -> str:
    """`text`, which names something; raises `PayloadError` for what could be taken for a path or a command."""
    try:
        return config.require_name(text, what)
    except ConfigError as error:
        raise PayloadError(str(error)) from None


# -- assignments -------------------------------------------------------------------------------------------------------


def require_id(text: str) -> None:
    """Raises `PayloadError` for what cannot be the id of an assignment."""
    if not _ID.fullmatch(text):
        raise PayloadError("an assignment's id is 32 hexadecimal characters")


def assignment_to_proto(
    assignment: Assignment,
    parcel: Parcel,
    digest: bytes,
    *,
    task: str,
    strategy: str,
    holds_out_valid: bool,
) -> pb.Assignment:
    """The message that asks for `assignment` with `parcel`, whose payload has that digest."""
    message = pb.Assignment(
        id=assignment.id,
        run=assignment.run,
        task=task,
        strategy=strategy,
        seed=assignment.seed,
        round=assignment.round,
        returns=_RETURNS[assignment.returns],
        holds_out_valid=holds_out_valid,
        model_digest=digest,
        model_bytes=parcel.payload_bytes,
        manifest_digest=bytes.fromhex(parcel.model.manifest.digest),
        extras=extras_to_proto({name: vector.size for name, vector in parcel.extra.items()}),
    )
    _put_work(message, assignment.work)
    if assignment.private is not None:
        dp, counts = assignment.private.dp, {name: getattr(assignment.private, name) for name in _COUNTS}
        message.private.CopyFrom(pb.Private(**counts, **{name: getattr(dp, name) for name in _DP_FIELDS}))
    if assignment.clip is not None:
        message.clip.CopyFrom(pb.Clip(norm=assignment.clip.norm, tells=assignment.clip.tells))
    if assignment.masking is not None:
        masking = assignment.masking
        layout = masking.layout.to_json()
        asked = pb.Masking(call=masking.call, step=masking.step, layout=layout, message=masking.message)
        message.masking.CopyFrom(asked)
    if assignment.sealing is not None:
        boxes = [one.to_bytes() for one in assignment.sealing.boxes]
        message.sealing.CopyFrom(pb.Sealing(boxes=boxes, words=assignment.sealing.words))
    return message


def _put_work(message: pb.Assignment, work: Work) -> None:
    if isinstance(work, Summarize):
        _put_query(message.summarize, work.query)
        return
    fields = _given(work.to_dict())
    if fields.get("batch_size") == "all":
        fields["batch_size"] = 0
    name, kind = {Fit: ("fit", pb.Fit), Gradient: ("gradient", pb.Gradient), Evaluate: ("evaluate", pb.Evaluate)}[
        type(work)
    ]
    getattr(message, name).CopyFrom(kind(**fields))


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is set, also inside of settings that hold others."""
    found = {name: value for name, value in settings.items() if value is not None}
    return {name: _given(value) if isinstance(value, Mapping) else value for name, value in found.items()}


def _put_query(message: pb.Summarize, query: Query) -> None:
    if isinstance(query, Moments):
        message.moments.SetInParent()
        message.moments.bounds.extend(pb.Interval(low=low, high=high) for low, high in query.bounds or [])
    elif isinstance(query, Histogram):
        message.histogram.CopyFrom(pb.Histogram(feature=query.feature, edges=query.edges))
    elif isinstance(query, LabelCounts):
        message.label_counts.CopyFrom(pb.LabelCounts(classes=query.classes))
    elif isinstance(query, Ranges):
        fields = query.to_dict()
        del fields["kind"]
        message.ranges.CopyFrom(pb.Ranges(**fields))
    else:
        message.row_count.SetInParent()


def assignment_from_proto(message: pb.Assignment, client: str) -> Assignment:
    """The assignment a message asks for; raises `PayloadError` for one that makes no sense."""
    require_id(message.id)
    returns = next((name for name, number in _RETURNS.items() if number == message.returns), None)
    if returns is None:
        raise PayloadError(f"assignment {message.id} does not say what it returns")
    if not _RUN.fullmatch(message.run):
        raise PayloadError(f"assignment {message.id} belongs to a run that no coordinator would name so")
    require_name(message.task, "a task's name")
    try:
        work, private, clip, masking = _work(message), _private(message), _clip(message), _masking(message)
    except ConfigError as error:
        raise PayloadError(f"assignment {message.id}: {error}") from None
    about = (message.id, message.run, message.seed, message.round, client, work, returns)
    return Assignment(*about, private=private, clip=clip, masking=masking, sealing=_sealing(message))


def _masking(message: pb.Assignment) -> Masking | None:
    is_box = message.returns == pb.REPLY and message.HasField("sealing")
    if message.HasField("masking") != (message.returns in (pb.WORDS, pb.REPLY) and not is_box):
        raise PayloadError(f"assignment {message.id}: words and replies belong to secure sums")
    if not message.HasField("masking"):
        return None
    found = message.masking
    step = next((one for one in get_args(MaskStep) if one == found.step), None)
    if step is None or (step in WORDS_STEPS) != (message.returns == pb.WORDS) or not _ID.fullmatch(found.call):
        raise PayloadError(f"assignment {message.id}: there is no such step of a secure sum")
    return Masking(found.call, step, Layout.from_json(found.layout), found.message)


def _sealing(message: pb.Assignment) -> Sealing | None:
    if not message.HasField("sealing"):
        return None
    boxes, words = tuple(map(BoxKey.from_bytes, message.sealing.boxes)), int(message.sealing.words)
    if (message.returns, bool(boxes), bool(words)) not in ((pb.WEIGHTS, True, True), (pb.REPLY, False, False)):
        raise PayloadError(f"assignment {message.id}: what is sealed is the model after a hop, for somebody")
    return Sealing(boxes, words)


def _clip(message: pb.Assignment) -> Clip | None:
    if not message.HasField("clip"):
        return None
    if not (math.isfinite(message.clip.norm) and message.clip.norm > 0.0):
        raise PayloadError(f"assignment {message.id}: a clip is a number above 0")
    return Clip(message.clip.norm, message.clip.tells)


def _private(message: pb.Assignment) -> Private | None:
    if not message.HasField("private"):
        return None
    fields = _fields(message.private)
    visits, questions = (fields.pop(name) for name in _COUNTS)
    if not visits + questions or visits > _MOST_VISITS or questions > _MOST_QUESTIONS:
        raise PayloadError(f"assignment {message.id}: a run does not ask {visits} times, after {questions} questions")
    return Private(parse(DP, fields, where="dp"), visits, questions)


def _work(message: pb.Assignment) -> Work:
    kind = message.WhichOneof("work")
    if kind == "summarize":
        return Summarize(query=_query(message.summarize))
    if kind == "fit":
        return parse(Fit, _sized(message.fit), where="fit")
    if kind == "gradient":
        return parse(Gradient, _sized(message.gradient), where="gradient")
    if kind == "evaluate":
        return parse(Evaluate, _fields(message.evaluate), where="evaluate")
    raise PayloadError(f"assignment {message.id} asks for no work that is known here: update the agent")


def _fields(message: Any) -> dict[str, Any]:
    found = {}
    for field in message.DESCRIPTOR.fields:
        if not field.has_presence or message.HasField(field.name):
            value = getattr(message, field.name)
            value = list(value) if field.is_repeated else value
            found[field.name] = value if field.message_type is None else _fields(value)
    return found


def _sized(message: pb.Fit | pb.Gradient) -> dict[str, Any]:
    return _fields(message) | ({"batch_size": "all"} if message.batch_size == 0 else {})


def _query(message: pb.Summarize) -> Query:
    kind = message.WhichOneof("query")
    if kind == "moments":
        bounds = [(interval.low, interval.high) for interval in message.moments.bounds]
        return Moments(bounds=bounds or None)
    if kind == "histogram":
        return Histogram(feature=message.histogram.feature, edges=list(message.histogram.edges))
    if kind == "label_counts":
        return LabelCounts(classes=message.label_counts.classes)
    if kind == "row_count":
        return RowCount()
    if kind == "ranges":
        return parse(Ranges, _fields(message.ranges), where="ranges")
    raise PayloadError("the question is not known here: update the agent")


def voucher_to_proto(voucher: Voucher) -> pb.Voucher:
    """A member's word that it attends."""
    return pb.Voucher(name=voucher.name, expires=voucher.expires, signature=voucher.signature)


def vouchers_from_proto(messages: Iterable[pb.Voucher]) -> list[Voucher]:
    """Vouchers as they were received, of which none needs to hold; those that cannot be any are left out."""
    return [
        Voucher(one.name, int(one.expires), one.signature)
        for one in messages
        if NAME.fullmatch(one.name) and len(one.signature) == 64
    ]


# -- payloads ----------------------------------------------------------------------------------------------------------


def header_to_proto(parcel: Parcel, digest: bytes) -> tensors_pb2.Header:
    """What announces a parcel."""
    sizes = {name: vector.size for name, vector in parcel.extra.items()}
    return tensors_pb2.Header(
        manifest=parcel.model.manifest.to_json(),
        extras=extras_to_proto(sizes),
        payload_bytes=parcel.payload_bytes,
        digest=digest,
    )


def header_from_proto(message: tensors_pb2.Header, limits: Limits = Limits()) -> tuple[Manifest, dict[str, int]]:
    """The manifest and the extras' sizes that a header announces; raises `PayloadError`."""
    if len(message.manifest) > limits.header_bytes:
        raise PayloadError(f"the manifest has {len(message.manifest)} characters, too many")
    manifest = Manifest.from_json(message.manifest)
    extras = extras_from_proto(message.extras, manifest.size)
    due = 4 * (manifest.size + sum(extras.values()))
    if message.payload_bytes != due or due > limits.payload_bytes:
        raise PayloadError(f"the header announces {message.payload_bytes} bytes, its tensors need {due}")
    if len(message.digest) != 32:
        raise PayloadError("a digest has 32 bytes")
    CodecHeader(manifest, 4 * manifest.size, message.digest.hex())
    return manifest, extras


def extras_to_proto(sizes: Mapping[str, int]) -> list[tensors_pb2.Extra]:
    """Names and lengths, sorted by name."""
    return [tensors_pb2.Extra(name=name, length=sizes[name]) for name in sorted(sizes)]


def extras_from_proto(extras: Any, model_size: int) -> dict[str, int]:
    """Names and lengths; raises `PayloadError` where they are more than any strategy sends."""
    sizes = {extra.name: int(extra.length) for extra in extras}
    if len(sizes) != len(extras) or list(sizes) != sorted(sizes) or len(sizes) > _MAX_EXTRAS:
        raise PayloadError(f"extra vectors are at most {_MAX_EXTRAS}, sorted by name, each named once")
    if not all(0 < len(name) <= 100 and name.isprintable() for name in sizes):
        raise PayloadError("an extra vector's name is 1 to 100 printable characters")
    largest = max(4 * model_size, 1 << 20)
    if sum(sizes.values()) > largest:
        raise PayloadError(f"extra vectors of {sum(sizes.values())} elements, at most {largest} are taken")
    return sizes


# -- answers -----------------------------------------------------------------------------------------------------------


def sums_to_proto(assignment_id: str, answer: MetricSums | Summary | Reply) -> pb.Sums:
    """An answer that is sums, or says something, inline."""
    message = pb.Sums(assignment_id=assignment_id, examples=answer.examples)
    if isinstance(answer, Reply):
        message.reply = answer.message
    elif answer.vector.dtype == np.int64:
        message.integers.values.extend(answer.vector.tolist())
        message.integers.SetInParent()
    else:
        message.reals.values.extend(answer.vector.tolist())
        message.reals.SetInParent()
        message.released = isinstance(answer, MetricSums) and answer.released
    return message


def sums_from_proto(message: pb.Sums, work: Work, returns: Returns = "sums") -> Answer:
    """The sums that `work` asked for, or the reply; raises `Refused` for another kind."""
    kind = message.WhichOneof("vector")
    if (kind == "reply") != (returns == "reply") or returns == "words":
        raise Refused(Reason.SHAPE, "the answer is not what was asked for")
    if kind == "reply":
        return Reply(message.reply)
    if kind is None or (isinstance(work, Evaluate) and kind != "reals") or isinstance(work, Fit | Gradient):
        raise Refused(Reason.SHAPE, "the answer is not what was asked for")
    values = message.reals.values if kind == "reals" else message.integers.values
    if isinstance(work, Evaluate):
        return MetricSums(np.array(values, dtype=np.float64), int(message.examples), message.released)
    vector: Any = np.array(values, dtype=np.float64 if kind == "reals" else np.int64)
    return Summary(vector, int(message.examples))


def refusal_to_proto(assignment_id: str, refused: Refused) -> pb.Refusal:
    """A refusal as it may travel: the reason, and a detail that was made for others to read."""
    return pb.Refusal(assignment_id=assignment_id, reason=refused.reason.value, detail=refused.detail[:_DETAIL])


def refusal_from_proto(message: pb.Refusal) -> Refused:
    """A client's refusal; a reason that clients cannot have counts as `failed`."""
    known = {reason.value: reason for reason in _FROM_CLIENTS}
    detail = "".join(c for c in message.detail[:_DETAIL] if c.isprintable())
    return Refused(known.get(message.reason, Reason.FAILED), detail)
