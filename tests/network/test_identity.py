"""Nobody gets in who does not belong: every RPC against eight credentials, over real sockets and real TLS."""

from __future__ import annotations

import asyncio
import datetime as dt
import importlib
import json
import pkgutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from structlog.testing import capture_logs

import fedkit
from bench.processes import free_port
from fedkit import protos
from fedkit.audit import verify
from fedkit.client.settings import read
from fedkit.enrolment import enroll
from fedkit.errors import ConfigError, StorageError, TrustError, Unreachable
from fedkit.protos import agents_pb2, identities_pb2
from fedkit.protos.wire import PROTOCOL, SESSION_KEY, Calls, Laden
from fedkit.server.guard import _ROLES, caller
from fedkit.server.process import Coordinator, CoordinatorSettings
from fedkit.strategies import FedAvg
from fedkit.trust import authority as authorities
from fedkit.trust.authority import Authority
from fedkit.trust.certificates import Role, make_key, request_for
from fedkit.trust.identity import Identity
from tests.network import tasks
from tests.network.conftest import CLIENTS, loopback
from tests.network.gates import eventually
from tests.network.inside import Inside

HOUR = dt.timedelta(hours=1)
LOCAL = fedkit.Fit(steps=2, batch_size=8, lr=0.1)
Code = grpc.StatusCode


class Place(Inside):
    """A coordinator with an authority; `authority` is a second hand on that, as the command line has it."""

    def __init__(self, folder: Path) -> None:
        Authority.create(folder / "ca", "hospitals").close()
        self.authority = Authority(folder / "ca")
        self.enrolment = f"127.0.0.1:{free_port()}"
        given = {"authority": folder / "ca", "enrolment": self.enrolment, "state": folder / "server"}
        super().__init__(CoordinatorSettings(listen="127.0.0.1:0", **given), {"plain": tasks.plain})

    def close(self) -> None:
        super().close()
        self.authority.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    found = Place(tmp_path_factory.mktemp("place"))
    yield found
    found.close()


# -- every credential against every RPC --------------------------------------------------------------------------------


def _services() -> dict[str, list[MethodDescriptor]]:
    """Every service of every .proto there is: a new one is in the matrix as soon as it exists."""
    found = {}
    for module in pkgutil.iter_modules(protos.__path__):
        if module.name.endswith("_pb2"):
            descriptor = importlib.import_module(f"fedkit.protos.{module.name}").DESCRIPTOR
            found |= {service.full_name: list(service.methods) for service in descriptor.services_by_name.values()}
    return found


SERVICES = _services()
METHODS = [method for methods in SERVICES.values() for method in methods]
NO_ENROLMENT = [method for method in METHODS if method.containing_service.name != "Enrolment"]


# Who may call what, written down a second time: the guard's own table is what is tested.
ROLES = {
    "fedkit.v1.Agents": {Role.AGENT},
    "fedkit.v1.Operators": {Role.OPERATOR},
    "fedkit.v1.Runs": {Role.AGENT, Role.OPERATOR},
    "fedkit.v1.Identities": {Role.AGENT, Role.OPERATOR},
}


def test_each_service_has_its_roles() -> None:
    assert _ROLES == ROLES
    assert SERVICES.keys() == {*ROLES, "fedkit.v1.Enrolment"}


def label(of: Any) -> str:
    return f"{of.containing_service.name}.{of.name}" if isinstance(of, MethodDescriptor) else str(of)


class Credentials:
    """The eight, made once: what each shows in its handshake."""

    def __init__(self, place: Place, folder: Path) -> None:
        ca = place.authority
        foreign = Authority.create(folder / "foreign", "hospitals")
        old = Authority(ca.folder, lifetime=dt.timedelta(seconds=-60))
        stranger = foreign.identity(Role.AGENT, "upenn")
        self.agent = ca.identity(Role.AGENT, "upenn")
        self.operator = ca.identity(Role.OPERATOR, "ada")
        self.other_site = ca.identity(Role.AGENT, "rwth")
        self.wrong_authority = Identity(stranger.key, stranger.certificate, ca.pem)  # it trusts the right one
        self.expired = old.identity(Role.AGENT, "upenn")
        self.expired_operator = old.identity(Role.OPERATOR, "ada")
        self.revoked = {role: ca.identity(role, "mallory") for role in (Role.AGENT, Role.OPERATOR)}
        ca.revoke("mallory")
        serials = {one.holder.serial for one in self.revoked.values()}
        eventually(lambda: serials <= place.coordinator._trust.guard.revoked, "the revocation is heard of")
        old.close()
        foreign.close()


@pytest.fixture(scope="module")
def credentials(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return Credentials(place, tmp_path_factory.mktemp("credentials"))


def dialled(address: str, authority: bytes, identity: Identity | None) -> grpc.Channel:
    shown = () if identity is None else (identity.key, identity.certificate)
    return grpc.secure_channel(
        address, grpc.ssl_channel_credentials(authority, *shown), [("grpc.enable_http_proxy", 0)]
    )


def code_of(channel: grpc.Channel, method: MethodDescriptor, request: bytes = b"", session: bytes = b"") -> Code:
    """What a call with one message ends with. A stream's first answer counts as OK, and the call is ended."""
    sides = (method.client_streaming, method.server_streaming)
    shape = "_".join("stream" if many else "unary" for many in sides)
    call = getattr(channel, shape)(f"/{method.containing_service.full_name}/{method.name}")
    given = iter([request]) if method.client_streaming else request
    metadata = [(SESSION_KEY, session)] if session else None
    try:
        answer = call(given, timeout=20, metadata=metadata)
        if method.server_streaming:
            next(iter(answer), None)
            answer.cancel()
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


@pytest.mark.parametrize("method", METHODS, ids=label)
@pytest.mark.parametrize("who", ["none", "wrong authority", "expired", "expired operator"])
def test_who_has_no_valid_certificate_gets_no_handshake(
    place: Place, credentials: Credentials, who: str, method: MethodDescriptor
) -> None:
    shown = None if who == "none" else getattr(credentials, who.replace(" ", "_"))
    with dialled(place.address, place.authority.pem, shown) as channel:
        assert code_of(channel, method) is Code.UNAVAILABLE


@pytest.mark.parametrize("method", NO_ENROLMENT, ids=label)
def test_a_revoked_certificate_opens_nothing(place: Place, credentials: Credentials, method: MethodDescriptor) -> None:
    for role in ROLES[method.containing_service.full_name]:
        with dialled(place.address, place.authority.pem, credentials.revoked[role]) as channel:
            assert code_of(channel, method) is Code.UNAUTHENTICATED


@pytest.mark.parametrize("method", NO_ENROLMENT, ids=label)
@pytest.mark.parametrize("role", [Role.AGENT, Role.OPERATOR])
def test_each_role_calls_what_is_its_own_and_nothing_else(
    place: Place, credentials: Credentials, role: Role, method: MethodDescriptor
) -> None:
    mine = credentials.agent if role is Role.AGENT else credentials.operator
    allowed = role in ROLES[method.containing_service.full_name]
    with dialled(place.address, place.authority.pem, mine) as channel:
        if not allowed:
            assert code_of(channel, method) is Code.PERMISSION_DENIED
            return
        with attending(channel, "upenn") as session:
            request = identities_pb2.RenewRequest(request=mine.request()).SerializeToString()
            found = code_of(channel, method, request if method.name == "Renew" else b"", session)
    assert found in (Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION)


class attending:
    """Attends with a channel; gives the session's token. Of a channel that may not attend, an empty one."""

    def __init__(self, channel: grpc.Channel, name: str) -> None:
        self._calls = Calls(channel, agents_pb2.DESCRIPTOR.services_by_name["Agents"])
        self._name = name
        self._over = threading.Event()

    def __enter__(self) -> bytes:
        hello = agents_pb2.Hello(
            protocol=PROTOCOL, client=self._name, instance=bytes(16), tasks=["toy"], max_examples=10
        )

        def said() -> Iterator[Laden]:
            yield Laden(agents_pb2.FromAgent(hello=hello))
            self._over.wait(30)

        self.stream = self._calls.attend(said())
        try:
            return bytes(next(self.stream).message.welcome.session)
        except grpc.RpcError:
            return b""

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.stream.cancel()


def names_here(place: Place) -> set[str]:
    return {session.name for session in place.coordinator.attendance.sessions.values()}


def test_a_site_attends_under_the_name_of_its_certificate_whatever_it_says(
    place: Place, credentials: Credentials
) -> None:
    with dialled(place.address, place.authority.pem, credentials.other_site) as channel, attending(channel, "upenn"):
        assert "rwth" in names_here(place)
        assert "upenn" not in names_here(place)


WITH_SESSION = [method for method in SERVICES["fedkit.v1.Agents"] if method.name != "Attend"]


@pytest.mark.parametrize("method", WITH_SESSION, ids=label)
def test_a_session_is_of_no_use_to_another_site(
    place: Place, credentials: Credentials, method: MethodDescriptor
) -> None:
    with (
        dialled(place.address, place.authority.pem, credentials.agent) as mine,
        attending(mine, "upenn") as session,
        dialled(place.address, place.authority.pem, credentials.other_site) as theirs,
    ):
        assert session
        assert code_of(theirs, method, b"", session) is Code.UNAUTHENTICATED
        assert code_of(mine, method, b"", session) is not Code.UNAUTHENTICATED


def test_a_site_renews_its_own_certificate_only(place: Place, credentials: Credentials) -> None:
    with dialled(place.address, place.authority.pem, credentials.other_site) as channel:
        calls = Calls(channel, identities_pb2.DESCRIPTOR.services_by_name["Identities"])
        made = calls.renew(identities_pb2.RenewRequest(request=credentials.other_site.request()), timeout=20)
        assert credentials.other_site.renewed(made.certificate).holder.name == "rwth"
        for request in (
            credentials.agent.request(),
            request_for(make_key(), Role.OPERATOR, "rwth"),
            b"",
            b"x" * 10_000,
        ):
            with pytest.raises(grpc.RpcError) as caught:
                calls.renew(identities_pb2.RenewRequest(request=request), timeout=20)
            assert caught.value.code() is Code.PERMISSION_DENIED


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_the_enrolment_port_takes_tokens_and_nothing_else(place: Place, method: MethodDescriptor) -> None:
    with dialled(place.enrolment, place.authority.pem, None) as channel:
        expected = Code.PERMISSION_DENIED if method.name == "Enroll" else Code.UNIMPLEMENTED
        assert code_of(channel, method) is expected


def test_the_main_port_takes_no_tokens(place: Place, credentials: Credentials) -> None:
    [method] = [one for one in METHODS if one.name == "Enroll"]
    with dialled(place.address, place.authority.pem, credentials.agent) as channel:
        assert code_of(channel, method) is Code.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("shown", "why"),
    [
        ({"transport_security_type": [b"ssl"], "ssl_tls_version": [b"TLSv1.2"]}, "TLS 1.3"),
        ({"transport_security_type": [b"ssl"]}, "TLS 1.3"),
        ({"transport_security_type": [b"ssl"], "ssl_tls_version": [b"TLSv1.3"]}, "no certificate"),
        ({"transport_security_type": [b"ssl"], "ssl_tls_version": [b"TLSv1.3"], "x509_pem_cert": [b"x"]}, "PEM"),
    ],
)
def test_older_tls_and_no_certificate_are_nobody(shown: dict[str, list[bytes]], why: str) -> None:
    class Context:
        def auth_context(self) -> dict[str, list[bytes]]:
            return shown

    with pytest.raises(TrustError, match=why):
        caller(Context())


# -- the life of a certificate -----------------------------------------------------------------------------------------


def test_a_revocation_ends_the_streams_that_are_open(place: Place) -> None:
    site, person = place.authority.identity(Role.AGENT, "leaky"), place.authority.identity(Role.OPERATOR, "leaky")
    with dialled(place.address, place.authority.pem, site) as channel:
        attends = attending(channel, "leaky")
        with attends as session:
            assert session
            place.authority.revoke("leaky")
            assert "revoked" in end_of(attends.stream)
    eventually(lambda: "leaky" not in names_here(place), "the session is over")
    with (
        pytest.raises(TrustError, match="revoked: ask the operator"),
        fedkit.connect(place.address, person, patience_s=1) as coordinator,
    ):
        coordinator.status()


@pytest.mark.parametrize("error", [StorageError("the disk is gone"), RuntimeError("what should not happen")], ids=type)
def test_a_revocation_that_cannot_be_read_at_once_is_heard_of_later(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trust, failing = place.coordinator._trust, [error]
    site = place.authority.identity(Role.AGENT, "lost")
    eventually(lambda: trust._seen == trust._authority.changes(), "the authority is looked at")

    def revoked(real: Callable[[], frozenset[int]] = trust._authority.revoked) -> frozenset[int]:
        if failing:
            raise failing.pop()
        return real()

    monkeypatch.setattr(trust._authority, "revoked", revoked)
    with capture_logs() as events:
        place.authority.revoke("lost")
        eventually(lambda: site.holder.serial in trust.guard.revoked, "the revocation is heard of")
    assert failing == []
    said = "authority unreadable" if isinstance(error, StorageError) else "watch ended"
    assert [event["event"] for event in events if event["log_level"] == "error"] == [said]


def test_whoever_is_turned_away_again_and_again_is_on_record_once_a_minute(
    place: Place, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = next(method for method in METHODS if method.name == "Describe")
    guard = place.coordinator._trust.guard
    guard._noted.clear()

    def noted() -> list[tuple[str, str]]:
        with capture_logs() as events, dialled(place.address, place.authority.pem, revoked) as channel:
            for _ in range(3):
                assert code_of(channel, method) is Code.UNAUTHENTICATED
        return [(event["name"], event["why"]) for event in events if event["event"] == "turned away"]

    revoked = credentials.revoked[Role.AGENT]
    assert noted() == [("mallory", "revoked")]
    assert noted() == []
    monkeypatch.setattr("fedkit.server.guard._NOTED_S", 0.0)
    assert noted() == [("mallory", "revoked")] * 3


def end_of(stream: Any) -> str:
    """What a stream says that the coordinator ends, because it does not know its caller any more."""
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stream:
            continue
    assert caught.value.code() is Code.UNAUTHENTICATED
    return str(caught.value.details())


def test_a_stream_ends_with_its_certificate(place: Place) -> None:
    brief = Authority(place.authority.folder, lifetime=dt.timedelta(seconds=2))
    site = brief.identity(Role.AGENT, "brief")
    brief.close()
    with dialled(place.address, place.authority.pem, site) as channel:
        attends = attending(channel, "brief")
        with attends as session:
            assert session
            assert "expired" in end_of(attends.stream)
    assert time.time() >= site.holder.expires
    eventually(lambda: "brief" not in names_here(place), "the session is over")


def test_no_other_role_can_pose_as_a_coordinator(place: Place, credentials: Credentials) -> None:
    for posing in (credentials.agent, credentials.operator):
        server = grpc.server(ThreadPoolExecutor(1))
        chain = [(posing.key, posing.certificate)]
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(chain, place.authority.pem, True))
        server.start()
        with (
            pytest.raises(Unreachable),
            fedkit.connect(f"127.0.0.1:{port}", credentials.operator, patience_s=1) as coordinator,
        ):
            coordinator.status()
        server.stop(None)


def test_an_identity_is_renewed_before_it_expires_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authorities, "LIFETIME", dt.timedelta(seconds=15))  # a process has to start in it
    place = Place(tmp_path / "place")
    folder = place.authority.identity(Role.AGENT, "upenn").save(tmp_path / "identity")
    first = Identity.load(folder).holder
    server = place.coordinator._trust._identity.holder.serial
    federation = loopback(tmp_path / "agents", ("upenn",), tls=True)
    federation.port = int(place.address.rpartition(":")[2])
    folder.parent.joinpath("agents", "identities").mkdir(parents=True)
    federation.identity("upenn").symlink_to(folder)
    federation.start_client("upenn")
    try:
        eventually(lambda: "upenn" in names_here(place), "upenn attends")
        pid = federation.processes["upenn"].pid
        eventually(lambda: time.time() > first.expires, "the first certificate is of no use any more")
        assert Identity.load(folder).holder.expires > time.time()
        eventually(lambda: "upenn" in names_here(place), "upenn attends with its new certificate")
        assert federation.processes["upenn"].pid == pid
        assert federation.processes["upenn"].poll() is None
        assert place.coordinator._trust._identity.holder.serial != server
        token = place.authority.token(Role.OPERATOR, "ada", HOUR)
        assert enroll(place.enrolment, str(token), tmp_path / "late").holder.name == "ada"
    finally:
        federation.stop()
        place.close()


def test_an_operators_identity_is_renewed_when_it_is_used(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Authority(place.authority.folder, lifetime=dt.timedelta(minutes=5))
    mine = short.identity(Role.OPERATOR, "grace")
    short.close()
    folder = mine.save(tmp_path / "grace")
    with fedkit.connect(place.address, folder, patience_s=1) as coordinator:
        coordinator.status()
    assert Identity.load(folder) == mine  # it is not yet time
    monkeypatch.setattr("fedkit.trust.identity._RENEWED_AT", 0.0)
    with fedkit.connect(place.address, folder, patience_s=1) as coordinator:
        assert coordinator.status().runs == ()
    assert Identity.load(folder).holder.expires > time.time() + 24 * 3600
    assert Identity.load(folder).key == mine.key


# -- enrolment ---------------------------------------------------------------------------------------------------------


def test_a_token_becomes_an_identity_over_the_network(place: Place, tmp_path: Path) -> None:
    token = place.authority.token(Role.OPERATOR, "joan", HOUR)
    mine = enroll(place.enrolment, str(token), tmp_path / "joan")
    assert (mine.holder.role, mine.holder.name) == (Role.OPERATOR, "joan")
    with fedkit.connect(place.address, tmp_path / "joan", patience_s=1) as coordinator:
        assert coordinator.status().runs == ()
    with pytest.raises(ConfigError, match="holds an identity already"):
        enroll(place.enrolment, str(token), tmp_path / "joan")
    with pytest.raises(TrustError, match="used before"):
        enroll(place.enrolment, str(token), tmp_path / "thief")


def test_an_answer_that_was_lost_is_asked_for_again_with_the_same_token(place: Place, tmp_path: Path) -> None:
    token = place.authority.token(Role.AGENT, "mit", HOUR)
    first = enroll(place.enrolment, str(token), tmp_path / "mit")
    (tmp_path / "mit" / "certificate.pem").unlink()  # as if it had never arrived
    assert enroll(place.enrolment, str(token), tmp_path / "mit").key == first.key


def test_whoever_stands_in_between_is_told_nothing(place: Place, tmp_path: Path) -> None:
    """The token's fingerprint is another authority's: the token is not sent, so that it works where it belongs."""
    elsewhere = Place(tmp_path / "elsewhere")
    token = elsewhere.authority.token(Role.AGENT, "upenn", HOUR)
    with pytest.raises(TrustError, match="another federation than the token"):
        enroll(place.enrolment, str(token), tmp_path / "upenn")
    assert not (tmp_path / "upenn").exists()
    enroll(elsewhere.enrolment, str(token), tmp_path / "upenn")
    elsewhere.close()


def test_a_place_without_a_coordinator_is_said_to_be_one(tmp_path: Path, place: Place) -> None:
    token = str(place.authority.token(Role.AGENT, "upenn", HOUR))
    with pytest.raises(Unreachable, match="is this the enrolment port"):
        enroll(f"127.0.0.1:{free_port()}", token, tmp_path / "x")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        threading.Thread(target=lambda: mute.accept()[0].close(), daemon=True).start()
        with pytest.raises(TrustError, match=r"speaks no TLS 1\.3"):
            enroll(f"127.0.0.1:{mute.getsockname()[1]}", token, tmp_path / "x")


# -- what people are told ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def insecure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with loopback(tmp_path_factory.mktemp("insecure"), ()) as federation:
        yield federation.address


def test_a_refused_handshake_says_what_to_do(
    place: Place, credentials: Credentials, insecure: str, tmp_path: Path
) -> None:
    foreign = Authority.create(tmp_path / "foreign", "hospitals").identity(Role.OPERATOR, "ada")
    cases: list[tuple[str, Identity | None, str]] = [
        (place.address, None, "speaks TLS: give the folder that fedkit enroll wrote"),
        (insecure, credentials.operator, r"speaks no TLS 1\.3"),
        (place.address, foreign, "of another federation than this identity"),
        (place.address, credentials.expired_operator, "has expired on .* enrol again"),
        (f"127.0.0.1:{free_port()}", credentials.operator, "nothing answers .* is fedkit server running there"),
    ]
    for address, identity, why in cases:
        with (
            pytest.raises(Unreachable, match=why),
            fedkit.connect(address, identity, patience_s=0.2) as coordinator,
        ):
            coordinator.status()


def test_a_name_the_certificate_does_not_have_is_named(place: Place, credentials: Credentials) -> None:
    address = place.address.replace("127.0.0.1", "127.1")  # the same, by a name that is in no certificate
    with (
        pytest.raises(Unreachable, match=r"is for .*127\.0\.0\.1.*, not for 127\.1: .* --host 127\.1"),
        fedkit.connect(address, credentials.operator, patience_s=0.2) as coordinator,
    ):
        coordinator.status()


def test_an_agents_identity_is_no_operators(place: Place, credentials: Credentials, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="of the kind operator; upenn is an agent"):
        fedkit.connect(place.address, credentials.agent)
    with pytest.raises(TrustError, match="of the kind agent; ada is an operator"):
        read(None, identity=credentials.operator.save(tmp_path / "ada"), tasks=("toy",))
    folder = credentials.agent.save(tmp_path / "upenn")
    assert read(None, identity=folder, tasks=("toy",)).name == "upenn"
    with pytest.raises(ConfigError, match="the identity is that of upenn"):
        read(None, identity=folder, name="rwth", tasks=("toy",))


def test_enrolment_without_an_authority_and_metrics_off_loopback_are_refused(tmp_path: Path) -> None:
    async def begin(**settings: Any) -> None:
        await Coordinator(CoordinatorSettings(state=tmp_path / "s", **settings), {}).start()

    with pytest.raises(ConfigError, match="belong to TLS"):
        asyncio.run(begin(listen="127.0.0.1:0", enrolment="127.0.0.1:0"))
    Authority.create(tmp_path / "ca", "hospitals").close()
    with pytest.raises(ConfigError, match="metrics are served without TLS"):
        asyncio.run(begin(listen="127.0.0.1:0", authority=tmp_path / "ca", metrics="0.0.0.0:9464"))


# -- a federation ------------------------------------------------------------------------------------------------------


def test_a_run_over_tls_gives_the_same_bits_and_its_logs_hold_no_secret(tmp_path: Path) -> None:
    strategy = FedAvg(rounds=2, local=LOCAL)
    with loopback(tmp_path, CLIENTS, tls=True) as federation:
        with fedkit.connect(federation.address, federation.operator) as coordinator:
            over = coordinator.run(tasks.plain, strategy, seed=5, min_clients=len(CLIENTS), progress=False)
        with pytest.raises(Unreachable, match="speaks TLS"), fedkit.connect(federation.address, patience_s=0) as nobody:
            nobody.status()
    assert over.weights == fedkit.simulate(tasks.plain, strategy, clients=CLIENTS, seed=5, progress=False).weights
    audits = sorted(tmp_path.rglob("audit.log"))
    assert len(audits) == 1 + len(CLIENTS)
    assert all(verify(path).lines >= 5 for path in audits)
    kept = [json.loads(line) for path in audits for line in path.read_text().splitlines()]
    assert over.weights.digest in {one["model"] for one in kept if one["event"] == "round committed"}
    assert {one["client"] for one in kept if one["event"] == "settled"} == set(CLIENTS)
    logs = b"".join(path.read_bytes() for path in [*(tmp_path / "logs").iterdir(), *audits])
    assert b'"tls": true' in logs
    for path in tmp_path.rglob("*.pem"):
        if "key" in path.name:
            middle = path.read_bytes().splitlines()[1]
            assert middle not in logs
