"""`fedkit ca`, `fedkit roster` and `fedkit enroll` as people type them."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedkit.cli import app
from fedkit.trust.authority import Authority
from fedkit.trust.certificates import Role
from fedkit.trust.roster import Chain
from fedkit.trust.tokens import Token

Typed = Callable[..., Result]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDKIT_IDENTITY", raising=False)
    return lambda *arguments, **given: CliRunner().invoke(app, arguments, **given)


def words(text: str) -> str:
    return " ".join(text.split())


def test_an_authority_is_made_invites_lists_and_revokes(typed: Typed, tmp_path: Path) -> None:
    made = typed("ca", "init", "hospitals")
    assert made.exit_code == 0, made.stderr
    assert "Next: fedkit server --listen 0.0.0.0:8443" in words(made.stdout)
    assert stat.S_IMODE((tmp_path / "fedkit-authority").stat().st_mode) == 0o700
    assert "Nobody has enrolled yet" in typed("ca", "list").stdout
    invited = typed("ca", "token", "ada", "--role", "operator", "--hours", "2")
    token = Token.parse(invited.stdout)  # on standard output there is the token and nothing else
    assert (token.role, token.name) == (Role.OPERATOR, "ada")
    assert "lets the operator ada enrol once, within 2 hours" in words(invited.stderr)
    authority = Authority(tmp_path / "fedkit-authority")
    authority.identity(Role.AGENT, "upenn")
    authority.close()
    assert [one["state"] for one in json.loads(typed("ca", "list", "--json").stdout)] == ["valid"]
    assert "1 certificates and 0 open tokens of upenn are revoked" in words(typed("ca", "revoke", "upenn").stdout)
    assert "revoked" in typed("ca", "list").stdout
    again = typed("ca", "revoke", "upenn", "--role", "agent")
    assert again.exit_code == 1
    assert "nobody of the name upenn holds a valid certificate" in words(again.stderr)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ca", "token", "upenn"), "fedkit ca init NAME --authority fedkit-authority makes an authority"),
        (("ca", "init", "../x"), "a federation's name must be 1 to 100"),
        (("enroll", "--coordinator", "127.0.0.1:1", "--out", "me"), "give the token with --token-file FILE"),
        (("enroll", "--coordinator", "127.0.0.1:1", "--out", "me", "--token-file", "none"), "cannot be read"),
        (("status", "--identity", "nowhere"), "fedkit enroll --out nowhere makes an identity"),
        (("server", "--listen", "0.0.0.0:1"), "make an authority with fedkit ca init"),
        (("server", "--listen", "127.0.0.1:0", "--authority", "nowhere"), "fedkit ca init"),
        (("roster", "show", "none.json"), "fedkit roster init makes a roster"),
        (("roster", "init", "r.json", "hospitals", "--member", "basel"), "a member is NAME=KEY"),
        (("roster", "init", "r.json", "hospitals", "--member", "basel=12"), "64 hexadecimal characters"),
        (("client", "--task", "heart", "--identity", "nowhere"), "fedkit enroll --out nowhere"),
    ],
)
def test_what_cannot_be_done_says_what_to_do(typed: Typed, arguments: tuple[str, ...], said: str) -> None:
    found = typed(*arguments)
    assert found.exit_code == 1
    assert said in words(found.stderr)


def test_a_token_on_standard_input_that_is_none_is_not_repeated(typed: Typed) -> None:
    found = typed("enroll", "--coordinator", "127.0.0.1:1", "--out", "me", "--token-file", "-", input="hunter2\n")
    assert found.exit_code == 1
    assert "not an enrolment token" in found.stderr
    assert "hunter2" not in found.stdout + found.stderr


def test_members_make_a_roster_and_change_it(typed: Typed, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca", "hospitals")
    public = {}
    for name in ("basel", "hull", "zurich"):
        authority.identity(Role.AGENT, name).save(tmp_path / name)
        shown = typed("roster", "key", "--identity", name)
        assert "read it to the other members" in words(shown.stderr)
        public[name] = shown.stdout.strip()
    authority.close()
    founders = [part for name in ("basel", "hull") for part in ("--member", public[name])]
    begun = typed("roster", "init", "r.json", "hospitals", *founders, "--threshold", "1")
    assert "still needs signatures: the new members basel, hull" in words(begun.stdout)
    assert "is there already" in words(typed("roster", "init", "r.json", "hospitals", *founders).stderr)
    early = typed("roster", "propose", "r.json", "--add", public["zurich"])
    assert early.exit_code == 1
    for name in ("basel", "hull"):
        assert typed("roster", "sign", "r.json", "--identity", name).exit_code == 0
    assert "It is complete" in words(typed("roster", "show", "r.json").stdout)
    assert "no member, and cannot sign" in words(typed("roster", "sign", "r.json", "--identity", "zurich").stderr)
    proposed = typed("roster", "propose", "r.json", "--add", public["zurich"], "--remove", "hull")
    assert "joins" in proposed.stdout
    assert "leaves" in proposed.stdout
    for name in ("zurich", "basel"):
        typed("roster", "sign", "r.json", "--identity", name)
    facts = json.loads(typed("roster", "show", "r.json", "--json").stdout)
    assert (facts["version"], facts["missing"], sorted(facts["members"])) == (2, "", ["basel", "zurich"])
    assert Chain.load(tmp_path / "r.json").check().digest == facts["digest"]
