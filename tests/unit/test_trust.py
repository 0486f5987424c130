"""Certificates name one member each, tokens work once, and nothing that is not from the authority passes for it."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import ipaddress
import os
import stat
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.errors import ConfigError, StorageError, TrustError
from fedkit.trust.authority import Authority
from fedkit.trust.certificates import Role, authority_in, fingerprint, holder, make_key, private_key, request_for
from fedkit.trust.identity import Identity
from fedkit.trust.tokens import Token

HOUR = dt.timedelta(hours=1)
DER = serialization.Encoding.DER


class Clock:
    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> Authority:
    Authority.create(tmp_path / "ca", "hospitals").close()
    return Authority(tmp_path / "ca", clock=clock)


def enrolled(authority: Authority, role: Role = Role.AGENT, name: str = "upenn") -> Identity:
    key = make_key()
    made = authority.enroll(authority.token(role, name, HOUR), request_for(key, role, name))
    return Identity(key, made, authority.pem)


def request(key: object, *urns: str, common: str = "upenn") -> bytes:
    asked = x509.CertificateSigningRequestBuilder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)]))
    if urns:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(urn) for urn in urns])
        asked = asked.add_extension(names, critical=False)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return asked.sign(key, digest).public_bytes(serialization.Encoding.PEM)


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_a_token_is_text_and_back_and_shows_its_secret_to_nobody() -> None:
    token = Token.make(Role.AGENT, "upenn", bytes(range(32)))
    text = str(token)
    assert Token.parse(f"  {text}\n") == token
    assert text.startswith("fedkit-token:agent:upenn:")
    secret = text.rpartition(":")[2]
    assert secret not in repr(token)
    assert Token.make(Role.AGENT, "upenn", bytes(32)).secret != token.secret


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: text + "A",
        lambda text: text.replace("agent", "root"),
        lambda text: text.replace("upenn", "../upenn"),
        lambda text: text.replace("fedkit-token", "token"),
        lambda text: text[:-1] + "_" if text[-1] not in "AEIMQUYcgkosw048" else text[:-1] + "B",
        lambda _: "",
    ],
)
def test_what_is_not_a_token_is_refused_and_never_repeated(change) -> None:
    text = change(str(Token.make(Role.AGENT, "upenn", bytes(32))))
    with pytest.raises(TrustError, match="not an enrolment token") as caught:
        Token.parse(text)
    assert not text or text not in str(caught.value)


def test_a_token_works_once_and_again_only_for_the_same_key(authority: Authority) -> None:
    token, key = authority.token(Role.AGENT, "upenn", HOUR), make_key()
    first = authority.enroll(token, request_for(key, Role.AGENT, "upenn"))
    again = authority.enroll(token, request_for(key, Role.AGENT, "upenn"))  # the first answer was lost
    assert holder(first).serial != holder(again).serial
    with pytest.raises(TrustError, match="used before"):
        authority.enroll(token, request_for(make_key(), Role.AGENT, "upenn"))


def test_an_old_an_unknown_and_a_changed_token_let_nobody_in(authority: Authority, clock: Clock) -> None:
    token, asked = authority.token(Role.AGENT, "upenn", HOUR), request_for(make_key(), Role.AGENT, "upenn")
    with pytest.raises(TrustError, match="not known"):
        authority.enroll(Token.make(Role.AGENT, "upenn", token.fingerprint), asked)
    for other in (
        Token(Role.OPERATOR, "upenn", token.fingerprint, token.secret),
        Token(Role.AGENT, "rwth", b"", token.secret),
    ):
        with pytest.raises(TrustError, match="not known"):
            authority.enroll(other, request_for(make_key(), other.role, other.name))
    clock.ahead = 3601
    with pytest.raises(TrustError, match="too old"):
        authority.enroll(token, asked)


def test_the_secret_of_a_token_is_stored_nowhere(authority: Authority) -> None:
    token = authority.token(Role.AGENT, "upenn", HOUR)
    authority.enroll(token, request_for(make_key(), Role.AGENT, "upenn"))
    for path in authority.folder.iterdir():
        raw = path.read_bytes()
        assert token.secret not in raw
        assert str(token).rpartition(":")[2].encode() not in raw


# -- requests ----------------------------------------------------------------------------------------------------------

EC = ec.generate_private_key(ec.SECP256R1())
MINE = "urn:fedkit:agent:upenn"
BAD = {
    "nothing": (b"", "not a certificate signing request"),
    "noise": (os.urandom(200), "not a certificate signing request"),
    "a huge one": (b"-----BEGIN CERTIFICATE REQUEST-----\n" + b"A" * 10_000, "not a certificate signing request"),
    "no name": (request(EC), "not a certificate signing request"),
    "another name": (request(EC, "urn:fedkit:agent:rwth"), "somebody else"),
    "another role": (request(EC, "urn:fedkit:operator:upenn"), "somebody else"),
    "two names": (request(EC, MINE, "urn:fedkit:agent:rwth"), "somebody else"),
    "another curve": (request(ec.generate_private_key(ec.SECP384R1()), MINE), "P-256"),
    "another kind of key": (request(ed25519.Ed25519PrivateKey.generate(), MINE), "P-256"),
}


@pytest.mark.parametrize(("asked", "why"), BAD.values(), ids=BAD)
def test_a_request_that_is_not_the_tokens_uses_nothing_up(authority: Authority, asked: bytes, why: str) -> None:
    token = authority.token(Role.AGENT, "upenn", HOUR)
    with pytest.raises(TrustError, match=why):
        authority.enroll(token, asked)
    assert authority.members() == []
    authority.enroll(token, request(EC, MINE))


def test_a_request_signed_by_another_key_is_refused(authority: Authority) -> None:
    asked = x509.load_pem_x509_csr(request(EC, MINE))
    raw = bytearray(asked.public_bytes(DER))
    raw[-5] ^= 1  # in the signature
    pem = x509.load_der_x509_csr(bytes(raw)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(TrustError, match="not signed by its own key"):
        authority.enroll(authority.token(Role.AGENT, "upenn", HOUR), pem)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("standing") / "ca", "hospitals")


CHANGES = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4)


def changed(raw: bytes, changes: list[tuple[int, int]]) -> bytes:
    found = bytearray(raw)
    for at, value in changes:
        found[at % len(found)] = value
    return bytes(found)


def pem(kind: str, der: bytes) -> bytes:
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN {kind}-----\n{text}-----END {kind}-----\n".encode()


@settings(max_examples=400)
@given(CHANGES)
def test_whatever_a_stranger_sends_as_a_request_is_refused_in_a_sentence(
    standing: Authority, changes: list[tuple[int, int]]
) -> None:
    asked = changed(x509.load_pem_x509_csr(request(EC, MINE)).public_bytes(DER), changes)
    with contextlib.suppress(TrustError):
        made = standing.enroll(standing.token(Role.AGENT, "upenn", HOUR), pem("CERTIFICATE REQUEST", asked))
        assert (holder(made).role, holder(made).name) == (Role.AGENT, "upenn")


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # of odd serial numbers
@settings(max_examples=400)
@given(CHANGES)
def test_whatever_somebody_shows_as_a_coordinators_certificate_is_refused_in_a_sentence(
    standing: Authority, changes: list[tuple[int, int]]
) -> None:
    mine = standing.identity(Role.COORDINATOR, "coordinator", ["fed.example"])
    shown = changed(x509.load_pem_x509_certificate(mine.certificate).public_bytes(DER), changes)
    with contextlib.suppress(TrustError):
        assert authority_in(shown, fingerprint(standing.certificate)) == standing.certificate
    with contextlib.suppress(TrustError):
        assert holder(pem("CERTIFICATE", shown)).role in Role


@pytest.mark.parametrize(
    "place",
    [
        x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.UniformResourceIdentifier("https://ca.example"),
        x509.UniformResourceIdentifier("data:application/pkix-cert;base64,AAAA"),
    ],
    ids=["a name", "an address", "a page", "no certificate"],
)
def test_an_authority_that_lies_elsewhere_is_refused(place: x509.GeneralName) -> None:
    now, name = dt.datetime.now(dt.UTC), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    where = x509.AuthorityInformationAccess([x509.AccessDescription(AuthorityInformationAccessOID.CA_ISSUERS, place)])
    made = x509.CertificateBuilder(name, name, EC.public_key(), 1, now, now + HOUR).add_extension(where, False)
    with pytest.raises(TrustError, match="not a fedkit coordinator"):
        authority_in(made.sign(EC, hashes.SHA256()).public_bytes(DER), bytes(32))


def test_a_host_that_has_no_name_in_a_certificate_is_named(standing: Authority) -> None:
    with pytest.raises(TrustError, match="'münchen' is no name of a host"):
        standing.identity(Role.COORDINATOR, "coordinator", ["münchen"])


# -- certificates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.AGENT, Role.OPERATOR])
def test_a_certificate_says_who_and_what_for_and_can_sign_nothing(authority: Authority, role: Role) -> None:
    mine = enrolled(authority, role)
    mine.check()
    assert (mine.holder.role, mine.holder.name) == (role, "upenn")
    made = x509.load_pem_x509_certificate(mine.certificate)
    assert list(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not made.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert dt.timedelta(days=29) < made.not_valid_after_utc - dt.datetime.now(dt.UTC) <= dt.timedelta(days=30)


def test_a_request_for_more_than_a_name_gets_no_more(authority: Authority) -> None:
    asked = (
        x509.CertificateSigningRequestBuilder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(MINE), x509.DNSName("bank.example")]), False
        )
        .sign(EC, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    made = x509.load_pem_x509_certificate(authority.enroll(authority.token(Role.AGENT, "upenn", HOUR), asked))
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(MINE)]
    assert made.subject.rfc4514_string() == "CN=upenn"
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_coordinators_certificate_carries_its_authority(authority: Authority, tmp_path: Path) -> None:
    mine = authority.identity(Role.COORDINATOR, "coordinator", ["fed.example", "10.0.0.7"])
    shown = x509.load_pem_x509_certificate(mine.certificate).public_bytes(DER)
    found = authority_in(shown, fingerprint(authority.certificate))
    assert found == authority.certificate
    other = Authority.create(tmp_path / "other", "hospitals")
    with pytest.raises(TrustError, match="another federation"):
        authority_in(shown, fingerprint(other.certificate))
    plain = x509.load_pem_x509_certificate(enrolled(authority).certificate).public_bytes(DER)
    for strange in (plain, b"", os.urandom(300)):
        with pytest.raises(TrustError, match="not a fedkit coordinator"):
            authority_in(strange, fingerprint(authority.certificate))


@pytest.mark.parametrize(
    "urns", [[], ["urn:fedkit:root:x"], [MINE, MINE], ["urn:fedkit:agent:../x"], ["https://x.example"]]
)
def test_a_certificate_that_names_not_one_member_is_nobodys(urns: list[str]) -> None:
    now, name = dt.datetime.now(dt.UTC), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    made = x509.CertificateBuilder(name, name, EC.public_key(), 1, now, now + HOUR)
    if urns:
        made = made.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(u) for u in urns]), False)
    with pytest.raises(TrustError, match=r"does not name one member|names nobody"):
        holder(made.sign(EC, hashes.SHA256()))


# -- renewal and revocation --------------------------------------------------------------------------------------------


def test_a_renewed_certificate_is_for_the_same_name_and_key(authority: Authority) -> None:
    mine = enrolled(authority)
    fresh = mine.renewed(authority.renew(mine.holder, mine.request()))
    assert (fresh.holder.role, fresh.holder.name, fresh.key) == (Role.AGENT, "upenn", mine.key)
    assert fresh.holder.serial != mine.holder.serial
    with pytest.raises(TrustError, match="somebody else"):
        authority.renew(mine.holder, request_for(mine.key, Role.OPERATOR, "upenn"))
    theirs = enrolled(authority, name="rwth")
    with pytest.raises(TrustError, match="do not belong together"):
        mine.renewed(theirs.certificate)


def test_it_is_time_to_renew_after_two_thirds_of_a_certificates_life(authority: Authority) -> None:
    left = enrolled(authority).renew_at - time.time()
    assert dt.timedelta(days=19) < dt.timedelta(seconds=left) < dt.timedelta(days=21)


def test_revoking_a_name_ends_all_its_certificates_and_tokens_and_nobody_elses(authority: Authority) -> None:
    mine, theirs = enrolled(authority), enrolled(authority, name="rwth")
    fresh = mine.renewed(authority.renew(mine.holder, mine.request()))
    waiting = authority.token(Role.AGENT, "upenn", HOUR)
    ended = authority.revoke("upenn")
    assert (set(ended.serials), ended.tokens) == ({mine.holder.serial, fresh.holder.serial}, 1)
    assert authority.revoked() == {mine.holder.serial, fresh.holder.serial}
    assert theirs.holder.serial not in authority.revoked()
    with pytest.raises(TrustError, match="revoked"):
        authority.renew(fresh.holder, fresh.request())
    with pytest.raises(TrustError, match="not known"):
        authority.enroll(waiting, request_for(make_key(), Role.AGENT, "upenn"))
    with pytest.raises(TrustError, match="nobody of the name upenn"):
        authority.revoke("upenn")
    enrolled(authority)  # with a new token, the site may come back


def test_a_token_that_was_stolen_before_anybody_enrolled_is_revoked(authority: Authority) -> None:
    stolen = authority.token(Role.OPERATOR, "ada", HOUR)
    with pytest.raises(TrustError, match="nobody of the name ada"):
        authority.revoke("ada", Role.AGENT)
    assert authority.revoke("ada") == ([], 1)
    with pytest.raises(TrustError, match="not known"):
        authority.enroll(stolen, request_for(make_key(), Role.OPERATOR, "ada"))


def test_another_process_sees_a_revocation_at_once(authority: Authority) -> None:
    mine = enrolled(authority)
    beside = Authority(authority.folder)
    before = beside.changes()
    assert beside.changes() == before
    authority.revoke("upenn")
    assert beside.changes() != before
    assert beside.revoked() == {mine.holder.serial}


def test_members_are_listed_with_their_newest_certificate(authority: Authority, clock: Clock) -> None:
    mine = enrolled(authority)
    enrolled(authority, Role.OPERATOR, "ada")
    authority.revoke("upenn")
    found = {(one.role, one.name): one for one in authority.members()}
    assert set(found) == {(Role.AGENT, "upenn"), (Role.OPERATOR, "ada")}
    assert found[Role.AGENT, "upenn"].revoked is not None
    assert found[Role.AGENT, "upenn"].expires == mine.holder.expires
    enrolled(authority)
    assert {one.name: one.revoked for one in authority.members()}["upenn"] is None


# -- folders -----------------------------------------------------------------------------------------------------------


def test_an_authority_is_made_once_and_its_key_is_its_owners_alone(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="holds an authority already"):
        Authority.create(authority.folder, "hospitals")
    for path in authority.folder.iterdir():
        if path.name != "authority.pem":
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    with pytest.raises(TrustError, match="fedkit ca init"):
        Authority(authority.folder / "nowhere")


def test_a_folder_with_another_authoritys_key_is_refused(authority: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", "banks")
    (authority.folder / "authority.pem").write_bytes(other.pem)
    with pytest.raises(TrustError, match="do not belong together"):
        Authority(authority.folder)
    (authority.folder / "authority.pem").write_text("nothing")
    with pytest.raises(TrustError, match="does not hold an authority"):
        Authority(authority.folder)


def test_an_identity_is_saved_and_loaded_and_its_key_is_shown_by_nothing(authority: Authority, tmp_path: Path) -> None:
    mine = enrolled(authority)
    assert Identity.load(mine.save(tmp_path / "me")) == mine
    assert "PRIVATE" not in repr(mine)
    assert stat.S_IMODE((tmp_path / "me" / "key.pem").stat().st_mode) == 0o600
    os.chmod(tmp_path / "me" / "key.pem", 0o640)
    with pytest.raises(TrustError, match="chmod 600"):
        Identity.load(tmp_path / "me")


def test_an_identity_of_parts_that_do_not_belong_together_is_refused(authority: Authority, tmp_path: Path) -> None:
    mine, other = enrolled(authority), Authority.create(tmp_path / "other", "banks")
    strange = [
        (Identity(make_key(), mine.certificate, mine.authority), "key and certificate"),
        (Identity(mine.key, mine.certificate, other.pem), "certificate and authority"),
        (Identity(mine.key, b"nothing", mine.authority), "certificate and authority"),
        (Identity(b"nothing", mine.certificate, mine.authority), "private key"),
    ]
    for one, why in strange:
        with pytest.raises(TrustError, match=why):
            one.check()
    with pytest.raises(TrustError, match="fedkit enroll --out"):
        Identity.load(tmp_path / "nowhere")
    with pytest.raises(TrustError, match="of the kind operator; upenn is an agent"):
        mine.require(Role.OPERATOR)
    with pytest.raises(TrustError, match="not one of ECDSA"):
        private_key(
            ed25519.Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


def test_a_disk_that_fails_issues_nothing(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    authority._connection.execute("PRAGMA query_only = 1")
    with pytest.raises(StorageError, match="free space"):
        authority.token(Role.AGENT, "upenn", HOUR)
