"""`make bench`: every speed figure as a ratio, with its target."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from bench.speed import import_time, many_clients, simulated_training
from bench.table import Figure, show


def ratios(peer: str | None) -> list[Figure]:
    """All that can be measured here: the peer only where it is installed, a GPU only where there is one."""
    figures = [import_time(), simulated_training()]
    if torch.cuda.is_available():
        figures.append(simulated_training("cuda"))
    return figures + (many_clients(peer) if peer else [])


def main() -> None:
    """Measures and prints; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pfl", help="a Python that has pfl installed")
    sys.exit(not show("Speed", ratios(parser.parse_args().pfl)))


if __name__ == "__main__":
    main()
