"""The model card: what the passport says, for people. What is not known is said to be missing, and never made up.

Its sections follow Mitchell et al. 2019, "Model Cards for Model Reporting", as far as a training run can fill them.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fedkit.deploy.passport import Measured, Passport, Scores, TensorFacts
from fedkit.deploy.plots import in_order, main_metric
from fedkit.deploy.verify import FP32, MODELS

__all__ = ["text"]

_MISSING = "not known"
_MOST_CLIENTS = 50
_AGGREGATIONS = {
    "plain": "the coordinator received each client's updates as they were",
    "masked": "updates were masked: the coordinator could read their sums, and no single one",
    "bfv": "updates were encrypted (BFV): the coordinator added them up without reading one",
    "ckks": "updates were encrypted (CKKS): the coordinator added them up without reading one",
}


def text(passport: Passport, signer: str, sizes: Mapping[str, int], pictures: Sequence[str]) -> str:
    """The card as Markdown. `signer` is a public key, `sizes` are bytes by model file, `pictures` lie beside it."""
    shown = {name: f"![{name.removesuffix('.png')}]({name})" for name in pictures}
    sections: dict[str, Iterable[str]] = {
        "In short": _in_short(passport, signer),
        "The model": _model(passport, sizes),
        "Inputs and outputs": _tensors(passport),
        "How it was trained": [*_training(passport), shown.get("learning.png", "No scores by round were given.")],
        "Data, and who took part": _clients(passport),
        "Scores": _scores(passport),
        "Fairness across clients and groups": [*_fairness(passport), shown.get("clients.png", "")],
        "Privacy": _privacy(passport),
        "Quantisation": [*_quantisation(passport), shown.get("variants.png", "")],
        "Limits, and what this card does not say": [_bullets(_limits(passport))],
        "How to run it": _running(passport),
        "How to verify it": _verifying(signer),
    }
    parts = [f"# Model card: {_plain(passport.task.name)}"]
    for title, lines in sections.items():
        parts += [f"## {title}", *(line for line in lines if line)]
    return "\n\n".join(parts) + "\n"


def _plain(value: object) -> str:
    """Text on one line, in which nothing is taken for Markdown or HTML."""
    found = " ".join(str(value).split())
    for sign in "\\`*_[]<>|#":
        found = found.replace(sign, f"\\{sign}")
    return found


def _code(value: object) -> str:
    return f"`{' '.join(str(value).replace('`', ' ').replace('|', ' ').split()) or '-'}`"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _number(value: float | None, form: str = ".4f") -> str:
    return _MISSING if value is None else format(value, form)


def _scored(scores: Scores | None, name: str) -> str:
    return _MISSING if scores is None else _number(scores.get(name))


def _in_short(passport: Passport, signer: str) -> Iterator[str]:
    run, metric = passport.run, main_metric(passport)
    shipped = passport.measured(passport.shipped)
    yield _bullets(
        [
            f"One model for the task **{_plain(passport.task.name)}**, trained by {_code(run.strategy)} over"
            f" {len(passport.clients)} clients{' simulated on one machine' * (run.engine == 'simulation')}.",
            f"To be deployed: {_code(MODELS[passport.shipped])} ({passport.shipped})"
            + (f": {_plain(shipped.why)}." if shipped else "."),
            f"{_plain(metric)} on all test rows together: **{_scored(_shipped_scores(passport), metric)}**.",
            f"Privacy: {_protection(passport)}.",
            f"Made {_plain(passport.created)}, signed by {_code(signer)}.",
        ]
    )


def _shipped_scores(passport: Passport) -> Scores:
    """Those of the file that is handed over, where clients have examined it; else of the model in PyTorch."""
    return passport.test if passport.examined is None else passport.examined.pooled


def _protection(passport: Passport) -> str:
    known = passport.privacy
    how = _AGGREGATIONS.get(known.aggregation, f"aggregation {_code(known.aggregation)}")
    sealed = "; models on their way between clients were sealed" if known.sealed else ""
    return f"{how}{sealed}; {_noise(passport)}"


def _noise(passport: Passport) -> str:
    if passport.privacy.dp is None:
        return "no noise was added"
    spent = [one.epsilon for one in passport.clients if one.epsilon is not None]
    if not spent:
        return "differential privacy; what it has cost each client is not known here"
    whose = "all clients" if len(spent) == len(passport.clients) else f"the {len(spent)} clients that say theirs"
    return f"differential privacy, of {whose} none at more than epsilon {_epsilon(max(spent))}"


def _epsilon(value: float | None) -> str:
    """Never less than it is."""
    return _MISSING if value is None or not math.isfinite(value) else f"{math.ceil(value * 1000) / 1000:.3f}"


def _model(passport: Passport, sizes: Mapping[str, int]) -> Iterator[str]:
    run = passport.run
    which = "the round with the best validation score" if run.best else "the last one committed"
    source = "no files: its code is not on record" if passport.task.source is None else _code(passport.task.source)
    facts = {
        "run": _code(run.name),
        "round": f"{run.round} of {run.rounds}, {which}",
        "task": f"{_code(passport.task.name)}; BLAKE3 of its source: {source}",
        "weights": f"{_code(passport.model.weights)} (BLAKE3)",
        "parameters": f"{passport.model.parameters:,}",
    }
    yield _table(("", ""), facts.items())
    named = {MODELS[passport.shipped]: passport.shipped, FP32: "fp32"}
    yield _table(("file", "is", "bytes"), [(_code(one), named[one], f"{size:,}") for one, size in sizes.items()])


def _tensors(passport: Passport) -> Iterator[str]:
    yield "Inputs are raw: preprocessing that was learned is inside the network. A dimension of `?` may vary."
    both = [("input", one) for one in passport.task.inputs] + [("output", one) for one in passport.task.outputs]
    yield _table(("", "name", "type", "shape"), [(kind, *_tensor(one)) for kind, one in both])


def _tensor(one: TensorFacts) -> tuple[str, str, str]:
    dims = ["batch", *("?" if dim is None else str(dim) for dim in one.shape[1:])]
    return _code(one.name), _code(one.dtype), _code(" x ".join(dims))


def _training(passport: Passport) -> Iterator[str]:
    run = passport.run
    where = "by clients simulated on one machine" if run.engine == "simulation" else "by a federation of clients"
    yield f"Strategy {_code(run.strategy)}, {run.rounds} rounds, seed {run.seed}, {where}. Its settings:"
    settings = json.dumps(run.settings, indent=2, sort_keys=True).replace("`", "'")
    yield f"```json\n{settings}\n```"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(passport.versions.items()))
    yield f"Versions: {_plain(versions) or _MISSING}."


def _clients(passport: Passport) -> Iterator[str]:
    yield (
        "Clients appear under pseudonyms that only whoever exported the model can resolve. What their data are, and how"
        " many rows they have, is theirs to say. A score or an epsilon that a site does not release is not known here."
    )
    metric = main_metric(passport)
    rows = [
        (_code(one.pseudonym), str(one.rounds), _scored(one.test, metric), _epsilon(one.epsilon))
        for one in passport.clients[:_MOST_CLIENTS]
    ]
    yield _table(("client", "rounds it contributed to", f"{_plain(metric)} on its test rows", "epsilon"), rows)
    if len(passport.clients) > _MOST_CLIENTS:
        yield f"And {len(passport.clients) - _MOST_CLIENTS} more, in `passport.json`."


def _scores(passport: Passport) -> Iterator[str]:
    examined = passport.examined
    heads = ["score", "trained model, all test rows"]
    if examined is not None:
        heads.append(f"{examined.variant} file in ONNX Runtime, test rows of {examined.sites} clients")
    names = list(dict.fromkeys([*passport.test, *(examined.pooled if examined else ())]))
    columns = [passport.test, *([examined.pooled] if examined else [])]
    yield _table(heads, [(_plain(name), *(_scored(column, name) for column in columns)) for name in names])
    if examined is None:
        yield "The shipped file itself was not examined at the clients."
    elif examined.noise:
        yield "With normal noise added to the inputs, by its standard deviation in units of the inputs' own:"
        yield _by("noise", examined.noise, "none", examined.pooled)


def _by(head: str, found: Mapping[str, Scores], base: str, pooled: Scores) -> str:
    rows = [(_plain(name), *(_scored(scores, one) for one in pooled)) for name, scores in found.items()]
    return _table((head, *map(_plain, pooled)), [(base, *(_scored(pooled, one) for one in pooled)), *rows])


def _fairness(passport: Passport) -> Iterator[str]:
    metric, examined = main_metric(passport), passport.examined
    known = [one.test[metric] for one in passport.clients if one.test and one.test.get(metric) is not None]
    found = [score for score in known if score is not None]
    silent = len(passport.clients) - len(found)
    if found:
        yield (
            f"{_plain(metric)} at single clients: {min(found):.4f} to {max(found):.4f}, a gap of"
            f" {max(found) - min(found):.4f}."
        )
    if silent:
        yield f"{silent} of {len(passport.clients)} clients do not release their own score."
    if examined is not None and examined.passing:
        yield "What the shipped file must reach, and at how many clients it does on their own rows:"
        rows = [(_code(one), f"{count} of {examined.sites}") for one, count in examined.passing.items()]
        yield _table(("criterion", "clients"), rows)
    if examined is not None and examined.groups:
        yield _by("group of rows", examined.groups, "all", examined.pooled)
    else:
        yield "Scores by groups of rows were not asked for."


def _privacy(passport: Passport) -> Iterator[str]:
    yield f"{_protection(passport).capitalize()}."
    if passport.privacy.dp is None:
        yield "Nothing bounds what the model itself gives away of the rows it was trained on."
    else:
        yield _table(("setting", "value"), [(_plain(k), _code(v)) for k, v in passport.privacy.dp.items()])
        yield "Epsilon is what each client's own ledger says of this run, where its site releases it (see above)."
    ranges = passport.calibration
    if ranges is not None and ranges.epsilon is not None:
        yield f"Calibration has cost epsilon {_epsilon(ranges.epsilon)} at delta {_number(ranges.delta, 'g')} besides."


def _quantisation(passport: Passport) -> Iterator[str]:
    yield f"Shipped: **{passport.shipped}**. A variant is refused where it saves nothing, is slower, or answers worse."
    batches = in_order(batch for one in passport.gate for batch in one.cpu_ratio)
    metric = main_metric(passport)
    heads = ("variant", "", "operators", "size", *(f"CPU time, batch {one}" for one in batches))
    rows = [_measured(one, batches, metric) for one in passport.gate]
    yield _table((*heads, "agreement", f"{_plain(metric)}, validation", "drop", "why"), rows)
    yield "Size and CPU time are over float32 in ONNX Runtime, on the machine that exported the model."
    if not passport.run.held_out:
        yield "No rows were held out in training: those of validation may have been trained on."
    yield _calibration(passport)
    yield (
        f"ONNX Runtime and PyTorch differ by {passport.parity.difference:.1e} of the largest output in float32;"
        f" {passport.parity.allowed:.0e} is allowed."
    )


def _measured(one: Measured, batches: Sequence[str], metric: str) -> tuple[str, ...]:
    times = [_number(one.cpu_ratio.get(batch), ".2f") for batch in batches]
    agreement = _number(one.agreement, ".2%")
    judged = (agreement, _scored(one.valid, metric), _number(one.drop), _plain(one.why))
    verdict = "passed" if one.passed else "refused"
    return (one.variant, verdict, str(one.operators), f"{one.size_ratio:.3f}", *times, *judged)


def _calibration(passport: Passport) -> str:
    found = passport.calibration
    if found is None:
        return "No ranges were calibrated."
    if found.method == "noise":
        return "The ranges of int8 were calibrated on made-up numbers, not on data."
    how = {
        "mean": "the mean of their ranges",
        "clipped": "ranges without a thousandth of rows' extremes",
        "rows": "one and a half times the mean of rows' extremes, with noise",
    }[found.method]
    many = "all rows" if found.rows is None else f"at most {found.rows} rows"
    return f"For the ranges of int8, {found.clients} clients were asked, of {many} at each: {how}."


def _limits(passport: Passport) -> Iterator[str]:
    yield "What the model is for, and for whom it is not, is for those to say who wrote the task; nothing here does."
    yield "Scores are of test rows at the clients that took part. At another place they may be better or worse."
    if passport.run.engine == "simulation":
        yield "Clients were simulated: whoever ran the simulation had all of their data."
    if passport.examined is None:
        yield "No criteria were examined at the clients before this export."
    elif not passport.examined.noise:
        yield "Robustness to noise in the inputs was not examined."
    if passport.privacy.dp is None:
        yield "Without noise, rows may be found out from the model by those who ask it enough."
    yield "The signature says who exported the model, and that nothing was changed since; not that it is any good."
    yield "`parity.json` holds made-up rows, which show that the files compute the same here, and nothing of real rows."


def _running(passport: Passport) -> Iterator[str]:
    yield "With `onnxruntime` and `numpy`, and nothing else:"
    feeds = "\n".join(f"    {one.name!r}: {_zeros(one)}," for one in passport.task.inputs)
    names = [one.name for one in passport.task.outputs]
    code = (
        "import numpy as np\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{MODELS[passport.shipped]}", providers=["CPUExecutionProvider"])\n'
        f"rows = {{  # raw values, one row here\n{feeds}\n}}\n"
        f"for name, values in zip({names!r}, session.run({names!r}, rows)):\n"
        "    print(name, values)"
    )
    yield f"```python\n{code}\n```"
    yield "The passport is in the file too: `session.get_modelmeta().custom_metadata_map['fedkit.passport']`."
    yield "On a CSV or a folder of pictures: `fedkit predict FOLDER INPUT --out FILE`."


def _zeros(one: TensorFacts) -> str:
    dims = [1, *(8 if dim is None else dim for dim in one.shape[1:])]
    return f"np.zeros({tuple(dims)!r}, dtype={one.dtype!r})"


def _verifying(signer: str) -> Iterator[str]:
    yield "Ask whoever gave you this folder for their public key on another way, then:"
    yield f"```bash\nfedkit verify FOLDER --signer {signer}\n```"
    yield textwrap.dedent(
        """\
        It checks the signature over `passport.json`, the digest of every other file, that no file is missing or added,
        both networks with ONNX's checker, their metadata, and that they still compute what PyTorch computed."""
    )
