"""Shared noise over a network: each site's policy, ledger and refusals, whatever the coordinator says."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

import fedkit
from fedkit.cli.main import app
from fedkit.crypto.masks import packed
from fedkit.crypto.messages import mapping_from, to_mapping
from fedkit.errors import Reason, RunFailed
from fedkit.privacy.accounting import epsilon_of, rdp_of
from fedkit.privacy.ledger import Ledger, Reservation
from fedkit.rounds import masked as rounds_masked
from fedkit.rounds.federation import JournaledFederation
from fedkit.rounds.masked import Asked, MaskedSum
from fedkit.rounds.shield import EVERY_CLIENT
from fedkit.strategies import FedAvg, FedSGD
from fedkit.work import Gradient
from tests.network import steps, tasks
from tests.network.conftest import ROOT
from tests.network.gates import here
from tests.network.hatchery import Hatched
from tests.network.test_masked import CLIENTS, TASK, Lying, lie_watch, started
from tests.network.test_spending import stored

DELTA = 1e-3
STRATEGY = FedSGD(rounds=1, lr=0.1, local=Gradient(batch_size=8), participation=fedkit.Participation(attempts=1))
DATA = '[tasks.plain]\ndata = "cohort-7"\n\n[budgets.cohort-7]\nepsilon = 20.0\ndelta = 1e-3\nevaluate = true\n'
POLICIES = {
    "ada": DATA,
    "bea": DATA + "\n[shared_noise]\nmin_colluders = 0\n",
    "cyd": DATA + "\n[shared_noise]\n",
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lying]:
    """Sites as they are on loopback without a policy, and a coordinator that lives in this process."""
    with started(tmp_path_factory.mktemp("shared"), Lying) as running:
        assert isinstance(running, Lying)
        yield running
        running.inside.close()


@pytest.fixture(scope="module")
def careful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lying]:
    """All but Dan have a policy and a budget, and Ada's says nothing of shared noise."""
    folder = tmp_path_factory.mktemp("careful")
    for name, text in POLICIES.items():
        (folder / f"{name}.toml").write_text(text)
    with started(folder / "federation", Lying) as running:
        assert isinstance(running, Lying)
        for name in POLICIES:
            running.kill(name)
            running.client_options[:] = ["--policy", str(folder / f"{name}.toml")]
            running.start_client(name)
        here(running, *CLIENTS)
        yield running
        running.inside.close()


def privacy(**changes: Any) -> fedkit.Privacy:
    given = {"noise_multiplier": 4.0, "delta": DELTA, "noise": "shared", "dropouts": 0, "colluders": 1} | changes
    return fedkit.Privacy(dp=fedkit.DP(**given), aggregation="masked")


def trained(federation: Lying, strategy: fedkit.Strategy = STRATEGY, **changes: Any) -> fedkit.Result:
    with fedkit.connect(federation.address, federation.operator) as coordinator:
        return coordinator.run(tasks.plain, strategy, seed=3, min_clients=4, privacy=privacy(**changes), progress=False)


def newest(federation: Hatched, name: str) -> list[Reservation]:
    """What a site has reserved for its last run."""
    book = Ledger(federation.folder / "clients" / name / "ledger.db", look=True)
    try:
        every = book.account("plain").reservations
        return [one for one in every if one.run == every[-1].run]
    finally:
        book.close()


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_the_ledger_says_with_whom_the_noise_was_shared_and_epsilon_follows_from_it(federation: Lying) -> None:
    result = trained(federation, STRATEGY.replace(rounds=2), noise_multiplier=None, epsilon=5.0)
    rates = set()
    for name in CLIENTS:
        steps = [one.steps for one in newest(federation, name)]
        assert [(one.parts.cohort, one.parts.dropouts, one.parts.colluders) for one in steps] == [(4, 0, 1)] * 2
        assert result.history[-1].epsilon[name] == pytest.approx(epsilon_of(rdp_of(steps), DELTA))
        assert 4.8 < result.history[-1].epsilon[name] <= 5.0
        rates |= {one.q for one in steps}
    assert len(rates) == 1  # however many rows a site has
    assert {record.refusals for record in result.history} == {()}


def test_whole_clients_are_noted_apart_from_what_rows_have_cost(federation: Lying) -> None:
    local = fedkit.Fit(steps=2, batch_size=8, lr=0.05)
    result = trained(federation, FedAvg(rounds=1, local=local), level="client", few_clients=True)
    assert set(result.history[0].epsilon) == {EVERY_CLIENT}
    book = Ledger(federation.folder / "clients" / "ada" / "ledger.db", look=True)
    [account] = [one for one in book.accounts() if one.data == "plain/client"]
    book.close()
    [one] = account.reservations
    assert one.is_whole
    assert (one.clip, one.steps.q, one.steps.parts.cohort) == (1.0, 1.0, 4)
    assert epsilon_of(rdp_of([one.steps]), DELTA) == pytest.approx(result.history[0].epsilon[EVERY_CLIENT])


def test_the_report_of_a_ledger_says_with_whom_noise_was_shared(federation: Lying) -> None:
    run = newest(federation, "ada")[0].run
    path = federation.folder / "clients" / "ada" / "ledger.db"
    said = " ".join(CliRunner().invoke(app, ["privacy", "report", str(path)]).output.split())
    assert f"{run} on plain: noise for one row, shared by 4 clients, of which 0 may be missing and 1 tell" in said
    assert "on plain/client: noise for the whole client, shared by 4 clients" in said


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hatched]:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "archive").mkdir()
    environment = {"PYTHONPATH": str(ROOT), steps.ARCHIVE: str(folder / "archive")}
    about = {"environment": environment, "is_measured": False}
    with Hatched(folder, [TASK], CLIENTS, roster=True, rejoin_s=60.0, **about) as running:
        yield running


@pytest.mark.parametrize("step", [step for step in steps.SPENDING if "reservation" in step])
def test_no_part_leaves_a_site_that_its_ledger_does_not_have_on_disk(killed: Hatched, step: str) -> None:
    killed.kill("ada")
    killed.due["ada"] = step
    killed._restart("ada")
    killed.wait_for_server()
    here(killed, *CLIENTS)
    strategy, rule = STRATEGY.replace(rounds=3), privacy()
    with fedkit.connect(killed.address, killed.operator) as coordinator:
        run = coordinator.submit(tasks.plain, strategy, seed=3, min_clients=4, privacy=rule)
        assert killed.processes["ada"].wait(30) == -signal.SIGKILL
        killed._restart("ada")
        killed.wait_for_server()
        list(coordinator.watch(run))
        result = coordinator.result(run, tasks.plain)
    reserved = newest(killed, "ada")
    noised = stored(killed.folder / "archive", {one.assignment for one in reserved})
    assert [len(contents) for contents in noised.values()] == [1] * len(reserved) == [1] * 3
    assert result.history[-1].epsilon["ada"] == pytest.approx(
        epsilon_of(rdp_of([one.steps for one in reserved]), DELTA)
    )


# -- the policy --------------------------------------------------------------------------------------------------------


def test_a_site_shares_noise_only_where_its_policy_says_so(careful: Lying) -> None:
    result = trained(careful, dropouts=1)
    [record] = result.history
    why = "noise: a part of it, shared with other sites (allowed: all of it, without [shared_noise])"
    assert {(one.client, one.reason, one.detail) for one in record.refusals} == {("ada", Reason.POLICY, why)}
    assert record.clients == CLIENTS[1:]
    assert set(record.epsilon) == set(CLIENTS[1:])


# -- a coordinator that lies -------------------------------------------------------------------------------------------


def told(monkeypatch: pytest.MonkeyPatch, step: str, change: Any) -> None:
    """From now on the coordinator asks `step` of each mean otherwise."""
    init = MaskedSum.__init__

    def lying_init(self: MaskedSum, masked: Any, ask: Any, *rest: Any) -> None:
        masked._least = 0  # nothing holds this coordinator back

        async def lied(asked: Asked) -> None:
            await ask(change(asked) if asked.step == step and masked.session.round > 1 else asked)

        init(self, masked, lied, *rest)

    monkeypatch.setattr(rounds_masked.MaskedSum, "__init__", lying_init)


def without_last(asked: Asked) -> Asked:
    names = sorted(asked.messages)[:-1]
    return replace(asked, messages=dict.fromkeys(names, packed(*(name.encode() for name in names))))


def test_nobody_signs_or_opens_a_sum_of_fewer_than_n_less_d(federation: Lying, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, "confirm", without_last)
    opened = lie_watch(monkeypatch)
    with pytest.raises(RunFailed, match=r"who delivered: 3 members, and the least is 4"):
        trained(federation)
    assert len(opened) == len(CLIENTS)  # of the rows that round 0 counts, and of nothing else


def test_nobody_opens_a_sum_that_fewer_than_n_less_d_have_signed(
    federation: Lying, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fewer(asked: Asked) -> Asked:
        return replace(
            asked,
            messages={
                name: to_mapping(dict(list(mapping_from(text).items())[:-1])) for name, text in asked.messages.items()
            },
        )

    told(monkeypatch, "unmask", fewer)
    with pytest.raises(RunFailed, match=r"3 members agree with it on who delivered, and it takes 4"):
        trained(federation)


def test_what_is_said_of_dropouts_once_the_vector_is_made_changes_nothing(
    federation: Lying, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps after the vector name a layout in which one client more may be missing."""
    told(monkeypatch, "confirm", without_last)
    asked_as = JournaledFederation._group

    async def relaxed(self: Any, question: Any, *given: Any, **more: Any) -> None:
        for name, masking in question.masking.items():
            if masking.step in ("confirm", "unmask") and masking.layout.noise is not None:
                noise = replace(masking.layout.noise, dropouts=1)
                question.masking[name] = replace(masking, layout=replace(masking.layout, noise=noise))
        await asked_as(self, question, *given, **more)

    monkeypatch.setattr(JournaledFederation, "_group", relaxed)
    with pytest.raises(RunFailed, match=r"who delivered: 3 members, and the least is 4"):
        trained(federation)


def test_a_site_that_is_told_of_less_noise_than_the_others_makes_noise_of_their_sum(
    federation: Lying, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_as = JournaledFederation._group

    async def less(self: Any, question: Any, *given: Any, **more: Any) -> None:
        masking = question.masking.get("ada")
        if masking is not None and masking.step == "vector" and masking.layout.noise is not None:
            noise = replace(masking.layout.noise, multiplier=0.5)
            question.masking["ada"] = replace(masking, layout=replace(masking.layout, noise=noise))
        await asked_as(self, question, *given, **more)

    monkeypatch.setattr(JournaledFederation, "_group", less)
    opened = lie_watch(monkeypatch)
    with pytest.raises(RunFailed):
        trained(federation)
    assert len(opened) == len(CLIENTS)  # of round 0


@pytest.mark.parametrize(
    "change", [{"dropouts": 1}, {"colluders": 0}, {"norm": 0.5}], ids=lambda change: next(iter(change))
)
def test_a_layout_with_another_noise_than_the_runs_is_refused(
    federation: Lying, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    of_rows = fedkit.privacy.shared.Sharing.of_rows

    def other(self: Any, *given: Any) -> Any:
        layout = of_rows(self, *given)
        return replace(layout, noise=replace(layout.noise, **change))

    monkeypatch.setattr(fedkit.privacy.shared.Sharing, "of_rows", other)
    with pytest.raises(RunFailed, match="not the one that the run's privacy asks for"):
        trained(federation)


def test_noise_too_small_for_the_runs_epsilon_is_refused_by_each_sites_own_account(
    federation: Lying, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_rows = fedkit.privacy.shared.Sharing.of_rows

    def quiet(self: Any, *given: Any) -> Any:
        layout = of_rows(self, *given)
        return replace(layout, noise=replace(layout.noise, multiplier=layout.noise.multiplier / 2))

    monkeypatch.setattr(fedkit.privacy.shared.Sharing, "of_rows", quiet)
    with pytest.raises(RunFailed, match="would have cost epsilon"):
        trained(federation, noise_multiplier=None, epsilon=2.0)


def test_a_sum_without_noise_is_not_trained_for_where_noise_is_to_be_shared(
    federation: Lying, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_rows = fedkit.privacy.shared.Sharing.of_rows
    monkeypatch.setattr(
        fedkit.privacy.shared.Sharing, "of_rows", lambda self, *given: replace(of_rows(self, *given), noise=None)
    )
    with pytest.raises(RunFailed, match="noise is to be shared, and no sum is named"):
        trained(federation)
