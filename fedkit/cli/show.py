"""Tables and bars: what people look at."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fedkit.client.prospect import Prospect
    from fedkit.demo.compare import Row
    from fedkit.deploy.acceptance import Verdict
    from fedkit.deploy.differences import Difference, Value
    from fedkit.deploy.passport import Passport, Scores
    from fedkit.deploy.registry import Change, Version
    from fedkit.privacy.report import Report, RunCost
    from fedkit.result import Result
    from fedkit.rounds.journal import RoundRecord
    from fedkit.status import ClientStatus, JobStatus, RunStatus

__all__ = [
    "LiveRounds",
    "audit",
    "busy",
    "changes",
    "clients",
    "comparison",
    "console",
    "differences",
    "errors",
    "gate",
    "hops",
    "print_json",
    "print_line",
    "privacy",
    "prospect",
    "rounds",
    "runs",
    "say",
    "stages",
    "test_scores",
    "verdicts",
    "verification",
    "version",
    "versions",
    "weights",
]

console = Console()
errors = Console(stderr=True)

_SHOWN = 18  # rounds a live table holds; longer runs show the evaluated ones


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))


def say(text: str) -> None:
    """A sentence for a person, as it is: nothing in it is coloured, or taken for markup or by the terminal."""
    console.print(_printable(text), highlight=False, markup=False)


def _printable(text: str) -> str:
    """What comes from elsewhere may hold characters that a terminal obeys, or that are none."""
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)


def print_line(text: str) -> None:
    """Text for another program, or for copying: as it is, on a line of its own."""
    print(text)


def busy(what: str, quiet: bool) -> contextlib.AbstractContextManager[Any]:
    """A spinner beside `what` until the block ends."""
    return contextlib.nullcontext() if quiet else console.status(what)


@contextlib.contextmanager
def stages(quiet: bool) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """One bar a stage: the function begins the next one, and returns what is told how far it is, and of how much."""
    bar = Progress(transient=True, console=console, disable=quiet or not console.is_terminal)

    def begin(what: str) -> Callable[[int, int], None]:
        for task in bar.tasks:
            bar.update(task.id, total=1, completed=1)
        this = bar.add_task(what, total=None)
        return lambda done, total: bar.update(this, completed=done, total=total or None)

    with bar:
        yield begin


class LiveRounds:
    """A table that grows with the rounds; long runs show about `_SHOWN` of them."""

    def __init__(self, live: Live, title: str, total: int) -> None:
        self._live = live
        self._title = title
        self._total = total
        self._records: list[RoundRecord] = []
        self._every = max(-(-total // _SHOWN), 1)

    def __call__(self, record: RoundRecord) -> None:
        """One more round is committed."""
        self._records.append(record)
        if record in self._seen():
            self._draw("")

    def say(self, text: str) -> None:
        """Shows what the run waits for, until the next round."""
        self._draw(text)

    def _seen(self) -> list[RoundRecord]:
        scored = [record for record in self._records if record.metrics]
        last = self._total
        return scored or [one for one in self._records if one.round % self._every == 0 or one.round == last]

    def _draw(self, caption: str) -> None:
        table = _table(self._title, self._seen()[-_SHOWN - 4 :], self._total)
        said = [Text(caption, style="yellow", no_wrap=True, overflow="ellipsis")] if caption else []
        self._live.update(Group(table, *said), refresh=True)


@contextlib.contextmanager
def rounds(title: str, total: int) -> Iterator[LiveRounds]:
    """A table that grows with the rounds."""
    with Live(_table(title, [], total), console=console, auto_refresh=False) as live:
        yield LiveRounds(live, title, total)
    if not console.is_terminal:
        console.print()  # a live table ends its last line only on a terminal


def _table(title: str, records: Sequence[RoundRecord], total: int) -> Table:
    names = [name for name in (records[-1].metrics if records else {}) if name != "loss"]
    metrics = names or sorted({name for record in records for name in record.metrics if name != "loss"})
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    notes = _notes(records)
    heads = ["round", "clients", "loss", "valid", *metrics, "s", "down", "up", *notes]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for record in records:
        scores = [_number(record.metrics.get(name)) for name in ("loss", *metrics)]
        counts = [f"{record.round}/{total}", str(len(record.clients)), _number(record.loss)]
        sizes = [f"{record.seconds:.2f}", _bytes(record.bytes_down), _bytes(record.bytes_up)]
        table.add_row(*counts, *scores, *sizes, *(note(record) for note in notes.values()))
    return table


def _notes(records: Sequence[RoundRecord]) -> dict[str, Callable[[RoundRecord], str]]:
    """Columns that only some runs need."""
    notes: dict[str, Callable[[RoundRecord], str]] = {}
    if any(record.epsilon for record in records):
        notes["epsilon"] = lambda record: _up(max(record.epsilon.values())) if record.epsilon else "-"
    if any(record.refusals for record in records):
        notes["refused"] = lambda record: str(len(record.refusals))
    if not all(record.stands for record in records):
        notes["stands"] = lambda record: "" if record.stands else "no"
    return notes


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f}{unit}" if unit == "B" else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError("unreachable")


def test_scores(result: Result) -> Table:
    """The final model on test data: pooled, and at each client."""
    names = list(result.test)
    table = Table(title="Test data, touched once", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("client")
    for name in names:
        table.add_column(name, justify="right")
    for client, scores in [*result.test_per_client.items(), ("all", result.test)]:
        table.add_row(client, *(_number(scores.get(name)) for name in names), style="bold" if client == "all" else "")
    return table


def comparison(rows: Sequence[Row]) -> Table:
    """Accuracy of each way to train, best in bold."""
    from fedkit.demo.heart import HOSPITALS

    best = max(row.accuracy for row in rows)
    table = Table(title="Accuracy on test rows", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("trained by")
    for head in ("all", *HOSPITALS):
        table.add_column(head, justify="right")
    for row in rows:
        each = [f"{row.per_hospital[hospital]:.3f}" for hospital in HOSPITALS]
        table.add_row(row.name, f"{row.accuracy:.3f}", *each, style="bold" if row.accuracy == best else "")
    return table


_STYLES = {
    "ready": "green",
    "working": "cyan",
    "away": "yellow",
    "left": "dim",
    "waiting": "yellow",
    "running": "cyan",
    "finished": "green",
    "failed": "red",
    "cancelled": "dim",
    "ok": "green",
    "not tried": "yellow",
    "candidate": "cyan",
    "canary": "yellow",
    "production": "bold green",
    "archived": "dim",
    "passed": "green",
    "shipped": "bold green",
    "refused": "yellow",
    "missed": "bold red",
    "not measured": "yellow",
}
_STYLED = {"state", "result", "stage", "from", "to", "outcome"}
_WHOLE = {*_STYLED, "run", "for", "round", "loss", "age", "model"}  # columns that keep their width
_CUT = {"task", "strategy"}  # columns that are cut where a line is too long; the others fold


def clients(found: Sequence[ClientStatus]) -> Table:
    """Everybody a coordinator knows, and what each one does."""
    refused = any(client.last_refusal for client in found)
    table = _plain("Clients", "client", "state", "for", "tasks", "works on", *(["last refusal"] if refused else []))
    for client in found:
        work = ", ".join(_job(job) for job in client.jobs) or "-"
        cells = [client.name, client.state, _lasting(client.since_s), ", ".join(client.tasks) or "-", work]
        _add(table, cells + ([client.last_refusal or "-"] if refused else []))
    return table


def _job(job: JobStatus) -> str:
    steps = f" {job.done}/{job.total}" if job.total else ""
    where = {0: "preparation", -1: "test"}.get(job.round, f"round {job.round}")
    return f"{job.run} {where} {job.work}{steps}"


def runs(found: Sequence[RunStatus], now: float) -> Table:
    """Runs, one a line; `now` is in seconds since 1970."""
    table = _plain("Runs", "run", "state", "round", "strategy", "loss", "age")
    for run in found:
        loss = None if run.last is None else run.last.metrics.get("loss", run.last.loss)
        age = _lasting(now - run.submitted_at)
        _add(table, [run.name, run.state, f"{run.round}/{run.rounds}", run.strategy, _number(loss), age])
    return table


def weights(found: Sequence[tuple[RunStatus, str]]) -> Table:
    """The models that can be had, one a line."""
    table = _plain("Weights", "run", "state", "task", "strategy", "model")
    for run, which in found:
        _add(table, [run.name, run.state, run.task, run.strategy, which])
    return table


def versions(found: Sequence[tuple[Version, Passport | None]]) -> Table:
    """Versions of models, one a line."""
    table = _plain("Models", "version", "stage", "added", "trained by", "scores")
    for one, passport in found:
        run, scores = ("?", "?") if passport is None else (passport.run.name, _scores(passport.test))
        _add(table, [str(one), one.stage, _day(one.added_at), run, scores])
    return table


def version(one: Version, passport: Passport) -> Table:
    """What is worth knowing of a version, one fact a line."""
    table = _plain(f"{one}, {one.stage}", "fact", "value")
    for fact, value in _facts(one, passport):
        _add(table, [fact, value])
    return table


def _facts(one: Version, passport: Passport) -> Iterator[tuple[str, str]]:
    run, exam, dp = passport.run, passport.examined, passport.privacy.dp
    yield "added", f"{_day(one.added_at)}, signed by {one.signer}"
    yield "run", f"{run.name}: {passport.task.name} by {run.strategy}, round {run.round} of {run.rounds} ({run.engine})"
    yield "clients", str(len(passport.clients))
    yield "scores", _scores(passport.test)
    yield "examined", "not in ONNX Runtime" if exam is None else f"{_scores(exam.pooled)} at {exam.sites} sites"
    shipped = passport.measured(passport.shipped)
    yield "shipped", passport.shipped + (f", {shipped.size_bytes:,} bytes: {shipped.why}" if shipped else "")
    costs = [client.epsilon for client in passport.clients if client.epsilon is not None]
    cost = f", epsilon {_up(max(costs))} at most" if costs else ""
    yield "privacy", passport.privacy.aggregation + (cost if dp else ", no differential privacy")


def _scores(scores: Scores) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in scores.items()) or "-"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def changes(found: Sequence[Change]) -> Table:
    """What became of a model's versions, oldest first, in UTC."""
    table = _plain("Changes", "version", "from", "to", "when", "who", "why")
    for one in found:
        event = one.event
        cells = [str(event.get(name) or "-") for name in ("from", "to")]
        when, who = _day(float(event.get("changed_at", 0.0))), str(event.get("who"))
        why = ": ".join(filter(None, (str(event.get("event")).removeprefix("model "), event.get("note"))))
        _add(table, [str(one.version), *cells, when, who, why])
    return table


def verdicts(found: Sequence[Verdict]) -> Table:
    """Criteria, those that are passed too."""
    table = _plain("Criteria", "criterion", "asked", "found", "outcome")
    for one in found:
        _add(table, [one.criterion, one.asked, one.found, one.outcome])
    return table


def differences(one: str, other: str, found: Sequence[Difference]) -> Table:
    """What differs between two versions."""
    table = _plain("Differences", "fact", one, other, "change")
    for difference in found:
        values = [_value(value) for value in (difference.one, difference.other)]
        _add(table, [difference.fact, *values, "" if difference.change is None else f"{difference.change:+.6g}"])
    return table


def _value(value: Value) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def prospect(found: Prospect) -> None:
    """What a run asks of a site, and what the site's policy says to each part of it."""
    run, strategy = found.file.run, found.file.strategy["name"]
    title = f"{run.name} ({found.state}): {run.task} by {strategy}, {found.aggregation}, {found.clients} clients here"
    table = _plain(title, "work", "what is asked", "this site's policy")
    for request in found.requests:
        answer = "\n".join(map(str, request.objections)) or "allowed"
        table.add_row(request.kind, request.what, Text(answer, "red" if request.objections else "green"))
    console.print(table)
    if not found.known:
        say(f"this agent does not have the task {run.task}: add it with --task")
    elif not found.is_welcome:
        say("this site will refuse what is not allowed, and take part in the rest")


def aggregations(found: Mapping[str, Mapping[str, float]]) -> Table:
    """The same training with its answers added up in one way and another."""
    heads = ("aggregation", "accuracy", "up", "down", "seconds", "own scores seen")
    table = _plain("What the coordinator gets", *heads)
    for name, facts in found.items():
        sizes = [f"{facts[way] / 1000:,.0f} kB" for way in ("bytes_up", "bytes_down")]
        shown = f"{facts['scores_of_one_hospital']:.0f}"
        _add(table, [name, f"{facts['accuracy']:.3f}", *sizes, f"{facts['seconds']:.1f}", shown])
    return table


def hops(found: Mapping[str, Mapping[str, float]]) -> Table:
    """The same weight transfer with its models in the clear, and sealed."""
    table = _plain("Weight transfer", "hops", "accuracy", "up", "down", "seconds")
    for name, facts in found.items():
        sizes = [f"{facts[way] / 1000:,.0f} kB" for way in ("bytes_up", "bytes_down")]
        _add(table, [name, f"{facts['accuracy']:.3f}", *sizes, f"{facts['seconds']:.1f}"])
    return table


def privacy(found: Sequence[Report], head: str, *, with_runs: bool) -> None:
    """What data sets have cost, what is left, and what is not covered."""
    from fedkit.privacy.report import NOT_COVERED

    table = _plain("Privacy", "data set", "rows", "epsilon", "delta", "budget", "left", "rounds it affords")
    for one in found:
        budget = "none" if one.budget is None else f"{one.budget.epsilon:g}"
        left = ["-" if value is None else _down(value) for value in (one.left, one.rounds)]
        _add(table, [one.data, str(one.rows), _up(one.spent.epsilon), f"{one.spent.delta:g}", budget, *left])
    console.print(table)
    if with_runs:
        for one in found:
            console.print(_costs(one))
    for one in found:
        for run in one.runs:
            _say_shared(one.data, run)
    say("Level: one row (example). Relation: adding or removing one. Sampling: Poisson. Not covered:")
    for text in NOT_COVERED:
        say(f"  * {text}")
    say(f"digest of the ledger {head}")


def _say_shared(data: str, run: RunCost) -> None:
    """With whom a run's noise was shared."""
    for clients, dropouts, colluders in run.shared:
        whose = "the whole client" if run.is_whole else "one row"
        say(
            f"{run.run} on {data}: noise for {whose}, shared by {clients} clients, of which {dropouts} may be missing "
            f"and {colluders} tell their parts"
        )


def gate(passport: Passport) -> None:
    """What each variant of a model costs and answers, which one is shipped, and why the others are not."""
    metric = next(iter(passport.task.metrics), "loss")
    table = _plain("Variants", "variant", "state", "bytes", "size", "CPU at 1", "at 64", "agreement", metric)
    for one in passport.gate:
        state = "shipped" if one.variant == passport.shipped else "passed" if one.passed else "refused"
        cpu = [_times(one.cpu_ratio.get(batch)) for batch in ("1", "64")]
        share = "-" if one.agreement is None else f"{one.agreement:.2%}"
        score = _number((one.valid or {}).get(metric))
        _add(table, [one.variant, state, f"{one.size_bytes:,}", _times(one.size_ratio), *cpu, share, score])
    console.print(table)
    say("Size and CPU time are over float32 in ONNX Runtime, at batch 1 and 64.")
    for one in passport.gate[1:]:
        say(f"{one.variant}: {one.why}")


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def audit(rows: Sequence[Sequence[str]]) -> None:
    """Attacks, one a line: what each found, what is claimed, what it finds without noise, what that means."""
    table = _plain("Audit", "attack", "found", "claimed", "without noise", "what it means")
    for cells in rows:
        _add(table, cells)
    console.print(table)


def verification(rows: Sequence[Sequence[str]]) -> None:
    """Checks of a bundle, one a line: of what, how it ended, what was found."""
    table = _plain("Checks", "check", "result", "found")
    for cells in rows:
        _add(table, cells)
    console.print(table)


def _costs(one: Report) -> Table:
    heads = ("run", "asked", "open", "steps", "rate", "noise", "clip", "clipped", "epsilon")
    table = _plain(f"Runs on {one.data} ({one.fingerprint[:16] or 'never loaded'})", *heads, only_folds="run")
    for run in one.runs:
        settings = [_range(values) for values in (run.sampling_rates, run.noise_multipliers, run.clips)]
        epsilon = f"{_up(run.spent.rdp)} RDP"
        if run.spent.pld is not None:
            epsilon += f"\n{_up(run.spent.pld)} PLD"
        counts = [str(run.assignments), str(run.open), str(run.steps)]
        clipped = "-" if run.clipped_share is None else f"{run.clipped_share:.0%}"
        _add(table, [run.run, *counts, *settings, clipped, epsilon])
    return table


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:.3g}" if len(values) == 1 else f"{values[0]:.3g}-{values[-1]:.3g}"


def _up(epsilon: float) -> str:
    """Never less than it is."""
    return f"{math.ceil(epsilon * 1000) / 1000:.3f}" if math.isfinite(epsilon) else "infinity"


def _down(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{math.floor(value * 1000) / 1000:.3f}"


def _plain(title: str, *heads: str, only_folds: str = "") -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for head in heads:
        is_whole = head != only_folds if only_folds else head in _WHOLE
        table.add_column(head, no_wrap=is_whole, overflow="fold")
    return table


def _add(table: Table, cells: Sequence[str]) -> None:
    """One line, of which no cell is taken for markup."""
    found = []
    for column, cell in zip(table.columns, cells, strict=True):
        style = _STYLES.get(cell, "") if column.header in _STYLED else ""
        is_cut = column.header in _CUT
        found.append(Text(_printable(cell), style, no_wrap=is_cut or None, overflow="ellipsis" if is_cut else None))
    table.add_row(*found)


def _lasting(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
