"""The process that trains: it has everything imported, does one assignment at a time, and talks over a socket.

Messages both ways are JSON, tensors lie in files. It ends when the agent's end of the socket closes, so that no work
goes on for an agent that is gone.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkit.client.parcels import fetched_parcel
from fedkit.codec import CHUNK_BYTES
from fedkit.crypto.chunks import Scheme
from fedkit.crypto.encrypted import SecretKey
from fedkit.errors import ConfigError, Reason, Refused
from fedkit.gate import Verdict
from fedkit.logs import where
from fedkit.packing import pack, unpack
from fedkit.policy import Policy, refuse
from fedkit.privacy.plan import Planned
from fedkit.privacy.shared import part_of, planned_for
from fedkit.process import tune_malloc
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import convert
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.rounds.layout import Layout
from fedkit.rounds.sealing import Letters
from fedkit.rounds.seat import Cover, Key, cover_from
from fedkit.spool import payload_digest
from fedkit.task import Task
from fedkit.trainer.trainer import ClientState, Trainer
from fedkit.weights import Manifest
from fedkit.work import Answer, Evaluate, Fit, Gradient, MetricSums, Reply, Summarize, Update

__all__ = ["Outfit", "read_message", "work", "write_message"]

_KEPT_TRAINERS = 4  # runs whose model and data stay loaded
_PROGRESS_S = 0.5
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Outfit:
    """What a worker is given for its lifetime."""

    client: str
    tasks: Mapping[str, Task]
    device: str = "auto"
    threads: int | None = None
    policy: Policy = Policy.unrestricted()


def write_message(sock: socket.socket, message: Mapping[str, Any]) -> None:
    """Sends one message."""
    raw = json.dumps(message).encode()
    sock.sendall(_LENGTH.pack(len(raw)) + raw)


def read_message(sock: socket.socket) -> dict[str, Any] | None:
    """The next message, or None at the end."""
    head = _read(sock, _LENGTH.size)
    raw = None if head is None else _read(sock, _LENGTH.unpack(head)[0])
    return None if raw is None else json.loads(raw)


def _read(sock: socket.socket, size: int) -> bytes | None:
    parts, left = [], size
    while left:
        part = sock.recv(min(left, 1 << 20))
        if not part:
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def work(sock: socket.socket, outfit: Outfit) -> None:
    """Does what it is asked over `sock` until that closes."""
    tune_malloc(greedy=True)
    if outfit.threads is not None:
        torch.set_num_threads(outfit.threads)
    share = outfit.policy.gpu_memory_share
    if share is not None and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)
    _Worker(sock, outfit).run()


class _Worker:
    def __init__(self, sock: socket.socket, outfit: Outfit) -> None:
        self._sock = sock
        self._outfit = outfit
        self._jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._reserved: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._trainers: dict[tuple[str, str, int, bool], Trainer] = {}
        self._manifests: dict[str, Manifest] = {}
        self._current = ""
        self._told = 0.0

    def run(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            job = self._jobs.get()
            self._current, self._told = job["id"], time.monotonic()
            write_message(self._sock, {"id": job["id"], **self._outcome(job)})
            self._cancelled.discard(job["id"])

    def _listen(self) -> None:
        try:
            while (message := read_message(self._sock)) is not None:
                if "cancel" in message:
                    self._cancelled.add(message["cancel"])
                elif "reserved" in message:
                    self._reserved.put(message["reserved"])
                else:
                    self._jobs.put(message)
        finally:
            os._exit(0)  # the agent is gone, however it went; nobody waits for the work under way

    def _outcome(self, job: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._do(job)
        except Refused as refused:
            return {"refused": refused.reason.value, "detail": refused.detail}
        except Exception as error:  # noqa: BLE001 - the task's own code runs here, and may raise anything
            return {"refused": Reason.FAILED.value, "detail": type(error).__name__, "where": where(error)[-3:]}

    def _do(self, job: dict[str, Any]) -> dict[str, Any]:
        if "make_key" in job:
            return _made_key(job["make_key"])
        message = pb.Assignment.FromString(base64.b64decode(job["assignment"]))
        assignment = convert.assignment_from_proto(message, self._outfit.client)
        state: ClientState = {} if job["state"] is None else unpack(Path(job["state"]).read_bytes())
        parcel = self._parcel(job, message)
        if assignment.masking is not None and assignment.masking.step == "open":
            return _opened(job, assignment, assignment.masking.layout, parcel)
        letters = Letters.from_dict(job["letters"])
        parcel = letters.open(parcel)
        self._watch(0, 0)
        trainer, policy = self._trainer(message), self._outfit.policy
        plan, private = None, assignment.private
        if isinstance(assignment.work, Fit | Gradient | Summarize):
            rows = trainer.rows(assignment.client)
            refuse(policy.objections_to_rows(assignment.work, rows, private=private is not None))
        if assignment.is_noised:
            plan = self._reserve(trainer, assignment)
        noisy: dict[str, Any] = {} if plan is None else {"private": plan.training, "question": plan.cost}
        answer, after = trainer.perform(assignment, parcel, state, **noisy)
        allowed = _allowed(policy, trainer, assignment, parcel, answer)
        answer = letters.close(_covered(job, assignment, allowed))
        with contextlib.suppress(FileNotFoundError):
            os.replace(job["spare"], job["out"])
        manifest = assignment.answer_manifest(parcel.model.manifest)
        facts = _written(assignment, answer, manifest, Path(job["out"])) | {"rows": allowed.examples}
        if plan is not None and plan.training is not None:
            facts |= {"clipped": trainer.done.clipped, "gradients": trainer.done.sampled}
        return facts | {"has_state": _keep_state(state, after, Path(job["out_state"]))}

    def _reserve(self, trainer: Trainer, assignment: Assignment) -> Planned:
        """The noisy steps of an assignment, once the ledger has them on disk; raises `Refused`."""
        rows = trainer.rows(assignment.client)
        plan = planned_for(assignment, rows)
        assert plan is not None  # only noised work asks
        facts = {
            "rows": rows,
            "fingerprint": trainer.fingerprint(assignment.client),
            "steps": plan.cost.to_dict(),
        }
        write_message(self._sock, {"id": self._current, "reserve": facts})
        refused = self._reserved.get()
        if refused:
            raise Refused(Reason(refused["refused"]), refused["detail"])
        return plan

    def _parcel(self, job: dict[str, Any], message: pb.Assignment) -> Parcel:
        if job["model"] is None:
            return fetched_parcel(message, None)
        if "manifest" in job:
            self._manifests[job["manifest_digest"]] = Manifest.from_json(job["manifest"])
        manifest = self._manifests[job["manifest_digest"]]
        return fetched_parcel(message, (job["model"], manifest))

    def _trainer(self, message: pb.Assignment) -> Trainer:
        key = (message.run, message.task, message.seed, message.holds_out_valid)  # all that a trainer is made from
        found = self._trainers.pop(key, None)
        if found is None:
            task = self._outfit.tasks.get(message.task)
            if task is None:
                raise Refused(Reason.POLICY, f"this agent has no task {message.task}")
            found = Trainer(
                task,
                message.seed,
                device=self._outfit.device,
                holds_out_valid=message.holds_out_valid,
                watch=self._watch,
            )
        while len(self._trainers) >= _KEPT_TRAINERS:
            self._trainers.pop(next(iter(self._trainers)))
        self._trainers[key] = found
        return found

    def _watch(self, done: int, total: int) -> None:
        if self._current in self._cancelled:
            raise Refused(Reason.CANCELLED, "called off")
        now = time.monotonic()
        if now - self._told >= _PROGRESS_S:
            self._told = now
            write_message(self._sock, {"id": self._current, "done": done, "total": total})


def _made_key(about: list[Any]) -> dict[str, Any]:
    """The key of an encrypted sum."""
    try:
        key = SecretKey.make(Scheme(*about))
    except ConfigError as error:
        raise Refused(Reason.ENCRYPTION, str(error)) from None
    return {"key": base64.b64encode(key.data).decode()}


def _cover(job: Mapping[str, Any], layout: Layout) -> Cover:
    """What the agent has made for this answer."""
    plus, minus = (tuple(map(base64.b64decode, some)) for some in job["cover"])
    return cover_from(layout, plus, minus)


def _covered(job: Mapping[str, Any], assignment: Assignment, answer: Answer) -> Answer:
    """The answer as nobody can read it, and with its part of the noise, where it is for a secure sum."""
    if assignment.masking is None:
        return answer
    layout = assignment.masking.layout
    return _cover(job, layout).cover(layout, answer, part_of(layout))


def _opened(job: dict[str, Any], assignment: Assignment, layout: Layout, parcel: Parcel) -> dict[str, Any]:
    """Opens an encrypted sum."""
    cover = _cover(job, layout)
    assert isinstance(cover, Key)  # of that step
    answer = cover.opened(layout, parcel.model)
    manifest = assignment.answer_manifest(parcel.model.manifest)
    return _write_update(answer, manifest, Path(job["out"])) | {"rows": 0, "has_state": False}


def _allowed(policy: Policy, trainer: Trainer, assignment: Assignment, parcel: Parcel, answer: Answer) -> Answer:
    """The answer as it may leave; raises `Refused`."""
    work = assignment.work
    gate = work.gate if isinstance(work, Fit) else None
    if isinstance(answer, Update) and policy.max_update_norm is not None:
        base = parcel.model if gate is None else gate.base(parcel.model, parcel.extra, answer.extra)
        change = answer.weights - base if assignment.returns == "weights" else answer.weights
        refuse([policy.objection_to_norm(change.norm())])
    if isinstance(answer, MetricSums) and isinstance(work, Evaluate):
        return dataclasses.replace(answer, released=_shows(policy, trainer, assignment.client, work))
    if isinstance(answer, Update) and gate is not None and gate.max_drop is not None:
        hidden = policy.objection_to_metrics([gate.scored]) is not None
        if hidden or not _shows(policy, trainer, assignment.client, Evaluate()):
            return dataclasses.replace(answer, extra=Verdict.without_scores(answer.extra))
    return answer


def _shows(policy: Policy, trainer: Trainer, client: str, work: Evaluate) -> bool:
    """Whether this site's own scores on those rows may be shown."""
    return policy.metrics_per_client and policy.releases(trainer.smallest_class(client, work))


def _written(assignment: Assignment, answer: Answer, manifest: Manifest, out: Path) -> dict[str, Any]:
    """Writes an update's bytes to `out`; the facts about the answer."""
    if isinstance(answer, Update):
        return _write_update(answer, manifest, out)
    assert not isinstance(answer, Reply)  # which is made where the roster key is
    kind = "metrics" if isinstance(answer, MetricSums) else "integers" if answer.vector.dtype == np.int64 else "reals"
    facts = {"kind": kind, "sums": answer.vector.tolist(), "examples": answer.examples, "run": assignment.run}
    return facts | ({"released": answer.released} if isinstance(answer, MetricSums) else {})


def _write_update(answer: Update, manifest: Manifest, out: Path) -> dict[str, Any]:
    total, size = payload_digest(manifest.digest), 0
    with open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb", buffering=0) as file:
        for vector in (answer.weights.vector, *(answer.extra[name] for name in sorted(answer.extra))):
            view = np.ascontiguousarray(vector, dtype="<f4").view(np.uint8).data
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                file.write(chunk)
                total.update(chunk)
            size += len(view)
        file.truncate(size)
    extras = {name: int(answer.extra[name].size) for name in sorted(answer.extra)}
    facts = {"manifest": manifest.digest, "payload_bytes": size, "digest": total.hexdigest(), "extras": extras}
    return facts | {"examples": answer.examples, "loss": answer.loss}


def _keep_state(before: ClientState, after: ClientState, out: Path) -> bool:
    """Writes the state that the work leaves, where it is another than before."""
    packed = pack(after)
    if not after or packed == pack(before):
        return False
    out.write_bytes(packed)
    return True
