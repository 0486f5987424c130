"""A grid in this process: Flower's own messages and contexts, which pass through bytes as on a SuperLink."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto


def through_bytes(record: RecordDict) -> RecordDict:
    """What comes out at the other end of a wire."""
    return recorddict_from_proto(RecordDictProto.FromString(recorddict_to_proto(record).SerializeToString()))


class DirectGrid:
    """Nodes with these configurations that answer when they are asked; `fault(node, message)` may answer instead."""

    def __init__(
        self, app: ClientApp, configs: Iterable[dict[str, Any]], fault: Callable[[int, Message], Any] | None = None
    ) -> None:
        self._app = app
        self._fault = fault or (lambda node, message: None)
        self.contexts = {
            node: Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={})
            for node, config in enumerate(configs, start=1)
        }
        self.asked: list[tuple[int, str]] = []
        self._numbers = itertools.count(1)
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        """All of them."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Each is answered at once; the reply waits to be pulled."""
        return [self._pushed(message) for message in messages]

    def _pushed(self, message: Message) -> str:
        key, node = str(next(self._numbers)), message.metadata.dst_node_id
        if node not in self.contexts:
            return ""
        message.metadata.__dict__["_message_id"] = key
        message.content = through_bytes(message.content)
        self.asked.append((node, message.metadata.message_type))
        reply = self._fault(node, message) or self._answered(node, message)
        if reply.has_content():
            reply.content = through_bytes(reply.content)
        self._replies[key] = reply
        return key

    def _answered(self, node: int, message: Message) -> Message:
        context = self.contexts[node]
        context.state = through_bytes(context.state)
        try:
            return self._app(message, context)
        except Exception as error:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)

    def pull_messages(self, keys: Iterable[str]) -> list[Message]:
        """Those that are there, once."""
        return [self._replies.pop(key) for key in list(keys) if key in self._replies]
