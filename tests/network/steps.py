"""Named steps at which a coordinator or an agent can be made to die, as under kill -9, and copies of its updates."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedkit.aggregation
import fedkit.client.line
import fedkit.client.trainers
import fedkit.server.agents
from fedkit.client.agent import Agent
from fedkit.client.line import Line
from fedkit.client.outbox import Outbox, Stored
from fedkit.history import History
from fedkit.privacy.ledger import Ledger
from fedkit.server.agents import AgentService
from fedkit.server.attendance import Session
from fedkit.server.errands import Published
from fedkit.server.journal import SqliteJournal
from fedkit.server.transport import RunTransport
from fedkit.spool import Intake

__all__ = ["ARCHIVE", "ENCRYPTING", "MASKING", "SEALING", "SPENDING", "STEPS", "Said", "Step", "archive_updates"]

ARCHIVE = "FEDKIT_TEST_ARCHIVE"
_BLOB = re.compile(r".*/models/[0-9a-f]{64}")


@dataclass(frozen=True)
class Step:
    """Just before or after the `at`-th call of `owner.name` for which `when` holds."""

    owner: Any
    name: str
    is_after: bool = False
    at: int = 1
    when: Callable[..., bool] = lambda *_, **__: True

    def arm(self) -> None:
        """From now on this process dies there; fails where there is no such function any more."""
        original, seen = getattr(self.owner, self.name), 0

        def pass_by(*given: Any, is_after: bool, **more: Any) -> None:
            nonlocal seen
            if is_after == self.is_after and self.when(*given, **more):
                seen += 1
                if seen == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)

        @functools.wraps(original)
        def call(*given: Any, **more: Any) -> Any:
            pass_by(*given, is_after=False, **more)
            found = original(*given, **more)
            pass_by(*given, is_after=True, **more)
            return found

        @functools.wraps(original)
        async def wait(*given: Any, **more: Any) -> Any:
            pass_by(*given, is_after=False, **more)
            found = await original(*given, **more)
            pass_by(*given, is_after=True, **more)
            return found

        setattr(self.owner, self.name, wait if inspect.iscoroutinefunction(original) else call)


@dataclass(frozen=True)
class Said:
    """Just after a coordinator has acknowledged an upload."""

    def arm(self) -> None:
        """From now on this process dies there."""
        upload = AgentService.upload

        async def call(service: AgentService, requests: Any, context: Any) -> None:
            await upload(service, requests, _Killing(context))

        AgentService.upload = call  # type: ignore[method-assign]


class _Killing:
    """A call's context; whoever writes the acknowledgement to it dies."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        await self._context.write(message)
        if message is fedkit.server.agents._TAKEN:
            os.kill(os.getpid(), signal.SIGKILL)


def _is_model(_: Any, target: Any, **__: Any) -> bool:
    return bool(_BLOB.fullmatch(str(target)))


def _is_news(_: Any, accepted: Any, dropped: Any) -> bool:
    return bool(accepted)


# The name begins with the process that dies. Round 0, which publishes the first model, is passed over: `at=2`.
STEPS: dict[str, Step | Said] = {
    "server: after a round has begun": Step(SqliteJournal, "begin", is_after=True, at=2),
    "server: after the offer": Step(AgentService, "_next", when=lambda _, session: bool(session.errands)),
    "server: mid-download": Step(Published, "_frame", at=2),
    "server: mid-chunk of an upload": Step(Intake, "_note", is_after=True, at=2),
    "server: before the acknowledgement": Step(AgentService, "_receive", is_after=True),
    "server: after the acknowledgement": Said(),
    "server: before a fact is noted": Step(SqliteJournal, "note"),
    "server: after a fact is noted": Step(SqliteJournal, "note", is_after=True),
    "server: mid-fold": Step(fedkit.aggregation._Sum, "_mean_piece", is_after=True, at=2),
    "server: before the model's rename": Step(os, "replace", at=2, when=_is_model),
    "server: after the model's rename": Step(os, "replace", is_after=True, at=2, when=_is_model),
    "server: before the commit": Step(SqliteJournal, "_write_commit", is_after=True, at=2),
    "server: after the commit": Step(SqliteJournal, "_stands", at=2),
    "server: before the line of history": Step(History, "append", at=2),
    "server: after the line of history": Step(History, "append", is_after=True, at=2),
    "server: before the news": Step(RunTransport, "committed", when=_is_news),
    "server: after the news for one": Step(Session, "tell", is_after=True),
    "ada: after the offer": Step(Agent, "_take", is_after=True),
    "ada: mid-download": Step(Intake, "_note", is_after=True, at=2),
    "ada: in training": Step(fedkit.client.trainers._Worker, "send", is_after=True),
    "ada: before a result is stored": Step(Outbox, "put"),
    "ada: after a result is stored": Step(Outbox, "put", is_after=True),
    "ada: mid-chunk of an upload": Step(fedkit.client.line, "frame", at=2),
    "ada: after the acknowledgement": Step(Line, "deliver", is_after=True),
    "ada: before the news is written down": Step(Outbox, "settle", when=_is_news),
    "ada: after the news is written down": Step(Outbox, "settle", is_after=True, when=_is_news),
}


# Where privacy is spent: reserve, train, store, send, commit.
SPENDING: dict[str, Step | Said] = {
    "ada: before the reservation": Step(Ledger, "reserve", at=2),
    "ada: after the reservation": Step(Ledger, "reserve", is_after=True, at=2),
    "ada: in private training": Step(fedkit.client.trainers._Worker, "send", is_after=True, at=4),
    "ada: before a noised result is stored": Step(Outbox, "put", at=2),
    "ada: after a noised result is stored": Step(Outbox, "put", is_after=True, at=2),
    "ada: before the reservation is closed": Step(Ledger, "close_reservation", at=2),
    "ada: after the reservation is closed": Step(Ledger, "close_reservation", is_after=True, at=2),
    "ada: before a noised result is sent": Step(Line, "post", at=2),
    "ada: after a noised result is sent": Step(Line, "post", is_after=True, at=2),
    "ada: before the commit is written down": Step(Outbox, "settle", when=_is_news),
    "ada: after the commit is written down": Step(Outbox, "settle", is_after=True, when=_is_news),
    "server: after noised results are there": Step(SqliteJournal, "note", at=2),
    "server: before the commit of noised results": Step(SqliteJournal, "_write_commit", is_after=True, at=2),
    "server: after the commit of noised results": Step(SqliteJournal, "_stands", at=2),
}


# In a masked sum, behind those of round 0: stored and noted once for each of the five steps.
MASKING: dict[str, Step | Said] = {
    f"{who}: {when} step {number} is {done}": Step(owner, name, is_after=when == "after", at=5 + number)
    for who, owner, name, done, moments in (
        ("ada", Outbox, "put", "stored", ("before", "after")),
        ("server", SqliteJournal, "note", "noted", ("after",)),
    )
    for when in moments
    for number in range(1, 6)
}


# In an encrypted sum, behind those of round 0: cyd makes the key of round 1 and is one of those who open the sum.
ENCRYPTING: dict[str, Step | Said] = {
    f"{who}: {when} step {number} of an encrypted sum is {done}": Step(
        owner, name, is_after=when == "after", at=before + number
    )
    for who, owner, name, done, before, moments, numbers in (
        ("cyd", Outbox, "put", "stored", 5, ("before", "after"), (2, 4, 6)),
        ("server", SqliteJournal, "note", "noted", 6, ("after",), (4,)),
    )
    for when in moments
    for number in numbers
}


# In a run of sealed hops: the box keys are the first thing that is asked, hops follow.
SEALING: dict[str, Step | Said] = {
    f"{who}: {when} {what} is {done}": Step(owner, name, is_after=when == "after", at=number)
    for who, owner, name, done, things in (
        ("ada", Outbox, "put", "stored", ("the box key", "the hop")),
        ("server", SqliteJournal, "note", "noted", ("the box keys", "the first hop", "the second hop")),
    )
    for when in ("before", "after")
    for number, what in enumerate(things, 1)
}


def archive_updates(folder: str | None) -> None:
    """Each update this process stores is copied to `folder` too, with what is known of it."""
    if folder is None:
        return
    put, place = Outbox.put, Path(folder)

    def kept(outbox: Outbox, stored: Stored, **given: bool) -> None:
        put(outbox, stored, **given)
        if stored.sums is None:
            shutil.copyfile(outbox.path(stored.id), place / f"{stored.id}.{os.getpid()}")
            facts = {"client": outbox.folder.parent.name, "examples": stored.examples}
            (place / f"{stored.id}.{os.getpid()}.json").write_text(json.dumps(facts))

    Outbox.put = kept  # type: ignore[method-assign]
