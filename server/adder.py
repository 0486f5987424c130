"""Processes of the coordinator's that add up ciphertexts: native code that crashes takes one of them along, no other.

They talk in lines of JSON; vectors lie in files. Of a large sum, each process adds some of the
chunks. `python -m fedkit.server.adder` is what runs there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from fedkit.crypto.adding import Adding, left
from fedkit.crypto.chunks import Scheme
from fedkit.crypto.ring import Words
from fedkit.errors import FedkitError, SumSpoiled

__all__ = ["AddingProcesses", "main"]

_MOST = 4  # processes
_LEAST_CHUNKS = 32  # for which another process is worth its while

log = structlog.get_logger("fedkit.server")


class AddingProcesses:
    """The processes as the coordinator sees them: each started when it is first needed, and again after it died."""

    def __init__(self) -> None:
        self._processes = [_Process() for _ in range(min(os.cpu_count() or 1, _MOST))]

    def start(self) -> None:
        """Starts the first, unless it runs: it needs two seconds to load what it works with."""
        self._processes[0].start()

    async def add_up(
        self, scheme: Scheme, fingerprint: bytes, values: int, uploads: Mapping[str, Path], out: Path
    ) -> tuple[Words, dict[str, str]]:
        """The sum of the uploads in these files, by way of the file `out`, which is gone afterwards.

        Raises `SumSpoiled`, also where a process died of it.
        """
        most = min(len(self._processes), scheme.chunks_for(values) // _LEAST_CHUNKS + 1)
        parts = Adding.parts(scheme, fingerprint, values, most)
        paths = {name: str(path) for name, path in uploads.items()}
        try:
            total: Words = np.memmap(out, dtype="<u4", mode="w+", shape=(scheme.words_of_sum(values),))
            refused: dict[str, str] = {}
            while more := await self._each(parts, {"uploads": left(paths, refused), "out": str(out)}):
                refused |= more
            return total, refused
        finally:
            with contextlib.suppress(FileNotFoundError):
                out.unlink()

    async def _each(self, parts: list[Adding], task: dict[str, Any]) -> dict[str, str]:
        """All that is refused of the uploads, where each process works on its part."""
        lines = [json.dumps({"part": _packed(part), **task}).encode() for part in parts]
        asked = zip(self._processes, lines, strict=False)
        answers = await asyncio.gather(*(asyncio.to_thread(process.ask, line) for process, line in asked))
        for answer in answers:
            if "spoiled" in answer:
                raise SumSpoiled(answer["spoiled"])
        return {name: why for answer in answers for name, why in answer["refused"].items()}

    def close(self) -> None:
        """Ends them."""
        for process in self._processes:
            process.close()


class _Process:
    """One of them."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()  # which a request keeps until it is answered, whether or not anybody waits

    def start(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            command = [sys.executable, "-m", "fedkit.server.adder"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 our own

    def ask(self, line: bytes) -> dict[str, Any]:
        """The answer; that the sum is spoiled, where the process died."""
        with self._turn:
            answer = self._answered(line)
        found: dict[str, Any] = json.loads(answer) if answer else {"spoiled": "a process that adds ciphertexts died"}
        return found

    def _answered(self, line: bytes) -> bytes:
        self.start()
        process = self._process
        assert process is not None  # it was started
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            log.error("a process that adds died")
            self.close()
        return answer

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()


def _packed(part: Adding) -> list[Any]:
    return [astuple(part.scheme), part.fingerprint.hex(), part.values, part.first, part.end]


def _unpacked(data: list[Any]) -> Adding:
    return Adding(Scheme(*data[0]), bytes.fromhex(data[1]), *data[2:])


def main() -> None:
    """Adds what lines on standard input ask for, until that ends."""
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(json.loads(line))) + "\n")
        sys.stdout.flush()


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    try:
        uploads = {who: np.memmap(path, dtype="<u4", mode="r") for who, path in task["uploads"].items()}
        out = np.memmap(task["out"], dtype="<u4", mode="r+")
        return {"refused": _unpacked(task["part"]).add(uploads, out)}
    except (FedkitError, OSError) as error:  # a file is gone with the run that asked
        return {"spoiled": str(error)}


if __name__ == "__main__":
    main()
