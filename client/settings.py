"""What the operator of an agent sets, in a TOML file or on the command line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fedkit import policy
from fedkit.address import is_loopback, parts
from fedkit.config import Name, PositiveInt, Settings, parse
from fedkit.errors import ConfigError
from fedkit.policy import Policy
from fedkit.trust.certificates import Role
from fedkit.trust.identity import Identity

__all__ = ["AgentSettings", "policy_of", "read"]


class AgentSettings(Settings):
    """One agent: its name, its coordinator, what it may work on, and what it may use.

    `tasks` are registered names, or `module:attr` that this process imports. `max_examples` is the most training rows
    its results may claim. `parallel` assignments are worked on at a time, each by a process of its own with `threads`
    torch threads (None: as many as torch takes). `state` is the folder that survives restarts. `identity` is the folder
    that `fedkit enroll` wrote: off loopback it is needed, and the name is that of its certificate. `roster` is the file
    the members have signed; with one, work under another roster is refused. `policy` is the file of what this site
    allows: without one, the safe defaults of `fedkit.policy.Policy` hold, and on loopback everything goes.
    """

    name: Name
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    coordinator: str = "127.0.0.1:8443"
    state: Path = Path("fedkit-client")
    identity: Path | None = None
    roster: Path | None = None
    policy: Path | None = None
    max_examples: PositiveInt = 1_000_000
    parallel: Annotated[int, Field(ge=1, le=64)] = 1
    threads: PositiveInt | None = None
    device: str = "auto"


def policy_of(settings: AgentSettings) -> Policy:
    """What the site allows; raises `ConfigError` for a policy that cannot be held."""
    if settings.policy is None:
        return Policy.unrestricted() if is_loopback(parts(settings.coordinator)[0]) else Policy()
    found = policy.read(settings.policy)
    if found.min_cohort > 1 and (settings.roster is None or settings.identity is None):
        raise ConfigError(
            f"{settings.policy.name}: min_cohort {found.min_cohort} counts members of the roster: give --roster and "
            "--identity, or leave it at 1"
        )
    return found


def read(path: Path | None, **given: Any) -> AgentSettings:
    """The file's settings, with what was `given` on the command line instead; raises `ConfigError`."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: there is no such file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None
    values |= {name: value for name, value in given.items() if value is not None}
    if values.get("identity") is not None:
        certified = Identity.load(Path(values["identity"])).require(Role.AGENT).holder.name
        if values.setdefault("name", certified) != certified:
            raise ConfigError(f"client.name: the identity is that of {certified}; leave the name out")
    return parse(AgentSettings, values, where="client")
