"""Between the messages of `operators.proto` and the library's own values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from blake3 import blake3

from fedkit.codec import Header, Limits
from fedkit.errors import PayloadError, Reason
from fedkit.protos import operators_pb2 as pb
from fedkit.protos import tensors_pb2
from fedkit.protos.convert import header_from_proto
from fedkit.protos.wire import shown
from fedkit.rounds.call import Refusal
from fedkit.rounds.conduct import Best, Outcome
from fedkit.rounds.journal import RoundRecord
from fedkit.status import ClientState, ClientStatus, JobStatus, RunState, RunStatus, Status
from fedkit.weights import Weights

__all__ = [
    "best_from_proto",
    "client_from_proto",
    "client_to_proto",
    "ending_from_proto",
    "model_header_from_proto",
    "model_header_to_proto",
    "outcome_from_proto",
    "outcome_to_proto",
    "packed_digest",
    "packed_header",
    "record_from_proto",
    "record_to_proto",
    "run_from_proto",
    "run_to_proto",
    "status_from_proto",
]

_MOST = (1 << 63) - 1  # settings have no upper bound, fields of messages have

# -- rounds ------------------------------------------------------------------------------------------------------------


def record_to_proto(record: RoundRecord) -> pb.Round:
    """One line of a run's history."""
    return pb.Round(
        round=record.round,
        attempt=_bounded(record.attempt),
        clients=record.clients,
        examples=_bounded(record.examples),
        loss=record.loss,
        metrics=record.metrics,
        per_client=_scores_to_proto(record.per_client),
        seconds=record.seconds,
        bytes_up=_bounded(record.bytes_up),
        bytes_down=_bounded(record.bytes_down),
        refusals=_refusals_to_proto(record.refusals),
        epsilon=record.epsilon,
        best=record.best,
        rejected=record.rejected,
        scored=record.scored,
        releases=_bounded(record.releases),
        clip=record.clip,
    )


def record_from_proto(message: pb.Round) -> RoundRecord:
    """One line of a run's history; "loss" comes first among metrics, then the others by name."""
    return RoundRecord(
        round=message.round,
        attempt=message.attempt,
        clients=tuple(shown(client) for client in message.clients),
        examples=message.examples,
        loss=message.loss if message.HasField("loss") else None,
        metrics=_values(message.metrics),
        per_client=_scores(message.per_client),
        seconds=message.seconds,
        bytes_up=message.bytes_up,
        bytes_down=message.bytes_down,
        refusals=_refusals(message.refusals),
        epsilon=_values(message.epsilon),
        best=message.best,
        rejected=shown(message.rejected),
        scored=tuple(shown(client) for client in message.scored),
        releases=message.releases,
        clip=message.clip if message.HasField("clip") else None,
    )


def _bounded(count: int) -> int:
    return min(count, _MOST)


def _scores_to_proto(scores: Mapping[str, Mapping[str, float]]) -> dict[str, pb.Scores]:
    return {client: pb.Scores(values=values) for client, values in scores.items()}


def _values(found: Mapping[str, float]) -> dict[str, float]:
    return {shown(name): found[name] for name in sorted(found, key=lambda name: (name != "loss", name))}


def _scores(found: Mapping[str, pb.Scores]) -> dict[str, dict[str, float]]:
    return {shown(client): _values(found[client].values) for client in sorted(found)}


def _refusals_to_proto(refusals: Iterable[Refusal]) -> list[pb.RoundRefusal]:
    return [pb.RoundRefusal(client=one.client, reason=one.reason.value, detail=one.detail) for one in refusals]


def _refusals(messages: Iterable[pb.RoundRefusal]) -> tuple[Refusal, ...]:
    return tuple(_refusal(message) for message in messages)


def _refusal(message: pb.RoundRefusal) -> Refusal:
    try:
        return Refusal(shown(message.client), Reason(message.reason), shown(message.detail))
    except ValueError:  # a newer coordinator knows more reasons
        return Refusal(shown(message.client), Reason.FAILED, shown(f"{message.reason}: {message.detail}"))


# -- runs and clients --------------------------------------------------------------------------------------------------


def run_to_proto(status: RunStatus) -> pb.Run:
    """One run."""
    return pb.Run(
        name=status.name,
        task=status.task,
        strategy=status.strategy,
        state=status.state,
        round=_bounded(max(status.round, 0)),
        rounds=_bounded(status.rounds),
        seed=status.seed,
        detail=status.detail,
        submitted_at=status.submitted_at,
        ended_at=status.ended_at,
        last=None if status.last is None else record_to_proto(status.last),
        models=status.models,
    )


def run_from_proto(message: pb.Run) -> RunStatus:
    """One run."""
    return RunStatus(
        name=shown(message.name),
        task=shown(message.task),
        strategy=shown(message.strategy),
        state=cast(RunState, shown(message.state)),
        round=message.round,
        rounds=message.rounds,
        seed=message.seed,
        detail=shown(message.detail),
        submitted_at=message.submitted_at,
        ended_at=message.ended_at,
        last=record_from_proto(message.last) if message.HasField("last") else None,
        models=tuple(shown(model) for model in message.models),
    )


def client_to_proto(status: ClientStatus) -> pb.Client:
    """One client."""
    return pb.Client(
        name=status.name,
        state=status.state,
        tasks=status.tasks,
        since_s=status.since_s,
        jobs=[_job_to_proto(job) for job in status.jobs],
        last_refusal=status.last_refusal,
    )


def _job_to_proto(job: JobStatus) -> pb.Job:
    return pb.Job(
        run=job.run,
        round=job.round,
        assignment_id=job.assignment_id,
        work=job.work,
        done=_bounded(job.done),
        total=_bounded(job.total),
    )


def client_from_proto(message: pb.Client) -> ClientStatus:
    """One client."""
    jobs = [
        JobStatus(shown(job.run), job.round, shown(job.assignment_id), shown(job.work), int(job.done), int(job.total))
        for job in message.jobs
    ]
    return ClientStatus(
        name=shown(message.name),
        state=cast(ClientState, shown(message.state)),
        tasks=tuple(shown(task) for task in message.tasks),
        since_s=message.since_s,
        jobs=tuple(jobs),
        last_refusal=shown(message.last_refusal),
    )


def status_from_proto(message: pb.StatusReply) -> Status:
    """Clients and runs."""
    clients = tuple(client_from_proto(client) for client in message.clients)
    return Status(clients, tuple(run_from_proto(run) for run in message.runs), shown(message.software))


# -- outcomes ----------------------------------------------------------------------------------------------------------


def outcome_to_proto(outcome: Outcome, run_file: str) -> pb.Outcome:
    """Everything of an outcome but weights and state, which `FetchModel` gives; `run_file` is JSON."""
    best = outcome.best
    return pb.Outcome(
        history=[record_to_proto(record) for record in outcome.history],
        abandoned=[record_to_proto(record) for record in outcome.abandoned],
        test=outcome.test,
        test_per_client=_scores_to_proto(outcome.test_per_client),
        refusals=_refusals_to_proto(outcome.refusals),
        best=None if best is None else pb.Best(round=best.round, metrics=best.metrics, test=best.test),
        run_file=run_file,
    )


def outcome_from_proto(
    message: pb.Outcome,
    *,
    history: list[RoundRecord],
    weights: Weights,
    best: Weights | None,
    state: Mapping[str, Any],
) -> Outcome:
    """An outcome, put together from what came in several calls; `best` is needed where the message has a best round."""
    facts = best_from_proto(message)
    found = None if facts is None or best is None else Best(weights=best, **facts)
    return Outcome(
        weights=weights,
        history=history,
        best=found,
        state=state,
        **ending_from_proto(message),
    )


def ending_from_proto(message: pb.Outcome) -> dict[str, Any]:
    """What of an outcome needs no model and is said in one message: abandoned attempts, test scores, refusals of them.

    The keys are fields of `fedkit.rounds.conduct.Outcome`.
    """
    return {
        "abandoned": [record_from_proto(record) for record in message.abandoned],
        "test": _values(message.test),
        "test_per_client": _scores(message.test_per_client),
        "refusals": _refusals(message.refusals),
    }


def best_from_proto(message: pb.Outcome) -> dict[str, Any] | None:
    """The best round's number, its metrics and its test scores, where an outcome has one."""
    if not message.HasField("best"):
        return None
    best = message.best
    return {"round": int(best.round), "metrics": _values(best.metrics), "test": _values(best.test)}


# -- models ------------------------------------------------------------------------------------------------------------


def model_header_to_proto(header: Header) -> tensors_pb2.Header:
    """What announces a model that travels alone."""
    return tensors_pb2.Header(
        manifest=header.manifest.to_json(), payload_bytes=header.payload_bytes, digest=bytes.fromhex(header.digest)
    )


def model_header_from_proto(message: tensors_pb2.Header, limits: Limits = Limits()) -> Header:
    """The header of a model that travels alone; raises `PayloadError` for one beyond `limits` or with extras."""
    manifest, extras = header_from_proto(message, limits)
    if extras:
        raise PayloadError("a model that travels alone has no extra vectors")
    return Header(manifest, int(message.payload_bytes), message.digest.hex())


def packed_header(packed: bytes) -> tensors_pb2.Header:
    """What announces packed bytes: the header of a payload without a manifest."""
    return tensors_pb2.Header(payload_bytes=len(packed), digest=packed_digest(packed))


def packed_digest(packed: bytes | bytearray) -> bytes:
    """The digest of packed bytes, as `Header.digest` defines it for an empty manifest."""
    return blake3(blake3().hexdigest().encode()).update(packed).digest()
