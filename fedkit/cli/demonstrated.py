"""`fedkit demo`."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from fedkit import codec
from fedkit.cli import show
from fedkit.cli.exported import Wish, bundled
from fedkit.config import Privacy
from fedkit.crypto.box import Owner
from fedkit.crypto.sealing import SealedModel
from fedkit.demo import compare, plot
from fedkit.demo.compare import Row
from fedkit.demo.heart import HOSPITALS, load, task
from fedkit.handover import Handed
from fedkit.loopback import Loopback
from fedkit.remote import Coordinator, connect
from fedkit.result import Result
from fedkit.rounds.layout import Secrecy
from fedkit.weights import Weights

__all__ = ["demonstrated", "demonstrated_privately", "demonstrated_sealed", "demonstrated_securely"]

_SEEN: dict[Secrecy, str] = {
    "masked": "Masked, the coordinator has seen no update, score or statistic of one hospital, only sums of four.",
    "bfv": "The coordinator has added up ciphertexts, for which it has no key. Two hospitals opened each sum; their "
    "audit logs name it.",
    "ckks": "Simulated, because CKKS shows its key to whoever gets decrypted values: between real hospitals, use bfv.",
}


def demonstrated(names: list[str], out: Path, seed: int, *, in_process: bool, as_json: bool) -> None:
    """Trains, compares, draws and exports, showing each step unless a program reads along."""
    began = time.monotonic()
    strategies = compare.pick(names)
    if not as_json:
        _introduce()
    with _federation(out, in_process, as_json) as coordinator:
        results = {name: _trained(name, seed, as_json, coordinator) for name in strategies}
        first, result = next(iter(results.items()))
        handed = bundled(result, out / "bundle", Wish(key=out / "signer"), as_json)
    with show.busy("For comparison: each hospital alone, then all rows pooled", as_json):
        rows = [compare.alone(seed), compare.pooled(seed)]
    rows += [compare.row(name, result) for name, result in results.items()]
    with show.busy("Drawing the curves", as_json):
        picture = plot.draw(out / "curves.png", {name: result.history for name, result in results.items()}, rows)
        result.save(out / "run")
    if as_json:
        show.print_json(_facts(rows, picture, handed, seed, time.monotonic() - began))
    else:
        _conclude(rows, picture, handed, first, time.monotonic() - began)


def demonstrated_privately(out: Path, seed: int, *, in_process: bool, as_json: bool) -> None:
    """FedAvg at epsilon 3 between the hospitals, what their ledgers say then, and accuracy against epsilon."""
    began = time.monotonic()
    if not as_json:
        _introduce()
    with _federation(out, in_process, as_json) as coordinator:
        result = _trained_privately(seed, as_json, coordinator)
    costs = result.history[-1].epsilon
    with show.busy("Accuracy against epsilon, five seeds each, simulated", as_json):
        seeds = range(seed, seed + 5)
        curves = {
            name: {epsilon: compare.private_accuracy(name, epsilon, seeds) for epsilon in compare.EPSILONS}
            for name in compare.PRIVATE
        }
        [without] = compare.private_accuracy("FedAvg", None, [seed])
        picture = plot.draw_privacy(out / "privacy.png", curves, without)
    facts = {"epsilon": costs, "delta": compare.DELTA, "accuracy": result.test["accuracy"], "curves": curves}
    if as_json:
        show.print_json(facts | {"plot": str(picture), "seconds": round(time.monotonic() - began, 1)})
        return
    show.say("\nWhat the run has cost each hospital, by its own ledger:")
    for hospital, epsilon in costs.items():
        show.say(f"  {hospital:<12} epsilon {epsilon:.3f} at delta {compare.DELTA:g}")
    show.say(f"Accuracy   {result.test['accuracy']:.3f} over all test rows; without privacy {without:.3f}")
    show.say(f"Plot       {picture}")
    if not in_process:
        book = out / "federation" / "clients" / HOSPITALS[0] / "ledger.db"
        show.say(f"\nNext: fedkit privacy report {book} --delta {compare.DELTA:g}")


def demonstrated_securely(scheme: Secrecy, out: Path, seed: int, *, in_process: bool, as_json: bool) -> None:
    """FedAvg between the hospitals as it is, then by secure aggregation: the same model, and what each costs."""
    began = time.monotonic()
    if not as_json:
        _introduce()
    results: dict[str, Result] = {}
    plain, secure = Privacy(aggregation="plain"), Privacy(aggregation=scheme)
    with _federation(out, in_process or scheme == "ckks", as_json, roster=True) as coordinator:
        for privacy in (plain, secure):
            results[str(privacy.aggregation)] = _trained_with(privacy, seed, as_json, coordinator)
    facts = {name: _secure_facts(result) for name, result in results.items()}
    apart = float(abs(results["plain"].weights.vector - results[scheme].weights.vector).max())
    if as_json:
        show.print_json({"runs": facts, "apart": apart, "seconds": round(time.monotonic() - began, 1)})
        return
    show.console.print(show.aggregations(facts))
    show.say(f"\nNo element of the two models differs by more than {apart:.0e}.")
    show.say(_SEEN[scheme])
    guide = "secure-aggregation" if scheme == "masked" else "encryption"
    show.say(f"\nNext: read docs/{guide}.md for what that protects from, and what it does not")


def _trained_with(privacy: Privacy, seed: int, as_json: bool, coordinator: Coordinator | None) -> Result:
    strategy = compare.STRATEGIES["FedAvg"]
    if as_json:
        return compare.train(strategy, seed, None, coordinator, privacy)
    with show.rounds(f"FedAvg, {privacy.aggregation}", strategy.rounds) as observe:
        return compare.train(strategy, seed, observe, coordinator, privacy)


def _secure_facts(result: Result) -> dict[str, float]:
    return _cost_facts(result) | {"scores_of_one_hospital": len(result.test_per_client)}


def demonstrated_sealed(out: Path, seed: int, *, in_process: bool, as_json: bool) -> None:
    """Weight transfer between the hospitals as it is, then sealed: the same bits, and what the coordinator keeps."""
    began = time.monotonic()
    if not as_json:
        _introduce()
    results, keys, kept = {}, (out / "federation/identities/operator", out / "federation/roster.json"), None
    with _federation(out, in_process, as_json, roster=True) as coordinator:
        owner = None if coordinator is None else Owner.load(*keys)
        for name in ("plain", "sealed"):
            results[name] = _transferred(name, seed, as_json, coordinator, owner)
        if coordinator is not None:
            kept = coordinator.weights(coordinator.status().runs[0].name)
            codec.save(out / "sealed.fedkit", kept)
    facts = {name: _cost_facts(result) for name, result in results.items()}
    is_same = results["plain"].weights == results["sealed"].weights
    if as_json:
        found = {"runs": facts, "same_bits": is_same, "is_kept_sealed": kept is not None and kept.manifest.is_sealed}
        show.print_json(found | {"seconds": round(time.monotonic() - began, 1)})
        return
    _report_sealed(facts, is_same, out, kept)


def _report_sealed(facts: dict[str, dict[str, float]], is_same: bool, out: Path, kept: Weights | None) -> None:
    show.console.print(show.hops(facts))
    show.say(
        f"\nSealed or not, the model {'has the same bits' if is_same else 'should have the same bits, and has not'}."
    )
    show.say("Sealed, the coordinator has read the model it began with, and none that a hospital has trained.")
    following = "read docs/sealed-hops.md for what that protects from, and what it does not"
    if kept is not None:
        sealed, folder = out / "sealed.fedkit", out / "federation"
        show.say(f"{sealed} is the last one as the coordinator keeps it: {SealedModel.of(kept)!r}")
        keys = f"--identity {folder / 'identities' / 'operator'} --roster {folder / 'roster.json'}"
        following = f"fedkit open {sealed} {keys} --out {out / 'model.fedkit'}"
    show.say(f"\nNext: {following}")


def _transferred(name: str, seed: int, as_json: bool, coordinator: Coordinator | None, owner: Owner | None) -> Result:
    strategy, privacy = (
        compare.STRATEGIES["CyclicWeightTransfer"],
        Privacy(aggregation="plain", sealed=name == "sealed"),
    )
    whose = owner if privacy.sealed else None
    if as_json:
        return compare.train(strategy, seed, None, coordinator, privacy, whose)
    with show.rounds(f"CyclicWeightTransfer, {name}", strategy.rounds) as observe:
        return compare.train(strategy, seed, observe, coordinator, privacy, whose)


def _cost_facts(result: Result) -> dict[str, float]:
    return {
        "accuracy": result.test["accuracy"],
        "bytes_up": sum(record.bytes_up for record in result.history),
        "bytes_down": sum(record.bytes_down for record in result.history),
        "seconds": round(sum(record.seconds for record in result.history), 2),
    }


def _trained_privately(seed: int, as_json: bool, coordinator: Coordinator | None) -> Result:
    strategy, privacy = compare.PRIVATE["FedAvg"], compare.private("FedAvg", compare.SHOWN_EPSILON)
    if as_json:
        return compare.train(strategy, seed, None, coordinator, privacy)
    with show.rounds(f"FedAvg, epsilon {compare.SHOWN_EPSILON:g}", strategy.rounds) as observe:
        return compare.train(strategy, seed, observe, coordinator, privacy)


def _introduce() -> None:
    sizes = ", ".join(f"{name} {len(load(name).train)}" for name in HOSPITALS)  # type: ignore[arg-type]
    show.console.print("[bold]UCI Heart Disease, four hospitals; no row leaves its hospital.[/bold]")
    show.console.print(f"Training rows: {sizes}. One logistic regression on 13 features.\n", highlight=False)


@contextlib.contextmanager
def _federation(out: Path, in_process: bool, quiet: bool, *, roster: bool = False) -> Iterator[Coordinator | None]:
    """A coordinator and four agents on this machine for as long as the block runs; None `in_process`."""
    if in_process:
        yield None
        return
    folder = out / "federation"
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        with show.busy("Starting one coordinator and four agents", quiet):
            federation = stack.enter_context(Loopback(folder, ["heart"], HOSPITALS, roster=roster))
        if not quiet:
            _present(federation)
        federation.keep_alive(lambda name: None if quiet else show.console.print(f"{name} ended; started again"))
        yield stack.enter_context(connect(federation.address, federation.operator))


def _present(federation: Loopback) -> None:
    ids = {name: process.pid for name, process in federation.processes.items()}
    say = show.console.print
    say(f"Coordinator at {federation.address}, process {ids.pop('server')}", highlight=False)
    say(f"Agents {', '.join(f'{name} {pid}' for name, pid in ids.items())}", highlight=False)
    say("Kill any of them (kill -9 PID): it is started again, and the run goes on where it was.\n", highlight=False)


def _trained(name: str, seed: int, as_json: bool, coordinator: Coordinator | None) -> Result:
    strategy = compare.STRATEGIES[name]
    if as_json:
        return compare.train(strategy, seed, None, coordinator)
    with show.rounds(name, strategy.rounds) as observe:
        result = compare.train(strategy, seed, observe, coordinator)
    show.console.print()
    return result


def _facts(rows: list[Row], picture: Path, handed: Handed, seed: int, seconds: float) -> dict[str, object]:
    return {
        "task": task.name,
        "seed": seed,
        "accuracy": [dataclasses.asdict(row) for row in rows],
        "plot": str(picture),
        "bundle": str(handed.folder),
        "shipped": handed.passport.shipped,
        "seconds": round(seconds, 1),
    }


def _conclude(rows: list[Row], picture: Path, handed: Handed, first: str, seconds: float) -> None:
    say = show.console.print
    say(show.comparison(rows))
    say(f"\nCurves     {picture}", highlight=False)
    passport, apart = handed.passport, handed.passport.parity.difference
    say(
        f"Bundle     {handed.folder} ({first}, {passport.shipped}, raw features in, {apart:.0e} from PyTorch)",
        highlight=False,
    )
    say(f"Card       {handed.folder / 'card.md'}", highlight=False)
    say(f"Took       {seconds:.0f} s", highlight=False)
    say(
        f"\nNext: look at the curves and the card, then fedkit verify {handed.folder}; or begin with fedkit server",
        highlight=False,
    )
