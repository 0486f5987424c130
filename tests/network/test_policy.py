"""Each site decides what leaves it: real agents with policies of their own, and a coordinator that asks for more."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

import fedkit
from fedkit.cli import show
from fedkit.cli.main import app
from fedkit.errors import Reason, RunFailed
from fedkit.loopback import Loopback
from fedkit.protos import agents_pb2, convert
from fedkit.protos.channels import channel
from fedkit.protos.wire import CHANNEL_OPTIONS, PROTOCOL, Calls, Laden
from fedkit.source import source_of
from fedkit.strategies import CyclicWeightTransfer, FedAvg, FedSGD
from fedkit.tracking import Event
from fedkit.trust.authority import Authority
from fedkit.trust.certificates import Role
from fedkit.trust.identity import Identity
from fedkit.trust.roster import Chain
from fedkit.trust.signing import make_signing_key, public_of
from fedkit.trust.vouchers import Voucher
from fedkit.work import Gradient
from tests.network import tasks
from tests.network.conftest import CLIENTS, ROOT, loopback
from tests.network.gates import here

LOCAL = fedkit.Fit(steps=4, batch_size=8, lr=0.1)
PLAIN = 'aggregation = ["plain", "masked"]\n'
POLICY = f"""
{PLAIN}
strategies = ["FedAvg", "FedSGD"]
work = ["fit", "gradient", "evaluate"]
min_cohort = 3
max_lr = 0.5
rounds_per_day = 12
metrics_per_client = true

[tasks.plain]
source = "{source_of(tasks.plain)}"
data = "cohort-7"

[tasks.stateful]
source = "{"0" * 64}"
"""
OPEN = PLAIN + "min_batch_size = 1\nmetrics_per_client = true\nmin_rows_per_class = 1\n"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory):
    """Three members of a roster. Ada has a policy; Bea allows more; Cyd has the defaults."""
    folder = tmp_path_factory.mktemp("policy")
    running = loopback(folder, tls=True, heartbeat_s=2.0)
    running._make_authority()
    running.tls = True
    keys = {name: make_signing_key(running.identity(name)) for name in CLIENTS}
    chain = Chain.begin("hospitals", {name: public_of(key) for name, key in keys.items()})
    for name, key in keys.items():
        chain = chain.sign(name, key)
    chain.save(folder / "roster.json")
    for name, text in (("ada", POLICY), ("bea", OPEN), ("cyd", PLAIN)):
        (folder / f"{name}.toml").write_text(text)
    running.server_options[:] = ["--roster", str(folder / "roster.json")]
    running.start_server()
    running.wait_for_server()
    try:
        for name in CLIENTS:
            options(running, name)
            running.start_client(name)
        here(running, *CLIENTS)
        yield running
    finally:
        running.stop()


def options(federation: Loopback, name: str) -> None:
    folder = federation.folder
    federation.client_options[:] = ["--roster", str(folder / "roster.json"), "--policy", str(folder / f"{name}.toml")]


def trained(federation: Loopback, strategy: object = None, task: fedkit.Task = tasks.plain, **given: object):
    strategy = strategy or FedAvg(rounds=1, local=LOCAL)
    given = {"privacy": fedkit.Privacy(aggregation="plain")} | given
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        return coordinator.run(task, strategy, seed=3, min_clients=3, progress=False, **given)


def why(result: fedkit.Result, client: str = "ada") -> set[str]:
    found = [refusal for record in result.history for refusal in record.refusals if refusal.client == client]
    assert all(refusal.reason is Reason.POLICY for refusal in found)
    return {refusal.detail for refusal in found}


def test_what_the_policies_allow_is_done_by_all_members(federation: Loopback) -> None:
    result = trained(federation, evaluate=fedkit.Evaluation())
    assert [record.clients for record in result.history] == [CLIENTS]
    assert [record.refusals for record in result.history] == [()]
    assert result.test


def test_scores_of_single_clients_are_shown_where_their_policy_says_so(federation: Loopback) -> None:
    events: list[Event] = []
    result = trained(federation, evaluate=fedkit.Evaluation(), track=events.append)
    assert set(result.history[0].per_client) == {"bea"}  # ada has too few rows of a class, cyd the defaults
    assert set(result.test_per_client) == {"bea"}
    assert set(result.test) == set(result.test_per_client["bea"])
    told = {name for event in events for name in re.findall(r"\b(ada|bea|cyd)\b", repr(event))}
    assert told == {"bea"}
    assert events[1].metrics["client/bea/valid/loss"] == result.history[0].per_client["bea"]["loss"]
    assert events[1].metrics["clients"] == 3
    assert events[2].tags["fedkit.model"] == result.weights.digest


@pytest.mark.parametrize(
    ("strategy", "task", "detail"),
    [
        (FedAvg(rounds=1, local=LOCAL.replace(batch_size=4)), tasks.plain, "batch size: 4 (allowed: at least 8)"),
        (FedAvg(rounds=1, local=LOCAL.replace(lr=0.75)), tasks.plain, "learning rate: 0.75 (allowed: at most 0.5)"),
        (
            FedSGD(rounds=1, lr=0.1, local=Gradient(batch_size=2)),
            tasks.plain,
            "batch size: 2 (allowed: at least 8)",
        ),
        (FedAvg(rounds=1, local=LOCAL), tasks.counting, "task: counting (allowed: plain, stateful)"),
    ],
    ids=["batch", "rate", "gradient", "task"],
)
def test_a_wish_beyond_a_policy_is_refused_with_both_values_and_costs_that_site_only(
    federation: Loopback, strategy: object, task: fedkit.Task, detail: str
) -> None:
    result = trained(federation, strategy.replace(participation=fedkit.Participation(quorum=1)), task)
    assert why(result) == {detail}
    assert why(result, "bea") == set()
    assert "bea" in result.history[0].clients
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        [ada] = [client for client in coordinator.status().clients if client.name == "ada"]
    assert ada.last_refusal.endswith(f": {detail}")


def test_another_version_of_a_task_is_refused(federation: Loopback) -> None:
    [detail] = why(trained(federation, task=tasks.stateful))
    assert detail == f"source of stateful: {source_of(tasks.stateful)[:16]} (allowed: {'0' * 16})"


def test_weight_transfer_passes_a_site_by_that_does_not_allow_it(federation: Loopback) -> None:
    result = trained(federation, CyclicWeightTransfer(rounds=1, local=LOCAL))
    assert result.history[0].clients == ("bea", "cyd")
    assert why(result) == {"strategy: CyclicWeightTransfer (allowed: FedAvg, FedSGD) (and 1 more)"}


def test_a_site_that_releases_no_scores_rejects_a_hop_without_telling_them(federation: Loopback) -> None:
    gated = CyclicWeightTransfer(rounds=2, local=LOCAL, gate=fedkit.Gate(max_drop=0.3))
    record = trained(federation, gated, tasks.hostile).history[1]
    [refusal] = [one for one in record.refusals if one.client == "bea"]
    assert refusal.reason is Reason.GATE
    assert refusal.detail == "cyd did not accept it: its loss on validation data got worse, max_drop is 0.3"
    assert record.clients == ("cyd",)


def checked(federation: Loopback, run: str, name: str, *given: str) -> Any:
    """`fedkit client check RUN` at one of the sites."""
    arguments = ["client", "check", run, "--task", "tests.network.tasks:plain", "--coordinator", federation.address]
    arguments += ["--identity", str(federation.identity(name)), "--roster", str(federation.folder / "roster.json")]
    return CliRunner().invoke(app, [*arguments, "--policy", str(federation.folder / f"{name}.toml"), *given])


def test_a_site_can_look_at_a_run_before_it_joins(federation: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show.console, "width", 160)
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        names = [
            coordinator.submit(
                tasks.plain, FedAvg(rounds=1, local=local), name=f"look-{local.batch_size}", min_clients=3
            )
            for local in (LOCAL, LOCAL.replace(batch_size=4))
        ]
        dp = fedkit.Privacy(dp=fedkit.DP(epsilon=2.0, delta=1e-3))
        coordinator.submit(tasks.plain, FedAvg(rounds=1, local=LOCAL), name="look-private", privacy=dp, min_clients=99)
        good, bad = (checked(federation, name, "ada") for name in names)
    assert (good.exit_code, bad.exit_code) == (0, 1), good.output + bad.output
    assert "4 steps in batches of 8, learning rate 0.1" in good.stdout
    assert "batch size: 4 (allowed: at least 8)" in bad.stdout
    told = json.loads(checked(federation, names[1], "bea", "--json").stdout)
    assert told["welcome"] is True
    assert [(request["kind"], request["objections"]) for request in told["requests"]] == [("fit", []), ("evaluate", [])]
    secret = checked(federation, "look-private", "bea", "--json")
    assert "privately: epsilon 2 at delta 0.001" in secret.stdout
    assert "as it has no budget" in secret.stdout or "without an id" in secret.stdout
    nobody = checked(federation, "no-such-run", "bea")
    assert nobody.exit_code == 1
    assert "there is no run 'no-such-run'" in nobody.stderr


def test_rounds_of_a_day_are_counted_over_all_runs(federation: Loopback) -> None:
    result = trained(federation, FedAvg(rounds=13, local=LOCAL))
    assert why(result) == {"rounds within 24 hours: 13 (allowed: at most 12)"}
    asked = [record.round for record in result.history if "ada" in record.clients]
    assert len(asked) <= 12  # those of the tests before count too


class Minted:
    """An agent under a certificate that only the authority vouches for. It attends, and refuses whatever is asked."""

    def __init__(self, federation: Loopback, identity: Identity) -> None:
        name = identity.holder.name
        word = Voucher.sign(name, Ed25519PrivateKey.generate(), Chain.load(federation.folder / "roster.json").last)
        hello = agents_pb2.Hello(protocol=PROTOCOL, client=name, instance=name[:16].ljust(16).encode(), max_examples=9)
        hello.tasks.append("plain")
        hello.voucher.CopyFrom(convert.voucher_to_proto(word))
        self._says: queue.Queue[Laden | None] = queue.Queue()
        self._says.put(Laden(agents_pb2.FromAgent(hello=hello)))
        self._channel = channel(federation.address, identity, CHANNEL_OPTIONS)
        calls = Calls(self._channel, agents_pb2.DESCRIPTOR.services_by_name["Agents"])
        self._stream = calls.attend(iter(self._says.get, None))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for message, _ in self._stream:
                if message.HasField("assignment"):
                    refusal = agents_pb2.Refusal(assignment_id=message.assignment.id, reason="failed")
                    self._says.put(Laden(agents_pb2.FromAgent(refusal=refusal)))

    def close(self) -> None:
        self._says.put(None)
        self._stream.cancel()
        self._channel.close()


def test_sites_that_a_coordinator_mints_reach_nobodys_minimum_cohort(federation: Loopback) -> None:
    for name in ("bea", "cyd"):
        federation.processes[name].terminate()
        federation.processes[name].wait(20)
    authority = Authority(federation.authority)
    minted = [Minted(federation, authority.identity(Role.AGENT, f"eve{number}")) for number in range(5)]
    authority.close()
    try:
        here(federation, "ada", *(f"eve{number}" for number in range(5)))
        strategy = FedAvg(rounds=1, local=LOCAL, participation=fedkit.Participation(quorum=1, attempts=1))
        with pytest.raises(RunFailed, match="of 6 clients asked 6 will not contribute"):
            trained(federation, strategy)
        with fedkit.connect(federation.address, federation.operator) as coordinator:
            [ada] = [client for client in coordinator.status().clients if client.name == "ada"]
    finally:
        for one in minted:
            one.close()
    assert "members of the roster asked together: 1 (allowed: at least 3)" in ada.last_refusal
    assert (federation.folder / "logs" / "server.log").read_text().count("voucher refused") == 5


def test_a_policy_that_counts_members_needs_a_roster(federation: Loopback, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("min_cohort = 3\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fedkit", "client", "--name", "zoe", "--task", "tests.network.tasks:plain"),
            *("--policy", str(tmp_path / "policy.toml"), "--coordinator", federation.address),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1
    assert "min_cohort 3 counts members of the roster: give --roster and --identity" in " ".join(done.stderr.split())
