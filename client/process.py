"""The agent process: imports everything, forks what trains, then attends."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fedkit.audit import AuditLog
from fedkit.client.nursery import Nursery
from fedkit.client.settings import AgentSettings
from fedkit.client.worker import Outfit
from fedkit.logs import keep
from fedkit.process import fast_loop, on_stop, tune_malloc
from fedkit.registry import choose_task
from fedkit.task import Task

__all__ = ["attend", "find_tasks"]


def find_tasks(names: tuple[str, ...]) -> dict[str, Task]:
    """The tasks by the names under which assignments speak of them; raises `ConfigError`."""
    found = [choose_task(name if ":" in name else None, name) for name in names]
    return {task.name: task for task in found}


def attend(settings: AgentSettings, *, tethered: bool = False) -> None:
    """Runs one agent until it is told to end, or, `tethered`, until standard input does.

    Raises `TurnedAway` where the coordinator does not want it, `ConfigError` where its folder is in use.
    """
    tune_malloc()
    tasks = find_tasks(settings.tasks)
    nursery = Nursery(Outfit(settings.name, tasks, settings.device, settings.threads))
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        runner.run(_attend(settings, sorted(tasks), nursery, tethered))


async def _attend(settings: AgentSettings, tasks: list[str], nursery: Nursery, tethered: bool) -> None:
    from fedkit.client.agent import Agent
    from fedkit.client.inbox import Inbox
    from fedkit.client.outbox import Outbox
    from fedkit.client.roster import KnownRoster
    from fedkit.client.trainers import Trainers

    folder = Path(settings.state) / settings.name
    outbox = Outbox(folder / "outbox")
    keep(AuditLog(folder / "audit.log"))
    inbox, trainers = Inbox(folder / "inbox", settings.parallel + 1), Trainers(nursery, settings.parallel)
    agent = Agent(settings, tasks, outbox, inbox, trainers, KnownRoster(folder / "roster.json", settings.roster))
    on_stop(agent.stop, tethered=tethered)
    await agent.run()
