"""Flower's own clients and strategies, as their authors would write them, for simulation and a coordinator alike."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedTrimmedAvg, FedYogi
from torch import nn

import fedkit
from fedkit.engines.flower import FlowerStrategy, client_task
from fedkit.testing import toy_task

CLIENTS = ("ada", "bea", "cyd", "dan")
TOY = toy_task()


def learn(model: nn.Module, config: Any, client: str) -> tuple[float, int]:
    """Full-batch gradient descent, so that nothing is drawn."""
    features, labels = TOY.data(client).train.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    for _ in range(config["local-epochs"]):
        optimizer.zero_grad()
        loss = TOY.loss(model(features), labels)
        loss.backward()
        optimizer.step()
    return float(loss.detach()), len(labels)


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Counts its visits, and refuses to train where one was forgotten."""
    model, config = TOY.model(), message.content["config"]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    visits = context.state.get("visits", MetricRecord({"count": 0}))
    visits["count"] += 1
    context.state["visits"] = visits
    assert visits["count"] == config["server-round"], f"{visits['count']} visits in round {config['server-round']}"
    assert CLIENTS[context.node_config["partition-id"]] == context.node_config["client"]
    assert context.run_config["model"] == "toy"
    loss, rows = learn(model, config, context.node_config["client"])
    metrics = MetricRecord({"num-examples": rows, "train_loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


class Older(NumPyClient):
    """The client of a `client_fn`."""

    def __init__(self, client: str) -> None:
        self.client = client

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, dict[str, float]]:
        """One visit."""
        model = TOY.model()
        names = model.state_dict()
        model.load_state_dict({name: torch.tensor(one) for name, one in zip(names, parameters, strict=True)})
        loss, rows = learn(model, config, self.client)
        return [value.numpy() for value in model.state_dict().values()], rows, {"loss": loss}


def client_fn(context: Context) -> Client:
    """Flower's older way to say what a client is."""
    return Older(str(context.node_config["client"])).to_client()


def flowered(run: Any, name: str) -> fedkit.Task:
    """A task that leaves its training to Flower's client."""
    about = {"clients": CLIENTS, "run_config": {"model": "toy"}, "loss": TOY.loss}
    return client_task(run, name=name, model=TOY.model, data=TOY.data, **about)


app_task = flowered(app, "app")
older_task = flowered(client_fn, "older")
plain_task = fedkit.Task(name="plain", model=TOY.model, data=TOY.data, loss=TOY.loss)


class Trimmed(FlowerStrategy):
    """Flower's trimmed mean, as a coordinator registers it."""

    beta: float = 0.25

    def flower(self) -> FedTrimmedAvg:
        """New."""
        return FedTrimmedAvg(beta=self.beta)


class Yogi(FlowerStrategy):
    """A Flower strategy that keeps vectors."""

    def flower(self) -> FedYogi:
        """New."""
        return FedYogi()
