"""What a device's policy asks of the moment: mains power, an unmetered network, nobody at work on it.

`Surroundings` is the interface; `LinuxSurroundings` asks the kernel, NetworkManager and logind. An app on another
system brings its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fedkit.policy import Objection, Policy

__all__ = ["LinuxSurroundings", "Surroundings", "objections_to_moment"]

_IDLE_LOAD = 0.5  # processes that want to run, for each core
_ANSWER_S = 5.0


class Surroundings(Protocol):
    """The state of the device now; None where it cannot be told."""

    def on_mains(self) -> bool | None:
        """Whether it runs on mains power."""
        ...

    def is_unmetered(self) -> bool | None:
        """Whether its network costs nothing by volume."""
        ...

    def is_unused(self) -> bool | None:
        """Whether nobody uses it."""
        ...

    def has_time(self) -> bool | None:
        """Whether it has little else to do."""
        ...


def objections_to_moment(policy: Policy, now: Surroundings, *, at_work: bool = False) -> Iterator[Objection]:
    """What a policy for devices objects to at this moment; what cannot be told is as good as a no.

    `at_work` says that this agent trains already, so that the device is busy for that reason alone.
    """
    wanted = (
        (policy.only_on_mains, now.on_mains, "power", "battery", "mains"),
        (policy.only_unmetered, now.is_unmetered, "network", "a metered one", "an unmetered one"),
        (policy.only_idle, now.is_unused, "device", "in use", "idle"),
        (policy.only_idle and not at_work, now.has_time, "load", "high", "low"),
    )
    for asked, state, rule, bad, good in wanted:
        found = state() if asked else True
        if not found:
            yield Objection(rule, "unknown" if found is None else bad, good)


class LinuxSurroundings:
    """Linux, by what it says under `power` and what its own tools answer."""

    def __init__(self, power: Path = Path("/sys/class/power_supply")) -> None:
        self._power = power

    def on_mains(self) -> bool | None:
        """By the kernel's list of power supplies: a machine with none of them hangs on the mains."""
        try:
            supplies = [(_line(path / "type"), path) for path in sorted(self._power.iterdir())]
        except OSError:
            return None
        mains = [path for kind, path in supplies if kind in ("Mains", "USB")]
        if any(_line(path / "online") == "1" for path in mains):
            return True
        batteries = [path for kind, path in supplies if kind == "Battery" and _line(path / "scope") != "Device"]
        return not batteries

    def is_unmetered(self) -> bool | None:
        """By NetworkManager: 2 and 4 of its property Metered are "no" and "probably not"."""
        owner = ("org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager")
        found = _asked("busctl", "--system", "get-property", *owner, owner[0], "Metered").split()
        return found[-1] in ("2", "4") if len(found) == 2 and found[-1] != "0" else None

    def is_unused(self) -> bool | None:
        """By logind's hint that nobody is active."""
        owner = ("org.freedesktop.login1", "/org/freedesktop/login1")
        found = _asked("busctl", "--system", "get-property", *owner, f"{owner[0]}.Manager", "IdleHint").split()
        return found[-1] == "true" if len(found) == 2 else None

    def has_time(self) -> bool | None:
        """By a load of less than half a process a core."""
        return os.getloadavg()[0] < _IDLE_LOAD * (os.cpu_count() or 1)


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _asked(*command: str) -> str:
    """What a tool of the system prints; nothing where it is not there or does not know."""
    tool = shutil.which(command[0])
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, timeout=_ANSWER_S, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
