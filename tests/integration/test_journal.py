"""A coordinator's state on disk: what a journal has taken is there again, whenever and however its process ended.

Run as a script, this file is the coordinators that are killed (see `main`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

import fedkit
from fedkit.errors import ConfigError, NameTaken, NoSuchRun, Reason, StateError, StorageError
from fedkit.history import History, read
from fedkit.packing import pack
from fedkit.queries import Histogram, LabelCounts, Moments
from fedkit.rounds.assignment import Assignment, Clip, Private
from fedkit.rounds.call import Refusal
from fedkit.rounds.conduct import Outcome
from fedkit.rounds.journal import Commit, Entry, MemoryJournal, OpenRound, RoundRecord, Started
from fedkit.server.blobs import Blobs
from fedkit.server.database import Database
from fedkit.server.journal import SqliteJournal
from fedkit.spool import Room, Spares, Spool, Spooled, SpooledExtras, Stash
from fedkit.strategy import Strategy
from fedkit.testing import Crash, Fuse, InMemoryFederation
from fedkit.weights import Entry as Tensor
from fedkit.weights import Manifest, Weights
from fedkit.work import Evaluate, Fit, Gradient, MetricSums, Summarize, Summary, Update


def sibling(name: str) -> ModuleType:
    """Another test module of this folder; pytest imports each by its path."""
    spec = importlib.util.spec_from_file_location(f"sibling_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


replay = sibling("test_replay")

MANIFEST = Manifest((Tensor("w", (3,)),))
EMPTY = Commit(0, Weights.zeros(MANIFEST), {}, RoundRecord(0))


class Desk:
    """A coordinator's folder with one run; `close` and `open` stand for the end of a process and the next one."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.settings = settings
        self.spool = folder / "spool"
        self.database = Database(folder / "fedkit.db")
        self.spool.mkdir(exist_ok=True)
        if not self.database.runs():
            self.database.add_run("heart", {})
        self.open()

    def open(self) -> None:
        self.blobs = Blobs(self.folder / "models")
        self.journal = SqliteJournal(self.database, self.blobs, "heart", self.spool, **self.settings)

    def reopen(self) -> SqliteJournal:
        self.database.close()
        self.database = Database(self.folder / "fedkit.db")
        self.open()
        return self.journal


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path)
    yield found
    found.database.close()


def model(*values: float) -> Weights:
    return Weights(MANIFEST, values)


# -- the whole machine, crashed ----------------------------------------------------------------------------------------


class Mortal(SqliteJournal):
    """A journal whose owner may die just before or just after each write."""

    fuse = Fuse()  # of the clients, who live on

    def __init__(self, *args: Any, own: Fuse, keeps: bool = True, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._own = own
        self._keeps = keeps

    def begin(self, round: int, attempt: int, clients: tuple[str, ...]) -> None:
        self._own.burn()
        super().begin(round, attempt, clients)
        self._own.burn()

    def note(self, entry: Entry) -> None:
        self._own.burn()
        super().note(entry)
        self._own.burn()

    def keep(self, assignment_id: str, answer: Any) -> None:
        if self._keeps:
            super().keep(assignment_id, answer)

    def commit(self, commit: Commit) -> None:
        self._own.burn()
        super().commit(commit)
        self._own.burn()


def lives(world: InMemoryFederation, strategy: Strategy, desk: Desk, keeps: bool) -> tuple[Outcome, int]:
    """Runs to the end over many lives, and counts them: each ends just after its first write or before its second.

    Between them these are all steps of the journal.
    """
    for life in range(1000):
        world.journal = Mortal(desk.database, desk.blobs, "heart", own=Fuse(2 + life % 2), keeps=keeps, **desk.settings)
        with contextlib.suppress(Crash):
            return world.run(strategy, evaluate=replay.EVALUATE), life
    raise AssertionError("lives without progress")


@pytest.mark.unmeasured
@pytest.mark.parametrize("name", replay.STRATEGIES)
@pytest.mark.parametrize(
    ("keeps", "inline_bytes"), [(True, 1 << 16), (False, 0)], ids=["answers kept", "asked again, models in files"]
)
def test_a_crash_at_every_step_of_the_journal_changes_neither_the_model_nor_the_work_done(
    name: str, keeps: bool, inline_bytes: int, tmp_path: Path
) -> None:
    strategy, desk = replay.STRATEGIES[name], Desk(tmp_path, inline_bytes=inline_bytes)
    reference, world = replay.federation(), replay.federation()
    expected = reference.run(strategy, evaluate=replay.EVALUATE)
    with desk.database:
        again, crashes = lives(world, strategy, desk, keeps)
    assert replay.facts(again) == replay.facts(expected)
    assert world.trained == reference.trained
    assert crashes >= 3 * len(expected.history)


# -- the process, killed -----------------------------------------------------------------------------------------------

KILLS = 8
KILLED = ["FedAvgM", "single updates"]


class Killer:
    """Ends this process by SIGKILL at a step: a statement that SQLite begins, a file opened, renamed or removed."""

    def __init__(self, folder: Path, at: int | None) -> None:
        self.steps = 0
        self._folder = str(folder)
        self._at = at
        sys.addaudithook(self._heard)

    def step(self, _: object = None) -> None:
        self.steps += 1
        if self.steps == self._at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(self._folder):
            self.step()


def live(folder: Path, name: str, at: int | None) -> None:
    """One coordinator's life in a process of its own; its clients begin anew with it."""
    desk, world = Desk(folder, inline_bytes=0), replay.federation()
    world.journal = Mortal(desk.database, desk.blobs, "heart", own=Fuse(), **desk.settings)
    desk.database._connection.set_trace_callback(Killer(folder, at).step)
    world.run(replay.STRATEGIES[name], evaluate=replay.EVALUATE)
    desk.database.close()


def ends(folder: Path, name: str) -> Iterator[int]:
    """How one coordinator after the other ended; all but the last are killed."""
    draw = random.Random(name)
    for at in [*(draw.randrange(4, 40) for _ in range(KILLS)), None]:
        child = os.fork()
        if not child:
            with contextlib.ExitStack() as stack:
                stack.callback(os._exit, 1)
                live(folder, name, at)
                os._exit(0)
        yield os.waitpid(child, 0)[1]


def main(folder: Path) -> None:
    """Runs each strategy in a folder of its own and prints how its processes ended."""
    replay.federation().run(replay.STRATEGIES[KILLED[0]], evaluate=replay.EVALUATE)  # loads what each of them needs
    sys.stdout.write(json.dumps({name: list(ends(folder / name, name)) for name in KILLED}))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.unmeasured
@pytest.mark.parametrize("name", KILLED)
def test_a_coordinator_killed_again_and_again_ends_with_the_same_bits(
    name: str, killed: tuple[Path, dict[str, list[int]]]
) -> None:
    folder, ends = killed
    assert ends[name] == [signal.SIGKILL] * KILLS + [0]
    expected = replay.federation()
    expected.run(replay.STRATEGIES[name], evaluate=replay.EVALUATE)
    desk = Desk(folder / name, inline_bytes=0)
    with desk.database:
        assert standing(desk.journal) == standing(expected.journal)
        assert files(desk) == {digest for (digest,) in desk.database.rows("SELECT digest FROM referenced")}


def standing(journal: Any) -> list[object]:
    """What a run has come to, without what depends on the clock and on questions asked again."""
    last, best = journal.last(), journal.best()
    rows = [(r.round, r.clients, r.examples, r.loss, dict(r.metrics), r.best) for r in journal.history()]
    return [last.round, last.model, pack(dict(last.state)), last.accepted, best.round, best.model, rows]


# -- what was written is what is read ----------------------------------------------------------------------------------

FLOATS = st.floats()
NAMES = st.sampled_from(["ann", "bob", "cyd", "d\u00e9j\u00e0 \0 'vu'; --"])
IDS = st.sampled_from([f"{i:032x}" for i in range(6)])
REFUSALS = st.lists(st.builds(Refusal, NAMES, st.sampled_from(Reason), st.text(max_size=5)), max_size=2).map(tuple)
METRICS = st.dictionaries(st.text(max_size=3), FLOATS, max_size=2)
MODELS = st.lists(st.floats(width=32), min_size=3, max_size=3).map(lambda values: Weights(MANIFEST, values))
VECTORS = st.lists(FLOATS, max_size=3).map(np.array)
COUNTS = st.integers(0, 2**40)
WORK = st.sampled_from(
    [
        Fit(steps=3, lr=0.1, batch_size="all"),
        Fit(epochs=2, proximal=1e-300, control_variates=True),
        Gradient(batch_size=7),
        Evaluate(split="test"),
        Summarize(query=Moments(bounds=[(-0.1, 1 / 3)])),
        Summarize(query=Moments()),
        Summarize(query=Histogram(feature=2, edges=[0.0, 0.1, 0.7])),
        Summarize(query=LabelCounts(classes=3)),
    ]
)
ASSIGNMENTS = st.builds(
    Assignment, IDS, NAMES, st.integers(0, 2**70), COUNTS, NAMES, WORK, st.sampled_from(["update", "weights", "sums"])
)
SHORT = st.lists(st.floats(width=32), max_size=3).map(np.float32)
ANSWERS = st.one_of(
    st.builds(Update, MODELS, COUNTS, st.none() | FLOATS, st.dictionaries(NAMES, SHORT, max_size=2)),
    st.builds(MetricSums, VECTORS.map(np.float64), COUNTS),
    st.builds(Summary, st.lists(st.integers(-9, 9)).map(lambda values: np.array(values, dtype=np.int64)), COUNTS),
)
STATES = st.dictionaries(
    st.text(max_size=3), FLOATS | VECTORS | MODELS | st.lists(COUNTS, max_size=2).map(tuple), max_size=2
)
KEYS = st.lists(IDS, max_size=3, unique=True).map(tuple)


@st.composite
def records(draw: st.DrawFn) -> RoundRecord:
    return RoundRecord(
        draw(st.integers(-1, 9)),
        draw(st.integers(1, 3)),
        tuple(draw(st.lists(NAMES, max_size=2))),
        draw(COUNTS),
        draw(st.none() | FLOATS),
        draw(METRICS),
        draw(st.dictionaries(NAMES, METRICS, max_size=2)),
        draw(FLOATS),
        draw(COUNTS),
        draw(COUNTS),
        draw(REFUSALS),
        draw(METRICS),
        draw(st.booleans()),
        draw(st.text(max_size=20)),
        tuple(draw(st.lists(NAMES, max_size=2))),
    )


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    record = draw(records())
    started = tuple(draw(st.lists(st.builds(Started, ASSIGNMENTS, MODELS), max_size=2)))
    return Commit(record.round, draw(MODELS), draw(STATES), record, started, draw(KEYS), draw(KEYS))


ENTRIES = st.builds(
    Entry,
    st.sampled_from(["call", "update", "start", "arrival"]),
    IDS,
    st.text(max_size=9),
    st.lists(st.tuples(NAMES, IDS), max_size=2).map(tuple),
    REFUSALS,
)
STEPS = st.one_of(
    st.tuples(st.just("begin"), st.tuples(st.integers(-1, 9), st.integers(1, 3), st.lists(NAMES).map(tuple))),
    st.tuples(st.just("note"), ENTRIES.map(lambda entry: (entry,))),
    st.tuples(st.just("keep"), st.tuples(IDS, ANSWERS)),
    st.tuples(st.just("commit"), commits().map(lambda commit: (commit,))),
    st.tuples(st.just("abandon"), records().map(lambda record: (record,))),
    st.tuples(st.just("reopen"), st.just(())),
)


class Twin(MemoryJournal):
    """A journal in memory that forgets in a crash what may be forgotten: answers kept since the last fact."""

    def __init__(self) -> None:
        super().__init__(keep_answers=True)
        self._noted: dict[str, Any] = {}

    def note(self, entry: Entry) -> None:
        super().note(entry)
        self._noted = dict(self._answers)

    def reopen(self) -> None:
        self._answers = dict(self._noted)

    def commit(self, commit: Commit) -> None:
        super().commit(commit)
        self._noted = {}

    def abandon(self, record: RoundRecord) -> None:
        super().abandon(record)
        self._noted = {}


def told(journal: Any) -> list[object]:
    """Everything a journal answers, as values that are equal only bit by bit."""
    last, best = journal.last(), journal.best()
    return [
        repr([journal.history(), journal.abandoned(), journal.open()]),
        None if last is None else commit_bits(last),
        None if best is None else [repr(best.record), best.round, best.model],
        [answer_bits(journal.answer(f"{i:032x}")) for i in range(6)],
    ]


def commit_bits(commit: Commit) -> list[object]:
    facts = [commit.round, commit.record, [s.assignment for s in commit.started], commit.accepted, commit.dropped]
    return [repr(facts), commit.model, [s.model for s in commit.started], pack(dict(commit.state))]


def answer_bits(answer: Any) -> object:
    if answer is None:
        return None
    return [type(answer), pack([getattr(answer, f.name) for f in dataclasses.fields(answer)])]


@settings(max_examples=60)
@given(st.lists(STEPS, max_size=14), st.sampled_from([0, 12, 1 << 16]))
def test_a_journal_on_disk_answers_as_one_in_memory_does_whenever_it_is_opened_again(steps, inline_bytes):
    with tempfile.TemporaryDirectory() as folder:
        twin, desk = Twin(), Desk(Path(folder), inline_bytes=inline_bytes)
        for name, arguments in [("begin", (0, 1, ())), *steps, ("reopen", ())]:
            if name == "reopen":
                twin.reopen(), desk.reopen()
            elif name == "begin" or twin.open() is not None:
                getattr(twin, name)(*arguments)
                getattr(desk.journal, name)(*arguments)
            assert told(desk.journal) == told(twin)
        desk.database.close()


@pytest.mark.parametrize("write", ["note", "keep", "commit", "abandon"])
def test_nothing_is_written_where_no_round_is_open(desk: Desk, write: str) -> None:
    arguments = {"note": [Entry("call", "k", "l")], "keep": ["k", MetricSums(np.ones(1), 1)]}
    with pytest.raises(RuntimeError, match="no round is open"):
        getattr(desk.journal, write)(*arguments.get(write, [EMPTY if write == "commit" else EMPTY.record]))


def test_a_round_that_takes_the_place_of_an_open_one_has_none_of_its_facts(desk: Desk) -> None:
    desk.journal.begin(0, 1, ("ann", "bob"))
    desk.journal.note(Entry("call", "k", "l"))
    desk.journal.begin(-1, 1, ("ann",))
    desk.journal.note(Entry("call", "m", "n"))
    assert desk.reopen().open() == OpenRound(-1, 1, ("ann",), (Entry("call", "m", "n"),))


def test_the_journal_of_a_run_that_there_is_not_is_refused(desk: Desk) -> None:
    with pytest.raises(NoSuchRun, match="there is no run 'lungs'"):
        SqliteJournal(desk.database, desk.blobs, "lungs")


# -- models and states -------------------------------------------------------------------------------------------------

LARGE = Manifest((Tensor("w", (2_000_000,)),))
LARGE_BYTES = 8_000_000


def large(value: float) -> Weights:
    return Weights(LARGE, np.full(LARGE.size, value, dtype=np.float32))


def go_on(journal: SqliteJournal, model: Weights, *, best: bool = False, state: Any = None, **more: Any) -> Commit:
    """The next round, committed."""
    number = len(journal.history())
    journal.begin(number, 1, ("ann",))
    commit = Commit(number, model, state or {}, RoundRecord(number, best=best), **more)
    journal.commit(commit)
    return commit


def files(desk: Desk) -> set[str]:
    return set(os.listdir(desk.blobs.folder)) - {".spare"}


def test_small_models_need_no_files(desk: Desk) -> None:
    go_on(desk.journal, model(1, 2, 3), best=True)
    go_on(desk.journal, model(4, 5, 6))
    assert files(desk) == set()
    assert desk.reopen().best().model == model(1, 2, 3)


def test_models_that_nothing_refers_to_are_removed_small_or_large(desk: Desk) -> None:
    for value in range(5):
        go_on(desk.journal, large(value), best=value == 2)
        go_on(desk.journal, model(value, 0, 0))
    assert files(desk) == {large(2).digest}
    assert desk.database.rows("SELECT digest FROM models") == [(model(4, 0, 0).digest,)]


def test_the_weights_a_run_begins_with_stay(desk: Desk) -> None:
    with desk.blobs.lock:
        desk.database.add_run("lungs", {}, desk.blobs.put(large(7)))
    go_on(desk.journal, large(1))
    assert files(desk) == {large(1).digest, large(7).digest}


def test_runs_do_not_remove_each_others_models(desk: Desk) -> None:
    desk.database.add_run("lungs", {})
    other = SqliteJournal(desk.database, desk.blobs, "lungs")
    for journal in (desk.journal, other):
        go_on(journal, large(1))
        go_on(journal, model(1, 1, 1))
        go_on(journal, large(1))
    go_on(desk.journal, large(2))
    assert other.last().model == large(1)
    assert SqliteJournal(desk.database, desk.blobs, "lungs").last().model == large(1)


def test_the_model_that_was_committed_is_the_one_that_is_had_and_no_copy(desk: Desk) -> None:
    commit = go_on(desk.journal, large(1), best=True)
    assert desk.journal.last() is commit
    assert desk.journal.best().model is commit.model


def test_only_the_last_large_model_stays_in_memory(desk: Desk) -> None:
    tracemalloc.start()
    try:
        for value in range(4):
            go_on(desk.journal, large(value), best=value == 1)
        held, peak = tracemalloc.get_traced_memory()
        assert held < 1.2 * LARGE_BYTES
        assert peak < 2.4 * LARGE_BYTES
        assert desk.reopen().best().round == 1
        assert desk.journal.last().round == 3
        assert tracemalloc.get_traced_memory()[0] < 1.2 * LARGE_BYTES
    finally:
        tracemalloc.stop()
    assert desk.journal.best().model == large(1)


def test_a_large_state_lies_in_a_file_as_long_as_it_stands(desk: Desk) -> None:
    state = {"m": np.arange(100_000.0), "name": "momentum"}
    go_on(desk.journal, model(1, 2, 3), state=state)
    assert len(files(desk)) == 1
    assert pack(desk.reopen().last().state) == pack(state)
    go_on(desk.journal, model(1, 2, 3))
    assert files(desk) == set()


def test_flights_that_began_with_one_model_share_it_after_a_restart(desk: Desk) -> None:
    about = ("heart", 3, 1, "ann", Fit(steps=1), "update", ("ann", "bob"))
    private = Private(fedkit.DP(noise_multiplier=1.0, delta=1e-5), 3, 1)
    flights = [Assignment("0", *about), Assignment("1", *about, private), Assignment("2", *about, None, Clip(0.5))]
    started = tuple(Started(one, weights) for one, weights in zip(flights, [large(1), large(1), large(2)], strict=True))
    go_on(desk.journal, large(2), started=started)
    last = desk.reopen().last()
    assert last.started == started
    assert last.started[0].model is last.started[1].model
    assert last.started[2].model is last.model
    go_on(desk.journal, large(3), started=started[:1])
    assert files(desk) == {large(1).digest, large(3).digest}


def test_a_run_has_a_secret_of_its_own_that_stays(desk: Desk) -> None:
    secret = desk.journal.secret
    assert len(secret) == 32
    assert desk.reopen().secret == secret
    desk.database.add_run("other", {})
    assert desk.database.run_secret("other") != secret


def test_a_state_that_cannot_be_packed_leaves_the_round_open(desk: Desk) -> None:
    desk.journal.begin(0, 1, ("ann",))
    with pytest.raises(StateError, match="seen is a set"):
        desk.journal.commit(Commit(0, model(1, 2, 3), {"seen": {1}}, RoundRecord(0)))
    assert desk.reopen().open().round == 0
    assert desk.journal.last() is None


def test_a_model_that_was_damaged_on_disk_is_an_error_that_names_it(desk: Desk) -> None:
    go_on(desk.journal, model(1, 2, 3))
    with desk.database.write() as connection:
        connection.execute("UPDATE models SET content = ?", (pack(model(1, 2, 4)),))
    with pytest.raises(StorageError, match=f"{model(1, 2, 3).digest} is damaged"):
        desk.reopen().last()


# -- answers in spool files --------------------------------------------------------------------------------------------


def spooled(desk: Desk, key: str, extras: dict[str, int]) -> Update:
    """An update as it comes over the network: its values lie in a file."""
    values = np.arange(MANIFEST.size + sum(extras.values()), dtype="<f4")
    raw = values.tobytes()
    whole = fedkit.Weights(Manifest((Tensor("w", (values.size,)),)), values)
    spool = Spool(desk.spool / key, whole.manifest.digest, len(raw), bytes.fromhex(whole.digest))
    spool.feed(memoryview(raw))
    payload = spool.finish()
    return Update(Spooled(MANIFEST, payload), 5, 0.25, SpooledExtras(payload, MANIFEST.size, extras))


def with_answer(desk: Desk, extras: dict[str, int]) -> Update:
    """A desk with an open round whose one call was answered."""
    go_on(desk.journal, model(0, 0, 0))
    desk.journal.begin(1, 1, ("ann",))
    update = spooled(desk, "ab" * 16, extras)
    desk.journal.keep("ab" * 16, update)
    desk.journal.note(Entry("call", "k", "l", (("ann", "ab" * 16),)))
    return update


def test_an_update_in_a_spool_file_comes_back_from_there(desk: Desk) -> None:
    update = with_answer(desk, {"control": 2, "other": 1})
    found = desk.reopen().answer("ab" * 16)
    assert isinstance(found.weights, Spooled)
    assert answer_bits(dataclasses.replace(found, extra=dict(found.extra))) == answer_bits(
        dataclasses.replace(update, extra=dict(update.extra))
    )
    assert list(found.extra) == ["control", "other"]


def test_values_that_lie_in_a_spool_file_are_not_copied_into_the_database(desk: Desk) -> None:
    with_answer(desk, {"control": 100_000})
    ((size,),) = desk.database.rows("SELECT length(content) FROM answers")
    assert size < 1000


def test_an_update_whose_file_is_gone_is_asked_again(desk: Desk) -> None:
    with_answer(desk, {})
    (desk.spool / ("ab" * 16)).unlink()
    assert desk.reopen().answer("ab" * 16) is None


def test_an_update_whose_file_is_short_is_asked_again(desk: Desk) -> None:
    with_answer(desk, {"control": 2})
    os.truncate(desk.spool / ("ab" * 16), 4 * 4)
    assert desk.reopen().answer("ab" * 16) is None


def test_an_update_that_is_reopened_with_other_tensors_is_asked_again(desk: Desk) -> None:
    with_answer(desk, {})
    other = Weights.zeros(Manifest((Tensor("v", (3,)),)))
    desk.settings = {"reopen": lambda path, extras: (other, {})}
    assert desk.reopen().answer("ab" * 16) is None


def test_how_a_file_is_opened_again_can_be_said(desk: Desk) -> None:
    with_answer(desk, {"control": 2})
    asked = []
    desk.settings = {"reopen": lambda path, extras: asked.append((path, extras))}
    assert desk.reopen().answer("ab" * 16) is None
    assert asked == [(desk.spool.resolve() / ("ab" * 16), (("control", 2),))]


@pytest.mark.parametrize("end", ["commit", "abandon"])
def test_spool_files_go_with_their_round(desk: Desk, end: str) -> None:
    with_answer(desk, {})
    desk.journal.keep("cd" * 16, spooled(desk, "cd" * 16, {}))
    (desk.spool / "ef").write_bytes(b"of a call that goes on")
    desk.reopen().keep("cd" * 16, spooled(desk, "cd" * 16, {}))
    if end == "commit":
        desk.journal.commit(Commit(1, model(1, 1, 1), {}, RoundRecord(1)))
    else:
        desk.journal.abandon(RoundRecord(1))
    assert os.listdir(desk.spool) == ["ef"]
    assert desk.database.rows("SELECT id FROM answers UNION SELECT fact FROM entries") == []


# -- answers in memory -------------------------------------------------------------------------------------------------

KEY = "ab" * 16
ROOM = 1000


def stashed(desk: Desk, key: str, room: Room, extras: dict[str, int]) -> Update:
    """An update as it comes over the network while there is room: its values lie in memory."""
    values = np.arange(MANIFEST.size + sum(extras.values()), dtype="<f4")
    whole = fedkit.Weights(Manifest((Tensor("w", (values.size,)),)), values)
    assert room.take(values.nbytes)
    into = Stash(desk.spool / key, whole.manifest.digest, values.nbytes, bytes.fromhex(whole.digest), room)
    into.feed(memoryview(values.tobytes()))
    payload = into.finish()
    return Update(Spooled(MANIFEST, payload), 5, 0.25, SpooledExtras(payload, MANIFEST.size, extras))


def in_memory(desk: Desk, room: Room | None = None) -> Update:
    """A desk with an open round and one answer, which no call has been noted with."""
    go_on(desk.journal, model(0, 0, 0))
    desk.journal.begin(1, 1, ("ann",))
    update = stashed(desk, KEY, room or Room(ROOM), {"control": 2})
    desk.journal.keep(KEY, update)
    return update


def note(desk: Desk, number: int) -> None:
    desk.journal.note(Entry("call", f"k{number}", "l", (("ann", KEY),)))


def bits(update: Update) -> object:
    return answer_bits(dataclasses.replace(update, extra=dict(update.extra)))


def test_an_answer_in_memory_is_written_with_the_second_fact_after_it(desk: Desk) -> None:
    room = Room(ROOM)
    update = in_memory(desk, room)
    before = bits(update)
    note(desk, 0)
    assert os.listdir(desk.spool) == []
    assert desk.database.rows("SELECT id FROM answers") == []
    assert desk.journal.answer(KEY) is update
    assert room.left == ROOM - 4 * (MANIFEST.size + 2)
    note(desk, 1)
    assert os.listdir(desk.spool) == [KEY]
    assert desk.database.rows("SELECT id, file FROM answers") == [(KEY, KEY)]
    assert room.left == ROOM
    assert bits(update) == bits(desk.journal.answer(KEY)) == bits(desk.reopen().answer(KEY)) == before


def test_an_answer_in_memory_that_is_lost_with_its_process_is_asked_again(desk: Desk) -> None:
    in_memory(desk)
    note(desk, 0)
    assert desk.reopen().answer(KEY) is None
    assert len(desk.journal.open().entries) == 1
    desk.journal.keep(KEY, stashed(desk, KEY, Room(ROOM), {"control": 2}))
    note(desk, 1)
    note(desk, 2)
    assert desk.reopen().answer(KEY) is not None


def test_each_answer_in_memory_waits_for_a_fact_of_its_own(desk: Desk) -> None:
    in_memory(desk)
    note(desk, 0)
    desk.journal.keep("cd" * 16, stashed(desk, "cd" * 16, Room(ROOM), {}))
    desk.journal.keep("ef" * 16, MetricSums(np.ones(2), 2))
    note(desk, 1)
    assert {key for (key,) in desk.database.rows("SELECT id FROM answers")} == {KEY, "ef" * 16}
    assert os.listdir(desk.spool) == [KEY]
    note(desk, 2)
    assert sorted(os.listdir(desk.spool)) == [KEY, "cd" * 16]


@pytest.mark.unmeasured
@pytest.mark.parametrize("facts", [0, 1, 2])
@pytest.mark.parametrize("end", ["commit", "abandon"])
@pytest.mark.parametrize("spares", [False, True], ids=["removed", "spared"])
def test_an_answer_in_memory_goes_with_its_round(desk: Desk, facts: int, end: str, spares: bool) -> None:
    if spares:
        desk.settings = {"remove": Spares(desk.spool, 2).give}
        desk.open()
    room = Room(ROOM)
    in_memory(desk, room)
    for number in range(facts):
        note(desk, number)
    if end == "commit":
        desk.journal.commit(Commit(1, model(1, 1, 1), {}, RoundRecord(1)))
    else:
        desk.journal.abandon(RoundRecord(1))
    assert os.listdir(desk.spool) == (["0.spare"] if spares and facts == 2 else [])
    assert desk.database.rows("SELECT id FROM answers UNION SELECT fact FROM entries") == []
    gc.collect()
    assert room.left == ROOM


def test_an_answer_in_memory_is_not_lost_where_the_disk_is_full(desk: Desk) -> None:
    update = in_memory(desk)
    note(desk, 0)
    most, before = set_pages(desk, 0), bits(update)
    with pytest.raises(StorageError, match="free space"):
        desk.journal.note(Entry("call", "k1", "x" * 200_000))
    assert bits(desk.journal.answer(KEY)) == before
    set_pages(desk, most)
    note(desk, 1)
    note(desk, 2)
    assert bits(desk.reopen().answer(KEY)) == before


def test_an_answer_in_memory_whose_file_cannot_be_written_is_an_error_that_names_the_folder(desk: Desk) -> None:
    before = bits(in_memory(desk))
    note(desk, 0)
    desk.spool.rename(desk.folder / "elsewhere")
    with pytest.raises(StorageError, match=r"spool: No such file or directory; free space or mend the disk"):
        note(desk, 1)
    (desk.folder / "elsewhere").rename(desk.spool)
    assert bits(desk.journal.answer(KEY)) == before
    note(desk, 1)
    note(desk, 2)
    assert bits(desk.reopen().answer(KEY)) == before


# -- the disk ----------------------------------------------------------------------------------------------------------


def writes(desk: Desk) -> dict[str, Callable[[], None]]:
    text = "x" * 200_000
    kept = np.random.default_rng(3).random(20_000)
    return {
        "begin": lambda: desk.journal.begin(1, 2, (text,)),
        "note": lambda: desk.journal.note(Entry("call", "k", text)),
        "commit": lambda: desk.journal.commit(Commit(1, model(1, 1, 1), {}, RoundRecord(1, clients=(text,)))),
        "commit of a state": lambda: desk.journal.commit(
            Commit(1, large(1), {"m": kept}, RoundRecord(1, clients=(text,)))
        ),
        "abandon": lambda: desk.journal.abandon(RoundRecord(1, clients=(text,))),
    }


@pytest.mark.parametrize("write", ["begin", "note", "commit", "commit of a state", "abandon"])
def test_on_a_full_disk_nothing_is_half_written_and_the_same_write_works_later(desk: Desk, write: str) -> None:
    go_on(desk.journal, model(0, 0, 0), best=True)
    desk.journal.begin(1, 1, ("ann",))
    desk.journal.keep(f"{1:032x}", MetricSums(np.ones(2), 2))
    before = told(desk.journal)
    most = set_pages(desk, 0)
    with pytest.raises(StorageError, match=r"fedkit\.db: database or disk is full; free space"):
        writes(desk)[write]()
    assert told(desk.journal) == before
    set_pages(desk, most)
    writes(desk)[write]()
    assert told(desk.reopen()) == told(desk.journal)
    assert told(desk.journal) != before


def set_pages(desk: Desk, most: int) -> int:
    """Lets the database grow to that many pages, or no more at all; returns how many were allowed before."""
    before = desk.database.row("PRAGMA max_page_count")[0]
    desk.database.row(f"PRAGMA max_page_count = {most or 1}")
    return before


def test_a_second_coordinator_on_the_same_folder_is_refused_and_told_why(desk: Desk) -> None:
    with pytest.raises(ConfigError, match=rf"is in use by another coordinator \(process {os.getpid()}\)"):
        Database(desk.folder / "fedkit.db")
    desk.database.close()
    Database(desk.folder / "fedkit.db").close()


def test_a_database_of_a_newer_version_is_refused(desk: Desk) -> None:
    with desk.database.write() as connection:
        connection.execute("PRAGMA user_version = 9")
    with pytest.raises(ConfigError, match=r"written by a newer fedkit \(version 9"):
        desk.reopen()
    with pytest.raises(ConfigError, match="newer"):
        Database(desk.folder / "fedkit.db")


def test_a_file_that_is_no_database_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "fedkit.db").write_text("no database" * 100)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"fedkit\.db: file is not a database"):
            Database(tmp_path / "fedkit.db")


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(StorageError, match="taken"):
        Database(tmp_path / "taken" / "fedkit.db")


def test_what_raises_within_a_transaction_undoes_it(desk: Desk) -> None:
    with pytest.raises(KeyboardInterrupt), desk.database.write() as connection:
        connection.execute("INSERT INTO settled VALUES ('a', 1)")
        raise KeyboardInterrupt
    assert desk.database.fates(["a"]) == ([], [])
    desk.database.settle(["b"], [])
    assert desk.database.fates(["a", "b"]) == (["b"], [])


def test_every_write_waits_for_the_disk_but_those_about_who_is_here(desk: Desk) -> None:
    assert desk.database.row("PRAGMA journal_mode") == ("wal",)
    with desk.database.write() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    with desk.database.write(durable=False) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (1,)


def test_the_database_is_nobody_elses(desk: Desk) -> None:
    assert {path.stat().st_mode & 0o777 for path in desk.folder.glob("fedkit.db*")} == {0o600}


def test_many_threads_may_write_at_once(desk: Desk) -> None:
    def settle(first: int) -> None:
        for i in range(first, first + 20):
            desk.database.settle([f"a{i}"], [f"d{i}"])

    threads = [threading.Thread(target=settle, args=(20 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    accepted, dropped = desk.database.fates([f"{kind}{i}" for i in range(80) for kind in "ad"])
    assert (len(accepted), len(dropped)) == (80, 80)


# -- runs, fates, clients ----------------------------------------------------------------------------------------------


def test_a_run_comes_back_as_it_was_submitted_and_as_it_stands(desk: Desk) -> None:
    file = {"run": {"name": "lungs", "seed": 2**63}, "strategy": {"lr": 0.1, "rounds": None}}
    added = desk.database.add_run("lungs", file, "ab" * 32)
    assert (added.state, added.file, added.init, added.is_over) == ("waiting", file, "ab" * 32, False)
    running = desk.database.set_run_state("lungs", "running", "waits for two more")
    over = desk.database.finish_run("lungs", "finished", outcome={"test": {"auroc": math.inf}})
    assert running == dataclasses.replace(added, state="running", detail="waits for two more")
    assert over.outcome == {"test": {"auroc": math.inf}}
    assert over.ended_at >= over.submitted_at
    desk.reopen()
    assert desk.database.run("lungs") == over
    assert [run.name for run in desk.database.runs()] == ["heart", "lungs"]


def test_a_line_of_history_that_the_disk_did_not_take_is_written_with_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "history" / "heart.jsonl"
    desk = Desk(tmp_path, lines=History(path))
    desk.journal.catch_up()
    first = go_on(desk.journal, model(0.0, 0.0, 0.0))
    aside = path.rename(tmp_path / "aside")
    path.mkdir()  # to which no line can be appended
    with capture_logs() as events:
        second = go_on(desk.journal, model(1.0, 0.0, 0.0), accepted=("a",))
    assert [(event["event"], event["round"]) for event in events] == [("history lags behind", second.round)]
    assert desk.journal.last() == second
    path.rmdir()
    aside.rename(path)
    go_on(desk.journal, model(2.0, 0.0, 0.0))
    third = go_on(desk.journal, model(3.0, 0.0, 0.0))
    lines = list(read(path))
    assert [line["round"] for line in lines] == list(range(first.round, third.round + 1))
    assert lines[second.round]["accepted"] == ["a"]
    desk.database.close()


def test_a_run_that_is_over_stays_as_it_is(desk: Desk) -> None:
    over = desk.database.finish_run("heart", "cancelled", "by an operator")
    assert desk.database.finish_run("heart", "failed", "later") == over
    assert desk.database.set_run_state("heart", "running") == over


def test_what_the_last_round_had_gathered_goes_with_its_run(desk: Desk) -> None:
    go_on(desk.journal, model(1, 2, 3))
    desk.journal.begin(-1, 1, ("ann",))
    desk.journal.keep("k", MetricSums(np.ones(2), 2))
    desk.journal.note(Entry("call", "k", "l"))
    desk.database.finish_run("heart", "finished")
    assert desk.database.rows("SELECT 1 FROM answers UNION SELECT 1 FROM entries") == []
    assert desk.reopen().last().model == model(1, 2, 3)


def test_a_name_is_given_once(desk: Desk) -> None:
    with pytest.raises(NameTaken, match="'heart' already"):
        desk.database.add_run("heart", {})
    assert len(desk.database.runs()) == 1


@pytest.mark.parametrize("change", [lambda d: d.run("x"), lambda d: d.finish_run("x", "failed")])
def test_a_run_that_there_is_not_is_an_error(desk: Desk, change: Callable[[Database], object]) -> None:
    with pytest.raises(NoSuchRun, match="no run 'x'"):
        change(desk.database)


def test_a_run_of_the_same_name_on_another_coordinator_asks_under_another_id(desk: Desk, tmp_path: Path) -> None:
    with Database(tmp_path / "other" / "fedkit.db") as other:
        ids = {desk.database.run("heart").id, other.add_run("heart", {}).id}
    assert len(ids) == 2
    assert all(key.startswith("heart.") and len(key) == len("heart.") + 8 for key in ids)


def test_text_that_is_no_unicode_can_be_a_detail(desk: Desk) -> None:
    assert desk.database.finish_run("heart", "failed", "caf\udce9").detail == "caf\\udce9"


def test_what_became_of_results_is_remembered_and_the_last_word_counts(desk: Desk) -> None:
    desk.database.settle(["a", "b"], ["c", "d"])
    desk.database.settle(["c"], ["b"])
    desk.reopen()
    assert desk.database.fates(["x", "d", "c", "b", "a"]) == (["c", "a"], ["d", "b"])


def test_a_commit_says_what_became_of_its_results(desk: Desk) -> None:
    go_on(desk.journal, model(1, 2, 3), accepted=("a",), dropped=("b",))
    assert desk.database.fates(["a", "b"]) == (["a"], ["b"])


def test_fates_of_very_many_results_are_told(desk: Desk) -> None:
    ids = [str(i) for i in range(50_000)]
    desk.database.settle(ids[::2], ids[1::2])
    assert desk.database.fates(ids) == (ids[::2], ids[1::2])


def test_clients_are_known_by_when_they_were_seen_last(desk: Desk) -> None:
    now = 100.0
    desk.database.close()
    with Database(desk.folder / "fedkit.db", clock=lambda: now) as database:
        database.saw("bob", tasks=["heart", "lungs"], max_examples=2**64 - 1)
        database.saw("ann", tasks=[], max_examples=7)
        now = 200.0
        database.mark("ann", "left")
        database.mark("nobody", "away")
        ann, bob = database.clients()
    assert (ann.name, ann.state, ann.last_seen, ann.max_examples, ann.tasks) == ("ann", "left", 200.0, 7, ())
    assert (bob.state, bob.last_seen, bob.max_examples, bob.tasks) == ("here", 100.0, 2**63 - 1, ("heart", "lungs"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
