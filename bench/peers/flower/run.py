"""Times rounds of Flower's deployment engine: one SuperLink, real SuperNodes on loopback, `flwr run`.

What is measured, inside the ServerApp: from the moment all nodes are online and the round is configured to the moment
the averaged model is there. Evaluation is off, nothing is encrypted, telemetry and update checks are off; the model is
one float32 array, and a client returns it changed in one element. By default Flower starts a process for each client
and round; that is part of its round.

Install the peer in an environment of its own: pip install flwr==1.41.0

    python bench/peers/flower/run.py --bytes 1000000 --clients 10 --rounds 3

It prints one line of JSON: `seconds` of each round, or `error`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

TOOLS = Path(sys.executable).parent
APP = Path(__file__).parent
ROUND = re.compile(r"BENCH (\d+) ([\d.]+)")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start(home: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process of the engine that logs into `home`."""
    with (home / f"{len(list(home.glob('*.log')))}-{name}.log").open("wb") as log:
        return subprocess.Popen([TOOLS / name, *arguments], stdout=log, stderr=log, start_new_session=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process, which ends what it started."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def wait_for(port: int, limit_s: float) -> None:
    """Returns once somebody listens."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("the SuperLink does not listen")


def seconds_per_round(home: Path, arguments: argparse.Namespace) -> list[float]:
    """Runs the app once; the seconds of its rounds."""
    port, *others = free_ports(1 + arguments.clients)
    (home / "config.toml").write_text(f'[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    settings = " ".join(f"{key}={getattr(arguments, key)}" for key in ("bytes", "clients", "rounds"))
    with ExitStack() as stack:
        host = ("--host", "127.0.0.1", "--port")
        offline = "--disable-runtime-dependency-installation"
        stack.callback(stop, start(home, "flower-superlink", "--insecure", offline, *host, str(port)))
        wait_for(port, 60)
        for other in others:
            link = ("--superlink", f"127.0.0.1:{port}")
            stack.callback(stop, start(home, "flower-supernode", "--insecure", *link, *host, str(other)))
        command = [TOOLS / "flwr", "run", APP, "bench", "--stream", "--run-config", settings]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
        stack.callback(run.kill)
        return follow(run, arguments)


def follow(run: subprocess.Popen[str], arguments: argparse.Namespace) -> list[float]:
    """The rounds it reports, until there are enough or it ends."""
    found, said = [], []
    assert run.stdout is not None
    for line in run.stdout:
        said.append(line)
        if match := ROUND.search(line):
            if int(match[1]) != arguments.clients:
                raise SystemExit(f"only {match[1]} of {arguments.clients} clients answered")
            found.append(float(match[2]))
        if len(found) == arguments.rounds:
            return found
    raise SystemExit("".join(said)[-600:])


def main() -> None:
    """Prints the seconds of each round, or why there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=600, help="seconds until it is given up")
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(SystemExit(f"over {arguments.limit} s")))
    signal.alarm(arguments.limit)
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    os.environ["PATH"] = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        os.environ["FLWR_HOME"] = home
        try:
            print(json.dumps({"seconds": seconds_per_round(Path(home), arguments)}))
        except SystemExit as error:
            print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main()
