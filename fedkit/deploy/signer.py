"""Who signs bundles: a key made on first use, signatures that can be checked anywhere, pseudonyms of clients.

A signature is Ed25519 (RFC 8032) over the exact bytes of a passport. A client's pseudonym is HMAC-SHA256 of its name
under a key derived from the signing key and the run's name (HKDF, RFC 5869): the same for the same signer and run, and
nothing that anybody else could work out from a list of names.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedkit.errors import ConfigError, TrustError
from fedkit.trust.roster import verifies
from fedkit.trust.signing import make_signing_key, public_of

__all__ = ["default_folder", "pseudonyms", "require_public", "sign", "signer_of", "signing_key"]

_PUBLIC = re.compile(r"[0-9a-f]{64}")
_LENGTHS = (10, 20, 64)  # of pseudonyms, in characters: as short as they can be and still differ


def default_folder() -> Path:
    """Where the signing key of whoever exports is: `$XDG_CONFIG_HOME/fedkit`, or `~/.config/fedkit`."""
    given = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".config"
    return base / "fedkit"


def signing_key(folder: Path | None = None) -> Ed25519PrivateKey:
    """The key in `folder`, by default in `default_folder()`, made where there is none; for its owner's eyes alone.

    Raises `TrustError` for a file that holds another kind of key or can be read by others.
    """
    return make_signing_key(default_folder() if folder is None else folder)


def require_public(text: str) -> str:
    """A public key as `SIGNATURE` has it; raises `ConfigError` for anything else."""
    if not _PUBLIC.fullmatch(text.strip().lower()):
        raise ConfigError(f"a signer is 64 hexadecimal characters, as fedkit verify prints them, got {text!r:.80}")
    return text.strip().lower()


def sign(body: bytes, key: Ed25519PrivateKey) -> bytes:
    """What `SIGNATURE` holds of `body`: JSON, in exactly one form."""
    return _written(public_of(key), key.sign(body).hex())


def signer_of(body: bytes, signature: bytes) -> str:
    """The public key that has signed `body`; raises `TrustError` where none has."""
    try:
        fields = json.loads(signature)
        public, signed = str(fields["public_key"]), str(fields["signature"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TrustError("not a signature: export the bundle anew") from None
    if _written(public, signed) != signature or not verifies(public, signed, body):
        raise TrustError("it does not sign this passport.json: one of the two was changed after it was signed")
    return public


def _written(public: str, signed: str) -> bytes:
    fields = {"algorithm": "ed25519", "public_key": public, "signature": signed}
    return json.dumps(fields, indent=2).encode() + b"\n"


def pseudonyms(names: Iterable[str], key: Ed25519PrivateKey, run: str) -> dict[str, str]:
    """What a passport calls the clients of a run: "site-" and 10 hexadecimal characters, or more where two were equal.

    Does not protect against: whoever has the signing key, or knows which clients there were and when each took part.
    """
    secret = HKDF(SHA256(), 32, salt=None, info=b"fedkit-pseudonyms-1\0" + run.encode()).derive(key.private_bytes_raw())
    digests = {name: hmac.new(secret, name.encode(), hashlib.sha256).hexdigest() for name in names}
    length = next(one for one in _LENGTHS if len({digest[:one] for digest in digests.values()}) == len(digests))
    return {name: f"site-{digest[:length]}" for name, digest in digests.items()}
