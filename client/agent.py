"""The agent: dials out, takes assignments, has them worked on, hands results in, and comes back after every break."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import math
import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import structlog

from fedkit import __version__
from fedkit.client.inbox import Inbox
from fedkit.client.line import Gone, Line, LineLost
from fedkit.client.outbox import Outbox, Stored
from fedkit.client.permits import Permits
from fedkit.client.roster import KnownRoster
from fedkit.client.settings import AgentSettings
from fedkit.client.trainers import Job, KeyJob, Trainers
from fedkit.codec import CHUNK_BYTES
from fedkit.crypto.encrypted import SecretKey
from fedkit.errors import PayloadError, Reason, Refused, RunError, StorageError, TrustError
from fedkit.logs import where
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import convert, identities_pb2
from fedkit.protos.channels import aio_channel, require_reachable
from fedkit.protos.failures import meant
from fedkit.protos.wire import CHANNEL_OPTIONS, PROTOCOL, Calls
from fedkit.rounds.assignment import Assignment
from fedkit.rounds.layout import Layout
from fedkit.rounds.sealing import Letters, answered_box
from fedkit.rounds.seat import Cover
from fedkit.trust.diagnosis import diagnose
from fedkit.trust.identity import Identity
from fedkit.weights import Manifest

__all__ = ["Agent", "TurnedAway"]

log = structlog.get_logger("fedkit.client")

_WELCOME_S = 10.0
_PAUSE_S = (0.1, 30.0)  # between two tries to connect: the shortest and the longest
_RETRY_S = 0.5
_LONGEST_S = 3600.0  # of one sleep
_RENEWAL_PAUSE_S = 600.0  # between two tries to renew a certificate, which has a third of its life left
_HINT_S = 60.0
_FINAL = (pb.Goodbye.PROTOCOL, pb.Goodbye.REPLACED, pb.Goodbye.MALFORMED)


class TurnedAway(RunError):
    """The coordinator does not want this agent back; the message says why."""


@dataclass(eq=False)
class _Errand:
    """One assignment being worked on or handed in."""

    message: pb.Assignment
    line: Line  # the connection over which it was asked for last
    payload: memoryview | bytes = b""  # of the model, where it came along
    task: asyncio.Task[None] | None = field(default=None)


class Agent:
    """One participant. `run` ends when `stop` is called, or raises `TurnedAway`."""

    def __init__(
        self,
        settings: AgentSettings,
        tasks: list[str],
        outbox: Outbox,
        inbox: Inbox,
        trainers: Trainers,
        roster: KnownRoster,
        permits: Permits,
    ) -> None:
        self._settings = settings
        self._tasks = tasks
        self._outbox = outbox
        self._inbox = inbox
        self._trainers = trainers
        self._roster = roster
        self._permits = permits
        self._instance = secrets.token_bytes(16)
        self._summing: set[str] = set()  # secure sums of which a step is being taken
        self._errands: dict[str, _Errand] = {}
        self._line: Line | None = None
        self._stopping = asyncio.Event()
        self._identity = None if settings.identity is None else Identity.load(settings.identity)
        require_reachable(settings.coordinator, self._identity)
        self._hinted = -math.inf

    # -- the connection ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Attends until told to stop; raises `TurnedAway`."""
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            while not stopped.done():
                attending = asyncio.create_task(self._come_back())
                await asyncio.wait({attending, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if stopped.done():
                    await self._leave(attending)
                else:
                    attending.result()
        finally:
            stopped.cancel()
            await self._drop([*self._errands])
            self._trainers.close()
            self._outbox.close()

    def stop(self) -> None:
        """Leaves: nobody waits for this client any more."""
        self._stopping.set()

    async def _leave(self, attending: asyncio.Task[None]) -> None:
        if self._line is not None:
            await self._line.leave()
            await asyncio.wait({attending}, timeout=2.0)
        attending.cancel()
        await asyncio.gather(attending, return_exceptions=True)

    async def _come_back(self) -> None:
        """One session, and before it as many tries as it takes, with pauses that grow with the break."""
        gone = time.monotonic()
        while True:
            try:
                if await self._attend():
                    await asyncio.sleep(random.uniform(0, _PAUSE_S[0]))  # noqa: S311
                    return
                why = "the coordinator closed the stream"
            except grpc.RpcError as error:
                why = _why(error)
            except (TimeoutError, grpc.aio.UsageError):
                why = "silence"
            shortest, longest = _PAUSE_S
            pause = min(max(shortest, 0.25 * (time.monotonic() - gone)), longest) * random.uniform(0.5, 1.0)  # noqa: S311
            log.info("not connected", coordinator=self._settings.coordinator, why=why, again_in_s=round(pause, 1))
            await self._hint()
            await asyncio.sleep(pause)

    async def _hint(self) -> None:
        """Says now and then what a person can do, where that can be found out."""
        if time.monotonic() - self._hinted >= _HINT_S:
            self._hinted = time.monotonic()
            hint = await asyncio.to_thread(diagnose, self._settings.coordinator, self._identity)
            if hint:
                log.warning("cannot connect", coordinator=self._settings.coordinator, hint=hint)

    async def _attend(self) -> bool:
        """One session; whether there was a welcome."""
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]  # each try dials anew
        async with aio_channel(self._settings.coordinator, self._identity, options) as channel:
            line = Line(channel, self._hello(), self._heartbeat)
            listening = asyncio.create_task(self._listen(line))
            tasks = {listening, *self._renewing(channel)}
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if listening not in done:
                    await done.pop()  # raises what should not have happened
                    return True
                return listening.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                line.cancel()
                if self._line is line:
                    self._line = None
                    log.info("disconnected", client=self._settings.name)

    def _renewing(self, channel: grpc.aio.Channel) -> list[asyncio.Task[None]]:
        """What ends when there is a fresh certificate; none without TLS."""
        if self._identity is None or self._settings.identity is None:
            return []
        return [asyncio.create_task(self._renew_in_time(channel, self._settings.identity, self._identity))]

    async def _renew_in_time(self, channel: grpc.aio.Channel, folder: Path, current: Identity) -> None:
        """Brings a fresh certificate when it is time: the next connection shows it."""
        calls = Calls(channel, identities_pb2.DESCRIPTOR.services_by_name["Identities"])
        while True:
            await asyncio.sleep(min(max(current.renew_at - time.time(), 0.0), _LONGEST_S))
            if time.time() < current.renew_at:
                continue
            try:
                made = await calls.renew(identities_pb2.RenewRequest(request=current.request()), timeout=_WELCOME_S)
                self._identity = current.renewed(made.certificate)
                self._identity.save(folder)
            except (grpc.RpcError, TrustError, StorageError) as error:
                why = meant(error, self._settings.coordinator) if isinstance(error, grpc.RpcError) else error
                log.error("certificate not renewed", client=self._settings.name, why=str(why))
                await asyncio.sleep(_RENEWAL_PAUSE_S)
            else:
                log.info("certificate renewed", client=self._settings.name)
                return

    def _hello(self) -> pb.Hello:
        voucher = self._roster.voucher(fresh=True)
        return pb.Hello(
            voucher=None if voucher is None else convert.voucher_to_proto(voucher),
            min_cohort=self._permits.policy.min_cohort,
            protocol=PROTOCOL,
            client=self._settings.name,
            instance=self._instance,
            software=f"fedkit {__version__}",
            tasks=self._tasks,
            max_examples=self._settings.max_examples,
            held=self._outbox.held(),
            running=list(self._errands),
        )

    def _heartbeat(self) -> pb.Heartbeat:
        voucher = self._roster.voucher()
        return pb.Heartbeat(voucher=None if voucher is None else convert.voucher_to_proto(voucher))

    async def _listen(self, line: Line) -> bool:
        try:
            async for message, payload in line.messages():
                self._hear(line, message, payload)
        except (grpc.RpcError, TimeoutError, grpc.aio.UsageError):
            if self._line is not line:
                raise
        return self._line is line

    def _hear(self, line: Line, message: pb.ToAgent, payload: memoryview | bytes) -> None:
        kind = message.WhichOneof("what")
        if kind == "welcome":
            self._hear_roster(message.welcome.roster)  # before the first heartbeat, which may carry a new voucher
            line.open(message.welcome)
            self._line = line
            self._settle(message.welcome.settlement)
            log.info("connected", client=self._settings.name, coordinator=self._settings.coordinator)
        elif kind == "assignment":
            self._take(line, message.assignment, payload)
        elif kind == "cancel":
            self._cancel(message.cancel.assignment_id)
        elif kind == "settlement":
            self._settle(message.settlement)
        elif kind == "refused":
            self._note_refused(message.refused)
        elif kind == "goodbye" and message.goodbye.reason in _FINAL:
            raise TurnedAway(
                f"{self._settings.coordinator} turned {self._settings.name} away: {message.goodbye.detail}"
            )

    def _hear_roster(self, text: str) -> None:
        try:
            if text and (news := self._roster.hear(text)) is not None:
                log.info("roster changed", client=self._settings.name, version=news.version)
        except (TrustError, StorageError) as error:
            log.error("roster refused", client=self._settings.name, why=str(error))

    # -- assignments ---------------------------------------------------------------------------------------------------

    def _take(self, line: Line, message: pb.Assignment, payload: memoryview | bytes) -> None:
        if message.HasField("settlement"):
            self._settle(message.settlement)
            message.ClearField("settlement")
        if message.id in self._errands:
            self._errands[message.id].line = line
            return
        about = _about(message, self._settings.name)
        log.debug("assignment", **about, work=message.WhichOneof("work"))
        errand = self._errands[message.id] = _Errand(message, line, payload)
        errand.task = asyncio.create_task(self._do(errand, about))
        errand.task.add_done_callback(lambda task: self._ended(task, errand, about))

    def _ended(self, task: asyncio.Task[None], errand: _Errand, about: dict[str, Any]) -> None:
        """What should not have happened, such as a full disk, costs this assignment and is on record."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("assignment failed", **about, error=type(error).__name__, where=where(error)[-3:])
            self._say_refused(errand, Refused(Reason.FAILED, type(error).__name__))

    async def _do(self, errand: _Errand, about: dict[str, Any]) -> None:
        key, fresh = errand.message.id, False
        try:
            if self._outbox.is_settled(key):
                raise Refused(Reason.DONE, "this assignment was done and its round is over")
            if self._outbox.find(key) is None:
                await self._work(errand)
                fresh = True
            await self._deliver(errand, fresh)
        except Refused as refused:
            log.warning("refused", **about, reason=refused.reason.value, detail=refused.detail)
            self._say_refused(errand, refused)
        except PayloadError as error:
            log.error("refused", **about, reason=Reason.PAYLOAD.value, detail=str(error))
            self._say_refused(errand, Refused(Reason.PAYLOAD, str(error)))
        except Gone:
            log.info("not wanted any more", **about)
        finally:
            self._errands.pop(key, None)

    async def _work(self, errand: _Errand) -> None:
        message = errand.message
        assignment = convert.assignment_from_proto(message, self._settings.name)
        await self._permits.admit(message, assignment)
        with self._alone(assignment):
            if assignment.returns == "reply":
                await self._reply(assignment)
            else:
                await self._work_out(errand, assignment)

    @contextlib.contextmanager
    def _alone(self, assignment: Assignment) -> Iterator[None]:
        """One step of a secure sum at a time; once it is stored, the seat refuses another one in its place.

        Two vectors under the same masks would tell their difference, and two lists of survivors both kinds of shares.
        """
        if assignment.masking is None:
            yield
            return
        call = assignment.masking.call
        if call in self._summing:
            raise Refused(Reason.MASKING, "another step of that sum is being taken")
        self._summing.add(call)
        try:
            yield
        finally:
            self._summing.discard(call)

    async def _work_out(self, errand: _Errand, assignment: Assignment) -> None:
        message = errand.message
        cover, seat = await self._cover(message, assignment)
        async with self._trainers.place() as perform:
            fetched = await self._fetch(errand) if message.model_bytes else None
            letters = await self._permits.letters(message, assignment, fetched)
            job, report = self._job(message, fetched, cover, letters), functools.partial(self._report, message.id)
            performing = perform(job, report, functools.partial(self._reserve, assignment, message.task))
            outcome = await self._permits.during(performing)
        is_noised = assignment.is_noised
        if "refused" in outcome:
            if is_noised:  # that may come of the noise, which is then not drawn again
                self._permits.ledger.close_reservation(message.id)
            self._log_failure(message, outcome)
            raise Refused(Reason(outcome["refused"]), outcome["detail"])
        if outcome["rows"] > self._settings.max_examples:
            text = f"{outcome['rows']} rows, but max_examples is {self._settings.max_examples}: raise it"
            raise Refused(Reason.EXAMPLES, text)
        facts = {name: outcome[name] for name in Stored.__slots__ if name in outcome}
        if assignment.private is not None and "manifest" in facts:
            facts |= {"loss": None, "epsilon": self._permits.cost(assignment, message.task)}
        stored = Stored(**(facts | {"id": message.id, "run": message.run}))
        self._outbox.put(stored, has_state=outcome["has_state"], durable=is_noised, seat=seat)
        if is_noised:
            counts = (outcome.get("clipped", 0), outcome.get("gradients", 0))
            self._permits.ledger.close_reservation(message.id, *counts, is_stored=True)
        asked = {"work": message.WhichOneof("work"), "model": message.model_digest.hex()}
        about = _about(message, self._settings.name)
        log.info("stored", **about, **asked, bytes=stored.payload_bytes, result=stored.digest)

    def _reserve(self, assignment: Assignment, task: str, facts: dict[str, Any]) -> dict[str, Any]:
        """Nothing where the ledger has it on disk, else why not."""
        try:
            self._permits.reserve(assignment, task, facts)
        except Refused as refused:
            return {"refused": refused.reason.value, "detail": refused.detail}
        except StorageError as error:  # the worker waits for an answer, and nothing may be spent without a record
            log.error("privacy not reserved", run=assignment.run, assignment=assignment.id, why=str(error))
            return {"refused": Reason.FAILED.value, "detail": type(error).__name__}
        return {}

    async def _reply(self, assignment: Assignment) -> None:
        """One step of a protocol in which nothing is worked out: its answer is stored with what it leaves."""
        masking = assignment.masking
        given: dict[str, Any] = {}
        if masking is None:
            reply = answered_box(assignment, self._permits.box())
        else:
            seat = self._permits.seat()
            secret = await self._made_key(assignment.id, masking.layout) if masking.step == "deliver" else None
            reply, left = await asyncio.to_thread(seat.reply, assignment, self._outbox.seat(masking.call), secret)
            given = {"seat": (masking.call, left), "vow": seat.vow(assignment, left)}
        text = base64.b64encode(reply.message).decode()
        stored = Stored(assignment.id, assignment.run, 0, sums=[text], kind="reply")
        self._outbox.put(stored, has_state=False, **given)

    async def _made_key(self, key: str, layout: Layout) -> SecretKey:
        """A key for an encrypted sum, made where native code may crash."""
        scheme = layout.encryption
        async with self._trainers.place() as perform:
            made = await perform(KeyJob(key, scheme), lambda *_: None, lambda _: {})
        if "refused" in made:
            raise Refused(Reason(made["refused"]), made["detail"])
        return SecretKey(scheme, base64.b64decode(made["key"]))

    async def _cover(
        self, message: pb.Assignment, assignment: Assignment
    ) -> tuple[Cover | None, tuple[str, bytes] | None]:
        """What goes on the answer, and what that leaves; neither where it is not for a secure sum."""
        masking = assignment.masking
        if masking is None:
            return None, None
        seat, before = self._permits.seat(), self._outbox.seat(masking.call)
        cover, left = await asyncio.to_thread(seat.cover, assignment, message.model_digest, before)
        if masking.step == "open":  # on record before it is done
            log.info("sum opened", client=self._settings.name, **seat.facts(assignment, left))
        return cover, (masking.call, left)

    def _job(
        self, message: pb.Assignment, fetched: tuple[Path, Manifest] | None, cover: Cover | None, letters: Letters
    ) -> Job:
        return Job(
            id=message.id,
            assignment=message.SerializeToString(),
            model=fetched,
            state=self._outbox.state(message.run),
            out=self._outbox.path(message.id),
            spare=self._outbox.spare,
            out_state=self._outbox.state_path(message.id),
            cover=cover,
            letters=letters,
        )

    def _log_failure(self, message: pb.Assignment, outcome: dict[str, Any]) -> None:
        if outcome.get("where"):
            log.error("task failed", run=message.run, error=outcome["detail"], where=outcome["where"])

    async def _fetch(self, errand: _Errand) -> tuple[Path, Manifest]:
        """The model; raises `PayloadError`, or `Gone` where nobody asks: what is here of it stays."""
        message, payload = errand.message, errand.payload
        errand.payload = b""
        if payload:
            self._inbox.keep(message, memoryview(payload))
            message.ClearField("manifest")
        while (found := self._inbox.find(message)) is None:
            line = errand.line
            if line is not self._line:
                raise Gone
            try:
                return await line.fetch(message, self._inbox)
            except (grpc.RpcError, LineLost):
                await self._pause(line)
        return found

    async def _pause(self, line: Line) -> None:
        """A moment, before the same connection is tried again."""
        if self._line is line:
            await asyncio.sleep(_RETRY_S)

    async def _deliver(self, errand: _Errand, fresh: bool) -> None:
        """Hands a stored result in, if it is asked for; otherwise it waits in the outbox."""
        key = errand.message.id
        stored = self._outbox.find(key)
        while stored is not None and (line := errand.line) is self._line:
            if stored.sums is not None:
                line.send(pb.FromAgent(sums=convert.sums_to_proto(key, stored.answer())))
                return
            if fresh and stored.payload_bytes <= CHUNK_BYTES:
                line.post(stored, self._outbox.path(key))
                return
            try:
                reply = await line.deliver(stored, self._outbox.path(key), at_once=fresh)
                if reply.WhichOneof("what") == "refused":
                    self._note_refused(reply.refused)
                return
            except (grpc.RpcError, LineLost, PayloadError):
                fresh = False
                await self._pause(line)

    def _note_refused(self, refusal: pb.Refusal) -> None:
        key = refusal.assignment_id
        run = stored.run if (stored := self._outbox.find(key)) is not None else ""
        log.warning("result refused", run=run, client=self._settings.name, assignment=key, reason=refusal.reason)

    def _say_refused(self, errand: _Errand, refused: Refused) -> None:
        errand.line.send(pb.FromAgent(refusal=convert.refusal_to_proto(errand.message.id, refused)))

    def _report(self, key: str, done: int, total: int) -> None:
        if self._line is not None:
            self._line.send(pb.FromAgent(progress=pb.Progress(assignment_id=key, done=done, total=total)))

    def _settle(self, settlement: pb.Settlement) -> None:
        self._outbox.settle(settlement.accepted, settlement.dropped)
        if settlement.accepted or settlement.dropped:
            news = {"accepted": list(settlement.accepted), "dropped": list(settlement.dropped)}
            log.info("settled", client=self._settings.name, **news)
        for key in settlement.dropped:
            self._cancel(key)

    def _cancel(self, key: str) -> None:
        errand = self._errands.get(key)
        if errand is not None and errand.task is not None:
            errand.task.cancel()

    async def _drop(self, keys: list[str]) -> None:
        tasks = [errand.task for key in keys if (errand := self._errands.get(key)) and errand.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _why(error: grpc.RpcError) -> str:
    if not isinstance(error, grpc.aio.AioRpcError):
        return "broken"
    found = meant(error, "")
    return str(found) if isinstance(found, TrustError) else error.code().name.lower()


def _about(message: pb.Assignment, client: str) -> dict[str, Any]:
    """What each event on an assignment names."""
    return {"run": message.run, "round": message.round, "client": client, "assignment": message.id}
