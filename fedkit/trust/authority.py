"""The federation's certificate authority: a folder with its key, and a SQLite file of tokens and certificates.

It runs inside the coordinator process, and on the command line beside it: each change is one transaction, and both see
it at once. What it vouches for is who is let in; against a coordinator that lies it vouches for nothing.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedkit.config import require_name
from fedkit.errors import ConfigError, StorageError, TrustError
from fedkit.trust.certificates import (
    Holder,
    Role,
    fingerprint,
    holder,
    issue,
    key_digest,
    make_authority,
    make_key,
    request_for,
)
from fedkit.trust.files import key_in, pem_of, read_secret, write
from fedkit.trust.identity import Identity
from fedkit.trust.tokens import Token

__all__ = ["Authority", "Member", "Revoked", "found"]

_KEY, _CERTIFICATE, _DATABASE = "authority-key.pem", "authority.pem", "authority.db"
_PEM = serialization.Encoding.PEM
LIFETIME = dt.timedelta(days=30)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (
    hash BLOB PRIMARY KEY, role TEXT NOT NULL, name TEXT NOT NULL, expires REAL NOT NULL, used_by BLOB
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS certificates (
    seq INTEGER PRIMARY KEY, serial TEXT NOT NULL UNIQUE, role TEXT NOT NULL, name TEXT NOT NULL,
    issued REAL NOT NULL, expires REAL NOT NULL, revoked REAL
);
CREATE INDEX IF NOT EXISTS by_name ON certificates (role, name);
"""


@dataclass(frozen=True, slots=True)
class Member:
    """One role and name, with its newest certificate. Times are seconds since 1970, UTC."""

    role: Role
    name: str
    expires: float
    revoked: float | None


class Revoked(NamedTuple):
    """What a revocation has ended: certificates by serial number, and how many tokens that nobody had used."""

    serials: list[int]
    tokens: int


class Authority:
    """Issues, renews and revokes. Raises `TrustError` for what is not allowed, `StorageError` where the disk fails.

    `lifetime` is that of the certificates it issues, `LIFETIME` where it is None.
    """

    def __init__(
        self, folder: Path, *, lifetime: dt.timedelta | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder = folder
        self._lifetime = lifetime or LIFETIME
        self._clock = clock
        self._signer = _read(folder)
        self._connection = self._connect()

    @classmethod
    def create(cls, folder: Path, federation: str) -> Authority:
        """A new authority in an empty folder; raises `ConfigError` where there is one already."""
        require_name(federation, "a federation's name")
        if (folder / _KEY).exists():
            raise ConfigError(f"{folder} holds an authority already: name another folder, or use that one")
        key, certificate = make_authority(federation)
        write(folder / _CERTIFICATE, certificate.public_bytes(_PEM))
        write(folder / _KEY, pem_of(key), secret=True)
        return cls(folder)

    @property
    def certificate(self) -> x509.Certificate:
        """Its own certificate."""
        return self._signer[1]

    @property
    def pem(self) -> bytes:
        """Its own certificate in PEM: what everybody in the federation trusts."""
        return self.certificate.public_bytes(_PEM)

    def token(self, role: Role, name: str, lifetime: dt.timedelta) -> Token:
        """A token for one enrolment under that name; only its hash is kept."""
        require_name(name, "a name")
        made = Token.make(role, name, fingerprint(self.certificate))
        with self._change() as connection:
            connection.execute(
                "INSERT INTO tokens (hash, role, name, expires) VALUES (?, ?, ?, ?)",
                (made.hash, role, name, self._clock() + lifetime.total_seconds()),
            )
        return made

    def enroll(self, token: Token, request: bytes) -> bytes:
        """The certificate (PEM) that a token and a signing request stand for.

        The token is used up with it, but for the same key: the answer may have been lost on the way.
        """
        key = key_digest(request)
        with self._change() as connection:
            row = connection.execute(
                "SELECT role, name, expires, used_by FROM tokens WHERE hash = ?", (token.hash,)
            ).fetchone()
            if row is None or (row[0], row[1]) != (token.role, token.name):
                raise TrustError("this token is not known here: ask the operator for a new one")
            if row[3] not in (None, key):
                raise TrustError(
                    "this token was used before: if that was not you, tell the operator; ask for a new one"
                )
            if row[2] <= self._clock():
                raise TrustError("this token is too old: ask the operator for a new one")
            made = self._issue(connection, request, token.role, token.name)
            connection.execute("UPDATE tokens SET used_by = ? WHERE hash = ?", (key, token.hash))
        return made

    def renew(self, current: Holder, request: bytes) -> bytes:
        """A new certificate (PEM) for whoever holds a valid one."""
        with self._change() as connection:  # a revocation comes before it or after it, never in between
            if current.serial in self.revoked():
                raise TrustError("the certificate was revoked")
            return self._issue(connection, request, current.role, current.name)

    def identity(self, role: Role, name: str, hosts: Sequence[str] = ()) -> Identity:
        """A new identity for somebody on this machine, who needs no token; a coordinator is dialled under `hosts`."""
        require_name(name, "a name")
        key = make_key()
        with self._change() as connection:
            made = self._issue(connection, request_for(key, role, name), role, name, hosts)
        return Identity(key, made, self.pem)

    def revoke(self, name: str, role: Role | None = None) -> Revoked:
        """Ends every valid certificate and every open token of that name, in one role or all.

        Raises `TrustError` where there is neither.
        """
        now = self._clock()
        of = {"name": name, "role": role, "now": now}
        whose = "name = :name AND (:role IS NULL OR role = :role) AND expires > :now"
        with self._change() as connection:
            valid = f"SELECT serial FROM certificates WHERE {whose} AND revoked IS NULL"  # noqa: S608 - no value is in it
            serials = [serial for (serial,) in connection.execute(valid, of)]
            connection.executemany(
                "UPDATE certificates SET revoked = ? WHERE serial = ?", [(now, one) for one in serials]
            )
            tokens = connection.execute(f"DELETE FROM tokens WHERE {whose} AND used_by IS NULL", of).rowcount  # noqa: S608
            connection.execute("DELETE FROM tokens WHERE name = :name AND (:role IS NULL OR role = :role)", of)
        if not serials and not tokens:
            raise TrustError(f"nobody of the name {name} holds a valid certificate or token")
        return Revoked([int(serial, 16) for serial in serials], tokens)

    def revoked(self) -> frozenset[int]:
        """The serial numbers of revoked certificates that have not expired."""
        rows = self._rows("SELECT serial FROM certificates WHERE revoked IS NOT NULL AND expires > ?", self._clock())
        return frozenset(int(serial, 16) for (serial,) in rows)

    def changes(self) -> int:
        """A number that another process's change to the authority makes another one; cheap to ask for."""
        return int(self._rows("PRAGMA data_version")[0][0])

    def members(self) -> list[Member]:
        """Everybody who ever had a certificate, by role and name, with the newest one."""
        rows = self._rows(
            "SELECT role, name, expires, revoked, max(seq) FROM certificates GROUP BY role, name ORDER BY role, name"
        )
        return [Member(Role(role), name, expires, revoked) for role, name, expires, revoked, _ in rows]

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def _issue(
        self, connection: sqlite3.Connection, request: bytes, role: Role, name: str, hosts: Sequence[str] = ()
    ) -> bytes:
        made = issue(self._signer, request, role, name, self._lifetime, hosts)
        of = holder(made)
        connection.execute(
            "INSERT INTO certificates (serial, role, name, issued, expires) VALUES (?, ?, ?, ?, ?)",
            (f"{of.serial:x}", role, name, of.issued, of.expires),
        )
        return made.public_bytes(_PEM)

    def _connect(self) -> sqlite3.Connection:
        path = self.folder / _DATABASE
        with _told(path):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            connection = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(_SCHEMA)
        return connection

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with _told(self.folder / _DATABASE):
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with _told(self.folder / _DATABASE):
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection:  # commits, or rolls back
                yield self._connection


def found(
    folder: Path, federation: str, agents: Iterable[str], place: Callable[[str], Path], operator: str = "operator"
) -> dict[str, Path]:
    """A new authority with an identity for each agent and one operator, all on this machine; their folders by name."""
    authority = Authority.create(folder, federation)
    roles = {**dict.fromkeys(agents, Role.AGENT), operator: Role.OPERATOR}
    try:
        return {name: authority.identity(role, name).save(place(name)) for name, role in roles.items()}
    finally:
        authority.close()


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"{path}: {error}; free space or mend the disk, then try again") from error


def _read(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = key_in(read_secret(folder / _KEY, f"fedkit ca init NAME --authority {folder} makes an authority"))
    try:
        certificate = x509.load_pem_x509_certificate((folder / _CERTIFICATE).read_bytes())
    except (OSError, ValueError):
        raise TrustError(f"{folder} does not hold an authority: put the folder back as it was") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise TrustError(f"{folder}: key and certificate do not belong together: put the folder back as it was")
    return key, certificate
