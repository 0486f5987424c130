"""A site's own signing key, Ed25519: made at the site, known to the others by the roster, and to no authority."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.codec import write_atomically
from fedkit.errors import TrustError

__all__ = ["load_signing_key", "make_signing_key", "public_of"]

_FILE = "signing.pem"


def make_signing_key(folder: Path) -> Ed25519PrivateKey:
    """The folder's signing key, made where there is none; raises `TrustError` for a file that holds none."""
    if not (folder / _FILE).exists():
        key = Ed25519PrivateKey.generate()
        private, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(folder / _FILE, key.private_bytes(serialization.Encoding.PEM, private, plain), mode=0o600)
    return load_signing_key(folder)


def load_signing_key(folder: Path) -> Ed25519PrivateKey:
    """The folder's signing key; raises `TrustError` where it is missing, is another kind of key, or open to others."""
    path = folder / _FILE
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TrustError(f"{path}: {error.strerror or error}; fedkit roster key --identity {folder} makes it") from None
    if os.stat(path).st_mode & 0o077:
        raise TrustError(f"{path} can be read by others than you: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(raw, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError(f"{path} does not hold a signing key: put it back as it was")
    return key


def public_of(key: Ed25519PrivateKey) -> str:
    """The public key as rosters hold it: 64 hexadecimal characters."""
    return key.public_key().public_bytes_raw().hex()
