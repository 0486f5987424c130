"""The parts of a page, each from what is on record; what is not known is said to be so."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from fedkit.deploy.passport import Measured, Passport, Scores
from fedkit.report.charts import Chart, Row, Series, lines, matrix
from fedkit.report.elements import Child, Markup, cut, details, facts, table, tag
from fedkit.report.facts import Facts, Handed
from fedkit.report.scale import amount, duration, number, spans, thinned
from fedkit.rounds.call import Refusal
from fedkit.rounds.journal import RoundRecord
from fedkit.rounds.shield import EVERY_CLIENT

__all__ = ["Section", "sections"]

Section: TypeAlias = tuple[str, str, list[Markup]]  # its name in the page, its heading, what is in it

_MOST_ROUNDS = 200  # that a chart and its table show
_MOST_COLUMNS = 120  # of the matrix
_MOST_CLIENTS = 50
_MOST_REFUSALS = 300
_ALL = "all clients"
_PHASES = {
    "stands": "rounds that stand",
    "rejected": "rounds that were rejected",
    "abandoned": "attempts that fell below the quorum",
}


def sections(run: Facts, bundle: Handed | None) -> Iterator[Section]:
    """The page's sections in order."""
    yield "short", "In short", [_in_short(run, bundle)]
    yield "scores", "Scores", [*_curves(run), *_tested(run)]
    yield "clients", "Who took part", list(_attendance(run))
    yield "time", "Time", list(_time(run))
    yield "bytes", "Bytes", list(_bytes(run))
    yield "privacy", "Privacy", list(_privacy(run))
    yield "refusals", "Refusals", list(_refusals(run))
    yield "handover", "Hand-over", list(_handover(bundle))
    yield "settings", "Settings", list(_settings(run))


def _say(*words: Child) -> Markup:
    return tag("p", *words)


# -- in short ----------------------------------------------------------------------------------------------------------


def _in_short(run: Facts, bundle: Handed | None) -> Markup:
    records = (*run.history, *run.abandoned)
    planned = "" if run.planned is None else f" of {run.planned}"
    tiles: dict[str, Child] = {
        "State": run.state,
        "Rounds": f"{run.history[-1].round if run.history else 0}{planned}",
        "Clients": str(len(run.seen)),
        **_lead(run),
        "Time in rounds": duration(sum(one.seconds for one in records)),
        "Bytes down, up": f"{amount(sum(r.bytes_down for r in records))}, {amount(sum(r.bytes_up for r in records))}",
        "Epsilon, most": _spent(run),
        "Refusals": str(len(_refused(run))),
        "Shipped": "no bundle" if bundle is None else bundle.passport.shipped,
    }
    return facts(tiles.items(), tiles=True)


def _lead(run: Facts) -> dict[str, Child]:
    """The last training loss and the score that decides."""
    losses = [one.loss for one in run.history if one.loss is not None]
    found: dict[str, Child] = {"Training loss": number(losses[-1] if losses else None)}
    metric = run.evaluate.metric if run.evaluate else None
    if run.best is not None and metric in run.best.metrics:
        found[f"Best {metric}, round {run.best.round}"] = number(run.best.metrics[metric])
    found |= {f"Test {name}": number(value) for name, value in list(run.test.items())[:3]}
    return found


def _epsilon(value: float | None) -> str:
    """Never less than it is."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{math.ceil(value * 1000 - 1e-9) / 1000:g}"


def _spent(run: Facts) -> str:
    if run.privacy is None or run.privacy.dp is None:
        return "not known" if run.privacy is None else "no noise"
    spent = [value for one in (*run.history, *run.abandoned) for value in one.epsilon.values()]
    planned = run.privacy.dp.epsilon
    of = "" if planned is None else f" of {_epsilon(planned)}"
    return f"{_epsilon(max(spent))}{of}" if spent else f"not known{of}"


# -- scores ------------------------------------------------------------------------------------------------------------


def _shown(run: Facts) -> list[str]:
    """The clients that are shown one by one."""
    return run.seen[:_MOST_CLIENTS]


def _more(run: Facts) -> Markup | None:
    left = len(run.seen) - _MOST_CLIENTS
    return _say(f"Of {len(run.seen)} clients, the first {_MOST_CLIENTS} by name are shown.") if left > 0 else None


def _thinned(run: Facts, records: Sequence[RoundRecord], what: str) -> Iterator[Markup]:
    if len(records) > _MOST_ROUNDS:
        every = -(-len(records) // _MOST_ROUNDS)
        yield _say(f"Of {len(records)} {what}, one in {every} is shown, the last one among them.")
    more = _more(run)
    if more is not None:
        yield more


def _curves(run: Facts) -> Iterator[Markup]:
    if not run.history:
        yield _say("No round is committed yet.")
        return
    yield from _thinned(run, run.history, "rounds")
    records = thinned(run.history, _MOST_ROUNDS)
    loss = [(one.round, one.loss) for one in records]
    yield lines(Chart("training-loss", "Mean training loss", [Series(_ALL, loss, is_pooled=True)]))
    scored = thinned([one for one in run.history if one.metrics or one.per_client], _MOST_ROUNDS)
    names = dict.fromkeys(name for one in scored for name in one.metrics)
    for at, name in enumerate(names):
        yield lines(_curve(run, scored, f"score-{at}", name))
    if not names:
        yield _say("No round was scored on validation data.")
    elif not any(one.per_client for one in scored):
        yield _say("No site releases scores of its own: what is shown is of all clients together.")
    yield from _rejected(run)


def _curve(run: Facts, scored: Sequence[RoundRecord], at: str, name: str) -> Chart:
    pooled = Series(_ALL, [(one.round, one.metrics.get(name)) for one in scored], is_pooled=True)
    single = [
        Series(client, [(one.round, one.per_client.get(client, {}).get(name)) for one in scored])
        for client in _shown(run)
        if any(name in one.per_client.get(client, {}) for one in scored)
    ]
    return Chart(at, f"{cut(name).capitalize()} on validation data", [pooled, *single])


def _rejected(run: Facts) -> Iterator[Markup]:
    rejected = [one for one in run.history if not one.stands][:_MOST_REFUSALS]
    if rejected:
        yield _say("The scores of a round that does not stand are those of the model it would have made.")
        rows = ((str(one.round), cut(one.rejected)) for one in rejected)
        yield table("Rounds that do not stand", ["Round", "Why"], rows, numbers=False)


def _tested(run: Facts) -> Iterator[Markup]:
    if not run.test:
        yield _say("There are no scores on test data: " + ("they were not to be had." if run.is_over else "not yet."))
        return
    heads = ["", *map(cut, run.test)]
    rows = [(_ALL, *map(number, run.test.values()))]
    if run.best is not None and run.best.test:
        rows.append((f"best round ({run.best.round}), {_ALL}", *(number(run.best.test.get(name)) for name in run.test)))
    for client in _shown(run):
        own = run.test_per_client.get(client)
        if own is not None:
            rows.append((client, *(number(own.get(name)) for name in run.test)))
    yield table("Scores of the final model on test data", heads, rows)


# -- who took part -----------------------------------------------------------------------------------------------------


def _attendance(run: Facts) -> Iterator[Markup]:
    if not run.history:
        yield _say("No round is committed yet.")
        return
    every = -(-len(run.history) // _MOST_COLUMNS)
    columns = [run.history[at : at + every] for at in range(0, len(run.history), every)]
    rows = [_row(client, columns) for client in _shown(run)]
    what = "round" if every == 1 else f"span of {every} rounds"
    label = f"Who took part: one row a client, one column a {what}"
    picture = matrix(f"{label}. The table below says the same.", rows, [str(part[0].round) for part in columns])
    key = "Filled: it contributed. Empty: it was not asked, or brought nothing. A cross: it refused, or was refused."
    lighter = " A lighter cell: in some rounds of the span." if every > 1 else ""
    fallback = details("clients-numbers", "Numbers of this chart", _took_part(run))
    more = _more(run)
    yield tag("figure", tag("figcaption", label), picture, tag("p", key + lighter), more, fallback, id="attendance")


def _row(client: str, columns: Sequence[Sequence[RoundRecord]]) -> Row:
    shares = [sum(client in one.clients for one in part) / len(part) for part in columns]
    refused = [any(client == refusal.client for one in part for refusal in one.refusals) for part in columns]
    return Row(client, shares, refused)


def _took_part(run: Facts) -> Markup:
    rows = []
    for client in _shown(run):
        took = [one.round for one in run.history if client in one.clients]
        refused = [one.round for one in run.history if any(client == refusal.client for refusal in one.refusals)]
        rows.append((client, str(len(took)), cut(spans(took)), cut(spans(refused)) or "none"))
    heads = ["Client", "Contributed to", "Rounds", "Refused in rounds"]
    return table(f"Contributions to {len(run.history)} rounds", heads, rows)


# -- time and bytes ----------------------------------------------------------------------------------------------------


def _time(run: Facts) -> Iterator[Markup]:
    records = thinned(run.history, _MOST_ROUNDS)
    if records:
        took = [(one.round, one.seconds) for one in records]
        one = Series("seconds", took, is_pooled=True)
        yield lines(Chart("seconds", "Seconds a round took", [one], form=_seconds, from_zero=True))
    parts = {
        "stands": [one for one in run.history if one.stands],
        "rejected": [one for one in run.history if not one.stands],
        "abandoned": list(run.abandoned),
    }
    rows = [
        (_PHASES[name], str(len(found)), duration(sum(one.seconds for one in found))) for name, found in parts.items()
    ]
    yield table("Wall time by what came of it", ["", "How many", "Time"], rows)


def _seconds(value: float | None) -> str:
    return number(value) if value is None else f"{value:.3g} s"


def _bytes(run: Facts) -> Iterator[Markup]:
    records = thinned(run.history, _MOST_ROUNDS)
    if records:
        down = Series("down, to clients", [(one.round, float(one.bytes_down)) for one in records])
        up = Series("up, from clients", [(one.round, float(one.bytes_up)) for one in records])
        yield lines(Chart("payload", "Bytes of payload a round", [down, up], form=_payload, from_zero=True))
    whole = (*run.history, *run.abandoned)
    rows = [
        ("down, to clients", amount(sum(one.bytes_down for one in whole))),
        ("up, from clients", amount(sum(one.bytes_up for one in whole))),
    ]
    yield table("Payload of all rounds and attempts", ["", "Bytes"], rows)


def _payload(value: float | None) -> str:
    return number(value) if value is None else amount(value)


# -- privacy -----------------------------------------------------------------------------------------------------------

_AGGREGATIONS = {
    "plain": "The coordinator receives each client's updates as they are.",
    "masked": "Updates are masked: the coordinator can read their sums, and no single one.",
    "bfv": "Updates are encrypted (BFV): the coordinator adds them up without reading one.",
    "ckks": "Updates are encrypted (CKKS): the coordinator adds them up without reading one.",
}


def _privacy(run: Facts) -> Iterator[Markup]:
    known = run.privacy
    if known is None:
        yield _say("What protects this run is not known here until it has ended.")
    else:
        yield _say(_AGGREGATIONS[known.aggregation or "plain"])
        if known.sealed:
            yield _say("Models on their way between clients are sealed: the coordinator cannot read them.")
        if known.dp is None:
            yield _say("No noise was added: nothing bounds what the model gives away of the rows it was trained on.")
    spent = [one for one in run.history if one.epsilon]
    if spent:
        yield _budget(run, thinned(spent, _MOST_ROUNDS))
    if known is not None and known.dp is not None:
        if not spent:
            yield _say("What it has cost each client is not known here: sites release their epsilon, or do not.")
        yield _say(
            "Planned is what this run may cost. What a site has left over all its runs is in its own ledger: ",
            tag("code", "fedkit privacy report"),
            ".",
        )
        yield _values("Differential privacy", known.dp.to_dict())


def _budget(run: Facts, spent: Sequence[RoundRecord]) -> Markup:
    """Epsilon so far, by client, against what was planned."""
    names = dict.fromkeys(name for one in spent for name in one.epsilon)
    series = [
        Series(name, list(_so_far(name, spent)), is_pooled=name == EVERY_CLIENT) for name in list(names)[:_MOST_CLIENTS]
    ]
    planned = run.privacy.dp.epsilon if run.privacy is not None and run.privacy.dp is not None else None
    limit = None if planned is None else ("planned", planned)
    return lines(Chart("epsilon", "Epsilon spent so far", series, form=_epsilon, from_zero=True, limit=limit))


def _so_far(name: str, spent: Sequence[RoundRecord]) -> Iterator[tuple[int, float | None]]:
    """A client's epsilon by round; one in which it had no part has cost it nothing."""
    last = None
    for one in spent:
        last = one.epsilon.get(name, last)
        yield one.round, last


# -- refusals ----------------------------------------------------------------------------------------------------------


def _refused(run: Facts) -> list[tuple[str, Refusal]]:
    """Every refusal, and when it was."""
    found = [(f"round {one.round}", refusal) for one in run.history for refusal in one.refusals]
    for one in run.abandoned:
        found += [(f"round {one.round}, attempt {one.attempt}", refusal) for refusal in one.refusals]
    return found + [("test scores", refusal) for refusal in run.refusals]


def _refusals(run: Facts) -> Iterator[Markup]:
    found = _refused(run)
    if not found:
        yield _say("Nobody refused, and nobody was refused.")
        return
    tally = Counter(refusal.reason.value for _, refusal in found)
    yield table("Refusals by reason", ["Reason", "How many"], ((one, str(count)) for one, count in tally.most_common()))
    if len(found) > _MOST_REFUSALS:
        yield _say(f"Of {len(found)} refusals, the last {_MOST_REFUSALS} are shown.")
    rows = ((when, cut(one.client), one.reason.value, cut(one.detail)) for when, one in found[-_MOST_REFUSALS:])
    yield table("Each refusal", ["When", "Client", "Reason", "In words"], rows, numbers=False)


# -- the hand-over -----------------------------------------------------------------------------------------------------


def _handover(bundle: Handed | None) -> Iterator[Markup]:
    if bundle is None:
        yield _say("There is no bundle of this run here: ", tag("code", "fedkit export"), " makes one.")
        return
    passport = bundle.passport
    parity = passport.parity
    verdict = "holds" if parity.difference <= parity.allowed else "does not hold"
    yield facts(
        [
            ("Shipped", passport.shipped),
            ("Made", passport.created),
            ("Signed by", tag("code", bundle.signer)),
            ("Model", f"round {passport.run.round}, {passport.model.parameters:,} parameters"),
            ("Parity", f"{parity.difference:.1e} from PyTorch, {parity.allowed:.0e} is allowed: it {verdict}"),
        ]
    )
    yield _gate(passport)
    if passport.examined is not None:
        yield from _examined(passport)
    yield _say("The signature over the passport holds; the bundle's other files are checked by fedkit verify.")


def _gate(passport: Passport) -> Markup:
    batches = list(dict.fromkeys(batch for one in passport.gate for batch in one.cpu_ratio))
    metrics = list(dict.fromkeys(name for one in passport.gate for name in one.valid or ()))
    heads = ["Variant", "Gate", "Size", *(f"CPU time, batch {one}" for one in batches), "Agreement"]
    heads += [*(f"{name}, validation" for name in metrics), "Why"]
    rows = (_measured(one, batches, metrics) for one in passport.gate)
    return table("The gate; sizes and times are over float32 in ONNX Runtime", heads, rows, numbers=False)


def _measured(one: Measured, batches: Sequence[str], metrics: Sequence[str]) -> list[str]:
    times = [number(one.cpu_ratio.get(batch)) for batch in batches]
    scores = [number((one.valid or {}).get(name)) for name in metrics]
    agreement = number(None) if one.agreement is None else f"{one.agreement:.2%}"
    verdict = "passed" if one.passed else "refused"
    return [one.variant, verdict, f"{one.size_ratio:.3f}", *times, agreement, *scores, cut(one.why)]


def _examined(passport: Passport) -> Iterator[Markup]:
    found = passport.examined
    assert found is not None  # the caller has looked
    by: dict[str, Scores] = {_ALL: found.pooled, **found.groups}
    by |= {f"noise {name}": scores for name, scores in found.noise.items()}
    names = list(found.pooled)
    rows = ((of, *(number(scores.get(name)) for name in names)) for of, scores in by.items())
    yield table(f"The {found.variant} file in ONNX Runtime, on test rows of {found.sites} clients", ["", *names], rows)
    if found.passing:
        held = ((name, f"{count} of {found.sites}") for name, count in found.passing.items())
        yield table("Criteria, and how many clients meet them on their own rows", ["Criterion", "Clients"], held)


# -- settings ----------------------------------------------------------------------------------------------------------


def _settings(run: Facts) -> Iterator[Markup]:
    about = {"run": run.name, "task": run.task, "engine": run.engine, "seed": run.seed}
    yield _values("Run", about)
    yield _values("Strategy", run.strategy)
    if run.evaluate is not None:
        yield _values("Evaluation", run.evaluate.to_dict())


def _values(caption: str, values: Mapping[str, object]) -> Markup:
    rows: Iterable[tuple[str, str]] = (
        (name, cut(value if isinstance(value, str) else json.dumps(value))) for name, value in values.items()
    )
    return table(caption, ["Setting", "Value"], rows, numbers=False)
