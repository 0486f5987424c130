"""What Prometheus may read: counts and seconds, no names of people and no values of data."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["Metrics"]

_CLIENT_STATES = ("ready", "working", "away", "left")
_RUN_STATES = ("waiting", "running", "finished", "failed", "cancelled")


class Metrics:
    """The coordinator's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        at = self.registry
        self.rounds = Counter("fedkit_rounds", "Rounds by how they ended", ["outcome"], registry=at)
        self.seconds = Histogram(
            "fedkit_phase_seconds",
            "Seconds by phase: wait for clients, one answer, fold, commit",
            ["phase"],
            registry=at,
            buckets=(0.001, 0.01, 0.1, 1, 10, 60, 600, 3600),
        )
        self.bytes = Counter("fedkit_payload_bytes", "Bytes of tensors by direction", ["direction"], registry=at)
        self.clients = Gauge("fedkit_clients", "Clients by state", ["state"], registry=at)
        self.runs = Gauge("fedkit_runs", "Runs by state", ["state"], registry=at)
        self.refusals = Counter("fedkit_refusals", "Answers that did not count, by reason", ["reason"], registry=at)

    def show(self, clients: Iterable[str], runs: Iterable[str]) -> None:
        """Sets the gauges to these states of clients and runs."""
        for gauge, states, found in ((self.clients, _CLIENT_STATES, clients), (self.runs, _RUN_STATES, runs)):
            tally = Tally(found)
            for state in states:
                gauge.labels(state=state).set(tally[state])
