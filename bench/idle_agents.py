"""5,000 agents that attend over mutual TLS and have nothing to do: what they cost the coordinator.

The agents are streams of one process that say hello and heartbeats; the coordinator is the real one. How long it takes
to answer is measured over a few more streams, from another process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.bare.coordinator import cpu_seconds
from bench.floods import resident_mb
from bench.processes import ROOT
from bench.table import Figure, show
from fedkit.loopback import Loopback
from fedkit.process import fast_loop, open_many_files
from fedkit.protos import agents_pb2 as pb
from fedkit.protos.channels import aio_channel
from fedkit.protos.wire import CHANNEL_OPTIONS, PROTOCOL, Calls, Laden
from fedkit.trust.authority import Authority
from fedkit.trust.certificates import Role
from fedkit.trust.identity import Identity

__all__ = ["idle_agents"]

AGENTS = 5_000
HEARTBEAT_S = 10.0
WATCHED_S = 40.0
PROBES = 20
CYCLES, PER_CYCLE, FROM_CYCLE = 20, 500, 5
AT_ONCE = 32  # that are being connected
SERVICE = pb.DESCRIPTOR.services_by_name["Agents"]
OPTIONS = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]


class Stream:
    """One attending agent."""

    def __init__(self, address: str, name: str, identity: Identity) -> None:
        self._channel = aio_channel(address, identity, OPTIONS)
        self._stream = Calls(self._channel, SERVICE).attend()
        self._name = name

    async def attend(self) -> None:
        """Says hello, and hears welcome."""
        hello = pb.Hello(
            protocol=PROTOCOL, client=self._name, instance=secrets.token_bytes(16), tasks=["idle"], max_examples=1000
        )
        await self._stream.write(Laden(pb.FromAgent(hello=hello)))
        answer = await self._stream.read()
        assert answer.message.HasField("welcome"), answer

    async def stay(self) -> None:
        """Sends heartbeats without end."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._stream.write(Laden(pb.FromAgent(heartbeat=pb.Heartbeat())))

    async def listen(self) -> None:
        """Hears whatever is said, without end."""
        while True:
            await self._stream.read()

    async def asked(self) -> float:
        """Seconds until the coordinator says to an update that nobody asked for it."""
        began = time.perf_counter()
        update = pb.Announcement(assignment_id="0" * 32, examples=1)
        await self._stream.write(Laden(pb.FromAgent(update=update)))
        while not (await self._stream.read()).message.HasField("refused"):
            continue
        return time.perf_counter() - began

    async def close(self) -> None:
        """Ends as if the process had died."""
        await self._channel.close()


async def _attending(address: str, identities: Iterable[tuple[str, Identity]]) -> list[Stream]:
    connecting = asyncio.Semaphore(AT_ONCE)

    async def one(name: str, identity: Identity) -> Stream:
        async with connecting:
            stream = Stream(address, name, identity)
            await stream.attend()
            return stream

    return list(await asyncio.gather(*(one(*each) for each in identities)))


# -- the process that holds the streams --------------------------------------------------------------------------------


def _read(path: Path) -> list[tuple[str, Identity]]:
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [(name, Identity(*(part.encode() for part in parts))) for name, *parts in lines]


async def _hold(address: str, identities: list[tuple[str, Identity]]) -> None:
    streams = await _attending(address, identities)
    print("ready", flush=True)
    kept = asyncio.gather(*(each for stream in streams for each in (stream.stay(), stream.listen())))
    stopping = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.wait({kept, stopping}, return_when=asyncio.FIRST_COMPLETED)
    os._exit(0)


async def _come_and_go(address: str, identities: list[tuple[str, Identity]]) -> None:
    for _ in range(CYCLES):
        streams = await _attending(address, identities)
        await asyncio.gather(*(stream.close() for stream in streams))
        print("cycle", flush=True)
        await asyncio.to_thread(sys.stdin.readline)


@contextlib.contextmanager
def _crowd(what: str, address: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "bench.idle_agents", f"--{what}", address, str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# -- what is measured --------------------------------------------------------------------------------------------------


class _Place(Loopback):
    """A coordinator alone, and identities for a crowd."""

    def crowd(self, count: int) -> Path:
        """A file with that many identities, each with a name of its own."""
        path = self.folder / "crowd.jsonl"
        with contextlib.closing(Authority(self.authority)) as authority, path.open("w") as file:
            for i in range(count):
                one = authority.identity(Role.AGENT, f"agent-{i}")
                parts = [part.decode() for part in (one.key, one.certificate, one.authority)]
                file.write(json.dumps([f"agent-{i}", *parts]) + "\n")
        return path

    @property
    def pid(self) -> int:
        """The coordinator's process."""
        return self.processes["server"].pid


@contextlib.contextmanager
def _place(count: int) -> Iterator[tuple[_Place, Path]]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        place = stack.enter_context(_Place(Path(folder), [], (), tls=True, heartbeat_s=HEARTBEAT_S))
        yield place, place.crowd(count)


async def _latencies(place: _Place, identities: list[tuple[str, Identity]]) -> list[float]:
    """How long answers take over a few streams, each asked ten times a second."""
    streams = await _attending(place.address, identities)
    found: list[float] = []

    async def probe(stream: Stream) -> None:
        until = time.monotonic() + WATCHED_S
        while time.monotonic() < until:
            found.append(await stream.asked())
            await asyncio.sleep(0.1)

    await asyncio.gather(*(probe(stream) for stream in streams))
    await asyncio.gather(*(stream.close() for stream in streams))
    return found


def _idle(agents: int) -> list[Figure]:
    with _place(agents + PROBES) as (place, path):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[PROBES:]))
        (place.folder / "probes.jsonl").write_text("".join(lines[:PROBES]))
        empty, began = resident_mb(place.pid), time.monotonic()
        with _crowd("hold", place.address, path) as crowd:
            assert crowd.stdout is not None
            assert crowd.stdout.readline() == "ready\n"
            seconds = time.monotonic() - began
            time.sleep(HEARTBEAT_S)
            before = cpu_seconds([place.pid])
            time.sleep(WATCHED_S)
            share = (cpu_seconds([place.pid]) - before) / WATCHED_S
            each = (resident_mb(place.pid) - empty) * 1e6 / 1024 / agents
            with asyncio.Runner(loop_factory=fast_loop()) as runner:
                found = runner.run(_latencies(place, _read(place.folder / "probes.jsonl")))
    p99 = statistics.quantiles(found, n=100)[98] * 1e3
    return [
        Figure(
            f"{agents:,} idle agents: memory of each, KiB", each, "<= 120", f"mutual TLS; all here in {seconds:.0f} s"
        ),
        Figure(f"{agents:,} idle agents: share of a core", share, "<= 0.15", f"heartbeats every {HEARTBEAT_S:g} s"),
        Figure(
            f"{agents:,} idle agents: answer, p99, ms",
            p99,
            "<= 50",
            f"{len(found):,} answers, median {statistics.median(found) * 1e3:.2g} ms",
        ),
    ]


def _growth() -> Figure:
    with _place(PER_CYCLE) as (place, path):
        resident = []
        with _crowd("come-and-go", place.address, path) as crowd:
            assert crowd.stdout is not None
            assert crowd.stdin is not None
            for _ in range(CYCLES):
                assert crowd.stdout.readline() == "cycle\n"
                time.sleep(0.5)
                resident.append(resident_mb(place.pid))
                crowd.stdin.write("\n")
                crowd.stdin.flush()
    grown = 100 * (resident[-1] / resident[FROM_CYCLE - 1] - 1)
    note = f"{resident[0]:.0f}, {resident[FROM_CYCLE - 1]:.0f}, {resident[-1]:.0f} MB after 1, {FROM_CYCLE}, {CYCLES}"
    return Figure(f"cycles of {PER_CYCLE} connects and cancels: growth, %", grown, "<= 5", note)


def idle_agents(agents: int = AGENTS) -> list[Figure]:
    """Memory, processor and answers with `agents` idle ones, and growth over many that come and go."""
    return [*_idle(agents), _growth()]


def main() -> None:
    """Measures and prints; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=AGENTS)
    for what in ("hold", "come-and-go"):
        parser.add_argument(f"--{what}", nargs=2, help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    if open_many_files() < given.agents + 100:
        sys.exit(f"this user may open too few files at a time for {given.agents} agents: raise the hard limit")
    for work, chosen in ((_hold, given.hold), (_come_and_go, given.come_and_go)):
        if chosen:
            with asyncio.Runner(loop_factory=fast_loop()) as runner:
                return runner.run(work(chosen[0], _read(Path(chosen[1]))))
    sys.exit(not show("Idle agents", idle_agents(given.agents)))


if __name__ == "__main__":
    main()
