"""What the SuperLink runs: federated averaging with a clock."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    """FedAvg that prints when a round begins and when its model is there."""

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> Any:
        """Starts the clock once enough nodes are online."""
        while len(list(grid.get_node_ids())) < self.min_available_nodes:
            time.sleep(0.2)
        self.began = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Stops it; says how many answered."""
        answers = list(replies)
        found = super().aggregate_train(server_round, answers)
        good = sum(not answer.has_error() for answer in answers)
        print(f"BENCH {good} {time.perf_counter() - self.began}", flush=True)
        return found


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds; the settings come from the run's configuration."""
    clients, rounds = int(context.run_config["clients"]), int(context.run_config["rounds"])
    vector = (np.arange(int(context.run_config["bytes"]) // 4) % 1000).astype(np.float32)
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    result = strategy.start(grid, initial_arrays=ArrayRecord([vector]), num_rounds=rounds)
    print(f"BENCH first {result.arrays.to_numpy_ndarrays()[0][0]}", flush=True)
