"""Enrolment tokens: one use, one name, a short life, and the fingerprint of the authority they belong to.

A token is text that a person can pass on: `fedkit-token:ROLE:NAME:FINGERPRINT:SECRET`, the last two in base64url. Its
secret has 256 random bits, so that a plain SHA-256 of it is enough to know it again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass, field

from fedkit.config import NAME
from fedkit.errors import TrustError
from fedkit.trust.certificates import Role

__all__ = ["Token"]

_FORM = re.compile(rf"fedkit-token:({'|'.join(Role)}):({NAME.pattern}):([\w-]{{43}}):([\w-]{{43}})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Token:
    """A token: for whom it is, SHA-256 of the authority's certificate, and the secret, which no repr shows."""

    role: Role
    name: str
    fingerprint: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def make(cls, role: Role, name: str, fingerprint: bytes) -> Token:
        """A new one."""
        return cls(role, name, fingerprint, secrets.token_bytes(32))

    @classmethod
    def parse(cls, text: str) -> Token:
        """What `str` of a token gave; raises `TrustError`, which never repeats the text."""
        found = _FORM.fullmatch(text.strip())
        try:
            if found is None:
                raise ValueError
            return cls(Role(found[1]), found[2], _bytes(found[3]), _bytes(found[4]))
        except (ValueError, binascii.Error):
            raise TrustError("this is not an enrolment token: copy all of it, from fedkit-token: to the end") from None

    def __str__(self) -> str:
        return ":".join(("fedkit-token", self.role, self.name, _text(self.fingerprint), _text(self.secret)))

    @property
    def hash(self) -> bytes:
        """What the authority keeps of the secret."""
        return hashlib.sha256(self.secret).digest()


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    raw = base64.urlsafe_b64decode(text + "=")
    if len(raw) != 32 or _text(raw) != text:
        raise ValueError
    return raw
