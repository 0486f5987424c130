"""Who may call what: each service has its roles, each call its certificate; a revoked one ends the calls it made."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor

from fedkit.errors import TrustError
from fedkit.trust.certificates import Holder, Role, holder

__all__ = ["Guard", "caller", "is_encrypted"]

log = structlog.get_logger("fedkit.server")

# A service that is not named here cannot be served over TLS at all.
_ROLES = {
    "fedkit.v1.Agents": frozenset({Role.AGENT}),
    "fedkit.v1.Operators": frozenset({Role.OPERATOR}),
    "fedkit.v1.Runs": frozenset({Role.AGENT, Role.OPERATOR}),
    "fedkit.v1.Identities": frozenset({Role.AGENT, Role.OPERATOR}),
}
_LONGEST_S = 24 * 3600.0  # for which one timer is set
_NOTED_S = 60.0  # for which a certificate that is turned away is not on record again


def caller(context: Any) -> Holder | None:
    """Whom the certificate of a call names; None for a call without TLS. Raises `TrustError`."""
    if not is_encrypted(context):
        return None
    certificates = context.auth_context().get("x509_pem_cert", [])
    if len(certificates) != 1:
        raise TrustError("there is no certificate")
    return holder(certificates[0])


def is_encrypted(context: Any) -> bool:
    """Whether a call came over TLS; raises `TrustError` for a version before 1.3."""
    shown = context.auth_context()
    if shown.get("transport_security_type") != [b"ssl"]:
        return False
    if shown.get("ssl_tls_version") != [b"TLSv1.3"]:
        raise TrustError("TLS 1.3 is spoken here, and nothing older")
    return True


class Guard:
    """Lets calls through by the certificates they are made with. `revoked` are serial numbers."""

    def __init__(self, revoked: Collection[int] = ()) -> None:
        self.revoked = frozenset(revoked)
        self._calls: defaultdict[int, set[_Call]] = defaultdict(set)
        self._noted: dict[tuple[int, str], float] = {}  # when it was last said of a certificate

    def around(self, service: ServiceDescriptor, servicer: object) -> object:
        """The servicer, with each of its methods behind the guard; raises `KeyError` for an unknown service."""
        return _Guarded(self, _ROLES[service.full_name], servicer)

    def revoke(self, serials: Collection[int]) -> None:
        """From now on these are the revoked certificates; open calls made with one of them end."""
        self.revoked = frozenset(serials)
        for serial in self.revoked & self._calls.keys():
            for call in list(self._calls[serial]):
                call.end("the certificate was revoked")

    @contextlib.asynccontextmanager
    async def passing(self, context: Any, roles: frozenset[Role]) -> AsyncIterator[None]:
        """Around one call: ends it with a gRPC status where it is not allowed, or is no longer."""
        holder = await self._admitted(context, roles)
        call = _Call(holder)
        self._calls[holder.serial].add(call)
        try:
            yield
        except asyncio.CancelledError:
            if not call.why:
                raise
            call.take_back()
            log.warning("call ended", role=holder.role.value, name=holder.name, why=call.why)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"{call.why}: {_ENROL}")
        finally:
            call.timer.cancel()
            self._calls[holder.serial].discard(call)
            if not self._calls[holder.serial]:
                del self._calls[holder.serial]

    async def _admitted(self, context: Any, roles: frozenset[Role]) -> Holder:
        try:
            found = caller(context)
            if found is None:
                raise TrustError("TLS is spoken here")
        except TrustError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            raise AssertionError("abort raises") from None
        if found.serial in self.revoked or found.expires <= time.time():
            why = "revoked" if found.serial in self.revoked else "expired"
            self._note(found, why)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"the certificate was {why}: {_ENROL}")
        if found.role not in roles:
            self._note(found, "role")
            allowed = " or ".join(sorted(roles))
            text = f"{found.name} is an {found.role}; this takes an identity of the kind {allowed}"
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, text)
        return found

    def _note(self, found: Holder, why: str) -> None:
        """On record once a minute: whoever calls again and again must not fill the disk."""
        now = time.monotonic()
        if now >= self._noted.get((found.serial, why), -math.inf) + _NOTED_S:
            self._noted[found.serial, why] = now
            log.warning("turned away", role=found.role.value, name=found.name, why=why)


_ENROL = "ask the operator of the coordinator for a token, and enrol again"


class _Call:
    """One call under way, which ends when its certificate expires."""

    def __init__(self, of: Holder) -> None:
        task = asyncio.current_task()
        assert task is not None  # every call has one
        self._task = task
        self._expires = of.expires
        self.why = ""
        self.timer = asyncio.get_running_loop().call_soon(self._wait)

    def _wait(self) -> None:
        left = self._expires - time.time()
        if left <= 0:
            self.end("the certificate has expired")
        else:
            self.timer = asyncio.get_running_loop().call_later(min(left, _LONGEST_S), self._wait)

    def end(self, why: str) -> None:
        """Ends the call from outside."""
        if not self.why:
            self.why = why
            self._task.cancel()

    def take_back(self) -> None:
        """The cancellation was ours, and has been heard."""
        self._task.uncancel()


class _Guarded:
    def __init__(self, guard: Guard, roles: frozenset[Role], servicer: object) -> None:
        self._guard = guard
        self._roles = roles
        self._servicer = servicer

    def __getattr__(self, name: str) -> Callable[..., Any]:
        behaviour = getattr(self._servicer, name)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            async with (
                self._guard.passing(context, self._roles),
                contextlib.aclosing(behaviour(request, context)) as said,
            ):
                async for message in said:
                    yield message

        async def call(request: Any, context: Any) -> Any:
            async with self._guard.passing(context, self._roles):
                return await behaviour(request, context)

        return stream if inspect.isasyncgenfunction(behaviour) else call
