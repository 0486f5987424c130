"""The commands, and the edge at which every error becomes one clear message."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedkit import __version__
from fedkit.cli import bundles
from fedkit.cli.edge import HERE, Json, LogForm, Tethered, edge
from fedkit.cli.memberships import audit_log, ca, roster
from fedkit.cli.models import models
from fedkit.cli.privacies import privacy
from fedkit.cli.sites import client

__all__ = ["app"]

app = typer.Typer(
    name="fedkit",
    help="Train one model where the data is, and hand it over as ONNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(client)
app.add_typer(privacy)
app.add_typer(ca)
app.add_typer(roster)
app.add_typer(audit_log)
app.add_typer(models)

Address = Annotated[
    str, typer.Option("--coordinator", envvar="FEDKIT_COORDINATOR", metavar="HOST:PORT", help="The coordinator.")
]
Identity = Annotated[
    Path | None,
    typer.Option("--identity", envvar="FEDKIT_IDENTITY", metavar="FOLDER", help="What fedkit enroll wrote; for TLS."),
]
Track = Annotated[
    str | None,
    typer.Option(
        envvar="FEDKIT_TRACK", metavar="WHERE", help="Write it down there too: mlflow[:URI] or tensorboard[:FOLDER]."
    ),
]


class Which(enum.StrEnum):
    """Which model of a run."""

    FINAL = "final"
    BEST = "best"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedkit {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train one model where the data is, and hand it over as ONNX."""


@app.command()
def simulate(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run: task, strategy, clients.")],
    task: Annotated[str | None, typer.Option(help="module:attr of the task, instead of a registered name.")] = None,
    clients: Annotated[str | None, typer.Option(help="Comma-separated, instead of the run file's.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes, instead of the run file's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for run.json and the weights.")] = None,
    track: Track = None,
    as_json: Json = False,
) -> None:
    """Train a run file's task over simulated clients on this machine."""
    from fedkit.cli.simulated import Given, simulated

    with edge():
        given = Given(task=task, clients=clients.split(",") if clients else None, workers=workers, track=track)
        simulated(run_file, given, out, as_json)


@app.command()
def run(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run: task, strategy.")],
    coordinator: Address = HERE,
    out: Annotated[Path | None, typer.Option(help="Folder for run.json and the weights.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Begin the run and return at once.")] = False,
    task: Annotated[
        str | None, typer.Option(help="module:attr of the task, where it is not registered on this machine.")
    ] = None,
    identity: Identity = None,
    roster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The roster; for the owner of a sealed run, with --identity.")
    ] = None,
    track: Track = None,
    as_json: Json = False,
) -> None:
    """Train a run file's task over the clients that attend a coordinator."""
    from fedkit.cli import networked

    with edge():
        peer = (coordinator, identity)
        networked.begin(run_file, peer, task, out=out, detach=detach, roster=roster, track=track, as_json=as_json)


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Only this run.")] = None,
    coordinator: Address = HERE,
    identity: Identity = None,
    as_json: Json = False,
) -> None:
    """Show who attends a coordinator and how its runs stand."""
    from fedkit.cli import networked

    with edge():
        networked.status(run, (coordinator, identity), as_json)


@app.command()
def cancel(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")],
    coordinator: Address = HERE,
    identity: Identity = None,
    as_json: Json = False,
) -> None:
    """End a run; its last committed model stands."""
    from fedkit.cli import networked

    with edge():
        networked.cancel(run, (coordinator, identity), as_json)


@app.command()
def weights(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Only this run.")] = None,
    coordinator: Address = HERE,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the run's model to this file.")] = None,
    which: Annotated[Which, typer.Option(help="The last committed model, or that of the best round.")] = Which.FINAL,
    identity: Identity = None,
    as_json: Json = False,
) -> None:
    """List the models whose weights a coordinator keeps, or write those of one to a file."""
    from fedkit.cli import networked

    with edge():
        networked.weights(run, (coordinator, identity), out, which.value, as_json)


@app.command("open")
def unseal(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A sealed model, as fedkit weights --out keeps it.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the model goes.")],
    roster: Annotated[
        Path, typer.Option(metavar="ROSTER.json", help="The members' roster, which knows who sealed it.")
    ],
    identity: Annotated[
        Path,
        typer.Option(
            "--identity",
            envvar="FEDKIT_IDENTITY",
            metavar="FOLDER",
            help="The owner's or a site's folder, with its key.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Open a sealed model with the key of one of those for whom it was sealed."""
    from fedkit.cli import networked

    with edge():
        networked.unseal(file, identity, roster, out, as_json)


@app.command()
def history(
    path: Annotated[Path, typer.Argument(metavar="RUN.jsonl", help="From history/ in a coordinator's folder.")],
    as_json: Json = False,
) -> None:
    """Check a run's history: rounds follow one another, and no result stands in two of them."""
    from fedkit import history
    from fedkit.cli import show

    with edge():
        found = history.check(path)
        if as_json:
            show.print_json(dataclasses.asdict(found))
        else:
            text = f"{path}: {found.rounds} rounds, {found.accepted} results, each in one of them; model {found.model}"
            show.console.print(text, highlight=False, markup=False)


@app.command()
def server(
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0: any.")] = None,
    state: Annotated[Path | None, typer.Option(help="The folder that survives: runs, models, clients.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="module:attr of a task; may be repeated.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="module:attr of a strategy; may be repeated.")] = None,
    heartbeat_s: Annotated[float | None, typer.Option(help="Seconds between heartbeats.")] = None,
    rejoin_s: Annotated[float | None, typer.Option(help="Seconds a client that went away is waited for.")] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Where Prometheus may read, and runs are shown to whoever has STATE/pages."
        ),
    ] = None,
    authority: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="What fedkit ca init wrote: mutual TLS, off loopback too.")
    ] = None,
    enrolment: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where those who have a token may enrol.")
    ] = None,
    roster: Annotated[Path | None, typer.Option(metavar="FILE", help="The members' roster, for every agent.")] = None,
    max_examples: Annotated[
        int | None, typer.Option(min=1, help="The most training rows that one site may claim; default 1,000,000.")
    ] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="A name or address under which this is dialled; may be repeated.")
    ] = None,
    log: Annotated[LogForm, typer.Option(help="How events are written to standard error.")] = LogForm.AUTO,
    tethered: Tethered = False,
) -> None:
    """Run a coordinator. Killed and started again on the same folder, it goes on where it was."""
    from fedkit.cli.serving import coordinating

    given: dict[str, object] = {"listen": listen, "state": state, "metrics": metrics, "authority": authority}
    given |= {"heartbeat_s": heartbeat_s, "rejoin_s": rejoin_s, "max_examples": max_examples}
    given |= {"enrolment": enrolment, "roster": roster, "hosts": tuple(host) if host else None}
    with edge():
        coordinating(task or [], strategy or [], log.value, given, tethered)


@app.command()
def enroll(
    coordinator: Annotated[str, typer.Option(metavar="HOST:PORT", help="The coordinator's enrolment port.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the key and the certificate go.")],
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The token, '-' for standard input; without it you are asked.")
    ] = None,
) -> None:
    """Join a federation: make a key that never leaves this machine, and trade a token for its certificate."""
    from fedkit.cli import trusted

    with edge():
        trusted.join(coordinator, out, token_file)


@app.command()
def demo(
    strategy: Annotated[list[str] | None, typer.Option(help="Only these strategies; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the plot, the model and its history.")] = Path("fedkit-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal models.")] = 42,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Simulate the hospitals instead of starting a coordinator and agents.")
    ] = False,
    dp: Annotated[
        bool, typer.Option("--dp", help="With differential privacy: FedAvg at epsilon 3, and accuracy against epsilon.")
    ] = False,
    aggregation: Annotated[
        Literal["plain", "masked", "bfv", "ckks"],
        typer.Option(
            help="FedAvg, of whose updates nobody sees more than their sum: masked, or encrypted (bfv, ckks)."
        ),
    ] = "plain",
    sealed: Annotated[
        bool, typer.Option("--sealed", help="Weight transfer whose models the coordinator cannot read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """One model across four hospitals: five strategies compared, a plot, an ONNX file."""
    from fedkit.cli.demonstrated import (
        demonstrated,
        demonstrated_privately,
        demonstrated_sealed,
        demonstrated_securely,
    )

    with edge():
        if sealed:
            demonstrated_sealed(out, seed, in_process=in_process, as_json=as_json)
            return
        if aggregation != "plain":
            demonstrated_securely(aggregation, out, seed, in_process=in_process, as_json=as_json)
            return
        if dp:
            demonstrated_privately(out, seed, in_process=in_process, as_json=as_json)
            return
        demonstrated(strategy or [], out, seed, in_process=in_process, as_json=as_json)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or a folder that --out wrote.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the bundle goes.")],
    task: Annotated[
        str | None, typer.Option(help="module:attr of the task, instead of the run's registered name.")
    ] = None,
    best: Annotated[bool, typer.Option(help="The round with the best validation metric, not the last one.")] = False,
    quantize: Annotated[
        Literal["auto", "none", "int8", "int8-dynamic", "fp16"], typer.Option(help="Which variants are tried.")
    ] = "auto",
    calibration: Annotated[
        Literal["mean", "clipped", "noise"] | None,
        typer.Option(help="Where int8 has its ranges from: clients' rows (mean, clipped), or none of them (noise)."),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="What noised ranges may cost each row of a private run, on top of it.")
    ] = None,
    acceptance: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Criteria for a release: what clients examine the model in.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The signing key's; made on first use.")] = None,
    layout: Annotated[
        bundles.Server | None, typer.Option(help="Also for this server, in a folder beside it: FOLDER-triton.")
    ] = None,
    canary: bundles.Canary = None,
    storage_uri: bundles.StorageUri = None,
    coordinator: Annotated[
        str | None,
        typer.Option(envvar="FEDKIT_COORDINATOR", metavar="HOST:PORT", help="Where the run's clients attend."),
    ] = None,
    identity: Identity = None,
    track: Track = None,
    as_json: Json = False,
) -> None:
    """Hand a run's model over: ONNX, quantised and checked by the run's clients, with a signed passport."""
    from fedkit.cli import exported
    from fedkit.deploy.settings import Export

    with edge():
        bundles.require_layout(layout, canary, storage_uri)
        settings = Export(quantize=quantize, calibration=calibration, epsilon=epsilon)
        wish = exported.Wish(settings=settings, best=best, acceptance=acceptance, key=key, track=track)
        handed = exported.exported(run, out, task, (coordinator, identity), wish, as_json)
        served = out.with_name(f"{out.name}-{layout.value}") if layout else None
        if layout and served:
            bundles.laid_out(out, layout, served, canary=canary, storage_uri=storage_uri)
        exported.report(handed, as_json, served)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or a folder that --out wrote.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page: one HTML file that needs nothing else.")],
    bundle: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The run's bundle, where it is not RUN/bundle.")
    ] = None,
    coordinator: Address = HERE,
    identity: Identity = None,
    as_json: Json = False,
) -> None:
    """Write a page of a run: curves, who took part, time, bytes, privacy, refusals, the hand-over."""
    from fedkit.cli.reported import reported

    with edge():
        reported(run, out, bundle, (coordinator, identity), as_json)


app.command()(bundles.verify)
app.command()(bundles.predict)
app.command()(bundles.layout)
