"""Rounds over the network against a bare stream and other frameworks, the coordinator's memory, the first round."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

from bench.processes import ROOT, Bare, Federation, command
from bench.table import Figure, alternate

__all__ = ["coordinator_memory", "first_round", "network_rounds", "other_frameworks", "secure_cost", "tls_cost"]

CLIENTS = 10
TURNS = {1: (40, 7), 25: (8, 3), 100: (4, 3)}  # megabytes: rounds before the other side has its turn, and such turns
PEERS = {"Flower": "flower", "NVIDIA FLARE's simulator": "flare"}
PEER_LIMIT_S = 600


def network_rounds() -> list[Figure]:
    """A round of 10 agents at 1, 25 and 100 MB against the bare program.

    The figure is the ratio to the program that makes one call for each transfer, as programs do. Beside it stands the
    ratio to one that never closes a stream: as little as grpc.aio can do at all.
    """
    return [figure for megabytes in TURNS for figure in _against_bare(megabytes)]


def other_frameworks(python: str) -> list[Figure]:
    """The same rounds against the frameworks that this Python has, each as it comes."""
    found = []
    for megabytes, (count, times) in TURNS.items():
        with Federation(f"mb{megabytes}", CLIENTS) as federation:
            federation.wait()
            ours = statistics.median(federation.rounds(count) for _ in range(times))
        for name in PEERS:
            found += _against_peer(ours, megabytes, name, python)
    return found


def _against_bare(megabytes: int) -> list[Figure]:
    found = []
    with Federation(f"mb{megabytes}", CLIENTS) as federation:
        federation.wait()
        for kept, name, target in ((False, "bare grpc.aio", "<= 2.0"), (True, "streams kept open", "")):
            with Bare(megabytes, CLIENTS, kept=kept) as bare:
                ratio, note = _ratio(federation, bare, *TURNS[megabytes])
            found.append(Figure(f"round of {CLIENTS} agents, {megabytes} MB / {name}", ratio, target, note))
    return found


def _ratio(federation: Federation, bare: Bare, count: int, times: int) -> tuple[float, str]:
    """The ratio of our seconds to those of the bare program, and a note on both."""
    used = []

    def ours() -> float:
        before = federation.cpu_seconds()
        seconds = federation.rounds(count)
        used.append((federation.cpu_seconds() - before) / (count + 1))
        return seconds

    ratio, mine, floor = alternate(ours, lambda: bare.rounds(count), times=times)
    cpu = f"CPU {statistics.median(used):.3g} against {bare.cpu_s:.3g} s"
    return ratio, f"{mine:.3g} s against {floor:.3g} s; {cpu}"


def _against_peer(ours: float, megabytes: int, name: str, python: str) -> list[Figure]:
    """The ratio to a peer's median round but the first; nothing but a printed line where the peer gives none."""
    said = _peer(PEERS[name], megabytes, python)
    if "error" in said:
        print(f"{name} at {megabytes} MB: {said['error']}")
        return []
    theirs = statistics.median(said["seconds"][1:])
    note = f"{ours:.3g} s against {theirs:.3g} s"
    return [Figure(f"round of {CLIENTS} agents, {megabytes} MB / {name}", ours / theirs, "<= 1", note)]


def _peer(folder: str, megabytes: int, python: str) -> dict[str, Any]:
    """What a peer's own script says: `seconds` of each round, or `error`."""
    script = str(ROOT / "bench" / "peers" / folder / "run.py")
    size = ("--bytes", str(megabytes * 1_000_000), "--clients", str(CLIENTS), "--limit", str(PEER_LIMIT_S))
    done = subprocess.run([python, script, *size, "--rounds", "4"], capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else {"error": done.stderr[-300:]}


def tls_cost() -> Figure:
    """A round of 25 MB over mutual TLS against the same without."""
    with Federation("mb25", CLIENTS) as plain, Federation("mb25", CLIENTS, tls=True) as secured:
        plain.wait()
        secured.wait()
        ratio, with_tls, without = alternate(lambda: secured.rounds(8), lambda: plain.rounds(8), times=3)
    note = f"{with_tls:.3g} s against {without:.3g} s"
    return Figure(f"round of {CLIENTS} agents, 25 MB, TLS / plaintext", ratio, "<= 1.4", note)


def secure_cost(scheme: Literal["masked", "bfv"]) -> Figure:
    """A round of 25 MB that nobody sees into against a plain one, in the same federation."""
    target = {"masked": "<= 2.5", "bfv": "<= 8"}[scheme]
    with Federation("mb25", CLIENTS, roster=True) as federation:
        federation.wait()
        ratio, ours, plain = alternate(lambda: federation.rounds(6, scheme), lambda: federation.rounds(6), times=3)
    note = f"{ours:.3g} s against {plain:.3g} s, both over TLS"
    return Figure(f"round of {CLIENTS} agents, 25 MB, {scheme} / plain", ratio, target, note)


def coordinator_memory() -> list[Figure]:
    """The coordinator's peak beyond idle in three rounds of 100 MB, in MB."""
    found = []
    for clients in (4, 10, 16):
        with Federation("mb100", clients) as federation:
            federation.wait()
            idle = federation.memory("VmRSS")
            federation.forget_peak()
            federation.rounds(3)
            peak = federation.memory("VmHWM")
        note = f"{peak:.0f} MB at its peak, {idle:.0f} MB idle"
        found.append(Figure(f"coordinator beyond idle, {clients} agents of 100 MB", peak - idle, "<= 464", note))
    return found


def first_round() -> Figure:
    """Seconds from four agents, a coordinator and `fedkit run` started at once to the end of a run of one round."""
    return Figure("commands to the end of the first round, s", statistics.median(_first() for _ in range(3)), "<= 8")


def _first() -> float:
    began = time.perf_counter()
    with Federation("mb1", 4) as federation:
        file = federation.folder / "run.toml"
        file.write_text(_RUN_FILE)
        submit = ("run", str(file), "--coordinator", federation.address, "--task", "bench.echo:mb1")
        process = command(*submit, log=federation.folder / "run.log")
        status = process.wait(120)
        seconds = time.perf_counter() - began
        if status != 0:
            raise RuntimeError(Path(federation.folder / "run.log").read_text()[-600:])
    return seconds


_RUN_FILE = """
[run]
name = "first"
task = "echo-1"
min_clients = 4
[strategy]
name = "FedAvg"
rounds = 1
local = { steps = 1 }
"""
