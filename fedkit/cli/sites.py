"""`fedkit client`: the agent, and what its operator can look at before it takes part."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from fedkit.cli.edge import Json, LogForm, Tethered, edge

__all__ = ["client"]

client = typer.Typer(name="client", invoke_without_command=True)

Coordinator = Annotated[
    str | None,
    typer.Option("--coordinator", envvar="FEDKIT_COORDINATOR", metavar="HOST:PORT", help="Whom to dial."),
]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="A registered task, or module:attr; may be repeated.")]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="These settings and more as TOML.")]
IdentityFolder = Annotated[
    Path | None,
    typer.Option("--identity", envvar="FEDKIT_IDENTITY", metavar="FOLDER", help="What fedkit enroll wrote; for TLS."),
]
RosterFile = Annotated[
    Path | None,
    typer.Option("--roster", metavar="FILE", help="The members' roster: work under another one is refused."),
]
PolicyFile = Annotated[Path | None, typer.Option("--policy", metavar="FILE", help="What this site allows, as TOML.")]


@client.callback()
def attend(
    context: typer.Context,
    name: Annotated[str | None, typer.Option(help="This participant's name.")] = None,
    coordinator: Coordinator = None,
    task: Tasks = None,
    config: Config = None,
    state: Annotated[Path | None, typer.Option(help="The folder that survives: results not yet committed.")] = None,
    identity: IdentityFolder = None,
    roster: RosterFile = None,
    policy: PolicyFile = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Assignments worked on at a time.")] = None,
    log: Annotated[LogForm, typer.Option(help="How events are written to standard error.")] = LogForm.AUTO,
    tethered: Tethered = False,
) -> None:
    """Run an agent: it dials a coordinator and trains on the data of this site."""
    given: dict[str, object] = {"name": name, "coordinator": coordinator, "state": state, "identity": identity}
    given |= {"tasks": tuple(task) if task else None, "roster": roster, "policy": policy}
    given |= {"device": device, "threads": threads, "parallel": parallel}
    if context.invoked_subcommand is not None:
        _require_none(given | {"config": config})
        return
    from fedkit.cli.serving import attending

    with edge():
        attending(config, log.value, given, tethered)


def _require_none(given: dict[str, Any]) -> None:
    """Options stand behind the command they belong to."""
    early = [name for name, value in given.items() if value is not None and name not in ("coordinator", "identity")]
    if early:
        raise typer.BadParameter(f"put --{early[0]} behind the command: fedkit client check RUN --{early[0]} ...")


@client.command("check")
def check(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")],
    coordinator: Coordinator = None,
    task: Tasks = None,
    config: Config = None,
    identity: IdentityFolder = None,
    roster: RosterFile = None,
    policy: PolicyFile = None,
    as_json: Json = False,
) -> None:
    """Show what a run would ask of this site, and what the site's policy says to it; exit code 1 where it refuses."""
    from fedkit.cli import show
    from fedkit.client.process import find_tasks
    from fedkit.client.prospect import describe, prospect
    from fedkit.client.settings import policy_of, read

    given: dict[str, object] = {"coordinator": coordinator, "identity": identity, "roster": roster, "policy": policy}
    with edge():
        settings = read(config, **given, tasks=tuple(task) if task else None, name=None if config or identity else "me")
        found = prospect(describe(settings, run), policy_of(settings), find_tasks(settings.tasks))
        if as_json:
            requests = [dataclasses.asdict(request) for request in found.requests]
            show.print_json({"run": run, "state": found.state, "welcome": found.is_welcome, "requests": requests})
        else:
            show.prospect(found)
        if not found.is_welcome:
            raise typer.Exit(1)


@client.command("source")
def source(
    task: Annotated[list[str], typer.Argument(metavar="TASK", help="A registered task, or module:attr.")],
) -> None:
    """Print the digest of a task's source, for a policy that allows this version and no other."""
    from fedkit.cli import show
    from fedkit.client.process import find_tasks
    from fedkit.source import files_of, source_of

    with edge():
        for name, found in find_tasks(tuple(task)).items():
            files = ", ".join(str(path) for path in files_of(found).values())
            show.print_line(f'[tasks.{name}]  # {files}\nsource = "{source_of(found)}"')
