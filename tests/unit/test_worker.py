"""What a training process keeps from one assignment to the next."""

from __future__ import annotations

import socket

from fedkit.client.worker import Outfit, _Worker
from fedkit.protos import agents_pb2 as pb
from fedkit.testing import toy_task


def test_a_trainer_is_kept_for_its_own_run_task_seed_and_split_only() -> None:
    tasks = {name: toy_task(name=name) for name in ("one", "other")}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = _Worker(ours, Outfit("ada", tasks))
        asked = {"run": "r", "task": "one", "seed": 1, "holds_out_valid": False}
        first = worker._trainer(pb.Assignment(**asked))
        assert worker._trainer(pb.Assignment(**asked)) is first
        for change in ({"run": "s"}, {"task": "other"}, {"seed": 2}, {"holds_out_valid": True}):
            found = worker._trainer(pb.Assignment(**(asked | change)))
            assert found is not first
            assert found.task is tasks[str((asked | change)["task"])]
