"""Warm workers: a process that has loaded what they need and only forks, so that a killed one is replaced at once.

It is forked itself before the agent starts a thread or a gRPC channel; neither survives a fork.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import socket
import threading
from typing import NoReturn

import torch

from fedkit.client.worker import Outfit, work
from fedkit.errors import RunError

__all__ = ["Nursery"]

_IDLE_S = 3.0  # without a request, after which there is time to load what a training may need


class Nursery:
    """Forks workers on request. Make it before anything else runs."""

    def __init__(self, outfit: Outfit) -> None:
        self._lock = threading.Lock()
        self._sock, child = socket.socketpair()
        if os.fork() == 0:
            self._sock.close()
            _serve(child, outfit)
        child.close()

    def fork(self) -> tuple[socket.socket, int]:
        """A new worker's socket and process id; raises `RunError` where there can be none."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._lock:
                socket.send_fds(self._sock, [b"+"], [theirs.fileno()])
                pid = int.from_bytes(self._sock.recv(8), "little")
        except OSError:
            pid = 0
        if pid == 0:
            ours.close()
            raise RunError("no training process can be started: restart the agent, and see that it has enough memory")
        return ours, pid

    def close(self) -> None:
        """Ends the process that forks; workers end with their sockets."""
        self._sock.close()


def _serve(sock: socket.socket, outfit: Outfit) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent hears it and closes the sockets
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended workers leave nothing behind
    is_warm = False
    while True:
        if not is_warm and not select.select([sock], [], [], _IDLE_S)[0]:
            _warm(outfit)
            is_warm = True
        said, handles, _, _ = socket.recv_fds(sock, 1, 1)
        if not said:
            os._exit(0)
        pid = _forked()
        if pid == 0:
            sock.close()
            _work(socket.socket(fileno=handles[0]), outfit)
        os.close(handles[0])
        sock.sendall(max(pid, 0).to_bytes(8, "little"))


def _warm(outfit: Outfit) -> None:
    """Loads what the first training and the first metric would load: two seconds that no worker spends again.

    Done once nobody has asked for a while: when all processes start at once, they have better things to do.
    """
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for task in outfit.tasks.values():
        if task.metrics:
            importlib.import_module("torchmetrics")


def _forked() -> int:
    """As `os.fork`; -1 where there is not enough memory for one more process."""
    try:
        return os.fork()
    except OSError:
        return -1


def _work(sock: socket.socket, outfit: Outfit) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        work(sock, outfit)
    finally:
        os._exit(1)
