"""A process of the coordinator's that adds up ciphertexts: native code that crashes takes this process along, no other.

The two talk in lines of JSON; vectors lie in files. `python -m fedkit.server.adder` is what runs there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from fedkit.crypto.adding import add_up
from fedkit.crypto.chunks import Scheme, words_of_sum
from fedkit.crypto.ring import Words
from fedkit.errors import FedkitError, SumSpoiled

__all__ = ["AddingProcess", "main"]

log = structlog.get_logger("fedkit.server")


class AddingProcess:
    """The process as the coordinator sees it: started when it is first needed, and again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()  # which a request keeps until it is answered, whether or not anybody waits

    def start(self) -> None:
        """Starts it, unless it runs: it needs two seconds to load what it works with."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            command = [sys.executable, "-m", "fedkit.server.adder"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 our own

    async def add_up(
        self, scheme: Scheme, fingerprint: bytes, values: int, uploads: Mapping[str, Path], out: Path
    ) -> tuple[Words, dict[str, str]]:
        """The sum of the uploads in these files, by way of the file `out`, which is gone afterwards.

        Raises `SumSpoiled`, also where the process died of it.
        """
        task = {
            "scheme": astuple(scheme),
            "fingerprint": fingerprint.hex(),
            "values": values,
            "uploads": {name: str(path) for name, path in uploads.items()},
            "out": str(out),
        }
        try:
            answer = await asyncio.to_thread(self._asked, json.dumps(task).encode())
            if "spoiled" in answer:
                raise SumSpoiled(answer["spoiled"])
            return np.memmap(out, dtype="<u4", mode="r"), answer["refused"]
        finally:
            with contextlib.suppress(FileNotFoundError):
                out.unlink()

    def _asked(self, line: bytes) -> dict[str, Any]:
        with self._turn:
            answer = self._answered(line)
        found: dict[str, Any] = json.loads(answer)
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
            log.error("the process that adds died")
            self.close()
            raise SumSpoiled("the process that adds ciphertexts died of them")
        return answer

    def close(self) -> None:
        """Ends it."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()


def main() -> None:
    """Adds up what lines on standard input ask for, until that ends."""
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(json.loads(line))) + "\n")
        sys.stdout.flush()


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    uploads = {who: np.memmap(path, dtype="<u4", mode="r") for who, path in task["uploads"].items()}
    out = np.memmap(task["out"], dtype="<u4", mode="w+", shape=(words_of_sum(task["values"]),))
    try:
        refused = add_up(Scheme(*task["scheme"]), bytes.fromhex(task["fingerprint"]), task["values"], uploads, out)
    except FedkitError as error:
        return {"spoiled": str(error)}
    return {"refused": refused}


if __name__ == "__main__":
    main()
