"""The inbox keeps the last few models by their digests, and goes on with downloads that broke off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from fedkit.client.inbox import Inbox
from fedkit.errors import PayloadError
from fedkit.protos import agents_pb2 as pb
from fedkit.protos import convert, tensors_pb2
from fedkit.rounds.assignment import Parcel
from fedkit.spool import payload_digest
from fedkit.weights import Entry, Manifest, Weights

MANIFEST = Manifest((Entry("w", (4,)),))


def parcel(value: float, **extra: np.ndarray) -> Parcel:
    return Parcel(Weights(MANIFEST, np.full(4, value, dtype=np.float32)), extra)


def payload(of: Parcel) -> bytes:
    return of.model.vector.tobytes() + b"".join(of.extra[name].tobytes() for name in sorted(of.extra))


def asked(of: Parcel, **changes: object) -> pb.Assignment:
    """The assignment that comes with this model, as far as the inbox looks at it."""
    manifest = of.model.manifest.digest
    fields = {
        "model_digest": payload_digest(manifest).update(payload(of)).digest(),
        "model_bytes": of.payload_bytes,
        "manifest_digest": bytes.fromhex(manifest),
        "extras": convert.extras_to_proto({name: vector.size for name, vector in of.extra.items()}),
    }
    return pb.Assignment(**(fields | changes))


def header(of: Parcel) -> tensors_pb2.Header:
    return convert.header_to_proto(of, asked(of).model_digest)


def fetch(inbox: Inbox, of: Parcel) -> Path:
    message = asked(of)
    if not inbox.knows(message):
        inbox.learn(message, header(of))
    spool = inbox.begin(message)
    spool.feed(memoryview(payload(of))[spool.have :])
    return inbox.finish(message, spool)[0]


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(tmp_path / "inbox")


def test_a_model_that_was_fetched_is_found_by_its_digest(inbox: Inbox) -> None:
    one = parcel(1.0, control=np.ones(3, dtype=np.float32))
    assert inbox.find(asked(one)) is None
    path = fetch(inbox, one)
    assert path.read_bytes() == payload(one)
    assert inbox.find(asked(one)) == (path, MANIFEST)


def test_an_equal_model_of_another_assignment_is_the_same_file(inbox: Inbox) -> None:
    path = fetch(inbox, parcel(1.0))
    assert inbox.find(asked(parcel(1.0), id="another", run="another")) == (path, MANIFEST)
    assert inbox.find(asked(parcel(2.0))) is None


def test_the_models_used_last_are_kept(inbox: Inbox) -> None:
    first = fetch(inbox, parcel(1.0))
    second = fetch(inbox, parcel(2.0))
    assert inbox.find(asked(parcel(1.0))) is not None
    third = fetch(inbox, parcel(3.0))
    assert inbox.find(asked(parcel(2.0))) is None
    assert [first.exists(), second.exists(), third.exists()] == [True, False, True]
    assert first.read_bytes() == payload(parcel(1.0))


def test_a_manifest_is_asked_for_once(inbox: Inbox) -> None:
    assert not inbox.knows(asked(parcel(1.0)))
    inbox.learn(asked(parcel(1.0)), header(parcel(1.0)))
    assert inbox.knows(asked(parcel(2.0)))


def test_a_manifest_that_was_not_announced_is_refused(inbox: Inbox) -> None:
    other = Parcel(Weights.zeros(Manifest((Entry("v", (4,)),))))
    with pytest.raises(PayloadError, match="not the one that was announced"):
        inbox.learn(asked(parcel(1.0)), header(other))
    assert not inbox.knows(asked(other))


def test_only_so_many_manifests_are_kept(inbox: Inbox) -> None:
    for number in range(100):
        one = Parcel(Weights.zeros(Manifest((Entry(f"w{number}", (1,)),))))
        inbox.learn(asked(one), header(one))
    assert inbox.knows(asked(one))
    assert sum(inbox.knows(pb.Assignment(manifest_digest=digest)) for digest in map(digest_of, range(100))) <= 64


def digest_of(number: int) -> bytes:
    return blake3(Manifest((Entry(f"w{number}", (1,)),)).to_json().encode()).digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_bytes": 20},
        {"model_bytes": 12},
        {"model_bytes": 1 << 62},
        {"extras": [tensors_pb2.Extra(name="control", length=1)]},
        {"model_digest": b"short"},
        {"model_digest": b""},
    ],
)
def test_lengths_that_do_not_fit_the_manifest_are_refused(inbox: Inbox, changes: dict) -> None:
    inbox.learn(asked(parcel(1.0)), header(parcel(1.0)))
    with pytest.raises(PayloadError):
        inbox.begin(asked(parcel(1.0), **changes))


def test_a_download_that_broke_off_goes_on_where_it_stopped(inbox: Inbox, tmp_path: Path) -> None:
    one, message = parcel(1.0), asked(parcel(1.0))
    assert inbox.have(message) == 0
    inbox.learn(message, header(one))
    spool = inbox.begin(message)
    spool.feed(memoryview(payload(one))[:8])
    spool.close()
    for again in (inbox, Inbox(tmp_path / "inbox")):
        assert again.have(message) == 8
        assert again.find(message) is None
    again.learn(message, header(one))
    spool = again.begin(message)
    assert spool.have == 8
    spool.feed(memoryview(payload(one))[8:])
    assert again.finish(message, spool)[0].read_bytes() == payload(one)
    assert again.have(message) == 0


def test_a_download_into_a_file_that_was_used_before_goes_on_as_well(inbox: Inbox) -> None:
    for value in (1.0, 2.0, 3.0):  # the first one's file is written over from now on
        fetch(inbox, parcel(value))
    one, message = parcel(4.0), asked(parcel(4.0))
    spool = inbox.begin(message)
    spool.feed(memoryview(payload(one))[:8])
    spool.close()
    assert inbox.have(message) == 8
    assert fetch(inbox, one).read_bytes() == payload(one)


def test_bytes_that_are_not_the_announced_ones_are_thrown_away(inbox: Inbox) -> None:
    message = asked(parcel(1.0))
    inbox.learn(message, header(parcel(1.0)))
    spool = inbox.begin(message)
    spool.feed(memoryview(payload(parcel(2.0))))
    with pytest.raises(PayloadError, match="digest"):
        inbox.finish(message, spool)
    assert inbox.find(message) is None
    assert inbox.have(message) == 0


def test_what_is_left_of_a_longer_download_does_not_ask_beyond_the_end(inbox: Inbox, tmp_path: Path) -> None:
    message = asked(parcel(1.0))
    (tmp_path / "inbox" / f"{message.model_digest.hex()}.part").write_bytes(bytes(1001))
    assert inbox.have(message) == message.model_bytes


def test_a_restart_forgets_whole_models_and_keeps_the_beginnings(inbox: Inbox, tmp_path: Path) -> None:
    fetch(inbox, parcel(1.0))
    inbox.begin(asked(parcel(2.0))).close()
    again = Inbox(tmp_path / "inbox")
    assert again.find(asked(parcel(1.0))) is None
    assert [path.suffix for path in (tmp_path / "inbox").iterdir()] == [".part"]


def test_downloads_that_never_go_on_do_not_fill_the_disk(inbox: Inbox, tmp_path: Path) -> None:
    inbox.learn(asked(parcel(0.0)), header(parcel(0.0)))
    for value in range(10):
        spool = inbox.begin(asked(parcel(value)))
        spool.feed(memoryview(payload(parcel(value)))[:8])
        spool.close()
    assert len(list((tmp_path / "inbox").iterdir())) <= 3
    assert inbox.have(asked(parcel(9.0))) == 8
    assert inbox.have(asked(parcel(8.0))) == 8


def test_only_the_owner_may_read_what_was_fetched(inbox: Inbox, tmp_path: Path) -> None:
    path = fetch(inbox, parcel(1.0))
    assert path.stat().st_mode & 0o077 == 0
    assert (tmp_path / "inbox").stat().st_mode & 0o077 == 0


# -- models that come along --------------------------------------------------------------------------------------------


def along(of: Parcel, **changes: object) -> pb.Assignment:
    """The assignment that brings this model's manifest too."""
    return asked(of, **({"manifest": of.model.manifest.to_json()} | changes))


def lying(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "inbox").iterdir())


def test_a_model_that_comes_along_is_found_like_one_that_was_fetched(inbox: Inbox, tmp_path: Path) -> None:
    one = parcel(1.0, control=np.ones(3, dtype=np.float32))
    inbox.keep(along(one), memoryview(payload(one)))
    path = tmp_path / "inbox" / asked(one).model_digest.hex()
    assert inbox.find(asked(one)) == (path, MANIFEST)
    assert path.read_bytes() == payload(one)
    assert lying(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o077 == 0


def test_the_manifest_comes_along_once(inbox: Inbox) -> None:
    inbox.keep(along(parcel(1.0)), memoryview(payload(parcel(1.0))))
    inbox.keep(asked(parcel(2.0)), memoryview(payload(parcel(2.0))))
    path, manifest = inbox.find(asked(parcel(2.0)))
    assert (path.read_bytes(), manifest) == (payload(parcel(2.0)), MANIFEST)


def test_a_model_without_any_manifest_is_left_to_be_fetched(inbox: Inbox, tmp_path: Path) -> None:
    inbox.keep(asked(parcel(1.0)), memoryview(payload(parcel(1.0))))
    assert inbox.find(asked(parcel(1.0))) is None
    assert not inbox.knows(asked(parcel(1.0)))
    assert lying(tmp_path) == []
    assert fetch(inbox, parcel(1.0)).read_bytes() == payload(parcel(1.0))


def test_models_that_come_along_go_like_those_that_were_fetched(inbox: Inbox) -> None:
    for value in range(5):
        inbox.keep(along(parcel(value)), memoryview(payload(parcel(value))))
    kept = [inbox.find(asked(parcel(value))) is not None for value in range(5)]
    assert kept == [False, False, False, True, True]


def test_a_model_that_is_here_is_not_written_again(inbox: Inbox) -> None:
    path = fetch(inbox, parcel(1.0))
    before = path.stat()
    inbox.keep(along(parcel(1.0)), memoryview(payload(parcel(1.0))))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("left", [b"", b"\xff" * 8, b"\xff" * 16, b"\xff" * 100], ids=len)
def test_a_model_that_comes_along_replaces_what_a_download_left(inbox: Inbox, tmp_path: Path, left: bytes) -> None:
    one = parcel(1.0)
    name = asked(one).model_digest.hex()
    (tmp_path / "inbox" / f"{name}.part").write_bytes(left)
    inbox.keep(along(one), memoryview(payload(one)))
    assert lying(tmp_path) == [name]
    assert inbox.find(asked(one))[0].read_bytes() == payload(one)


OTHER = Manifest((Entry("v", (4,)),))
MISFITS = {
    "other values": (along(parcel(1.0)), payload(parcel(2.0))),
    "fewer values": (along(parcel(1.0)), payload(parcel(1.0))[:-4]),
    "more values": (along(parcel(1.0)), payload(parcel(1.0)) + bytes(4)),
    "half a value": (along(parcel(1.0)), payload(parcel(1.0))[:-2]),
    "nothing": (along(parcel(1.0)), b""),
    "another length": (along(parcel(1.0), model_bytes=20), payload(parcel(1.0)) + bytes(4)),
    "another digest": (along(parcel(1.0), model_digest=bytes(32)), payload(parcel(1.0))),
    "a short digest": (along(parcel(1.0), model_digest=b"../x"), payload(parcel(1.0))),
    "another manifest": (along(parcel(1.0), manifest=OTHER.to_json()), payload(parcel(1.0))),
    "no manifest": (along(parcel(1.0), manifest="[[["), payload(parcel(1.0))),
    "the digest of another": (
        along(parcel(1.0), manifest=OTHER.to_json(), manifest_digest=bytes.fromhex(OTHER.digest)),
        payload(parcel(1.0)),
    ),
}


@pytest.mark.parametrize(("message", "values"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_model_that_does_not_belong_to_its_assignment_is_refused_and_leaves_nothing(
    inbox: Inbox, tmp_path: Path, message: pb.Assignment, values: bytes, used: bool
) -> None:
    for value in (5.0, 6.0, 7.0) if used else ():  # whose first file would be written over
        fetch(inbox, parcel(value))
    before = [name for name in lying(tmp_path) if not name.endswith(".spare")]
    with pytest.raises(PayloadError):
        inbox.keep(message, memoryview(values))
    assert [name for name in lying(tmp_path) if not name.endswith(".spare")] == before
    assert inbox.find(message) is None
    assert inbox.have(message) == 0
    assert fetch(inbox, parcel(1.0)).read_bytes() == payload(parcel(1.0))
