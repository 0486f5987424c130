"""X.509 as a federation uses it: one authority, and certificates that say who somebody is and what they may do.

Keys are ECDSA over P-256. Who holds a certificate stands in its one subject alternative name of the kind URI,
`urn:fedkit:ROLE:NAME`; the common name is for people. Formats: RFC 5280; TLS 1.3: RFC 8446.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

from fedkit.config import NAME
from fedkit.errors import TrustError
from fedkit.trust.files import key_in, pem_of

__all__ = [
    "Holder",
    "Role",
    "authority_in",
    "fingerprint",
    "holder",
    "issue",
    "key_digest",
    "make_authority",
    "make_key",
    "private_key",
    "request_for",
]

_INLINE = "data:application/pkix-cert;base64,"
_BACKDATED = dt.timedelta(minutes=5)  # at most, for clocks that are a little slow
_AUTHORITY_YEARS = 10
_REQUEST_BYTES = 8192
_NO_REQUEST = "this is not a certificate signing request in PEM"
_STRANGE = (
    *(ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature),
    *(x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, x509.InvalidVersion),
)


class Role(StrEnum):
    """What the holder of a certificate may do."""

    AGENT = "agent"  # attend, and do assignments
    OPERATOR = "operator"  # submit, watch and cancel runs, and fetch models
    COORDINATOR = "coordinator"  # be dialled


_URN = re.compile(rf"urn:fedkit:({'|'.join(Role)}):({NAME.pattern})")


@dataclass(frozen=True, slots=True)
class Holder:
    """Whom a certificate names. `expires` is in seconds since 1970, UTC."""

    role: Role
    name: str
    serial: int
    issued: float
    expires: float


def make_authority(federation: str) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A new authority's key and self-signed certificate."""
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, federation)])
    made = (
        _builder(subject, subject, key.public_key(), now - _BACKDATED, now + dt.timedelta(days=365 * _AUTHORITY_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
    )
    return key, made.sign(key, hashes.SHA256())


def make_key() -> bytes:
    """A new private key, PEM."""
    return pem_of(ec.generate_private_key(ec.SECP256R1()))


def private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """The key of a PEM; raises `TrustError`, which never shows any of it."""
    key = key_in(pem)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TrustError("the private key is not one of ECDSA in PEM, or is encrypted: enrol again")
    return key


def request_for(pem: bytes, role: Role, name: str) -> bytes:
    """A certificate signing request (PEM) for a private key in PEM; raises `TrustError`."""
    key = private_key(pem)
    asked = x509.CertificateSigningRequestBuilder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:fedkit:{role}:{name}")])
    return asked.add_extension(names, critical=False).sign(key, hashes.SHA256()).public_bytes(_PEM)


def issue(
    authority: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
    request: bytes,
    role: Role,
    name: str,
    lifetime: dt.timedelta,
    hosts: Sequence[str] = (),
) -> x509.Certificate:
    """A certificate for whoever made the PEM `request`; of that only the key counts.

    `hosts` are the names and addresses under which a coordinator is dialled. Raises `TrustError` for a request that is
    none, is not signed by its own key, asks for another name, or has a key of another kind.
    """
    key, (signer, root) = _requested(request, role, name), authority
    now = dt.datetime.now(dt.UTC)
    since, until = now - min(_BACKDATED, lifetime / 10), min(now + lifetime, root.not_valid_after_utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"urn:fedkit:{role}:{name}"), *map(_host, hosts)]
    usage = ExtendedKeyUsageOID.SERVER_AUTH if role is Role.COORDINATOR else ExtendedKeyUsageOID.CLIENT_AUTH
    made = (
        _builder(subject, root.subject, key, since, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if role is Role.COORDINATOR:
        made = made.add_extension(_inline(root), critical=False)
    return made.sign(signer, hashes.SHA256())


def holder(certificate: x509.Certificate | bytes) -> Holder:
    """Whom a certificate (or its PEM) names; raises `TrustError` for one that no federation's authority makes."""
    found = _parsed(certificate) if isinstance(certificate, bytes) else certificate
    with _refusing("the certificate names nobody; it is not from a federation's authority"):
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    urns = [_URN.fullmatch(urn) for urn in names.get_values_for_type(x509.UniformResourceIdentifier)]
    if len(urns) != 1 or urns[0] is None:
        raise TrustError("the certificate does not name one member of a federation")
    until, since = found.not_valid_after_utc, found.not_valid_before_utc
    return Holder(Role(urns[0][1]), urns[0][2], found.serial_number, since.timestamp(), until.timestamp())


def key_digest(request: bytes) -> bytes:
    """SHA-256 of the public key of a signing request; raises `TrustError` for one that is none."""
    with _refusing(_NO_REQUEST):
        key = _request(request).public_key()
        encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).digest()


def fingerprint(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's DER encoding."""
    return certificate.fingerprint(hashes.SHA256())


def authority_in(der: bytes, expected: bytes) -> x509.Certificate:
    """The authority that a coordinator's certificate carries inside, if it has the `expected` fingerprint.

    The certificate itself is not trusted: whoever shows it has yet to prove that this authority issued it. Raises
    `TrustError`.
    """
    with _refusing("this is not a fedkit coordinator: its certificate does not carry its authority"):
        shown = x509.load_der_x509_certificate(der)
        access = shown.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
        [where] = [a.access_location for a in access if a.access_method == AuthorityInformationAccessOID.CA_ISSUERS]
        if not isinstance(where, x509.UniformResourceIdentifier):
            raise ValueError
        found = x509.load_der_x509_certificate(base64.b64decode(where.value.removeprefix(_INLINE), validate=True))
    if fingerprint(found) != expected:
        raise TrustError(
            "this coordinator belongs to another federation than the token: check the address, and ask whoever gave "
            "you the token. Somebody in between would look the same"
        )
    return found


_PEM = serialization.Encoding.PEM


@contextlib.contextmanager
def _refusing(why: str) -> Iterator[None]:
    """Raises `TrustError` for everything that the library says of bytes that are not what they claim to be."""
    try:
        yield
    except _STRANGE:
        raise TrustError(why) from None


def _parsed(pem: bytes) -> x509.Certificate:
    with _refusing("this is not a certificate in PEM"):
        return x509.load_pem_x509_certificate(pem)


def _request(pem: bytes) -> x509.CertificateSigningRequest:
    with _refusing(_NO_REQUEST):
        if len(pem) > _REQUEST_BYTES:
            raise ValueError
        return x509.load_pem_x509_csr(pem)


def _requested(pem: bytes, role: Role, name: str) -> ec.EllipticCurvePublicKey:
    request = _request(pem)
    with _refusing(_NO_REQUEST):
        key, is_signed = request.public_key(), request.is_signature_valid
        asked = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        urns = asked.get_values_for_type(x509.UniformResourceIdentifier)
    if not is_signed:
        raise TrustError("the certificate signing request is not signed by its own key")
    if urns != [f"urn:fedkit:{role}:{name}"]:
        raise TrustError(f"this is for the {role} {name}, and the request asks for somebody else")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError("a key is of the kind ECDSA P-256")
    return key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, since: dt.datetime, until: dt.datetime
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number(), since, until).add_extension(
        x509.SubjectKeyIdentifier.from_public_key(key), critical=False
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    with _refusing(f"{name!r:.100} is no name of a host: letters of ASCII, digits, points and hyphens"):
        return x509.DNSName(name)


def _inline(root: x509.Certificate) -> x509.AuthorityInformationAccess:
    """The authority's certificate itself where its address would stand, so that whoever joins can compare it."""
    place = _INLINE + base64.b64encode(root.public_bytes(serialization.Encoding.DER)).decode()
    what = x509.AccessDescription(AuthorityInformationAccessOID.CA_ISSUERS, x509.UniformResourceIdentifier(place))
    return x509.AuthorityInformationAccess([what])
