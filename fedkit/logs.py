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

from fedkit.audit import AuditLog
from fedkit.errors import StorageError

__all__ = ["LogFormat", "configure", "keep", "where"]

# What the audit log keeps. Nothing that a stranger can cause without a certificate: it would fill the disk.
_AUDITED = frozenset(
    {
        *("listening", "submitted", "cancelled", "run taken up", "run over", "refused"),
        *("round committed", "round rejected"),
        *("client here", "client gone", "call ended", "turned away", "enrolled", "renewed", "revoked"),
        *("connected", "assignment failed", "privacy reserved", "sum opened", "stored", "settled", "result refused"),
        *("roster changed", "roster refused", "certificate renewed", "certificate not renewed"),
    }
)

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
    if not any(isinstance(handler, _Libraries) for handler in logging.getLogger().handlers):
        logging.getLogger().addHandler(_Libraries(logging.WARNING))


class _Libraries(logging.Handler):
    """What libraries log, as events: without arguments and tracebacks, which may hold data.

    Nor could a coordinator survive to format some tracebacks of gRPC's: CPython 3.11 was seen to end at that.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """One event for one record."""
        error = record.exc_info[1] if record.exc_info else None
        about = {} if error is None else {"error": type(error).__name__}
        structlog.get_logger(record.name).warning("library", library=record.name, said=str(record.msg)[:200], **about)


def keep(audit: AuditLog) -> None:
    """From now on, this process writes the events that count into an audit log too."""

    def noted(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:  # noqa: ARG001
        if event.get("event") in _AUDITED:
            try:
                audit.write({name: value for name, value in event.items() if name not in ("level", "timestamp")})
            except StorageError as error:
                return {**event, "level": "error", "missing_in_audit_log": str(error)}
        return event

    processors = structlog.get_config()["processors"]
    structlog.configure(processors=[*processors[:-1], noted, processors[-1]])


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
