"""The key to the pages of a coordinator, and where they are not served; test_life.py looks at one as a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedkit.errors import ConfigError, TrustError
from fedkit.server.pages import page_key, say_where
from fedkit.server.process import Coordinator, CoordinatorSettings


def test_the_key_outlives_the_process_and_is_for_one_account(tmp_path: Path) -> None:
    key = page_key(tmp_path)
    say_where(tmp_path, key, "127.0.0.1:9464")
    assert page_key(tmp_path) == key
    (tmp_path / "pages").chmod(0o644)
    with pytest.raises(TrustError, match="chmod 600"):
        page_key(tmp_path)
    (tmp_path / "pages").chmod(0o600)
    (tmp_path / "pages").write_text("http://fedkit:short@127.0.0.1:9464/runs\n")
    assert page_key(tmp_path) not in (key, "short")


def test_pages_are_served_on_loopback_only(tmp_path: Path) -> None:
    settings = CoordinatorSettings(state=tmp_path, metrics="0.0.0.0:9464")
    with pytest.raises(ConfigError, match="on loopback only"):
        Coordinator(settings, {})
