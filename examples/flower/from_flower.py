"""A Flower ClientApp and Flower's FedTrimmedAvg on fedkit: here in simulation, and as they are on a coordinator."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedTrimmedAvg
from torch import nn

import fedkit
from fedkit.demo import heart
from fedkit.engines.flower import FlowerStrategy, client_task

app, loss = ClientApp(), nn.BCEWithLogitsLoss()


@app.train()
def train(message: Message, context: Context) -> Message:
    rows, model = heart.load(context.node_config["client"]).train, task.model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=message.content["config"]["lr"])
    for features, labels in torch.utils.data.DataLoader(rows, batch_size=10, shuffle=True):
        optimizer.zero_grad()
        loss(model(features), labels).backward()
        optimizer.step()
    answer = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(rows)})}
    return Message(RecordDict(answer), reply_to=message)


class Trimmed(FlowerStrategy):  # on a coordinator: --strategy from_flower:Trimmed --task from_flower:task
    def flower(self) -> FedTrimmedAvg:
        return FedTrimmedAvg(beta=0.25)


about = {"data": heart.load, "loss": loss, "metrics": heart.task.metrics}
task = client_task(app, name="heart-app", model=lambda: nn.Sequential(nn.BatchNorm1d(13), nn.Linear(13, 1)), **about)
if __name__ == "__main__":
    strategy = Trimmed(rounds=20, config={"lr": 0.05})
    result = fedkit.simulate(task, strategy, clients=heart.HOSPITALS, seed=42, threads=1)
    print(f"FedTrimmedAvg of {len(result.clients)} ClientApps: test accuracy {result.test['accuracy']:.3f}")
