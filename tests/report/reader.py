"""A page as a browser would take it: every element closed in order, its texts and attributes at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(one if isinstance(one, str) else one.text for one in self.children)

    def all(self, *names: str) -> list[Element]:
        inside = [one for one in self.children if isinstance(one, Element)]
        found = [self] if not names or self.name in names else []
        return found + [below for one in inside for below in one.all(*names)]

    def one(self, name: str, **attributes: str) -> Element:
        return next(e for e in self.all(name) if all(e.attributes.get(k) == v for k, v in attributes.items()))

    def rows(self) -> list[list[str]]:
        return [[cell.text for cell in row.all("th", "td")] for row in self.all("tr")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("document", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        one = Element(tag, dict(attrs))
        self.open[-1].children.append(one)
        if tag not in _VOID:
            self.open.append(one)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> ends <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parsed(html: str) -> Element:
    """The page; fails where an element is not closed in its place, or an id is there twice."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    [page] = reader.open
    ids = [one.attributes["id"] for one in page.all() if "id" in one.attributes]
    assert len(set(ids)) == len(ids), "an id is there twice"
    return page
