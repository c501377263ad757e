"""Rank 1 of two for tests: computes model after model. Usage: second_rank.py SOCKET_FD MEETING, jobs on stdin.

A job is one JSON line: the checkpoint and the sizes of its executor; it ends with any message that is no order.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

import torch

from textmill.cli.child import die_with
from textmill.errors import TextmillError
from textmill.models.registry import build_model
from textmill.parallel.group import RankLost
from textmill.parallel.processes import Ranks
from textmill.runner.orders import Channel, Failure, Plan
from textmill.runner.ranks import follow
from textmill.runner.torch_executor import TorchExecutor
from textmill.weights.checkpoint import open_checkpoint
from textmill.weights.view import View

die_with(os.getppid(), "second-rank")
torch.set_num_threads(1)
group = Ranks(1, 2)
group.join(Path(sys.argv[2]))
leader = Channel(socket.socket(fileno=int(sys.argv[1])))
for line in sys.stdin:
    job = json.loads(line)
    try:
        checkpoint = open_checkpoint(job["path"], dequantize=job["dequantize"])
        executor = TorchExecutor(build_model(checkpoint.config, View(checkpoint, group=group)), *job["sizes"])
    except TextmillError as error:
        leader.send(Failure(error.message))
        continue
    leader.send(Plan(0, 0))
    try:
        follow(executor, leader)
    except RankLost as error:
        with contextlib.suppress(RankLost):
            leader.send(Failure(error.message))
        break
    leader.send(Failure("\n".join(checkpoint.unread())))
