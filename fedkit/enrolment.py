"""Joining a federation: a key that never leaves this machine, a token for a certificate, and a fresh one in time."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
from cryptography.hazmat.primitives import serialization

from fedkit.errors import ConfigError, FedkitError, TrustError, Unreachable
from fedkit.protos import identities_pb2 as pb
from fedkit.protos.failures import meant
from fedkit.protos.wire import Calls
from fedkit.trust.certificates import authority_in, request_for
from fedkit.trust.diagnosis import shown_certificate
from fedkit.trust.identity import Identity
from fedkit.trust.tokens import Token

__all__ = ["enroll", "renew"]

_ANSWER_S = 30.0


def enroll(address: str, token: str, folder: Path) -> Identity:
    """Makes a key in `folder`, and brings the certificate for it from the coordinator's enrolment port at `address`.

    The coordinator must prove that it belongs to the authority whose fingerprint the token carries, before it is told
    anything. Where an answer is lost, the same token works again in the same folder. Raises `TrustError`,
    `Unreachable`, `StorageError`, and `ConfigError` for a folder that holds an identity already.
    """
    given = Token.parse(token)
    if Identity.is_in(folder):
        raise ConfigError(f"{folder} holds an identity already: name another folder")
    try:
        authority = authority_in(shown_certificate(address), given.fingerprint)
    except OSError as error:
        text = f"{address} does not answer ({error.strerror or 'no answer'}): is this the enrolment port?"
        raise Unreachable(text) from None
    root = authority.public_bytes(serialization.Encoding.PEM)
    key = Identity.begin(folder)
    request = pb.EnrollRequest(token=str(given), request=request_for(key, given.role, given.name))
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(root)) as channel:
        calls = Calls(channel, pb.DESCRIPTOR.services_by_name["Enrolment"])
        try:
            made = calls.enroll(request, timeout=_ANSWER_S)
        except grpc.RpcError as error:
            raise _meant(error, address) from None
    found = Identity(key, made.certificate, root)
    found.check()
    if (found.holder.role, found.holder.name) != (given.role, given.name):
        raise TrustError("the certificate is for somebody else than the token")
    found.save(folder)
    return found


def renew(channel: grpc.Channel, identity: Identity, folder: Path) -> Identity:
    """The identity with a fresh certificate if it is time for one, saved to `folder`; itself otherwise.

    Raises `TrustError` where the coordinator refuses; one that does not answer is asked another time.
    """
    if time.time() < identity.renew_at:
        return identity
    calls = Calls(channel, pb.DESCRIPTOR.services_by_name["Identities"])
    try:
        made = calls.renew(pb.RenewRequest(request=identity.request()), timeout=_ANSWER_S)
    except grpc.RpcError as error:
        failure = meant(error, "the coordinator")
        if isinstance(failure, Unreachable):
            return identity
        raise failure from None
    found = identity.renewed(made.certificate)
    found.save(folder)
    return found


def _meant(error: grpc.RpcError, address: str) -> FedkitError:
    found = meant(error, address)
    if isinstance(found, Unreachable):
        return Unreachable(
            f"{address} does not answer as the token's federation would: check the address, its name, and that it is "
            "the enrolment port"
        )
    return found
