"""kill -9 wherever privacy is spent: no noise leaves a site that its ledger does not have on disk."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

import fedkit
from fedkit.privacy.accounting import epsilon_of, rdp_of
from fedkit.privacy.ledger import Ledger
from fedkit.strategies import FedAvg
from tests.network import steps, tasks
from tests.network.gates import here
from tests.network.hatchery import Hatched

CLIENTS = ("ada", "bea")
REPEATS = int(os.environ.get("FEDKIT_SPENDING_KILLS", "1"))  # of each step
STRATEGY = FedAvg(rounds=3, local=fedkit.Fit(steps=2, batch_size=8, lr=0.05))
PRIVACY = fedkit.Privacy(dp=fedkit.DP(noise_multiplier=2.0, delta=1e-3))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hatched]:
    folder = tmp_path_factory.mktemp("spending")
    (folder / "archive").mkdir()
    about = {"environment": {steps.ARCHIVE: str(folder / "archive")}, "is_measured": False}
    with Hatched(folder, ["tests.network.tasks:plain"], CLIENTS, rejoin_s=60.0, **about) as running:
        yield running


@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize("step", steps.SPENDING)
def test_nothing_is_counted_too_low_wherever_a_process_is_killed(federation: Hatched, step: str, repeat: int) -> None:
    victim = step.partition(":")[0]
    federation.kill(victim)
    federation.due[victim] = step
    federation._restart(victim)
    federation.wait_for_server()
    here(federation, *CLIENTS)
    with fedkit.connect(federation.address) as coordinator:
        name = f"{'-'.join(step.replace(':', '').split())}-{repeat}"
        run = coordinator.submit(tasks.plain, STRATEGY, name=name, seed=3, min_clients=2, privacy=PRIVACY)
        assert federation.processes[victim].wait(30) == -signal.SIGKILL
        federation._restart(victim)
        federation.wait_for_server()
        list(coordinator.watch(run))
        result = coordinator.result(run, tasks.plain)
    assert [record.refusals for record in result.history] == [()] * STRATEGY.rounds
    for client in CLIENTS:
        require_counted(federation.folder, client, name, result)


def require_counted(folder: Path, client: str, name: str, result: fedkit.Result) -> None:
    """Each noised update that was ever stored has its reservation, and no reservation two of them."""
    ledger = Ledger(folder / "clients" / client / "ledger.db", look=True)
    [account] = ledger.accounts()
    ledger.close()
    reserved = {one.assignment: one for one in account.reservations if one.run.startswith(f"{name}.")}
    noised = stored(folder / "archive", reserved.keys())
    assert set(noised) == set(reserved)
    assert len(reserved) == STRATEGY.rounds
    assert all(len(contents) == 1 for contents in noised.values())
    assert all(one.steps.count == 2 for one in reserved.values())
    told = result.history[-1].epsilon[client]
    spent = epsilon_of(rdp_of([one.steps for one in reserved.values()]), PRIVACY.dp.delta)
    assert told == pytest.approx(spent, rel=1e-12)


def stored(archive: Path, assignments: object) -> dict[str, set[str]]:
    """The different updates that were stored for each assignment, by the digests of their content."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in archive.iterdir():
        key = path.name.partition(".")[0]
        if path.suffix != ".json" and key in assignments:  # type: ignore[operator]
            found[key].add(blake3(path.read_bytes()).hexdigest())
    return found
