"""HTML that cannot be broken out of: text is escaped when it is put into an element, and what is an element knows it.

Names of clients and reasons for refusals come from elsewhere. They are text, whatever they hold.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

__all__ = ["Child", "Markup", "cut", "details", "facts", "join", "region", "table", "tag", "text"]

_NONE = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 400  # characters of one text from elsewhere


class Markup(str):
    """HTML that is finished: it is not escaped again."""

    __slots__ = ()


Child: TypeAlias = Markup | str | None


def text(value: object) -> Markup:
    """`value` as text. Characters that are not printed, or turn the direction of writing, become one that says so."""
    plain = "".join(one if one.isprintable() or one == "\n" else _NONE for one in str(value))
    return Markup(html.escape(plain))


def cut(value: object) -> str:
    """The beginning of a text from elsewhere, which may be long."""
    found = str(value)
    return found if len(found) <= _LONGEST else f"{found[:_LONGEST]}\N{HORIZONTAL ELLIPSIS}"


def join(children: Iterable[Child]) -> Markup:
    """Several children, one after the other."""
    return Markup("".join(one if isinstance(one, Markup) else text(one) for one in children if one is not None))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element. Of attributes, `class_` is class and `aria_label` aria-label; True stands alone, None is left out."""
    opened = "".join(itertools.starmap(_attribute, attributes.items()))
    if name in ("meta", "col"):
        return Markup(f"<{name}{opened}>")
    return Markup(f"<{name}{opened}>{join(children)}</{name}>")


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    written = name.rstrip("_").replace("_", "-")
    return f" {written}" if value is True else f' {written}="{text(value)}"'


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Child]], *, numbers: bool = True) -> Markup:
    """A table whose first column names its rows; the others hold `numbers`, or text."""
    top = tag("tr", *(tag("th", head, scope="col") for head in heads))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    inside = tag("caption", caption), tag("thead", top), tag("tbody", *body)
    return region(caption, tag("table", *inside, class_="numbers" if numbers else None))


def region(label: str, *children: Child) -> Markup:
    """What may be wider than the window: it scrolls by itself, with the arrow keys too."""
    return tag("div", *children, class_="wide", role="region", aria_label=label, tabindex=0)


def details(name: str, summary: str, *children: Child) -> Markup:
    """What is shown when it is asked for; `name` tells it from the others of the page."""
    return tag("details", tag("summary", summary), *children, id=name)


def facts(pairs: Iterable[tuple[str, Child]], *, tiles: bool = False) -> Markup:
    """Names and what they are."""
    inside = (tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs)
    return tag("dl", *inside, class_="tiles" if tiles else None)
