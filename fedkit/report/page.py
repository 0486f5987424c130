"""The page of a run: one HTML file that fetches nothing, and is whole without its script."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from fedkit import codec
from fedkit.errors import StorageError
from fedkit.report.elements import Markup, join, tag
from fedkit.report.facts import Facts, Handed
from fedkit.report.sections import sections
from fedkit.status import RunStatus

__all__ = ["index", "page", "policy", "write"]

_REFRESH_S = 3


def page(run: Facts, bundle: Handed | None = None, *, live: bool = False) -> str:
    """The page as HTML. A `live` one asks its own address for news while the run goes on, and for nothing else."""
    found = list(sections(run, bundle))
    links = (tag("li", tag("a", head, href=f"#{name}")) for name, head, _ in found)
    goes_on = live and not run.is_over
    progress = _progress(run)
    main = tag(
        "main",
        tag("p", progress, class_="state"),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        *(
            tag("section", tag("h2", head, id=f"{name}-head"), *inside, id=name, aria_labelledby=f"{name}-head")
            for name, head, inside in found
        ),
        id="main",
        tabindex=-1,
        data_live="yes" if goes_on else None,
    )
    back = tag("a", "All runs", href="/runs") if live else None
    said = f"Task {run.task}, {run.strategy.get('name', 'strategy not known')}, seed {run.seed}"
    return _document(f"Run {run.name}", [tag("p", said), back], main, live=live, refresh=goes_on)


def index(runs: Iterable[RunStatus]) -> str:
    """The list of a coordinator's runs, each with the way to its page."""
    lines = [
        tag("li", tag("a", one.name, href=f"/runs/{one.name}"), f": {one.task}, {one.strategy}, {_status(one)}")
        for one in runs
    ]
    inside = tag("ul", *lines, class_="runs") if lines else tag("p", "No run was begun yet.")
    return _document("Runs", [], tag("main", inside, id="main", tabindex=-1), live=True, refresh=False)


def write(path: Path, run: Facts, bundle: Handed | None = None) -> Path:
    """Writes the page to a file, whole; raises `StorageError`."""
    try:
        codec.write_atomically(path, page(run, bundle).encode())
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; it must be possible to write there") from None
    return path


def policy(*, live: bool = False) -> str:
    """The Content-Security-Policy: the page's own style and script, known by their digests, and nothing from outside.

    A `live` page may ask the address that it came from.
    """
    own = f"style-src '{_digest('page.css')}'; script-src '{_digest('page.js')}'"
    return f"default-src 'none'; {own}; connect-src {_asked(live)}; img-src data:; base-uri 'none'; form-action 'none'"


def _asked(live: bool) -> str:
    return "'self'" if live else "'none'"


def _status(one: RunStatus) -> str:
    return f"{one.state}, round {one.round} of {one.rounds}" if one.rounds else f"{one.state}, round {one.round}"


def _progress(run: Facts) -> str:
    last = run.history[-1].round if run.history else 0
    planned = "" if run.planned is None else f" of {run.planned}"
    why = f": {run.detail}" if run.detail else ""
    return f"{run.state.capitalize()}, round {last}{planned}{why}."


def _document(title: str, about: Iterable[Markup | None], main: Markup, *, live: bool, refresh: bool) -> str:
    again = tag("noscript", tag("meta", http_equiv="refresh", content=str(_REFRESH_S))) if refresh else None
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy(live=live)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        again,
        tag("title", f"{title} \N{MIDDLE DOT} fedkit"),
        tag("style", Markup(_asset("page.css"))),
    )
    button = tag("button", "Dark", type="button", id="theme", aria_pressed="false", hidden=True)
    top = tag("header", tag("div", tag("h1", title), *about), button)
    skip = tag("a", "Skip to the contents", href="#main", class_="skip")
    news = tag("p", role="status", id="news", class_="unseen")
    body = tag("body", skip, top, news, main, tag("script", Markup(_asset("page.js"))))
    return f"<!DOCTYPE html>\n{tag('html', join([head, body]), lang='en')}\n"


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("fedkit.report") / name).read_text(encoding="utf-8")


@functools.cache
def _digest(name: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(_asset(name).encode()).digest()).decode()}"
