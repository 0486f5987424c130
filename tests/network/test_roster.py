"""Sites work under the roster they know, whoever runs the coordinator."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import fedkit
from fedkit.client.roster import KnownRoster
from fedkit.errors import Reason, Refused, RunFailed, TrustError
from fedkit.loopback import Loopback
from fedkit.strategies import FedAvg
from fedkit.trust.roster import Chain
from fedkit.trust.signing import load_signing_key, make_signing_key, public_of
from tests.network import tasks
from tests.network.conftest import CLIENTS, loopback
from tests.network.gates import here

LOCAL = fedkit.Fit(steps=2, batch_size=8, lr=0.1)
KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([i] * 32)) for i, name in enumerate((*CLIENTS, "dot"), 1)}
PUBLIC = {name: public_of(key) for name, key in KEYS.items()}


def signed(chain: Chain, *names: str) -> Chain:
    for name in names:
        chain = chain.sign(name, KEYS[name])
    return chain


FIRST = signed(Chain.begin("hospitals", {name: PUBLIC[name] for name in CLIENTS}, 2), *CLIENTS)
SECOND = signed(FIRST.propose(add={"dot": PUBLIC["dot"]}), "ada", "bea", "dot")
MINTED = signed(FIRST.propose(add={"dot": PUBLIC["dot"]}), "ada", "dot")  # one signature is missing


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory):
    """Three sites that know the first version, and a coordinator that is started anew with one roster or another."""
    folder = tmp_path_factory.mktemp("roster")
    FIRST.save(folder / "known.json")
    with loopback(folder, client_options=["--roster", str(folder / "known.json")]) as running:
        yield running


def with_roster(federation: Loopback, chain: Chain | None) -> None:
    """The coordinator ends and comes back with another roster."""
    federation.server_options[:] = []
    if chain is not None:
        chain.save(federation.folder / "servers.json")
        federation.server_options[:] = ["--roster", str(federation.folder / "servers.json")]
    federation.processes["server"].terminate()
    federation.processes["server"].wait(20)
    federation.start_server()
    federation.wait_for_server()
    here(federation, *CLIENTS)


def trained(federation: Loopback) -> fedkit.Result:
    with fedkit.connect(federation.address) as coordinator:
        strategy = FedAvg(rounds=1, local=LOCAL, participation=fedkit.Participation(attempts=1))
        plain = fedkit.Privacy(aggregation="plain")  # these sites have no keys of their own
        return coordinator.run(tasks.plain, strategy, seed=3, min_clients=len(CLIENTS), progress=False, privacy=plain)


def forked() -> Chain:
    return signed(Chain.begin("hospitals", {"dot": PUBLIC["dot"], "ada": PUBLIC["ada"]}, 1), "dot", "ada")


@pytest.mark.parametrize("chain", [None, forked()], ids=["none", "another"])
def test_work_under_no_roster_or_another_one_is_refused_with_both_versions(
    federation: Loopback, chain: Chain | None
) -> None:
    with_roster(federation, chain)
    with pytest.raises(RunFailed):
        trained(federation)
    logs = "".join(path.read_text() for path in (federation.folder / "logs").glob("*.log"))
    theirs = "no roster" if chain is None else f"version 1 ({chain.last.digest[:16]})"
    said = f"this site knows version 1 of the roster ({FIRST.last.digest[:16]}), the coordinator has {theirs}"
    assert said in logs


def test_a_version_that_follows_is_accepted_kept_and_not_taken_back(federation: Loopback) -> None:
    with_roster(federation, FIRST)
    first = trained(federation)
    with_roster(federation, SECOND)
    assert trained(federation).weights == first.weights
    for name in CLIENTS:
        assert Chain.load(federation.folder / "clients" / name / "roster.json") == SECOND
    federation.kill("bea")
    federation.start_client("bea")  # its own file still holds the first version
    here(federation, *CLIENTS)
    assert trained(federation).weights == first.weights
    with_roster(federation, FIRST)
    with pytest.raises(RunFailed):
        trained(federation)


def test_a_coordinator_does_not_start_with_a_roster_that_is_not_signed(tmp_path: Path) -> None:
    from fedkit.server.process import Coordinator, CoordinatorSettings

    MINTED.save(tmp_path / "roster.json")
    with pytest.raises(TrustError, match="version 2 of the roster still needs signatures: 1 of bea, cyd"):
        Coordinator(CoordinatorSettings(listen="127.0.0.1:0", state=tmp_path, roster=tmp_path / "roster.json"), {})


# -- what a site keeps -------------------------------------------------------------------------------------------------


def known(folder: Path, chain: Chain) -> KnownRoster:
    chain.save(folder / "given.json")
    return KnownRoster(folder / "roster.json", folder / "given.json")


def test_a_site_hears_of_what_follows_and_of_nothing_else(tmp_path: Path) -> None:
    roster = known(tmp_path, FIRST)
    assert not roster.hear(FIRST.to_json())
    for strange, why in ((MINTED, "still needs signatures"), (forked(), "does not follow")):
        with pytest.raises(TrustError, match=why):
            roster.hear(strange.to_json())
    with pytest.raises(TrustError, match="not a roster"):
        roster.hear("{}")
    assert roster.version == FIRST.last
    bare = [dataclasses.replace(one, signatures={}) for one in SECOND.versions[:1]]
    assert roster.hear(Chain((*bare, *SECOND.versions[1:])).to_json()) == SECOND.last
    assert Chain.load(tmp_path / "roster.json") == SECOND  # what was known keeps the signatures it had
    assert not roster.hear(FIRST.to_json())
    assert KnownRoster(tmp_path / "roster.json", tmp_path / "given.json").version == SECOND.last
    assert KnownRoster(tmp_path / "roster.json", None).version == SECOND.last


def test_a_site_without_a_roster_takes_none_from_a_coordinator(tmp_path: Path) -> None:
    roster = KnownRoster(tmp_path / "roster.json", None)
    assert not roster.hear(FIRST.to_json())
    assert roster.version is None
    roster.require(7, b"anything")


@pytest.mark.parametrize(("version", "digest"), [(0, b""), (1, bytes(32)), (2, bytes.fromhex(FIRST.last.digest))])
def test_an_assignment_under_another_version_is_refused(tmp_path: Path, version: int, digest: bytes) -> None:
    roster = known(tmp_path, FIRST)
    roster.require(1, bytes.fromhex(FIRST.last.digest))
    with pytest.raises(Refused, match="this site knows version 1") as caught:
        roster.require(version, digest)
    assert caught.value.reason is Reason.POLICY


def test_a_signing_key_is_made_once_and_is_the_sites_alone(tmp_path: Path) -> None:
    key = make_signing_key(tmp_path / "site")
    assert public_of(make_signing_key(tmp_path / "site")) == public_of(key)
    path = tmp_path / "site" / "signing.pem"
    assert path.stat().st_mode & 0o077 == 0
    path.chmod(0o644)
    with pytest.raises(TrustError, match="chmod 600"):
        load_signing_key(tmp_path / "site")
    path.chmod(0o600)
    path.write_text("nothing")
    with pytest.raises(TrustError, match="does not hold a signing key"):
        load_signing_key(tmp_path / "site")
    with pytest.raises(TrustError, match="fedkit roster key --identity"):
        load_signing_key(tmp_path)
