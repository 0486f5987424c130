"""The pages of runs for whoever operates the coordinator, in a browser.

They name clients and show their scores, so they need more than an address on loopback, where every account of the
machine may knock: a key, which is in a file of the coordinator's folder that no other account can read.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import hmac
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from fedkit.config import NAME
from fedkit.errors import FedkitError, NoSuchRun
from fedkit.report.facts import of_status
from fedkit.report.page import index, page, policy
from fedkit.rounds.journal import RoundRecord
from fedkit.status import RunStatus
from fedkit.trust.files import read_secret, write

__all__ = ["Pages", "Shelf", "Told", "page_key", "say_where"]

T = TypeVar("T")
_Reply: TypeAlias = tuple[HTTPStatus, str, list[tuple[str, str]]]

_FILE = "pages"
_USER = "fedkit"
_LINK = re.compile(rf"http://{_USER}:([A-Za-z0-9_-]{{32}})@\S+\n")
_ANSWER_S = 10.0
_KEPT = 8  # pages that are not made again as long as nothing happens
_ALWAYS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]


@dataclass(frozen=True, slots=True)
class Told:
    """What a coordinator has on record of a run; `known` are fields of `fedkit.report.facts.Facts`."""

    status: RunStatus
    history: Sequence[RoundRecord]
    known: Mapping[str, Any]

    @property
    def mark(self) -> tuple[object, ...]:
        """What is equal as long as nothing has happened."""
        return self.status, len(self.history), len(self.known["abandoned"])


class Shelf(Protocol):
    """What pages are made of: called on the coordinator's event loop."""

    def runs(self, name: str = "") -> list[RunStatus]:
        """All runs, the newest first, or the one of that name."""
        ...

    def told(self, name: str) -> Told:
        """All that is on record of one; raises `NoSuchRun`."""
        ...


def page_key(folder: Path) -> str:
    """The key of the coordinator with that folder, the same after a restart; raises `TrustError` where others read it.

    It is 192 bits of the operating system's randomness.
    """
    path = folder / _FILE
    if path.exists():
        found = _LINK.fullmatch(read_secret(path, "remove it").decode(errors="replace"))
        if found is not None:
            return found[1]
    return secrets.token_urlsafe(24)


def say_where(folder: Path, key: str, address: str) -> None:
    """Writes the whole link to the pages, key included, to the coordinator's folder."""
    write(folder / _FILE, f"http://{_USER}:{key}@{address}/runs\n".encode(), secret=True)


class Pages:
    """`/runs` and `/runs/NAME` as a WSGI application: called in threads, it asks `shelf` on its event `loop`."""

    def __init__(self, shelf: Shelf, key: str, loop: asyncio.AbstractEventLoop) -> None:
        self._shelf = shelf
        self._loop = loop
        self._allowed = b"Basic " + base64.b64encode(f"{_USER}:{key}".encode())
        self._making = threading.Lock()  # one page at a time: rounds come first
        self._made: dict[str, tuple[object, str]] = {}

    def beside(self, other: WSGIApplication) -> WSGIApplication:
        """An application in which `other` answers whatever is not a page."""

        def app(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            is_ours = path == "/runs" or path.startswith("/runs/")
            return self(environ, start) if is_ours else other(environ, start)

        return app

    def __call__(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        """One page, or why there is none."""
        status, text, headers = self._reply(environ)
        body = text.encode()
        length = ("Content-Length", str(len(body)))
        start(f"{status.value} {status.phrase}", [*headers, length, *_ALWAYS])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _reply(self, environ: WSGIEnvironment) -> _Reply:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _refused(HTTPStatus.METHOD_NOT_ALLOWED, "Pages are only read.", ("Allow", "GET, HEAD"))
        given = environ.get("HTTP_AUTHORIZATION", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, self._allowed):
            ask = ("WWW-Authenticate", 'Basic realm="fedkit runs", charset="UTF-8"')
            return _refused(HTTPStatus.UNAUTHORIZED, "The whole link is in the file pages of the server's folder.", ask)
        try:
            html = self._page(environ.get("PATH_INFO", "").removeprefix("/runs").removeprefix("/"))
        except NoSuchRun:
            return _refused(HTTPStatus.NOT_FOUND, "There is no such run.")
        except (FedkitError, TimeoutError, RuntimeError, concurrent.futures.CancelledError):
            return _refused(HTTPStatus.SERVICE_UNAVAILABLE, "The coordinator cannot say now; try again.")
        rules = f"{policy(live=True)}; frame-ancestors 'none'"
        return HTTPStatus.OK, html, [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", rules)]

    def _page(self, name: str) -> str:
        if not name:
            return index(self._ask(self._shelf.runs))
        if not NAME.fullmatch(name):
            raise NoSuchRun("there is no run of such a name")
        with self._making:
            told = self._ask(lambda: self._shelf.told(name))
            mark, html = self._made.get(name, (None, ""))
            if mark != told.mark:
                html = page(of_status(told.status, told.history, **told.known), live=True)
                if len(self._made) >= _KEPT:
                    self._made.clear()
                self._made[name] = told.mark, html
            return html

    def _ask(self, question: Callable[[], T]) -> T:
        """The answer of the event loop's thread, to which runs and their database belong."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def give() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(question())
                except FedkitError as error:
                    answer.set_exception(error)

        self._loop.call_soon_threadsafe(give)
        try:
            return answer.result(_ANSWER_S)
        finally:
            answer.cancel()


def _refused(status: HTTPStatus, text: str, *headers: tuple[str, str]) -> _Reply:
    return status, f"{text}\n", [("Content-Type", "text/plain; charset=utf-8"), *headers]
