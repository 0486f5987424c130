"""Who is here: the sessions of attending agents, who is away for a moment, and who has left."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog

from fedkit.errors import Reason, Refused
from fedkit.protos import agents_pb2 as pb
from fedkit.protos.wire import Laden
from fedkit.server.errands import Errand
from fedkit.trust.roster import Chain
from fedkit.trust.vouchers import Voucher
from fedkit.work import Answer

__all__ = ["Attendance", "Away", "Session"]

log = structlog.get_logger("fedkit.server")

_MODELS = 2  # that an agent keeps, at least
_MANIFESTS = 32
_NEWS_S = 0.02  # for which news of results waits for an assignment to travel with
_MOST_UNREAD = 512  # messages that wait for an agent which does not read them


class Away(Exception):
    """The session ended before the answer came; the client may be back in a moment."""


@dataclass(eq=False)
class Session:
    """One attending agent, from its welcome to its end. It is sent everything through one queue of limited length."""

    name: str
    instance: bytes
    tasks: frozenset[str]
    max_examples: int
    min_cohort: int = 1  # so many vouchers it wants to see with each assignment
    voucher: Voucher | None = None  # its own, where a member of the roster has signed it
    token: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    heard: float = field(default_factory=time.monotonic)
    since: float = field(default_factory=time.monotonic)
    errands: dict[str, Errand] = field(default_factory=dict)
    outgoing: asyncio.Queue[Laden | None] = field(default_factory=asyncio.Queue)
    ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    left: bool = False
    _models: deque[bytes] = field(default_factory=lambda: deque(maxlen=_MODELS))  # those it was sent last
    _manifests: deque[bytes] = field(default_factory=lambda: deque(maxlen=_MANIFESTS))
    _news: pb.Settlement | None = None

    async def ask(self, errand: Errand) -> Answer:
        """The client's answer. Raises `Refused`, or `Away` where the session ends before."""
        self.errands[errand.assignment.id] = errand
        self._assign(errand)
        try:
            either: set[asyncio.Future[Any]] = {errand.answer, self.ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.send(pb.ToAgent(cancel=pb.Cancel(assignment_id=errand.assignment.id)))
            raise
        finally:
            self.errands.pop(errand.assignment.id, None)
        if not errand.answer.done():
            raise Away
        outcome = errand.answer.result()
        if isinstance(outcome, Refused):
            raise Refused(outcome.reason, outcome.detail)  # a new one, or the traceback would keep the errand alive
        return outcome

    def _assign(self, errand: Errand) -> None:
        """Queues the assignment. It takes waiting news along, and a small model that the agent does not have."""
        message, payload = pb.ToAgent(assignment=errand.message), errand.published.whole
        digest, manifest = errand.message.model_digest, errand.message.manifest_digest
        if self._news is not None:
            message.assignment.settlement.CopyFrom(self._news)
            self._news = None
        if digest in self._models or errand.sendings:  # a line that broke under it may be too slow for it in one piece
            payload = b""
        elif payload:
            self._models.append(digest)
            if manifest not in self._manifests:
                self._manifests.append(manifest)
                message.assignment.manifest = errand.published.parcel.model.manifest.to_json()
        errand.sendings += 1
        self.send(message, payload)

    def send(self, message: pb.ToAgent, payload: memoryview | bytes = b"") -> None:
        """Queues a message; where too many wait already, the session ends, and they with it."""
        if self.ended.done():
            return
        if self.outgoing.qsize() < _MOST_UNREAD:
            self.outgoing.put_nowait(Laden(message, payload))
            return
        log.warning("client does not read", client=self.name)
        while not self.outgoing.empty():
            self.outgoing.get_nowait()
        self.end()

    def tell(self, settlement: pb.Settlement) -> None:
        """Queues news of results, with the next assignment if that comes at once."""
        if self._news is None:
            self._news = pb.Settlement()
            asyncio.get_running_loop().call_later(_NEWS_S, self._tell_now)
        self._news.MergeFrom(settlement)

    def _tell_now(self) -> None:
        if self._news is not None:
            news, self._news = self._news, None
            self.send(pb.ToAgent(settlement=news))

    def end(self, last: pb.ToAgent | None = None) -> None:
        """Sends `last`, then nothing any more."""
        if not self.ended.done():
            self.ended.set_result(None)
            if last is not None:
                self.outgoing.put_nowait(Laden(last))
            self.outgoing.put_nowait(None)


class Attendance:
    """The sessions by client name. A client that went away counts as missing for `rejoin_s`, then as lost."""

    def __init__(self, rejoin_s: float, roster: Chain | None = None) -> None:
        self.rejoin_s = rejoin_s
        self.roster = None if roster is None else roster.last
        self.roster_text = "" if roster is None else roster.to_json()
        self.sessions: dict[str, Session] = {}
        self.away: dict[str, tuple[float, frozenset[str]]] = {}  # since when, and the tasks
        self.left: set[str] = set()
        self.refusals: dict[str, str] = {}  # the last one of each client, in words
        self.over: dict[str, tuple[str, Reason]] = {}  # assignments of open rounds: whose, and why no answer is taken
        self._tokens: dict[bytes, Session] = {}
        self._waiting: defaultdict[str, list[asyncio.Future[None]]] = defaultdict(list)
        self._changed: asyncio.Future[None] | None = None

    def expect(self, name: str, tasks: frozenset[str]) -> None:
        """A client that was here before the coordinator began again may be back in a moment."""
        self.away[name] = (time.monotonic(), tasks)

    def arrive(self, session: Session) -> Session | None:
        """A client attends; the session it had before, if any, ends and is returned."""
        before = self.sessions.get(session.name)
        if before is not None:
            self.depart(before)
        self.sessions[session.name] = self._tokens[session.token] = session
        self.away.pop(session.name, None)
        self.left.discard(session.name)
        for waiter in self._waiting.pop(session.name, []):
            _wake(waiter)
        self._change()
        return before

    def depart(self, session: Session) -> bool:
        """A session is over; whether it was the client's present one."""
        self._tokens.pop(session.token, None)
        session.end()
        if self.sessions.get(session.name) is not session:
            return False
        del self.sessions[session.name]
        if session.left:
            self.left.add(session.name)
            for waiter in self._waiting.pop(session.name, []):
                _wake(waiter)
        else:
            self.away[session.name] = (time.monotonic(), session.tasks)
        self._change()
        return True

    def holder(self, token: bytes) -> Session | None:
        """The session a token was given to."""
        return self._tokens.get(token)

    def take_voucher(self, session: Session, voucher: Voucher) -> bool:
        """Keeps a session's own voucher to show to others; False for one that is not its own, or does not hold."""
        if self.roster is None:
            return True  # nobody here can tell, and nobody asks
        if voucher.name != session.name or not voucher.holds(self.roster):
            return False
        session.voucher = voucher
        return True

    def vouchers(self, client: str, cohort: Iterable[str]) -> list[Voucher]:
        """Of those who are asked together, as many as the client wants to see: its own word it does not need."""
        session = self.sessions.get(client)
        if session is None or self.roster is None or session.min_cohort <= 1:
            return []
        found = (self.sessions[name].voucher for name in cohort if name in self.sessions and name != client)
        return list(itertools.islice((voucher for voucher in found if voucher is not None), session.min_cohort - 1))

    def why_over(self, key: str, session: Session) -> Reason:
        """Why an answer to this assignment, of which nothing is settled, is not taken from this session."""
        client, reason = self.over.get(key, ("", Reason.UNKNOWN))
        return reason if client == session.name else Reason.UNKNOWN

    def states(self) -> list[str]:
        """One word for each client: ready, working, away, left."""
        here = ["working" if session.errands else "ready" for session in self.sessions.values()]
        return [*here, *["away"] * len(self.away), *["left"] * len(self.left)]

    def present(self, task: str) -> list[str]:
        """The names of those here who know `task`."""
        return sorted(name for name, session in self.sessions.items() if task in session.tasks)

    def missing(self, task: str) -> dict[str, float]:
        """Who went away less than `rejoin_s` ago, with the seconds left to come back."""
        now = time.monotonic()
        left = {name: since + self.rejoin_s - now for name, (since, tasks) in self.away.items() if task in tasks}
        return {name: seconds for name, seconds in left.items() if seconds > 0}

    async def session(self, name: str) -> Session:
        """The client's session, waiting a moment for one that is away; raises `Refused`."""
        while name not in self.sessions:
            since, _ = self.away.get(name, (-math.inf, frozenset()))
            seconds = since + self.rejoin_s - time.monotonic()
            if seconds <= 0:
                raise Refused(Reason.LOST, f"{name} went away and did not come back within {self.rejoin_s:g} s")
            with self._waiter(name) as waiter:
                await asyncio.wait({waiter}, timeout=seconds)
        return self.sessions[name]

    @contextlib.contextmanager
    def _waiter(self, name: str) -> Iterator[asyncio.Future[None]]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[name].append(waiter)
        try:
            yield waiter
        finally:
            if waiter in self._waiting.get(name, []):
                self._waiting[name].remove(waiter)

    async def change(self, timeout_s: float | None) -> None:
        """Returns when somebody has come or gone, or after `timeout_s`."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.wait({self._changed}, timeout=timeout_s)

    def _change(self) -> None:
        if self._changed is not None:
            _wake(self._changed)
            self._changed = None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
