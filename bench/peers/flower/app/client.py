"""What each SuperNode runs."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, _: Context) -> Message:
    """Returns the received model with one added to its first element."""
    (vector,) = message.content["arrays"].to_numpy_ndarrays()
    vector = vector.copy() if not vector.flags.writeable else vector
    vector[0] += 1
    answer = {"arrays": ArrayRecord([vector]), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(answer), reply_to=message)
