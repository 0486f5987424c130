"""Channels to a coordinator: mutual TLS 1.3 with an identity, plaintext on the loopback interface without."""

from __future__ import annotations

from typing import Any

import grpc

from fedkit.address import is_loopback, parts
from fedkit.errors import ConfigError
from fedkit.trust.identity import Identity

__all__ = ["aio_channel", "channel", "require_reachable"]


def require_reachable(address: str, identity: Identity | None) -> None:
    """Raises `ConfigError` for an address that is none, or that may not be dialled without an identity."""
    host, port = parts(address)
    if port == 0:
        raise ConfigError(f"{address}: host:port with a port of 1 and more is needed; nobody listens on port 0")
    if identity is None and not is_loopback(host):
        raise ConfigError(
            f"{address}: off loopback an identity is needed, because without TLS anybody on the network could read "
            "models and updates and pose as somebody else: give --identity FOLDER, which fedkit enroll makes"
        )


def channel(address: str, identity: Identity | None, options: list[tuple[str, Any]]) -> grpc.Channel:
    """A channel for threads."""
    require_reachable(address, identity)
    if identity is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, _credentials(identity), options=options)


def aio_channel(address: str, identity: Identity | None, options: list[tuple[str, Any]]) -> grpc.aio.Channel:
    """A channel for the running event loop."""
    require_reachable(address, identity)
    if identity is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, _credentials(identity), options=options)


def _credentials(identity: Identity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate)
