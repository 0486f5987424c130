"""An assignment with its parcel, and an answer, each as one message and one payload: for carriers of whole ones.

fedkit's own wire moves payloads in chunks (`fedkit.protos.wire`). What comes over another one is checked here just as
strictly: every function that reads raises `PayloadError` for what cannot be what it claims.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from fedkit.errors import PayloadError, Reason, Refused
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import convert, tensors_pb2
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.spool import payload_digest
from fedkit.weights import Manifest, Vector, Weights
from fedkit.work import Answer, Update

__all__ = ["Asked", "Settled", "answer_from", "answer_to", "asked_from", "asked_to", "refusal_to"]

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Settled:
    """Which of a client's earlier results stand, and which are undone."""

    accepted: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Asked:
    """What one message asks of a client."""

    assignment: Assignment
    parcel: Parcel
    holds_out_valid: bool
    settled: Settled


def asked_to(
    assignment: Assignment, parcel: Parcel, settled: Settled, *, task: str, strategy: str, holds_out_valid: bool
) -> tuple[bytes, Vector]:
    """The message, and its payload: all vectors of the parcel one after the other."""
    about: Any = {"task": task, "strategy": strategy, "holds_out_valid": holds_out_valid}
    message = convert.assignment_to_proto(assignment, parcel, parcel.payload_digest, **about)
    message.manifest = parcel.model.manifest.to_json()
    message.settlement.CopyFrom(pb.Settlement(accepted=settled.accepted, dropped=settled.dropped))
    return message.SerializeToString(), _joined(parcel.vectors)


def asked_from(message: bytes, payload: Vector, client: str) -> Asked:
    """What `asked_to` wrote, for `client`."""
    found = _parsed(pb.Assignment, message)
    header = tensors_pb2.Header(
        manifest=found.manifest, extras=found.extras, payload_bytes=found.model_bytes, digest=found.model_digest
    )
    manifest, sizes = convert.header_from_proto(header)
    model, extra = _parted(payload, manifest, sizes, found.model_digest)
    assignment = convert.assignment_from_proto(found, client)
    news = Settled(_ids(found.settlement.accepted), _ids(found.settlement.dropped))
    return Asked(assignment, Parcel(model, extra), found.holds_out_valid, news)


def answer_to(assignment_id: str, answer: Answer) -> tuple[bytes, Vector]:
    """The message, and its payload: empty but for an update."""
    if not isinstance(answer, Update):
        sums = convert.sums_to_proto(assignment_id, answer)
        return pb.FromAgent(sums=sums).SerializeToString(), _joined(())
    parcel = Parcel(answer.weights, answer.extra)
    announced = pb.Announcement(
        assignment_id=assignment_id,
        examples=answer.examples,
        loss=answer.loss,
        epsilon=answer.epsilon,
        extras=convert.extras_to_proto(answer.sizes),
        payload_bytes=parcel.payload_bytes,
        digest=parcel.payload_digest,
    )
    return pb.FromAgent(update=announced).SerializeToString(), _joined(parcel.vectors)


def refusal_to(assignment_id: str, refused: Refused) -> bytes:
    """The message that says why there is no answer."""
    return pb.FromAgent(refusal=convert.refusal_to_proto(assignment_id, refused)).SerializeToString()


def answer_from(message: bytes, payload: Vector, assignment: Assignment, sent: Manifest) -> Answer:
    """The answer to `assignment`, which came with a model of manifest `sent`; raises the `Refused` that it may be."""
    found = _parsed(pb.FromAgent, message)
    kind = found.WhichOneof("what")
    if kind not in ("update", "sums", "refusal") or getattr(found, kind).assignment_id != assignment.id:
        raise PayloadError(f"{assignment.client} has answered something else than what was asked")
    if kind == "refusal":
        raise convert.refusal_from_proto(found.refusal)
    if kind == "sums":
        return convert.sums_from_proto(found.sums, assignment.work, assignment.returns)
    if assignment.returns not in ("update", "weights"):
        raise Refused(Reason.SHAPE, f"expected {assignment.returns}, got an update")
    announced = found.update
    sizes = convert.extras_from_proto(announced.extras, sent.size)
    weights, extra = _parted(payload, sent, sizes, announced.digest)
    given: dict[str, Any] = {name: getattr(announced, name) for name in ("loss", "epsilon") if announced.HasField(name)}
    return Update(weights, int(announced.examples), extra=extra, **given)


def _parsed(kind: type[M], raw: bytes) -> M:
    try:
        found: M = kind.FromString(raw)  # type: ignore[attr-defined]
    except DecodeError:
        raise PayloadError(f"what came is not a message of kind {kind.__name__}") from None
    return found


def _ids(found: Iterable[str]) -> list[str]:
    ids = list(found)
    for one in ids:
        convert.require_id(one)
    return ids


def _joined(vectors: Iterable[Vector]) -> Vector:
    found = list(vectors)
    return np.concatenate(found) if found else np.zeros(0, dtype="<f4")


def _parted(
    payload: Vector, manifest: Manifest, sizes: Mapping[str, int], digest: bytes
) -> tuple[Weights, dict[str, Vector]]:
    """The model and the extra vectors that lie behind it; raises `PayloadError` for other bytes than were announced."""
    due = manifest.size + sum(sizes.values())
    if payload.shape != (due,):
        raise PayloadError(f"{due} values were announced, {payload.size} came")
    raw: npt.NDArray[np.uint8] = np.ascontiguousarray(payload, dtype="<f4").view(np.uint8)
    if payload_digest(manifest.digest).update(raw.data).digest() != digest:
        raise PayloadError("the payload's digest is not the announced one; the bytes were changed on the way")
    ends = np.cumsum([manifest.size, *sizes.values()])
    model, *extras = np.split(payload, ends[:-1])
    return Weights(manifest, model), dict(zip(sizes, extras, strict=True))
