"""Agents that reach their coordinator over a bad line only."""

from __future__ import annotations

from bench.proxy import Proxy
from fedkit.loopback import Loopback

__all__ = ["Lined"]


class Lined(Loopback):
    """A federation whose agents dial `line` instead of their coordinator. Mixed into any other kind of federation."""

    line: Proxy

    def start_client(self, name: str) -> None:
        port, self.port = self.port, int(self.line.address.rpartition(":")[2])
        super().start_client(name)
        self.port = port
