"""`fedkit models`: the registry of models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedkit.cli.edge import Json, edge

__all__ = ["models"]

models = typer.Typer(
    name="models", help="Versions of models, and which one is in production: a registry.", no_args_is_help=True
)

Folder = Annotated[
    Path, typer.Option("--registry", envvar="FEDKIT_REGISTRY", metavar="FOLDER", help="The registry's folder.")
]
Spec = Annotated[
    str, typer.Argument(metavar="NAME:VERSION", help="A number, or canary or production, as in heart:production.")
]
Note = Annotated[str, typer.Option(help="Why, for the audit log.")]
HERE = Path("fedkit-registry")


@models.command("list")
def models_list(registry: Folder = HERE, as_json: Json = False) -> None:
    """List all versions of all models."""
    from fedkit.cli import released

    with edge():
        released.listed(registry, as_json)


@models.command("add")
def models_add(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that fedkit export wrote.")],
    name: Annotated[str, typer.Option(help="The model's name.")],
    signer: Annotated[
        str | None, typer.Option(metavar="HEX", help="The public key that must have signed the bundle.")
    ] = None,
    note: Note = "",
    registry: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Keep a copy of a bundle as the next version of a model, a candidate; it is verified first."""
    from fedkit.cli import released

    with edge():
        released.added(registry, bundle, name, signer, note, as_json)


@models.command("show")
def models_show(
    version: Annotated[
        str, typer.Argument(metavar="NAME[:VERSION]", help="Without a version: the one in production, or the newest.")
    ],
    registry: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Show one version and what became of the model's versions."""
    from fedkit.cli import released

    with edge():
        released.shown(registry, version, as_json)


@models.command("promote")
def models_promote(
    version: Spec,
    to: Annotated[Literal["canary", "production"], typer.Option(help="The stage.")],
    criteria: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TOML; default: criteria.toml in the registry's folder."),
    ] = None,
    without_criteria: Annotated[
        bool, typer.Option("--without-criteria", help="Judge by none; the audit log says so.")
    ] = False,
    note: Note = "",
    registry: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Put a version to its next stage, if it passes every criterion; the one that was there is archived."""
    from fedkit.cli import released

    with edge():
        given = released.Judging(criteria, without_criteria)
        released.promoted(registry, version, to, given, note, as_json)


@models.command("rollback")
def models_rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model's name.")],
    note: Note = "",
    registry: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Put back the version that was in production before, and archive the present one."""
    from fedkit.cli import released

    with edge():
        released.rolled_back(registry, name, note, as_json)


@models.command("archive")
def models_archive(version: Spec, note: Note = "", registry: Folder = HERE, as_json: Json = False) -> None:
    """Take a version out of use; rollback passes it over."""
    from fedkit.cli import released

    with edge():
        released.archived(registry, version, note, as_json)


@models.command("diff")
def models_diff(
    one: Annotated[str, typer.Argument(metavar="A", help="NAME[:VERSION]")],
    other: Annotated[str, typer.Argument(metavar="B", help="NAME[:VERSION]")],
    registry: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Show what the passports of two versions say differently."""
    from fedkit.cli import released

    with edge():
        released.compared(registry, one, other, as_json)
