"""A client's side on Flower: what a ClientApp does with a message.

Flower may do each message in another process, so all that a client keeps between two of them lies in the
`Context.state` that Flower keeps for it, in simulation and on a SuperNode alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedkit.engines.flower.library import flower
from fedkit.engines.flower.records import from_records, to_records
from fedkit.errors import ConfigError, IncompatibleStrategy, PayloadError, Reason, Refused
from fedkit.packing import pack, unpack
from fedkit.privacy.accounting import Tally
from fedkit.protos import whole
from fedkit.task import Task
from fedkit.trainer.client import LocalClient, MemoryStore
from fedkit.trainer.trainer import Trainer
from fedkit.work import Steps

__all__ = ["Node", "name_of"]

_KEPT = "fedkit"

_trainers: dict[str, Trainer] = {}  # of this process, at most one: the model and the data stay loaded


def name_of(node_config: Mapping[str, Any], clients: tuple[str, ...]) -> str:
    """Which client a node is, by `client="NAME"` or `partition-id=N` of its configuration; raises `ConfigError`."""
    name, number = node_config.get("client"), node_config.get("partition-id")
    if name is None and type(number) is int and 0 <= number < len(clients):
        return clients[number]
    if name not in clients:
        text = f"a node is client={name!r} with partition-id={number!r}, which is none of {', '.join(clients[:5])}"
        raise ConfigError(f"{text}: start its SuperNode with --node-config 'client=\"NAME\"'")
    return str(name)


@dataclass(frozen=True)
class Node:
    """Answers messages. `key` tells this run's clients from those of others that the same process works for."""

    key: str
    task: Task
    clients: tuple[str, ...]
    seed: int
    device: str
    threads: int

    def attend(self, message: Any, context: Any) -> Any:
        """Says which client this node is."""
        app = flower("app")
        record = app.ConfigRecord({"client": name_of(context.node_config, self.clients)})
        return app.Message(app.RecordDict({_KEPT: record}), reply_to=message)

    def answer(self, message: Any, context: Any) -> Any:
        """Does the work that a message asks for."""
        torch.set_num_threads(self.threads)
        said, payload = from_records(message.content)
        asked = whole.asked_from(said, payload, name_of(context.node_config, self.clients))
        store = _Store(context.state)
        store.settle(asked.settled.accepted, asked.settled.dropped)
        content = self._answered(asked, store)
        store.keep(context.state)
        return flower("app").Message(content, reply_to=message)

    def _answered(self, asked: whole.Asked, store: _Store) -> Any:
        assignment = asked.assignment
        client = LocalClient(assignment.client, self._trainer(asked.holds_out_valid), store)
        client.spent.update(store.spent)
        try:
            answer = client.perform(assignment, asked.parcel)
        except IncompatibleStrategy as error:
            refused = Refused(Reason.FAILED, str(error))
        except Refused as error:
            refused = error
        else:
            store.spent = dict(client.spent)
            return to_records(*whole.answer_to(assignment.id, answer))
        return to_records(whole.refusal_to(assignment.id, refused), asked.parcel.model.vector[:0])

    def _trainer(self, holds_out_valid: bool) -> Trainer:
        key = f"{self.key}/{holds_out_valid}"
        if key not in _trainers:
            _trainers.clear()
            _trainers[key] = Trainer(self.task, self.seed, device=self.device, holds_out_valid=holds_out_valid)
        return _trainers[key]


class _Store(MemoryStore):
    """A client's memory that is put into `Context.state` after each message, with what privacy has cost by run.

    It keeps no answers: on Flower nobody asks twice.
    """

    def __init__(self, state: Any) -> None:
        super().__init__(keeps_answers=False)
        self.spent: dict[str, Tally] = {}
        kept = state.config_records.get(_KEPT, {}).get(_KEPT)
        if kept is None:
            return
        try:
            self._state, self._pending, spent = unpack(kept)
        except (PayloadError, ValueError, TypeError) as error:
            raise ConfigError(f"the node's state is none of fedkit's: {error}") from None
        self.spent = {run: Tally.of(map(Steps.from_dict, steps)) for run, steps in spent.items()}

    def keep(self, state: Any) -> None:
        """Puts everything back."""
        spent = {run: [steps.to_dict() for steps in tally] for run, tally in self.spent.items()}
        packed = pack([self._state, self._pending, spent])
        state[_KEPT] = flower("app").ConfigRecord({_KEPT: packed})
