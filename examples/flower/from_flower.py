"""A Flower ClientApp and Flower's FedTrimmedAvg on fedkit: here in simulation, and as they are on a coordinator."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedTrimmedAvg

import fedkit
from fedkit.demo import heart
from fedkit.engines.flower import FlowerStrategy, client_task

app, loss = ClientApp(), torch.nn.BCEWithLogitsLoss()


@app.train()
def train(message: Message, context: Context) -> Message:
    rows, model = heart.load(context.node_config["client"]).train, task.model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    sgd = torch.optim.SGD(model.parameters(), lr=message.content["config"]["lr"])
    for features, labels in torch.utils.data.DataLoader(rows, batch_size=10, shuffle=True):
        sgd.zero_grad()
        loss(model(features), labels).backward()
        sgd.step()
    records = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(rows)})}
    return Message(RecordDict(records), reply_to=message)


class Trimmed(FlowerStrategy):
    """On a coordinator: --strategy from_flower:Trimmed --task from_flower:task."""

    def flower(self) -> FedTrimmedAvg:
        """The strategy before the first round."""
        return FedTrimmedAvg(beta=0.25)


norm, about = torch.nn.BatchNorm1d, {"data": heart.load, "loss": loss, "metrics": heart.task.metrics}
task = client_task(app, name="heart-app", model=lambda: torch.nn.Sequential(norm(13), torch.nn.Linear(13, 1)), **about)
if __name__ == "__main__":
    result = fedkit.simulate(task, Trimmed(rounds=20, config={"lr": 0.05}), clients=heart.HOSPITALS, seed=42, threads=1)
    print(f"FedTrimmedAvg of {len(result.clients)} ClientApps: test accuracy {result.test['accuracy']:.3f}")
