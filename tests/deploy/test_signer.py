"""The signing key is made once, for its owner alone, and gives each client one pseudonym a run."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedkit.deploy import signer
from fedkit.deploy.signer import default_folder, pseudonyms, sign, signer_of, signing_key
from fedkit.errors import TrustError
from fedkit.trust.signing import public_of
from tests.deploy.conftest import KEY

OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))


def test_a_key_is_made_on_first_use_where_settings_of_programs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    key = signing_key()
    assert public_of(signing_key()) == public_of(key)
    (path,) = (tmp_path / "config" / "fedkit").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    with pytest.raises(TrustError, match="can be read by others"):
        signing_key()
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".config" / "fedkit"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert default_folder() == tmp_path / ".config" / "fedkit"


def test_a_folder_of_one_s_own_may_be_named(tmp_path: Path) -> None:
    assert public_of(signing_key(tmp_path / "keys")) == public_of(signing_key(tmp_path / "keys"))
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def test_pseudonyms_are_stable_and_those_of_one_signer_and_run() -> None:
    names = ["cleveland", "hungarian", "va"]
    found = pseudonyms(names, KEY, "heart-1")
    assert found == {"cleveland": "site-2046fcaffc", "hungarian": "site-e8cd6d88f5", "va": "site-330220341b"}
    assert pseudonyms(["va"], KEY, "heart-1") == {"va": found["va"]}
    for key, run in ((OTHER, "heart-1"), (KEY, "heart-2")):
        assert not set(found.values()) & set(pseudonyms(names, key, run).values())


def test_pseudonyms_grow_where_two_would_be_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signer, "_LENGTHS", (1, 2, 4, 64))
    found = pseudonyms([f"client-{i}" for i in range(40)], KEY, "r")
    assert len(set(found.values())) == 40
    assert {len(name) for name in found.values()} == {len("site-") + 4}


@given(st.binary(max_size=300))
def test_a_signature_is_over_every_byte(body):
    signed = sign(body, KEY)
    assert signer_of(body, signed) == public_of(KEY)
    for other, signature in ((body + b"\0", signed), (body, signed + b" "), (body, signed.replace(b"\n", b"\r\n"))):
        with pytest.raises(TrustError):
            signer_of(other, signature)
