"""Runs as TensorBoard reads them, by PyTorch's own writer."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fedkit.errors import ConfigError
from fedkit.tracking.events import Begun, Ended, Event, Shipped

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard"]


class TensorBoard:
    """A tracker: each run becomes a folder of its own in `folder`, with curves by round and a table of its settings.

    TensorBoard has no models, so bundles are passed over. Raises `ConfigError` where it is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError:
            raise ConfigError("tracking with TensorBoard needs it: pip install fedkit[tensorboard]") from None
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Event) -> None:
        """Writes one event down."""
        if isinstance(event, Begun):
            self._begin(event)
        writer = self._writer
        if writer is None or isinstance(event, Begun | Shipped):
            return
        for name, value in event.metrics.items():
            writer.add_scalar(name, value, event.round)
        writer.flush()
        if isinstance(event, Ended):
            writer.close()
            self._writer = None

    def _begin(self, event: Begun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        name = f"{event.run}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        self._writer = SummaryWriter(str(self._folder / name))
        rows = [f"| {one} | {value} |" for one, value in {**event.tags, **event.params}.items()]
        text = "\n".join(["| setting | value |", "|---|---|", *rows])
        self._writer.add_text("run", text, 0)
