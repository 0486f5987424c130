"""What a process shows to others: a folder with its private key, its certificate, and the authority it trusts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from fedkit.errors import TrustError
from fedkit.trust.certificates import Holder, Role, holder, make_key, private_key, request_for
from fedkit.trust.files import read_secret, write

__all__ = ["Identity"]

_KEY, _CERTIFICATE, _AUTHORITY = "key.pem", "certificate.pem", "authority.pem"
_RENEWED_AT = 2 / 3  # of a certificate's life


@dataclass(frozen=True)
class Identity:
    """A key with the certificate that an authority gave it; all PEM. The key is shown by no repr."""

    key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes

    @classmethod
    def load(cls, folder: Path) -> Identity:
        """What `save` wrote; raises `TrustError` where something is missing, or does not belong together."""
        advice = f"fedkit enroll --out {folder} makes an identity"
        key = read_secret(folder / _KEY, advice)
        try:
            found = cls(key, (folder / _CERTIFICATE).read_bytes(), (folder / _AUTHORITY).read_bytes())
        except OSError as error:
            raise TrustError(f"{folder}: {error.strerror or error}; {advice}") from None
        found.check()
        return found

    def save(self, folder: Path) -> Path:
        """Writes the three files, the certificate last, and returns the folder; raises `StorageError`."""
        if not (folder / _KEY).exists() or (folder / _KEY).read_bytes() != self.key:
            write(folder / _KEY, self.key, secret=True)
        write(folder / _AUTHORITY, self.authority)
        write(folder / _CERTIFICATE, self.certificate)
        return folder

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether the folder holds an identity, or what is left of one."""
        return (folder / _CERTIFICATE).exists()

    @staticmethod
    def begin(folder: Path) -> bytes:
        """A key for an identity to come, in PEM: on disk before anybody hears of it, and the same one when asked again.

        Raises `StorageError`, and `TrustError` for a key that others may read.
        """
        if not (folder / _KEY).exists():
            write(folder / _KEY, make_key(), secret=True)
        return read_secret(folder / _KEY, "enrol again")

    @property
    def holder(self) -> Holder:
        """Whom the certificate names."""
        return holder(self.certificate)

    @property
    def renew_at(self) -> float:
        """When the certificate is to be renewed, in seconds since 1970, UTC."""
        now = self.holder
        return now.issued + _RENEWED_AT * (now.expires - now.issued)

    def check(self) -> None:
        """Raises `TrustError` unless the key, the certificate and the authority belong together."""
        try:
            mine = x509.load_pem_x509_certificate(self.certificate)
            mine.verify_directly_issued_by(x509.load_pem_x509_certificate(self.authority))
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            raise TrustError("certificate and authority do not belong together: enrol again") from None
        if mine.public_key() != private_key(self.key).public_key():
            raise TrustError("key and certificate do not belong together: enrol again")
        holder(mine)

    def require(self, *roles: Role) -> Identity:
        """Itself, if it has one of these roles; raises `TrustError`."""
        mine = self.holder
        if mine.role not in roles:
            raise TrustError(f"this takes an identity of the kind {' or '.join(roles)}; {mine.name} is an {mine.role}")
        return self

    def request(self) -> bytes:
        """A certificate signing request for the same key and name."""
        mine = self.holder
        return request_for(self.key, mine.role, mine.name)

    def renewed(self, certificate: bytes) -> Identity:
        """The same key with another certificate; raises `TrustError` for one that does not belong to it."""
        found = Identity(self.key, certificate, self.authority)
        found.check()
        before, after = self.holder, found.holder
        if (before.role, before.name) != (after.role, after.name):
            raise TrustError("the renewed certificate is somebody else's")
        return found
