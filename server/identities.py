"""Enrolment and renewal: what a coordinator does for its authority."""

from __future__ import annotations

from typing import Any

import structlog

from fedkit.errors import TrustError
from fedkit.protos import identities_pb2 as pb
from fedkit.protos.failures import answering
from fedkit.server.guard import caller, is_encrypted
from fedkit.trust.authority import Authority
from fedkit.trust.tokens import Token

__all__ = ["EnrolmentService", "IdentityService"]

log = structlog.get_logger("fedkit.server")


class EnrolmentService:
    """Implements `service Enrolment` of identities.proto."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority

    async def enroll(self, request: pb.EnrollRequest, context: Any) -> pb.Certificate:
        """A certificate for a token."""
        async with answering(context):
            try:
                if not is_encrypted(context):
                    raise TrustError("TLS is spoken here")
                token = Token.parse(request.token)
                made = self._authority.enroll(token, request.request)
            except TrustError as error:
                log.warning("enrolment refused", why=str(error))
                raise
            log.info("enrolled", role=token.role.value, name=token.name)
            return pb.Certificate(certificate=made)


class IdentityService:
    """Implements `service Identities` of identities.proto, behind the guard."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority

    async def renew(self, request: pb.RenewRequest, context: Any) -> pb.Certificate:
        """A fresh certificate for whoever calls."""
        async with answering(context):
            current = caller(context)
            if current is None:
                raise TrustError("there is no certificate to renew")
            made = self._authority.renew(current, request.request)
            log.info("renewed", role=current.role.value, name=current.name)
            return pb.Certificate(certificate=made)
