"""The commands, and the edge at which every error becomes one clear message."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from fedkit import __version__
from fedkit.errors import FedkitError

__all__ = ["app"]

app = typer.Typer(
    name="fedkit",
    help="Train one model where the data is, and hand it over as ONNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output instead of tables.")]


@contextlib.contextmanager
def _edge() -> Iterator[None]:
    """An error that fedkit knows ends with its message and exit code 1; everything else keeps its traceback."""
    from fedkit.cli import show

    try:
        yield
    except FedkitError as error:
        show.errors.print(f"fedkit: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        show.errors.print("fedkit: stopped; nothing half-written was left behind", style="yellow")
        raise typer.Exit(130) from None


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
    as_json: Json = False,
) -> None:
    """Train a run file's task over simulated clients on this machine."""
    from fedkit.cli.simulated import simulated

    with _edge():
        simulated(run_file, task, clients.split(",") if clients else None, workers, out, as_json)


@app.command()
def demo(
    strategy: Annotated[list[str] | None, typer.Option(help="Only these strategies; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the plot, the model and its history.")] = Path("fedkit-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal models.")] = 42,
    as_json: Json = False,
) -> None:
    """One model across four hospitals: five strategies compared, a plot, an ONNX file."""
    from fedkit.cli.demonstrated import demonstrated

    with _edge():
        demonstrated(strategy or [], out, seed, as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that fedkit simulate --out wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for model.onnx.")],
    task: Annotated[
        str | None, typer.Option(help="module:attr of the task, instead of the run's registered name.")
    ] = None,
    best: Annotated[bool, typer.Option(help="The round with the best validation metric, not the last one.")] = False,
    as_json: Json = False,
) -> None:
    """Write a run's model as ONNX, checked against PyTorch."""
    from fedkit.cli.exported import exported

    with _edge():
        found = exported(run, out, task, best)
        _report_export(dataclasses.asdict(found) | {"path": str(found.path)}, as_json)


def _report_export(fields: dict[str, object], as_json: bool) -> None:
    from fedkit.cli import show

    if as_json:
        show.print_json(fields)
        return
    show.console.print(f"{fields['path']}: {fields['size_bytes']:,} bytes, float32, dynamic batch")
    show.console.print(f"ONNX Runtime and PyTorch differ by {fields['difference']:.1e} (relative)", highlight=False)
