"""Structured logs of the processes: one event a line, with the run, round, client and assignment it is about.

Events hold names, counts, seconds and types of errors: never data, weights, secrets or the text of a task's exception.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Literal

import structlog
from structlog.typing import EventDict, WrappedLogger

__all__ = ["LogFormat", "configure", "where"]

LogFormat = Literal["auto", "json", "text"]


def configure(form: LogFormat = "auto", level: str = "info") -> None:
    """Sends events to standard error: as JSON lines, or as coloured text where a person reads along."""
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    last = structlog.dev.ConsoleRenderer() if text else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _without_text,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def where(error: BaseException) -> list[str]:
    """The files, lines and functions an error passed through, innermost last, without its text: that may hold data."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}" for frame in frames]


def _without_text(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:  # noqa: ARG001
    """Says of an exception only its type and where it came from."""
    if event.pop("exc_info", None):
        error = sys.exc_info()[1]
        if error is not None:
            return {**event, "error": type(error).__name__, "where": where(error)}
    return event
