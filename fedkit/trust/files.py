"""Keys, certificates and rosters on disk: each file whole, and a secret for its owner alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedkit.codec import write_atomically
from fedkit.errors import StorageError, TrustError

__all__ = ["PrivateKey", "key_in", "pem_of", "read_secret", "write"]

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def write(path: Path, content: bytes, *, secret: bool = False) -> None:
    """Replaces the file, in a folder that is made where it is missing; raises `StorageError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, content, mode=0o600 if secret else 0o666)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; it must be possible to write there") from None


def read_secret(path: Path, advice: str) -> bytes:
    """A file that nobody else may read; raises `TrustError`, with `advice` where there is none."""
    try:
        raw = path.read_bytes()
        mode = os.stat(path).st_mode
    except OSError as error:
        raise TrustError(f"{path}: {error.strerror or error}; {advice}") from None
    if mode & 0o077:
        raise TrustError(f"{path} can be read by others than you: chmod 600 {path}")
    return raw


def pem_of(key: PrivateKey) -> bytes:
    """The key as a file holds it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_in(pem: bytes) -> object:
    """The private key of whatever kind in a PEM; None where there is none, or an encrypted one."""
    try:
        return serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
