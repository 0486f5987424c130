"""The coordinator's side of TLS: its own certificate, the guard in front of its services, and the enrolment port."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from typing import Any

import grpc
import structlog

from fedkit.address import parts
from fedkit.errors import ConfigError, StorageError
from fedkit.protos import identities_pb2
from fedkit.protos.wire import STRANGERS_OPTIONS, handlers
from fedkit.server.guard import Guard
from fedkit.server.identities import EnrolmentService, IdentityService
from fedkit.trust.authority import Authority
from fedkit.trust.certificates import Role
from fedkit.trust.identity import Identity

__all__ = ["Trust", "listen"]

log = structlog.get_logger("fedkit.server")

_LOOK_S = 0.25  # between two looks for revocations
_NAME = "coordinator"


class Trust:
    """Everything a coordinator does about identities. `hosts` are what clients may dial, besides its usual names."""

    def __init__(self, authority: Authority, address: str, hosts: Sequence[str]) -> None:
        self._authority = authority
        self._hosts = sorted({*_usual(parts(address)[0]), *hosts})
        self._identity = authority.identity(Role.COORDINATOR, _NAME, self._hosts)
        self._seen = -1
        self._enrolment: Any = None
        self.guard = Guard(authority.revoked())

    def credentials(self, *, mutual: bool = True) -> grpc.ServerCredentials:
        """TLS, `mutual` but for enrolment; a certificate that is renewed counts from the next connection on."""
        shown = self._identity

        def newer() -> grpc.ServerCertificateConfiguration | None:  # asked for at each handshake, in a thread of gRPC's
            nonlocal shown
            before, shown = shown, self._identity
            return None if shown is before else self._configuration(shown)

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(shown),
            newer,  # type: ignore[arg-type]  # it may return None
            require_client_authentication=mutual,
        )

    def renewal(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What serves renewals, behind the guard."""
        service = identities_pb2.DESCRIPTOR.services_by_name["Identities"]
        return handlers(service, self.guard.around(service, IdentityService(self._authority)))

    async def open_enrolment(self, address: str) -> int:
        """Listens for those who have a token and no certificate yet; the port."""
        server = grpc.aio.server(options=STRANGERS_OPTIONS)
        service = identities_pb2.DESCRIPTOR.services_by_name["Enrolment"]
        server.add_generic_rpc_handlers((handlers(service, EnrolmentService(self._authority)),))
        port = listen(server, address, self.credentials(mutual=False))
        await server.start()
        self._enrolment = server
        log.info("enrolment open", address=f"{address.rpartition(':')[0]}:{port}")
        return port

    async def watch(self) -> None:
        """Hears of revocations, which another process writes down, and renews the coordinator's own certificate."""
        while True:
            try:
                self._look()
            except StorageError as error:
                log.error("authority unreadable", why=str(error))
            await asyncio.sleep(_LOOK_S)

    def _look(self) -> None:
        seen = self._authority.changes()
        if seen != self._seen:
            revoked = self._authority.revoked()
            for serial in sorted(revoked - self.guard.revoked):
                log.info("revoked", serial=f"{serial:x}")
            self.guard.revoke(revoked)
            self._seen = seen  # not before: what cannot be read now is read at the next look
        if time.time() >= self._identity.renew_at:
            self._identity = self._authority.identity(Role.COORDINATOR, _NAME, self._hosts)

    def _configuration(self, identity: Identity) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], self._authority.pem)

    async def close(self) -> None:
        """Ends enrolment and closes the authority."""
        if self._enrolment is not None:
            await self._enrolment.stop(0)
        self._authority.close()


def listen(server: Any, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Opens a server's port; raises `ConfigError` where it is not to be had."""
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError:
        raise ConfigError(f"{address} is in use by another process, or not to be had here") from None


def _usual(host: str) -> set[str]:
    """Under what a machine is dialled: where it listens, its own name, and loopback."""
    names = {"localhost", "127.0.0.1", "::1", socket.gethostname(), host}
    return {name for name in names - {"0.0.0.0", "::"} if name and name.isascii()}  # noqa: S104 - compared, not listened on
