"""The agent process: imports everything, forks what trains, then attends."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.audit import AuditLog
from fedkit.client.nursery import Nursery
from fedkit.client.settings import AgentSettings, policy_of
from fedkit.client.worker import Outfit
from fedkit.logs import keep
from fedkit.policy import Policy
from fedkit.process import fast_loop, on_stop, tune_malloc
from fedkit.registry import choose_task
from fedkit.task import Task
from fedkit.trust.signing import has_signing_key, load_signing_key

__all__ = ["attend", "find_tasks"]


def find_tasks(names: tuple[str, ...]) -> dict[str, Task]:
    """The tasks by the names under which assignments speak of them; raises `ConfigError`."""
    found = [choose_task(name if ":" in name else None, name) for name in names]
    return {task.name: task for task in found}


def _signing_key(settings: AgentSettings) -> Ed25519PrivateKey | None:
    """The site's own signing key, where there is one: members of a roster vouch for themselves with it."""
    folder = settings.identity
    return None if folder is None or not has_signing_key(folder) else load_signing_key(folder)


def attend(settings: AgentSettings, *, tethered: bool = False) -> None:
    """Runs one agent until it is told to end, or, `tethered`, until standard input does.

    Raises `TurnedAway` where the coordinator does not want it, `ConfigError` where its folder is in use.
    """
    tune_malloc()
    tasks = find_tasks(settings.tasks)
    policy = policy_of(settings)
    threads = min((count for count in (settings.threads, policy.threads) if count is not None), default=None)
    nursery = Nursery(Outfit(settings.name, tasks, settings.device, threads, policy))
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        runner.run(_attend(settings, tasks, policy, nursery, tethered))


async def _attend(
    settings: AgentSettings, tasks: dict[str, Task], policy: Policy, nursery: Nursery, tethered: bool
) -> None:
    from fedkit.client.agent import Agent
    from fedkit.client.inbox import Inbox
    from fedkit.client.outbox import Outbox
    from fedkit.client.permits import Permits
    from fedkit.client.roster import KnownRoster
    from fedkit.client.surroundings import LinuxSurroundings
    from fedkit.client.trainers import Trainers
    from fedkit.client.visits import Visits
    from fedkit.privacy.ledger import Ledger

    folder = Path(settings.state) / settings.name
    outbox = Outbox(folder / "outbox")
    keep(AuditLog(folder / "audit.log"))
    inbox, trainers = Inbox(folder / "inbox", settings.parallel + 1), Trainers(nursery, settings.parallel)
    roster = KnownRoster(folder / "roster.json", settings.roster, settings.name, _signing_key(settings))
    visits, ledger = Visits(folder / "visits.db"), Ledger(folder / "ledger.db")
    permits = Permits(policy, tasks, roster, visits, LinuxSurroundings(), ledger)
    agent = Agent(settings, sorted(tasks), outbox, inbox, trainers, roster, permits)
    on_stop(agent.stop, tethered=tethered)
    await agent.run()
