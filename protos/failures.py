"""Between the library's errors and gRPC's codes: what a servicer raises is what its caller gets."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from fedkit import errors
from fedkit.errors import FedkitError
from fedkit.protos.wire import shown

__all__ = ["ERROR_KEY", "answering", "code_of", "error_from", "error_text", "meant"]

ERROR_KEY = "fedkit-error"  # trailing metadata: the error's class, where a code stands for several
_TEXT_BYTES = 2000  # of an error, in UTF-8: trailing metadata beyond 8 KiB loses the whole answer

_CODES: tuple[tuple[type[FedkitError], grpc.StatusCode], ...] = (  # the first that fits
    (errors.NameTaken, grpc.StatusCode.ALREADY_EXISTS),
    (errors.NoSuchRun, grpc.StatusCode.NOT_FOUND),
    (errors.ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.TaskError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.IncompatibleStrategy, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.PayloadError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ManifestMismatch, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.TrustError, grpc.StatusCode.PERMISSION_DENIED),
    (FedkitError, grpc.StatusCode.FAILED_PRECONDITION),
)
_SPOKEN: dict[str, type[FedkitError]] = {
    kind.__name__: kind
    for kind in (
        errors.DataError,
        errors.IncompatibleStrategy,
        errors.ManifestMismatch,
        errors.MetricNotSummable,
        errors.PayloadError,
        errors.RunCancelled,
        errors.RunFailed,
        errors.StateError,
        errors.StorageError,
        errors.TaskError,
    )
}
_PLAIN: dict[grpc.StatusCode, type[FedkitError]] = {
    grpc.StatusCode.ALREADY_EXISTS: errors.NameTaken,
    grpc.StatusCode.NOT_FOUND: errors.NoSuchRun,
    grpc.StatusCode.INVALID_ARGUMENT: errors.ConfigError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.RunError,
    grpc.StatusCode.PERMISSION_DENIED: errors.TrustError,
    grpc.StatusCode.UNAUTHENTICATED: errors.TrustError,
}


@contextlib.asynccontextmanager
async def answering(context: Any) -> AsyncIterator[None]:
    """Around a servicer's method: errors of ours become the gRPC codes that stand for them."""
    try:
        yield
    except TimeoutError:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "what was announced did not arrive in time")
    except FedkitError as error:
        named = ((ERROR_KEY, type(error).__name__),)
        await context.abort(code_of(error), error_text(error), trailing_metadata=named)


def code_of(error: FedkitError) -> grpc.StatusCode:
    """The gRPC code that stands for an error of this kind."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


def error_text(error: FedkitError) -> str:
    """What an error says, short enough for a gRPC status."""
    raw = str(error).encode()
    return str(error) if len(raw) <= _TEXT_BYTES else raw[:_TEXT_BYTES].decode(errors="ignore") + " ..."


def error_from(code: grpc.StatusCode, text: str, name: str = "") -> FedkitError | None:
    """The error that was raised at the other side; None for a code that no error of ours has."""
    lines = "\n".join(shown(line) for line in text.splitlines())
    return _SPOKEN.get(name, _PLAIN[code])(lines) if code in _PLAIN else None


def meant(error: grpc.RpcError, address: str) -> FedkitError:
    """What a failed call to `address` stands for, on any channel; one without status was broken off."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return errors.RemoteError(f"the call to {address} broke off")
    metadata = error.trailing_metadata() or ()
    name = next((str(found.value) for found in metadata if found.key == ERROR_KEY), "")
    found = error_from(error.code(), error.details() or "", name)
    if found is not None:
        return found
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return errors.Unreachable(f"{address} does not answer")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return errors.RemoteError(
            f"what answers at {address} is not a coordinator of fedkit, or one of another version"
        )
    text = shown(error.details() or "")
    return errors.RemoteError(f"the coordinator at {address} answered {error.code().name}: {text:.300}")
