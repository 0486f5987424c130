"""Network addresses as people write them."""

from __future__ import annotations

import ipaddress
import re

from fedkit.errors import ConfigError

__all__ = ["is_loopback", "parts"]

_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_.-]+)):([0-9]{1,5})")


def parts(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[host]:port"; raises `ConfigError`."""
    found = _ADDRESS.fullmatch(address)
    if found is None or int(found[3]) > 65535:
        raise ConfigError(f'an address is host:port, such as "127.0.0.1:8443", got {address!r:.100}')
    return found[1] or found[2], int(found[3])


def is_loopback(host: str) -> bool:
    """Whether the host is this machine's own loopback interface, which no other machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
