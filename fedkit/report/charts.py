"""Charts as SVG inside a figure, each with its numbers in a table below it.

Colours are classes of the page's style, as a strict Content-Security-Policy lets no element have a style of its own.
What a colour says, a dash or a mark says too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedkit.report.elements import Markup, details, join, table, tag
from fedkit.report.scale import Axis, axis, is_drawn, number

__all__ = ["COLOURS", "MOST_NAMED", "Chart", "Row", "Series", "lines", "matrix"]

COLOURS = 8
MOST_NAMED = 8  # clients with a colour of their own; more are all drawn alike

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 36
_INNER = _WIDTH - _LEFT - _RIGHT
_DOTTED = 60  # points of a line, at most, that are marked one by one
_NAMES, _ROW = 150, 20  # pixels for a client's name, and for a row of the matrix
_LETTERS = 20


@dataclass(frozen=True, slots=True)
class Series:
    """One line: (round, value) in order. It passes over None, and is broken where a value is no number.

    `is_pooled`: of all clients together.
    """

    name: str
    points: Sequence[tuple[int, float | None]]
    is_pooled: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over rounds. `name` is the figure's in the page; `limit` is a level with its name; `form` writes values."""

    name: str
    caption: str
    series: Sequence[Series]
    form: Callable[[float | None], str] = number
    from_zero: bool = False
    limit: tuple[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One client in the matrix: by column, its share of the rounds it took part in, and whether one was refused."""

    client: str
    shares: Sequence[float]
    refused: Sequence[bool]


# -- lines -------------------------------------------------------------------------------------------------------------


def lines(chart: Chart) -> Markup:
    """A line chart over rounds, with a legend and a table of what is drawn."""
    across, up = _axes(chart)
    kinds = _kinds(chart.series)
    drawn = [_line(one, kind, across, up, chart) for one, kind in zip(chart.series, kinds, strict=True)]
    inside = (*_grid(across, up, chart), *(_limit(chart, up) if chart.limit else ()), *drawn)
    picture = _picture(_HEIGHT, _spoken(chart), inside)
    return tag(
        "figure", tag("figcaption", chart.caption), picture, _legend(chart, kinds), _numbers(chart), id=chart.name
    )


def _axes(chart: Chart) -> tuple[Axis, Axis]:
    rounds = [at for one in chart.series for at, _ in one.points]
    values = [value for one in chart.series for _, value in one.points if value is not None]
    level = [] if chart.limit is None else [chart.limit[1]]
    return axis(map(float, rounds)), axis([*values, *level], from_zero=chart.from_zero)


def _kinds(series: Sequence[Series]) -> list[str]:
    """The class of each line: those of single clients share one where they are many."""
    single = [one.name for one in series if not one.is_pooled]
    if len(single) > MOST_NAMED:
        return ["pooled" if one.is_pooled else "one" for one in series]
    return ["pooled" if one.is_pooled else f"s{single.index(one.name) % COLOURS}" for one in series]


def _x(across: Axis, round: float) -> float:
    return _LEFT + across.at(round, _INNER)


def _y(up: Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - up.at(value, _HEIGHT - _TOP - _BOTTOM)


def _grid(across: Axis, up: Axis, chart: Chart) -> Iterator[Markup]:
    for tick in up.ticks:
        y = f"{_y(up, tick):.1f}"
        yield tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid")
        yield tag("text", chart.form(tick), x=_LEFT - 8, y=y, class_="up")
    for tick in across.ticks:
        if tick == round(tick):
            yield tag("text", f"{tick:.0f}", x=f"{_x(across, tick):.1f}", y=_HEIGHT - _BOTTOM + 16, class_="across")
    yield tag("text", "round", x=_WIDTH - _RIGHT, y=_HEIGHT - 4, class_="end")


def _limit(chart: Chart, up: Axis) -> Iterator[Markup]:
    assert chart.limit is not None
    name, level = chart.limit
    y = _y(up, level)
    yield tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="limit")
    yield tag("text", f"{name} {chart.form(level)}", x=_WIDTH - _RIGHT, y=f"{y + 14:.1f}", class_="end")


def _line(one: Series, kind: str, across: Axis, up: Axis, chart: Chart) -> Markup:
    places = [
        (at, value, _x(across, at), _y(up, value)) if is_drawn(value) else None
        for at, value in one.points
        if value is not None
    ]
    steps = []
    for before, place in zip([None, *places], places, strict=False):
        if place is not None:
            steps.append(f"{'M' if before is None else 'L'}{place[2]:.1f} {place[3]:.1f}")
    path = tag("path", tag("title", one.name), d="".join(steps), class_=f"line {kind}")
    dots = [
        tag("circle", tag("title", f"round {at}, {one.name}: {chart.form(value)}"), cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.5)
        for at, value, x, y in (place for place in places if place is not None)
    ]
    return join([path, tag("g", *dots, class_=f"dots {kind}") if len(dots) <= _DOTTED and kind != "one" else None])


def _spoken(chart: Chart) -> str:
    """The chart in a sentence, for those who cannot see it."""
    said = []
    for one in [*(s for s in chart.series if s.is_pooled), *(s for s in chart.series if not s.is_pooled)][:MOST_NAMED]:
        values = [value for _, value in one.points if value is not None]
        if values:
            said.append(f"{one.name} from {chart.form(values[0])} to {chart.form(values[-1])}")
    level = [f"{chart.limit[0]} {chart.form(chart.limit[1])}"] if chart.limit else []
    return f"{chart.caption}: {'; '.join([*said, *level]) or 'no values'}. The table below has the numbers."


def _legend(chart: Chart, kinds: Sequence[str]) -> Markup | None:
    named = [(one.name, kind) for one, kind in zip(chart.series, kinds, strict=True) if kind != "one"]
    if "one" in kinds:
        named.append((f"{kinds.count('one')} single clients", "one"))
    if len(named) < 2:
        return None
    return tag("ul", *(tag("li", _swatch(kind), name) for name, kind in named), class_="legend")


def _swatch(kind: str) -> Markup:
    path = tag("path", d="M0 6H28", class_=f"line {kind}")
    return tag("svg", path, viewBox="0 0 28 12", width=28, height=12, aria_hidden="true")


def _numbers(chart: Chart) -> Markup:
    values = [dict(one.points) for one in chart.series]
    rounds = sorted({at for one in values for at in one})
    rows = ([str(at), *(chart.form(one.get(at)) for one in values)] for at in rounds)
    found = table(chart.caption, ["Round", *(one.name for one in chart.series)], rows)
    return details(f"{chart.name}-numbers", "Numbers of this chart", found)


def _picture(height: float, label: str, inside: Sequence[Markup]) -> Markup:
    box = f"0 0 {_WIDTH} {height:g}"
    return tag("svg", *inside, viewBox=box, role="img", aria_label=label, class_="chart")


# -- the matrix --------------------------------------------------------------------------------------------------------


def matrix(label: str, rows: Sequence[Row], columns: Sequence[str]) -> Markup:
    """Who took part in what: a filled cell for part in all rounds of a column, a lighter one for part in some.

    A cross is for a refusal. `columns` are the names of columns, of which as many are shown as there is room for.
    """
    width = (_WIDTH - _NAMES - _RIGHT) / max(len(columns), 1)
    shown = max(-(-len(columns) // 12), 1)
    heads = [
        tag("text", name, x=f"{_NAMES + (at + 0.5) * width:.1f}", y=14, class_="across")
        for at, name in enumerate(columns)
        if at % shown == 0
    ]
    body = [_cells(row, 22 + at * _ROW, width) for at, row in enumerate(rows)]
    return _picture(26 + len(rows) * _ROW, label, [*heads, *body])


def _cells(row: Row, top: float, width: float) -> Markup:
    short = row.client if len(row.client) <= _LETTERS else f"{row.client[: _LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
    name = tag("text", short, tag("title", row.client), x=_NAMES - 8, y=f"{top + _ROW / 2:.1f}", class_="up")
    gap = 1 if width > 4 else 0
    wide, high = f"{width - gap:.2f}", _ROW - 2
    drawn: dict[str, list[str]] = {}
    for at, share in enumerate(row.shares):
        step = f"M{_NAMES + at * width:.2f} {top}h{wide}v{high}h-{wide}z"
        drawn.setdefault(_level(share), []).append(step)
    cells = [tag("path", d="".join(steps), class_=level) for level, steps in sorted(drawn.items())]
    return join([name, *cells, _crosses(row, top, width)])


def _level(share: float) -> str:
    """Of five: none, up to a third, up to two thirds, most, all."""
    return f"part{0 if share <= 0 else 4 if share >= 1 else 1 + int(share * 3)}"


def _crosses(row: Row, top: float, width: float) -> Markup | None:
    half = min(width, _ROW) / 4
    steps = []
    for at, refused in enumerate(row.refused):
        if refused:
            x, y = _NAMES + (at + 0.5) * width - half, top + _ROW / 2 - 1 - half
            steps.append(
                f"M{x:.2f} {y:.2f}l{2 * half:.2f} {2 * half:.2f}m0 {-2 * half:.2f}l{-2 * half:.2f} {2 * half:.2f}"
            )
    return tag("path", d="".join(steps), class_="cross") if steps else None
