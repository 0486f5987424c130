"""A Flower app: fedkit's weight transfer across four hospitals, for a SuperLink and its SuperNodes."""

import fedkit
from fedkit.demo import heart
from fedkit.engines import flower
from fedkit.strategies import CyclicWeightTransfer


def keep(result: fedkit.Result) -> None:
    """Runs in the ServerApp's process when the run is over."""
    print(f"fedkit: test accuracy {result.test['accuracy']:.3f}, written to {result.save('fedkit-run')}")


both = flower.apps(
    heart.task,
    CyclicWeightTransfer(rounds=3, local=fedkit.Fit(steps=100, batch_size=4, lr=0.001)),
    clients=heart.HOSPITALS,
    seed=42,
    on_result=keep,
)
server_app = both[0]  # each by an assignment of its own, which `flwr run` looks for
client_app = both[1]
