"""What a process that moves models sets up before anything else: its memory allocator and its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import Callable

__all__ = ["fast_loop", "on_stop", "open_many_files", "tune_malloc"]

# The numbers of glibc's malloc.h. Chunks of a model then come from memory that is already there: with the defaults each
# one of 128 KiB and more is mapped, touched for the first time, and unmapped.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_SETTINGS = {_MMAP_THRESHOLD: 4 << 20, _TRIM_THRESHOLD: 256 << 20, _ARENA_MAX: 2}
_GREEDY = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 1 << 30}


def tune_malloc(*, greedy: bool = False) -> bool:
    """Keeps freed memory of up to 4 MiB a piece for reuse; True where that was possible, which is with glibc.

    With `greedy`, up to 1 GiB of any pieces: for a process that makes arrays of one model's size again and again.
    Call it before the process starts threads.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(setting, value) for setting, value in (_GREEDY if greedy else _SETTINGS).items())


def open_many_files() -> int:
    """As many files and connections as this process may ever have, where it may have only some at first; how many."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems say "unlimited" and mean less
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes event loops, for `asyncio.Runner(loop_factory=...)`: uvloop's where it is installed."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


def on_stop(stop: Callable[[], None], *, tethered: bool = False) -> None:
    """Calls `stop` at SIGINT and SIGTERM, and with `tethered` when standard input ends: whoever started us is gone."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)

    def read() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            stop()

    if tethered:
        loop.add_reader(0, read)
