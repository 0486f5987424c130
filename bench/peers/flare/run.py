"""Times rounds of NVIDIA FLARE's simulator: federated averaging over sites that return at once.

What is measured, from the server's own log: the time between the beginnings of two rounds, which covers sending,
receiving, averaging and saving the model. The simulator plays every site at the same time; the model is one float32
array, and a site returns it changed in one element.

Install the peer in an environment of its own: pip install nvflare==2.9.0

    python bench/peers/flare/run.py --bytes 1000000 --clients 10 --rounds 3

It prints one line of JSON: `seconds` of each round, or `error`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

CLIENT = Path(__file__).with_name("client.py")
TIME = r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) - FedAvg - INFO"
MARK = re.compile(TIME + r".*\n.*\n? *(?:Round \d+ started|Finished FedAvg)", re.MULTILINE)
ANSWERED = re.compile(r"Aggregated (\d+)/(\d+) results")


def simulate(arguments: argparse.Namespace, folder: Path) -> None:
    """One run of the simulator, in this process; it logs to the standard output."""
    import numpy as np
    from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
    from nvflare.recipe import SimEnv

    start = folder / "start.npy"
    np.save(start, (np.arange(arguments.bytes // 4) % 1000).astype(np.float32))
    recipe = NumpyFedAvgRecipe(
        name="bench",
        initial_ckpt=str(start),
        min_clients=arguments.clients,
        num_rounds=arguments.rounds,
        train_script=str(CLIENT),
    )
    count = arguments.clients
    recipe.execute(SimEnv(num_clients=count, num_threads=count, workspace_root=str(folder), log_config="full"))


def seconds_per_round(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the simulator in a process group of its own, within the limit."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--inside", folder]
        run = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)
        try:
            run.wait(arguments.limit)
        except subprocess.TimeoutExpired:
            return {"error": f"over {arguments.limit} s"}
        finally:
            end(run.pid)
        log.seek(0)
        return rounds(log.read(), arguments.clients)


def end(group: int) -> None:
    """Ends all processes of a group."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def rounds(log: str, clients: int) -> dict[str, Any]:
    """What the server's log says: seconds of each round in which all sites answered."""
    marks = [datetime.strptime(mark, "%Y-%m-%d %H:%M:%S,%f").timestamp() for mark in MARK.findall(log)]
    full = [match for match in ANSWERED.findall(log) if match == (str(clients), str(clients))]
    if len(marks) < 2 or len(full) < len(marks) - 1:
        return {"error": log[-600:]}
    return {"seconds": [after - before for before, after in pairwise(marks)]}


def main() -> None:
    """Prints the seconds of each round, or why there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=600, help="seconds until it is given up")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        simulate(arguments, Path(arguments.inside))
    else:
        print(json.dumps(seconds_per_round(arguments)))


if __name__ == "__main__":
    main()
