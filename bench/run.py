"""`make bench`: every speed figure as a ratio, with its target."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from bench.dp_steps import private_steps
from bench.network import (
    coordinator_memory,
    first_round,
    network_rounds,
    other_frameworks,
    secure_cost,
    tls_cost,
)
from bench.speed import import_time, many_clients, simulated_training
from bench.table import Figure, show


def ratios(peer: str | None) -> list[Figure]:
    """All that can be measured here: the peer only where it is installed, a GPU only where there is one."""
    figures = [import_time(), simulated_training(), *private_steps()]
    if torch.cuda.is_available():
        figures += [simulated_training("cuda"), *private_steps("cuda")]
    return figures + (many_clients(peer) if peer else [])


def network() -> list[Figure]:
    """What real processes on loopback take."""
    return [
        *network_rounds(),
        tls_cost(),
        secure_cost("masked"),
        secure_cost("bfv"),
        *coordinator_memory(),
        first_round(),
    ]


def arguments() -> argparse.ArgumentParser:
    """The command line: where the peers and the data are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pfl", help="a Python that has pfl installed")
    parser.add_argument("--peers", help="a Python that has flwr and nvflare installed")
    parser.add_argument("--data", type=Path, help="the folder with the four Fashion-MNIST .gz files")
    return parser


def main() -> None:
    """Measures and prints; exits with 1 where a target is missed."""
    given = arguments().parse_args()
    good = show("Speed", ratios(given.pfl)) & show("Network", network())
    sys.exit(not (good & (given.peers is None or show("Other frameworks", other_frameworks(given.peers)))))


if __name__ == "__main__":
    main()
