"""Time rounds of Apple's pfl-research with clients that return at once.

What is measured: the wall-clock time of one central iteration of federated
averaging in one process (PyTorch backend, CPU) when every client is in the
cohort and local training does nothing. What remains is the framework's own
work per client: handing it the model, taking the difference between the
trained and the received model, weighting it by the number of data points,
adding it to the aggregate, restoring the model, and keeping the metrics; and
once per iteration, averaging and updating the central model.

Users are drawn by pfl's own ``FederatedDataset``, which seeds NumPy for each of
them. ``--trimmed`` lists the whole cohort instead, without seeds: the least that
still does the work above. Both favour pfl otherwise: no optimizer or batch is
made for a client, the model is a single flat tensor (more tensors cost more),
user data sets are built beforehand, nothing is evaluated in the timed
iterations, and no callback but the clock is enabled. pfl always evaluates users
in iteration 0; that one is the warm-up, and it is not timed.

Install the peer in an environment of its own (Python 3.10 to 3.12)::

    pip install torch==2.13.0
    pip install pfl

No workaround is needed: pfl 0.6.0 runs as released with torch 2.13.0 and
numpy 2.4. ``torch`` comes first so that ``pip install pfl`` leaves it alone.

Run::

    python pfl_rounds.py --clients 1000 --parameters 10000 --rounds 20

It prints one line of JSON; ``all`` holds the timed rounds, in seconds.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.common_types import Population
from pfl.context import CentralContext
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset, FederatedDatasetBase
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import MetricName, Metrics, get_overall_value
from pfl.model.pytorch import PyTorchModel
from pfl.stats import MappedVectorStatistics

ROWS_PER_USER = 4
FEATURES = 4
WARM_UP_ROUNDS = 1


class FlatModule(torch.nn.Module):
    """A model that is one vector of float32 parameters."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(parameters))

    def loss(self, *batch: torch.Tensor) -> torch.Tensor:
        """Required by pfl; never called, since no client trains."""
        raise NotImplementedError

    def metrics(self, *batch: torch.Tensor) -> dict[str, Any]:
        """Report nothing, so that evaluation in the warm-up is empty."""
        return {}


class NoTrainingAveraging(FederatedAveraging):
    """Federated averaging without the call that runs local SGD."""

    def train_one_user(
        self,
        initial_model_state: MappedVectorStatistics,
        model: PyTorchModel,
        user_dataset: Dataset,
        central_context: CentralContext,
    ) -> tuple[MappedVectorStatistics, Metrics]:
        """Return the model difference at once, as the base class does last."""
        return model.get_model_difference(initial_model_state), Metrics()


class WholeCohort(FederatedDatasetBase):
    """All users in a fixed order, each with a fixed seed (which is unused)."""

    def __init__(self, users: list[Dataset]) -> None:
        super().__init__()
        self._users = users

    def __next__(self) -> tuple[Dataset, int]:
        """Required by pfl; the backend only asks for cohorts."""
        raise NotImplementedError

    def get_cohort(self, cohort_size: int) -> Iterator[tuple[Dataset, int]]:
        """Yield the first users up to the size of the cohort."""
        for seed, user in enumerate(self._users[:cohort_size]):
            yield user, seed


class RoundClock(TrainingProcessCallback):
    """Note the time and the number of clients of each central iteration."""

    def __init__(self) -> None:
        self.ticks: list[float] = []
        self.clients: list[int] = []

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Start the clock."""
        self.ticks.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(
        self,
        aggregate_metrics: Metrics,
        model: PyTorchModel,
        *,
        central_iteration: int,
    ) -> tuple[bool, Metrics]:
        """Note the end of an iteration; never stop the training."""
        name = MetricName("number of devices", Population.TRAIN)
        self.clients.append(int(get_overall_value(aggregate_metrics[name])))
        self.ticks.append(time.perf_counter())
        return False, Metrics()

    def seconds(self) -> list[float]:
        """Return the duration of every iteration, the warm-up included."""
        return [end - start for start, end in zip(self.ticks, self.ticks[1:], strict=False)]


def build_users(clients: int, trimmed: bool) -> FederatedDatasetBase:
    """Make the tiny user data sets once, before the clock starts."""
    rows = np.ones((ROWS_PER_USER, FEATURES), dtype=np.float32)
    users = [Dataset((rows.copy(),), user_id=str(i)) for i in range(clients)]
    if trimmed:
        return WholeCohort(users)
    sampler = get_user_sampler("minimize_reuse", list(range(clients)))
    return FederatedDataset(lambda user_id: users[user_id], sampler)


def build_model(parameters: int) -> PyTorchModel:
    """Wrap the flat module; the central step adds the mean difference."""
    module = FlatModule(parameters)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    return PyTorchModel(module, torch.optim.SGD, optimizer)


def algorithm_params(clients: int, iterations: int) -> NNAlgorithmParams:
    """Use every client, and evaluate in no iteration but the first."""
    return NNAlgorithmParams(
        central_num_iterations=iterations,
        evaluation_frequency=iterations + 1,
        train_cohort_size=clients,
        val_cohort_size=0,
    )


def time_rounds(clients: int, parameters: int, rounds: int, trimmed: bool) -> list[float]:
    """Run the simulation and return the seconds of each timed round."""
    model = build_model(parameters)
    users = build_users(clients, trimmed)
    clock = RoundClock()
    NoTrainingAveraging().run(
        algorithm_params(clients, rounds + WARM_UP_ROUNDS),
        SimulatedBackend(users, users, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(local_batch_size=None, local_num_epochs=0, local_learning_rate=0.0),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    if clock.clients != [clients] * (rounds + WARM_UP_ROUNDS):
        raise RuntimeError(f"clients per round: {clock.clients}")
    return clock.seconds()[WARM_UP_ROUNDS:]


def positive(text: str) -> int:
    """Parse a whole number of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time rounds of pfl-research with clients that do nothing.")
    parser.add_argument("--clients", type=positive, default=1000)
    parser.add_argument("--parameters", type=positive, default=10_000)
    parser.add_argument(
        "--rounds",
        type=positive,
        default=20,
        help="timed rounds; one more runs before them as warm-up",
    )
    parser.add_argument("--trimmed", action="store_true", help="leave out pfl's own sampling of users")
    return parser.parse_args()


def main() -> None:
    """Time the rounds and print one line of JSON."""
    arguments = parse_arguments()
    os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")
    seconds = time_rounds(arguments.clients, arguments.parameters, arguments.rounds, arguments.trimmed)
    result = {
        "peer": "pfl, trimmed" if arguments.trimmed else "pfl",
        "version": version("pfl"),
        "clients": arguments.clients,
        "parameters": arguments.parameters,
        "rounds": arguments.rounds,
        "seconds_per_round": statistics.median(seconds),
        "all": seconds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
