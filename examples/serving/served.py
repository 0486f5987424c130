"""MLServer as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calls import HOST, call

READY_WITHIN_S = 240


@contextlib.contextmanager
def serving(mlserver: str, folder: Path, network: Path, sha256: str) -> Iterator[int]:
    """MLServer on this machine with one network as "heart"; gives its port once it is ready."""
    ports = dict(zip(("http_port", "grpc_port", "metrics_port"), free_ports(3), strict=True))
    settings = ports | {"host": HOST, "parallel_workers": 0, "debug": False}
    parameters = {"uri": str(network.resolve()), "version": "1", "extra": {"sha256": sha256}}
    model = {"name": "heart", "implementation": "network.Network", "parameters": parameters}
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("settings", settings), ("model-settings", model)):
        (folder / f"{name}.json").write_text(json.dumps(values))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    log, latest = folder / "log", time.monotonic() + READY_WITHIN_S
    with log.open("w") as file:
        about: Any = {"env": environment, "stdout": file, "stderr": file}
        server = subprocess.Popen([mlserver, "start", str(folder)], **about)  # noqa: S603 - the one that was given
    try:
        while call(ports["http_port"], "GET", "/v2/models/heart/ready") is None:
            if server.poll() is not None or time.monotonic() > latest:
                raise SystemExit(f"the server is not ready:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield ports["http_port"]
    finally:
        server.terminate()
        server.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(socket.create_server((HOST, 0))).getsockname()[1] for _ in range(count)]
