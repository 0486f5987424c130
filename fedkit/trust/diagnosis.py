"""Why a handshake fails, in words: gRPC tells a client no more than that the connection was closed."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import socket
import ssl
import time

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedkit.address import parts
from fedkit.errors import TrustError
from fedkit.trust.certificates import authority_in, fingerprint
from fedkit.trust.identity import Identity

__all__ = ["diagnose", "shown_certificate"]

_PATIENCE_S = 5.0


def shown_certificate(address: str) -> bytes:
    """The certificate (DER) that whoever listens at `address` shows; nothing about it is checked.

    Raises `OSError` where nobody answers, `TrustError` where what answers speaks no TLS 1.3.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(parts(address), _PATIENCE_S) as line:
        try:
            with context.wrap_socket(line) as wrapped:
                return wrapped.getpeercert(binary_form=True) or b""
        except (ssl.SSLError, ConnectionResetError):
            raise TrustError(f"{address} speaks no TLS 1.3: it is no coordinator, or one without TLS") from None


def diagnose(address: str, identity: Identity | None) -> str:
    """What a person can do about a connection that does not come up; empty where nothing is known."""
    try:
        shown = shown_certificate(address)
    except OSError:
        return ""
    except TrustError as error:
        return str(error) if identity is not None else ""
    if identity is None:
        return f"the coordinator at {address} speaks TLS: give the folder that fedkit enroll wrote, with --identity"
    return _of_coordinator(shown, address, identity) or _of_mine(identity)


def _of_coordinator(shown: bytes, address: str, identity: Identity) -> str:
    mine = x509.load_pem_x509_certificate(identity.authority)
    try:
        authority_in(shown, fingerprint(mine))
        found = x509.load_der_x509_certificate(shown)
        found.verify_directly_issued_by(mine)
    except (TrustError, ValueError, TypeError, InvalidSignature):
        return f"the coordinator at {address} is of another federation than this identity: check the address"
    until = found.not_valid_after_utc
    if until <= dt.datetime.now(dt.UTC):
        return (
            f"the coordinator's certificate has expired on {until:%Y-%m-%d %H:%M} UTC: its operator must start it again"
        )
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = {
        *names.get_values_for_type(x509.DNSName),
        *(str(one) for one in names.get_values_for_type(x509.IPAddress)),
    }
    host = parts(address)[0]
    with contextlib.suppress(ValueError):
        host = str(ipaddress.ip_address(host))
    if host not in known:
        text = ", ".join(sorted(known))
        hint = f"dial one of these, or start it with --host {host}"
        return f"the coordinator's certificate is for {text}, not for {host}: {hint}"
    return ""


def _of_mine(identity: Identity) -> str:
    mine = identity.holder
    if mine.expires <= time.time():
        until = dt.datetime.fromtimestamp(mine.expires, dt.UTC)
        hint = "ask for a token, and enrol again"
        return f"the certificate of {mine.name} has expired on {until:%Y-%m-%d %H:%M} UTC: {hint}"
    return "" if mine.issued <= time.time() else "this machine's clock is slow: the certificate is not valid yet"
