"""`fedkit verify`, `predict` and `layout`: what is done with a bundle."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedkit.cli.edge import Json, edge
from fedkit.errors import ConfigError

if TYPE_CHECKING:
    from fedkit.deploy.verify import Verified

__all__ = ["Canary", "Server", "StorageUri", "laid_out", "layout", "predict", "require_layout", "verify"]

Folder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that fedkit export wrote.")]
Signer = Annotated[
    str | None, typer.Option(metavar="HEX", help="The public key that must have signed it, 64 hexadecimal characters.")
]

Canary = Annotated[
    int | None, typer.Option(metavar="PERCENT", help="KServe: the share of the traffic that this model gets.")
]
StorageUri = Annotated[
    str | None, typer.Option(metavar="URI", help="KServe: where the models folder will be, s3://...")
]


class Network(enum.StrEnum):
    """Which network of a bundle."""

    SHIPPED = "shipped"
    FP32 = "fp32"


class Pixels(enum.StrEnum):
    """What the pixels of a picture are to the model."""

    UNIT = "unit"
    BYTE = "byte"


class Server(enum.StrEnum):
    """For what a bundle is laid out."""

    TRITON = "triton"
    KSERVE = "kserve"
    ORT_MOBILE = "ort-mobile"


def verify(folder: Folder, signer: Signer = None, as_json: Json = False) -> None:
    """Check a bundle: its signature, every byte, its networks, and that they compute here what PyTorch computed."""
    from fedkit.cli import show
    from fedkit.deploy.verify import Examination

    with edge():
        examination = Examination(folder, signer)
        checks = list(examination.checks())
        holds = all(check.passed for check in checks)
        if as_json:
            results = [{"name": one.name, "result": one.result, "detail": one.detail} for one in checks]
            facts = {"folder": str(folder), "holds": holds, "signer": examination.signer, "checks": results}
            show.print_json(facts)
        else:
            show.verification([(one.name, one.result, one.detail) for one in checks])
            show.say(_verdict(examination.signer, holds, signer is not None))
    if not holds:
        raise typer.Exit(1)


def _verdict(signer: str | None, holds: bool, was_expected: bool) -> str:
    if not holds:
        return "This is not the bundle that was signed: do not deploy it. Fetch it again, or ask who gave it to you."
    if was_expected:
        return f"Every check has passed. Signed by {signer}, as expected."
    return f"Every check has passed. Signed by {signer}: compare that with their key, or give it as --signer."


def predict(
    folder: Folder,
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A CSV, or a folder of PNG or JPEG pictures.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The CSV of outputs.")],
    variant: Annotated[Network, typer.Option(help="The network that is to be deployed, or float32.")] = Network.SHIPPED,
    label: Annotated[
        str | None, typer.Option("--id", metavar="COLUMN", help="A column that is kept and names the row.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="The model's inputs in its order, by name or position; default: all."),
    ] = None,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Whether line 1 names columns; default: if no numbers.")
    ] = None,
    pixels: Annotated[Pixels, typer.Option(help="Pixels from 0 to 1, or from 0 to 255.")] = Pixels.UNIT,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows at a time.")] = None,
    signer: Signer = None,
    as_json: Json = False,
) -> None:
    """Run a bundle, once it is verified, on a CSV or a folder of pictures."""
    from fedkit.cli import show
    from fedkit.deploy.predict import predict as answer
    from fedkit.deploy.rows import Pictures, Table
    from fedkit.deploy.verify import verify_bundle

    rows: dict[str, Any] = {} if batch is None else {"batch": batch}
    with edge():
        chosen = [one.strip() for one in columns.split(",")] if columns else None
        table = Table(columns=chosen, label=label, has_header=header, **rows)
        pictures = Pictures(values=pixels.value, **rows)
        with show.stages(as_json) as begin:
            begin("verifying")
            bundle, is_fp32 = verify_bundle(folder, signer), variant is Network.FP32
            watch = begin("predicting")
            found = answer(bundle, source, out, table=table, pictures=pictures, use_fp32=is_fp32, watch=watch)
        facts = {"path": str(found.path), "rows": found.rows, "columns": list(found.columns), "signer": bundle.signer}
        if as_json:
            show.print_json(facts | {"variant": "fp32" if is_fp32 else bundle.passport.shipped})
        else:
            show.say(f"{found.path}: {found.rows:,} rows of {', '.join(found.columns)}")


def layout(
    folder: Folder,
    to: Annotated[
        Server, typer.Option(help="Triton's repository, that and a KServe InferenceService, or a phone's ORT file.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where it goes.")],
    name: Annotated[str | None, typer.Option(help="The model's name there; default: the task's.")] = None,
    canary: Canary = None,
    storage_uri: StorageUri = None,
    signer: Signer = None,
    as_json: Json = False,
) -> None:
    """Write a bundle, once it is verified, as a server wants it. Nothing is served or sent."""
    from fedkit.cli import show

    with edge():
        bundle, path = laid_out(folder, to, out, name, canary=canary, storage_uri=storage_uri, signer=signer)
        files = sorted(str(one.relative_to(path)) for one in path.rglob("*") if one.is_file())
        if as_json:
            show.print_json({"path": str(path), "files": files, "signer": bundle.signer})
        else:
            show.say(f"{path}: {', '.join(files)}")


def require_layout(to: Server | None, canary: int | None, storage_uri: str | None) -> None:
    """Raises `ConfigError` for what a server does not take, or does not do without."""
    if to is not Server.KSERVE and (canary is not None or storage_uri is not None):
        raise ConfigError("--canary and --storage-uri are KServe's: nothing else splits traffic or fetches models")
    if to is Server.KSERVE and storage_uri is None:
        raise ConfigError("KServe needs --storage-uri, where the models folder will be: s3://...")


def laid_out(
    folder: Path,
    to: Server,
    out: Path,
    name: str | None = None,
    *,
    canary: int | None = None,
    storage_uri: str | None = None,
    signer: str | None = None,
) -> tuple[Verified, Path]:
    """Verifies a bundle and writes it as a server wants it; raises `ConfigError` for what that server does not take."""
    from fedkit.deploy import layouts
    from fedkit.deploy.verify import verify_bundle

    require_layout(to, canary, storage_uri)
    bundle = verify_bundle(folder, signer)
    if to is Server.TRITON:
        return bundle, layouts.triton(bundle, out, name)
    if to is Server.ORT_MOBILE:
        return bundle, layouts.ort_mobile(bundle, out, name)
    return bundle, layouts.kserve(bundle, out, name, storage_uri=storage_uri, canary_percent=canary)
