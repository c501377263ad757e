"""Ranks that are processes, joined by torch.distributed: gloo on the CPU, NCCL on GPUs."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as distributed
from torch._C._distributed_c10d import FileStore
from torch.distributed.distributed_c10d import _set_pg_timeout

from textmill.kernels.rows import Rows, Unrecordable
from textmill.parallel.group import Group, RankLost

Value = TypeVar("Value")

LONGEST_MEETING = timedelta(seconds=60)


class Ranks(Group):
    """One of `size` processes; what they hold is known at once, what they exchange waits for `join`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def join(self, meeting: Path, *, seconds: float = 60.0, device: str = "cpu") -> None:
        """Waits for the other ranks at a file that only they may open; RankLost if they do not all come.

        `seconds` bound every exchange from then on: RankLost if it takes longer, or if another rank is gone.
        """
        # Ranks are processes of one machine; gloo would listen where the host's name points, and it asks for no key.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "nccl" if device == "cuda" else "gloo"  # NCCL: untested
        try:
            store = FileStore(str(meeting), self.size)
            distributed.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=LONGEST_MEETING
            )
        except RuntimeError as error:
            raise RankLost(f"rank {self.rank} does not find the others: {first_line(error)}") from error
        _set_pg_timeout(timedelta(seconds=seconds))

    def all_reduce(self, x: Value) -> Value:
        values = tensor_of(x, "sum over ranks")
        try:
            distributed.all_reduce(values)
        except RuntimeError as error:
            raise RankLost(f"rank {self.rank} hears nothing from another one: {first_line(error)}") from error
        return cast(Value, values)

    def gather(self, x: Value) -> Value:
        own = tensor_of(x, "exchange between ranks")
        parts = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else None
        try:
            distributed.gather(own, parts)
        except RuntimeError as error:
            raise RankLost(f"rank {self.rank} hears nothing from another one: {first_line(error)}") from error
        return x if parts is None else cast(Value, torch.cat(parts, dim=-1))

    def close(self) -> None:
        distributed.destroy_process_group()


def tensor_of(x: object, operation: str) -> torch.Tensor:
    if isinstance(x, Rows):
        raise Unrecordable(operation)
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"ranks exchange tensors, not {type(x).__name__}")
    return x.contiguous()


def first_line(error: Exception) -> str:
    """Without the place in the backend's source, and the stack that some add."""
    return re.sub(r"^\[[^\]]*:\d+\] ", "", str(error).strip().partition("\n")[0])
