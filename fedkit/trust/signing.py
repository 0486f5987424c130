"""A site's own signing key, Ed25519: made at the site, known to the others by the roster, and to no authority."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedkit.errors import TrustError
from fedkit.trust.files import key_in, pem_of, read_secret, write

__all__ = ["has_signing_key", "load_signing_key", "make_signing_key", "public_of"]

_FILE = "signing.pem"


def make_signing_key(folder: Path) -> Ed25519PrivateKey:
    """The folder's signing key, made where there is none; raises `TrustError` for a file that holds none."""
    if not (folder / _FILE).exists():
        write(folder / _FILE, pem_of(Ed25519PrivateKey.generate()), secret=True)
    return load_signing_key(folder)


def has_signing_key(folder: Path) -> bool:
    """Whether a signing key was made there."""
    return (folder / _FILE).exists()


def load_signing_key(folder: Path) -> Ed25519PrivateKey:
    """The folder's signing key; raises `TrustError` where it is missing, is another kind of key, or open to others."""
    path = folder / _FILE
    key = key_in(read_secret(path, f"fedkit roster key --identity {folder} makes it"))
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError(f"{path} does not hold a signing key: put it back as it was")
    return key


def public_of(key: Ed25519PrivateKey) -> str:
    """The public key as rosters hold it: 64 hexadecimal characters."""
    return key.public_key().public_bytes_raw().hex()
