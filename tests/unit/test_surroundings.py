"""What a device's policy asks of the moment, as Linux tells it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedkit.client import permits as permits_module
from fedkit.client import surroundings
from fedkit.client.permits import Permits
from fedkit.client.roster import KnownRoster
from fedkit.client.surroundings import LinuxSurroundings, objections_to_moment
from fedkit.client.visits import Visits
from fedkit.errors import Refused
from fedkit.policy import Policy
from fedkit.privacy.ledger import Ledger

EVERYTHING = Policy(only_on_mains=True, only_unmetered=True, only_idle=True)


class Told:
    """A device of which everything is known, or nothing."""

    def __init__(self, state: bool | None) -> None:
        self._state = state

    def on_mains(self) -> bool | None:
        return self._state

    def is_unmetered(self) -> bool | None:
        return self._state

    def is_unused(self) -> bool | None:
        return self._state

    def has_time(self) -> bool | None:
        return self._state


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (True, []),
        (
            False,
            [
                "power: battery (allowed: mains)",
                "network: a metered one (allowed: an unmetered one)",
                "device: in use (allowed: idle)",
                "load: high (allowed: low)",
            ],
        ),
        (
            None,
            [
                "power: unknown (allowed: mains)",
                "network: unknown (allowed: an unmetered one)",
                "device: unknown (allowed: idle)",
                "load: unknown (allowed: low)",
            ],
        ),
    ],
)
def test_each_condition_is_held_and_the_unknown_is_a_no(state: bool | None, expected: list[str]) -> None:
    assert [str(one) for one in objections_to_moment(EVERYTHING, Told(state))] == expected


def test_a_policy_without_conditions_asks_nothing() -> None:
    class Silent(Told):
        def on_mains(self) -> bool | None:
            raise AssertionError("nobody asked")

        is_unmetered = is_unused = has_time = on_mains

    assert list(objections_to_moment(Policy(), Silent(None))) == []


def supply(folder: Path, name: str, **files: str) -> None:
    (folder / name).mkdir(parents=True)
    for file, text in files.items():
        (folder / name / file).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({}, True),
        ({"AC": {"type": "Mains", "online": "1"}, "BAT0": {"type": "Battery"}}, True),
        ({"AC": {"type": "Mains", "online": "0"}, "BAT0": {"type": "Battery"}}, False),
        ({"usb": {"type": "USB", "online": "1"}, "battery": {"type": "Battery"}}, True),
        ({"BAT0": {"type": "Battery"}}, False),
        ({"mouse": {"type": "Battery", "scope": "Device"}}, True),
    ],
)
def test_power_is_what_the_kernel_says(tmp_path: Path, supplies: dict[str, dict[str, str]], expected: bool) -> None:
    for name, files in supplies.items():
        supply(tmp_path, name, **files)
    assert LinuxSurroundings(tmp_path).on_mains() is expected


def test_a_kernel_without_a_list_of_supplies_cannot_tell(tmp_path: Path) -> None:
    assert LinuxSurroundings(tmp_path / "nothing").on_mains() is None


def answering(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, code: int = 0) -> None:
    """A tool of the system that answers `text`."""
    tool = folder / "busctl"
    tool.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("answer", "code", "expected"),
    [
        *(("u 1", 0, False), ("u 2", 0, True), ("u 3", 0, False), ("u 4", 0, True)),
        *(("u 0", 0, None), ("no", 0, None), ("u 2", 1, None)),
    ],
)
def test_the_network_is_what_its_manager_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, expected: bool | None
) -> None:
    answering(tmp_path, monkeypatch, answer, code)
    assert LinuxSurroundings().is_unmetered() is expected


@pytest.mark.parametrize(("answer", "expected"), [("b true", True), ("b false", False), ("", None)])
def test_unused_is_what_the_login_manager_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, expected: bool | None
) -> None:
    answering(tmp_path, monkeypatch, answer)
    assert LinuxSurroundings().is_unused() is expected


@pytest.mark.parametrize(("load", "expected"), [(0.0, True), (1e6, False)])
def test_a_device_has_time_while_its_load_is_low(monkeypatch: pytest.MonkeyPatch, load: float, expected: bool) -> None:
    monkeypatch.setattr(surroundings.os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert LinuxSurroundings().has_time() is expected


def test_the_load_of_its_own_training_does_not_stop_an_agent() -> None:
    class Busy(Told):
        def has_time(self) -> bool | None:
            return False

    assert [str(one) for one in objections_to_moment(EVERYTHING, Busy(True))] == ["load: high (allowed: low)"]
    assert list(objections_to_moment(EVERYTHING, Busy(True), at_work=True)) == []


def test_a_system_without_these_tools_cannot_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert LinuxSurroundings().is_unmetered() is None
    assert LinuxSurroundings().is_unused() is None


# -- while work goes on ------------------------------------------------------------------------------------------------


@pytest.fixture
def permits(tmp_path: Path) -> Iterator[Callable[..., Permits]]:
    roster, visits = KnownRoster(tmp_path / "roster.json", None), Visits(tmp_path / "visits.db")
    ledger = Ledger(tmp_path / "ledger.db")
    yield lambda device, policy=EVERYTHING: Permits(policy, {}, roster, visits, device, ledger)
    ledger.close()


def test_work_ends_when_the_moment_does(permits: Callable[..., Permits], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permits_module, "_LOOK_S", 0.01)
    device, called_off = Told(True), []

    async def work() -> None:
        device._state = False
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            called_off.append(True)
            raise

    with pytest.raises(Refused, match=r"power: battery \(allowed: mains\)"):
        asyncio.run(permits(device).during(work()))
    assert called_off == [True]


@pytest.mark.parametrize("policy", [EVERYTHING, Policy()])
def test_work_that_may_go_on_ends_with_its_result(permits: Callable[..., Permits], policy: Policy) -> None:
    async def work() -> str:
        return "done"

    assert asyncio.run(permits(Told(True), policy).during(work())) == "done"
