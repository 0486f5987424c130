"""Many clients on one machine: the same rounds, strategies and local work as a real federation, without a network."""

from fedkit.simulation import splits
from fedkit.simulation.run import simulate

__all__ = ["simulate", "splits"]
