"""The outbox does what the store in memory does, and goes on doing it after every end of its process."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from fedkit.client.outbox import Outbox, Stored
from fedkit.errors import Refused, StorageError
from fedkit.spool import payload_digest
from fedkit.trainer.client import MemoryStore
from fedkit.work import MetricSums, Summary

MANIFEST = "ab" * 32
RUNS = ("heart.01234567", "heart.89abcdef")


def key(number: int) -> str:
    return f"{number:032x}"


def produce(outbox: Outbox, name: str, content: bytes = b"\0" * 12, state: bytes | None = None) -> Stored:
    """What a worker leaves behind: the files are in place, the result is not stored yet."""
    outbox.path(name).write_bytes(content)
    if state is not None:
        outbox.state_path(name).write_bytes(state)
    digest = payload_digest(MANIFEST).update(content).hexdigest()
    return Stored(name, RUNS[0], 5, 0.25, MANIFEST, len(content), digest)


def put(outbox: Outbox, name: str, content: bytes = b"\0" * 12, state: bytes | None = None) -> Stored:
    stored = produce(outbox, name, content, state)
    outbox.put(stored, has_state=state is not None)
    return stored


def state_of(outbox: Outbox, run: str = RUNS[0]) -> bytes | None:
    path = outbox.state(run)
    return None if path is None else path.read_bytes()


def files(folder: Path) -> set[str]:
    """What lies there but the database, and but a file that nobody needs and the next result may take."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(("outbox.db", "spare"))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ada" / "outbox"


@pytest.fixture
def outbox(folder: Path):
    box = Outbox(folder)
    yield box
    box.close()


class TwoStores(RuleBasedStateMachine):
    """The outbox and the store in memory are told the same, and asked the same."""

    results = Bundle("results")
    working = Bundle("working")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.outbox = Outbox(self.folder)
        self.memory = {run: MemoryStore() for run in RUNS}
        self.runs: dict[str, str] = {}
        self.running: set[str] = set()
        self.order: list[str] = []
        self.count = 0

    @rule(target=working, run=st.sampled_from(RUNS))
    def begin(self, run: str) -> str:
        """A worker has written its files and has not said so yet."""
        self.count += 1
        name = key(self.count)
        self.runs[name] = run
        self.running.add(name)
        self.outbox.path(name).write_bytes(name.encode())
        self.outbox.state_path(name).write_bytes(f"state of {name}".encode())
        return name

    @rule(target=results, name=consumes(working), has_state=st.booleans())
    def put(self, name: str, has_state: bool) -> object:
        if name not in self.running:
            return multiple()
        self.running.discard(name)
        self.order.append(name)
        run, raw = self.runs[name], self.outbox.path(name).read_bytes()
        if not has_state:
            self.outbox.state_path(name).unlink()
        digest = payload_digest(MANIFEST).update(raw).hexdigest()
        self.outbox.put(Stored(name, run, 1, None, MANIFEST, len(raw), digest), has_state=has_state)
        store = self.memory[run]
        store.put(name, name, f"state of {name}".encode() if has_state else store.state())
        return name

    @rule(accepted=st.lists(results, max_size=3), dropped=st.lists(results, max_size=2))
    def settle(self, accepted: list[str], dropped: list[str]) -> None:
        dropped = [name for name in dropped if name not in accepted]
        self.outbox.settle(accepted, dropped)
        for store in self.memory.values():
            store.settle(accepted, dropped)

    @rule(name=working)
    def drop_running_work(self, name: str) -> None:
        """The coordinator calls off what a worker has not finished; its files are the worker's business."""
        self.outbox.settle([], [name])

    @rule()
    def reopen(self) -> None:
        self.outbox.close()
        self.outbox = Outbox(self.folder)
        self.running.clear()

    @invariant()
    def the_same_is_known(self) -> None:
        for name, run in self.runs.items():
            answer = self.memory[run].answer(name)
            assert (self.outbox.find(name) is None) == (answer is None)
            if self.memory[run].is_settled(name):
                assert self.outbox.is_settled(name)
        assert self.outbox.held() == [name for name in self.order if self.memory[self.runs[name]].answer(name)]

    @invariant()
    def the_state_is_the_same(self) -> None:
        for run, store in self.memory.items():
            assert (state_of(self.outbox, run) or {}) == store.state()

    @invariant()
    def no_file_is_missing_and_none_is_left(self) -> None:
        held = set(self.outbox.held())
        states = {path.name for run in RUNS if (path := self.outbox.state(run)) is not None}
        found = files(self.folder)
        assert held | states | self.running <= found
        rest = {name for name in found if name.removesuffix(".state") not in held | self.running}
        assert rest <= {f"{name}.state" for name in self.runs}
        assert len(rest) <= len(RUNS)

    def teardown(self) -> None:
        self.outbox.close()
        shutil.rmtree(self.folder)


TestTwoStores = TwoStores.TestCase
TestTwoStores.settings = settings(max_examples=25, stateful_step_count=25)


def test_everything_about_a_result_survives_the_end_of_the_process(outbox: Outbox, folder: Path) -> None:
    raw = np.arange(5, dtype="<f4").tobytes()
    stored = Stored(key(1), RUNS[0], 7, 0.1, MANIFEST, 20, payload_digest(MANIFEST).update(raw).hexdigest(), {"c": 2})
    outbox.path(key(1)).write_bytes(raw)
    outbox.put(stored, has_state=False)
    outbox.close()
    again = Outbox(folder)
    assert again.find(key(1)) == stored
    assert again.path(key(1)).read_bytes() == raw
    again.close()


@pytest.mark.parametrize("loss", [None, 0.1, float("inf"), -0.0])
def test_a_loss_comes_back_as_it_was(outbox: Outbox, loss: float | None) -> None:
    outbox.path(key(1)).write_bytes(b"")
    outbox.put(Stored(key(1), RUNS[0], 1, loss, MANIFEST, 0, payload_digest(MANIFEST).hexdigest()), has_state=False)
    assert repr(outbox.find(key(1)).loss) == repr(loss)


@pytest.mark.parametrize(
    ("kind", "sums", "answer"),
    [
        ("metrics", [0.1, float("nan")], MetricSums(np.array([0.1, np.nan]), 3)),
        ("integers", [2**62, -1], Summary(np.array([2**62, -1]), 3)),
        ("reals", [1e300], Summary(np.array([1e300]), 3)),
        ("integers", [], Summary(np.array([], dtype=np.int64), 3)),
    ],
)
def test_sums_come_back_bit_by_bit(outbox: Outbox, folder: Path, kind: str, sums: list, answer: object) -> None:
    outbox.put(Stored(key(1), RUNS[0], 3, sums=sums, kind=kind), has_state=False)
    outbox.close()
    again = Outbox(folder)
    found = again.find(key(1)).answer()
    again.close()
    assert (type(found), found.examples, found.vector.dtype) == (type(answer), 3, answer.vector.dtype)
    assert found.vector.tobytes() == answer.vector.tobytes()


def test_held_results_are_named_oldest_first(outbox: Outbox) -> None:
    for number in (3, 1, 2):
        put(outbox, key(number))
    assert outbox.held() == [key(3), key(1), key(2)]


DAMAGE = {
    "lost": Path.unlink,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0\0\0\0"),
    "garbled": lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:]),
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_result_whose_bytes_are_not_those_stored_is_not_found(outbox: Outbox, folder: Path, damage) -> None:
    put(outbox, key(1), state=b"after")
    outbox.close()
    damage(folder / key(1))
    again = Outbox(folder)
    assert again.find(key(1)) is None
    assert again.held() == []
    assert again.state(RUNS[0]) is None
    assert not again.is_settled(key(1))
    again.close()


def test_a_result_that_was_lost_is_worked_out_again_from_the_state_before_it(outbox: Outbox, folder: Path) -> None:
    put(outbox, key(1), state=b"one")
    outbox.settle([key(1)], [])
    put(outbox, key(2), state=b"two")
    outbox.close()
    (folder / key(2)).unlink()
    again = Outbox(folder)
    assert again.find(key(2)) is None
    assert state_of(again) == b"one"
    put(again, key(2), state=b"two")
    assert state_of(again) == b"two"
    again.settle([key(2)], [])
    assert state_of(again) == b"two"
    assert files(folder) == {f"{key(2)}.state"}
    again.close()


def test_an_accepted_result_goes_and_its_state_stays(outbox: Outbox, folder: Path) -> None:
    put(outbox, key(1), state=b"one")
    outbox.settle([key(1)], [])
    assert outbox.find(key(1)) is None
    assert outbox.is_settled(key(1))
    assert state_of(outbox) == b"one"
    assert files(folder) == {f"{key(1)}.state"}


def test_a_dropped_result_goes_with_its_state(outbox: Outbox, folder: Path) -> None:
    put(outbox, key(1), state=b"one")
    outbox.settle([key(1)], [])
    put(outbox, key(2), state=b"two")
    outbox.settle([], [key(2)])
    assert state_of(outbox) == b"one"
    assert files(folder) == {f"{key(1)}.state"}


def test_runs_keep_their_states_apart(outbox: Outbox) -> None:
    put(outbox, key(1), state=b"one")
    assert outbox.state(RUNS[1]) is None


def test_ids_that_were_settled_are_kept_for_ever(outbox: Outbox, folder: Path) -> None:
    put(outbox, key(1))
    outbox.settle([key(1), key(8)], [key(9)])
    outbox.close()
    again = Outbox(folder)
    assert [again.is_settled(key(number)) for number in (1, 8, 9, 2)] == [True, True, True, False]
    again.close()


def test_news_that_comes_twice_changes_nothing(outbox: Outbox, folder: Path) -> None:
    put(outbox, key(1), state=b"one")
    for _ in range(2):
        outbox.settle([key(1)], [])
        assert state_of(outbox) == b"one"
        assert files(folder) == {f"{key(1)}.state"}


def test_what_was_vowed_is_never_taken_back_and_nothing_else_is_stored_with_it(outbox: Outbox, folder: Path) -> None:
    def signed(number: int, statement: bytes, of: Outbox) -> None:
        reply = Stored(key(number), RUNS[0], 0, sums=["c2lnbmVk"], kind="reply")
        of.put(reply, has_state=False, seat=("call", b"kept"), vow=(b"round 1", statement))

    signed(1, b"one sum", outbox)
    signed(2, b"one sum", outbox)
    outbox.settle([key(1), key(2)], [])
    outbox.close()
    again = Outbox(folder)
    with pytest.raises(Refused, match="another sum of that round was signed before"):
        signed(3, b"another", again)
    assert again.find(key(3)) is None
    assert again.seat("call") is None
    signed(4, b"one sum", again)
    again.close()


def test_the_files_of_running_work_outlive_any_settlement(outbox: Outbox, folder: Path) -> None:
    put(outbox, key(1), state=b"one")
    produce(outbox, key(2), state=b"two")
    outbox.settle([key(1)], [])
    outbox.settle([], [key(2), key(3)])
    assert files(folder) == {f"{key(1)}.state", key(2), f"{key(2)}.state"}


def test_of_the_files_nobody_needs_any_more_one_is_kept_for_the_next_result(outbox: Outbox, folder: Path) -> None:
    for number in (1, 2, 3):
        put(outbox, key(number), content=bytes((number,)) * 4)
    outbox.settle([key(1)], [key(2)])
    assert outbox.spare.read_bytes() in (b"\1" * 4, b"\2" * 4)
    assert files(folder) == {key(3)}
    assert outbox.path(key(3)).read_bytes() == b"\3" * 4
    outbox.close()
    Outbox(folder).close()
    assert not outbox.spare.exists()


def test_what_an_interrupted_worker_left_is_gone_after_a_restart(outbox: Outbox, folder: Path) -> None:
    put(outbox, key(1), state=b"one")
    produce(outbox, key(2), state=b"two")
    outbox.close()
    Outbox(folder).close()
    assert files(folder) == {key(1), f"{key(1)}.state"}


SECOND = """
import sys
from pathlib import Path
from fedkit.client.outbox import Outbox
from fedkit.errors import ConfigError
try:
    Outbox(Path(sys.argv[1]))
except ConfigError as error:
    print(error)
"""


def test_a_second_process_is_told_that_the_folder_is_taken(outbox: Outbox, folder: Path) -> None:
    put(outbox, key(1))
    produce(outbox, key(2))
    told = subprocess.run([sys.executable, "-c", SECOND, str(folder)], capture_output=True, text=True, check=True)
    assert f"{folder} is in use by another agent process" in told.stdout
    assert files(folder) == {key(1), key(2)}
    assert outbox.find(key(1)) is not None


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_outbox import Outbox, key, produce, put
box = Outbox(Path(sys.argv[1]))
put(box, key(1), state=b"one")
box.settle([key(1)], [])
put(box, key(2), state=b"two")
produce(box, key(3), state=b"three")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_stored_survives_a_kill(folder: Path) -> None:
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=root).returncode == -9
    outbox = Outbox(folder)
    assert outbox.held() == [key(2)]
    assert outbox.find(key(2)) is not None
    assert state_of(outbox) == b"two"
    assert files(folder) == {f"{key(1)}.state", key(2), f"{key(2)}.state"}
    outbox.close()


def test_a_file_that_is_no_outbox_is_named_in_the_error(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "outbox.db").write_bytes(b"this is not a database" * 400)
    with pytest.raises(StorageError, match=r"outbox\.db"):
        Outbox(folder)


def test_a_folder_that_cannot_be_made_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "ada").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="ada/outbox: Not a directory"):
        Outbox(tmp_path / "ada" / "outbox")


def test_only_the_owner_may_read_what_is_stored(outbox: Outbox, folder: Path) -> None:
    assert folder.stat().st_mode & 0o077 == 0
