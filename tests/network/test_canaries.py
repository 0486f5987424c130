"""No secret and no value of the data is where it does not belong: logs, command lines, environments, errors, files."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fedkit
from bench.processes import free_port
from fedkit.errors import RunFailed
from fedkit.loopback import Loopback
from fedkit.strategies import FedAvg
from fedkit.trust.authority import Authority
from fedkit.trust.certificates import Role
from fedkit.trust.signing import make_signing_key
from fedkit.trust.tokens import Token
from tests.network import tasks
from tests.network.conftest import ROOT, TASKS
from tests.network.gates import here

LOCAL = fedkit.Fit(steps=2, batch_size=8, lr=1e-9)
SITES = ("ada", "bea")
CANARIES = ("canary", "is a patient", str(tasks.CANARY))


class Kept:
    """A federation after a run that went well and two whose tasks fail with data in their errors."""

    def __init__(self, folder: Path) -> None:
        self.enrolment = f"127.0.0.1:{free_port()}"
        options = ["--enrolment", self.enrolment, "--metrics", f"127.0.0.1:{free_port()}"]
        environment = {"PYTHONPATH": str(ROOT)}
        paths = [*TASKS, "tests.network.tasks:canaries", "tests.network.tasks:canaries_in_step"]
        self.federation = Loopback(folder, paths, (), environment=environment, tls=True, server_options=options)
        self.said: list[str] = []
        self.lines: list[str] = []

    def __enter__(self) -> Kept:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.federation)
            self._begin()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _begin(self) -> None:
        self._join("ada")
        authority = Authority(self.federation.authority)
        authority.identity(Role.AGENT, "bea").save(self.federation.identity("bea"))
        authority.close()
        for name in SITES:
            make_signing_key(self.federation.identity(name))
            self.federation.start_client(name)
        here(self.federation, *SITES)
        self._run()
        self.lines += [_line(process.pid) for process in self.federation.processes.values()]

    def _join(self, name: str) -> None:
        """As people do it: a token by the authority's command line, and an enrolment that reads it from a pipe."""
        ca = str(self.federation.authority)
        self.token = Token.parse(self._typed("ca", "token", name, "--authority", ca, told=False))
        folder = str(self.federation.identity(name))
        self._typed(
            "enroll", "--coordinator", self.enrolment, "--out", folder, "--token-file", "-", given=str(self.token)
        )

    def _typed(self, *arguments: str, given: str = "", told: bool = True) -> str:
        with subprocess.Popen(
            [sys.executable, "-m", "fedkit", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            self.lines.append(_line(process.pid))
            out, errors = process.communicate(given)
        assert process.returncode == 0, errors
        self.said += [errors, *([out] if told else [])]
        return out

    def _run(self) -> None:
        with fedkit.connect(self.federation.address, self.federation.operator) as coordinator:
            result = coordinator.run(
                tasks.canaries,
                FedAvg(rounds=2, local=LOCAL),
                min_clients=2,
                progress=False,
                evaluate=fedkit.Evaluation(),
            )
            result.save(self.federation.folder / "result")
            for task in (tasks.leaky, tasks.canaries_in_step):
                with pytest.raises(RunFailed) as caught:
                    coordinator.run(task, FedAvg(rounds=1, local=LOCAL), min_clients=2, progress=False)
                self.said.append(str(caught.value))
            self.said.append(repr(coordinator.status()))

    def secrets(self) -> Iterator[tuple[str, Path | None]]:
        """Each secret, and the one file it belongs to."""
        for path in self.federation.folder.rglob("*.pem"):
            text = path.read_text()
            if "PRIVATE KEY" in text:
                yield from ((line, path) for line in text.splitlines() if line and "-----" not in line)
        yield base64.urlsafe_b64encode(self.token.secret).decode().rstrip("="), None
        yield self.token.secret.hex(), None


def _line(pid: int | None) -> str:
    """The command line and the environment of a process, as anybody with a look at /proc sees the former."""
    return "".join((Path(f"/proc/{pid}") / name).read_text(errors="replace") for name in ("cmdline", "environ"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with Kept(tmp_path_factory.mktemp("canaries")) as found:
        yield found


def test_a_secret_is_in_its_own_file_and_nowhere_else(kept: Kept) -> None:
    files = {path: path.read_bytes() for path in kept.federation.folder.rglob("*") if path.is_file()}
    found = list(kept.secrets())
    assert (
        len({path for _, path in found if path is not None}) == 1 + 2 * len(SITES) + 1
    )  # the authority, sites, operator
    for secret, own in found:
        assert [path for path, raw in files.items() if secret.encode() in raw] == ([] if own is None else [own])
        assert not any(secret in text for text in (*kept.said, *kept.lines))


def test_no_value_of_the_data_leaves_its_site_or_is_written_down(kept: Kept) -> None:
    raw = np.float32(tasks.CANARY).tobytes()
    for path in kept.federation.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert raw not in content, path
            assert not any(canary.encode() in content for canary in CANARIES), path
    for text in (*kept.said, *kept.lines):
        assert not any(canary in text for canary in CANARIES)


def test_a_failure_is_told_by_its_kind_and_place(kept: Kept) -> None:
    logs = [json.loads(line) for line in (kept.federation.folder / "logs" / "ada.log").read_text().splitlines()]
    told = [line for line in logs if line["event"] == "task failed"]
    assert {line["error"] for line in told} == {"ValueError"}
    assert all(line["where"][-1].startswith("tasks.py:") for line in told)
