"""A coordinator in a thread of the test's own process: its insides can be looked at, its sockets are real."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from fedkit.server.process import Coordinator, CoordinatorSettings
from fedkit.task import Task

T = TypeVar("T")

_PATIENCE_S = 120.0


class Inside:
    """The coordinator, started, with the event loop it runs in."""

    def __init__(self, settings: CoordinatorSettings, tasks: Mapping[str, Task]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._made_of = settings, tasks
        self.address = f"127.0.0.1:{self.do(self._begin(settings, tasks))}"

    async def _begin(self, settings: CoordinatorSettings, tasks: Mapping[str, Task]) -> int:
        self.coordinator = Coordinator(settings, tasks)
        return await self.coordinator.start()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, done in the coordinator's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_PATIENCE_S)

    def restart(self) -> None:
        """Ends the coordinator and begins another one on its folder; the address stays where it was chosen."""
        self.do(self.coordinator.stop())
        self.do(self._begin(*self._made_of))

    def close(self) -> None:
        self.do(self.coordinator.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
