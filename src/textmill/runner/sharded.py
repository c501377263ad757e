"""A model on several ranks, from settings to running: each reads its part, all agree on a cache that fits in all."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from textmill.config import Settings
from textmill.core import EngineInfo
from textmill.errors import ConfigError, ModelError
from textmill.layers.causal_lm import CausalLM
from textmill.models.registry import build_model
from textmill.parallel.processes import Ranks
from textmill.runner import build
from textmill.runner.build import BLOCK_SIZE, Report, Shape
from textmill.runner.hub_model import needs_hub_model
from textmill.runner.memory import CachePlan, free_memory, slots_that_fit
from textmill.runner.orders import Channel, Failure, Plan
from textmill.runner.ranks import LeadingExecutor, follow
from textmill.runner.runner import LocalRunner
from textmill.runner.torch_executor import TorchExecutor, bytes_per_block
from textmill.runner.warmup import warm_up
from textmill.weights.checkpoint import Checkpoint, open_checkpoint
from textmill.weights.config import ModelConfig
from textmill.weights.source import ModelSource
from textmill.weights.view import View

# How long an exchange may take, as a part of the time after which the launcher kills a hung engine: the group is the
# first to notice, and can say which rank it is. A rank that is gone is noticed at once.
PART_OF_HANG = 0.8
LONGEST_EXCHANGE = 600.0  # where the launcher never kills


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds, and what it has room for (`cache` counts the bytes of all ranks)."""

    checkpoint: Checkpoint
    config: ModelConfig
    model: CausalLM
    group: Ranks
    shape: Shape
    cache: CachePlan


def build_leader(
    settings: Settings, source: ModelSource, report: Report, peers: Sequence[Channel], meeting: Path
) -> tuple[LocalRunner, EngineInfo]:
    """Rank 0 of `len(peers)` + 1, warm. Raises ConfigError, ModelError, RankLost."""
    started = time.perf_counter()
    size = len(peers) + 1
    report("load", f"reading {source.model_id} on {size} ranks (torch kernels)")
    part = read_part(settings, source, 0, size)
    cache, shape = agreed(part, peers)
    part.group.join(meeting, seconds=longest_exchange(settings))
    executor = LeadingExecutor(part.model, shape.max_slots, shape.max_total_tokens, BLOCK_SIZE, cache.num_blocks, peers)
    executor.weight_bytes = build.float_bytes(part.checkpoint)
    report("load", "all ranks are there", seconds=time.perf_counter() - started)
    limits = build.limits_of(settings, part.config, shape, cache, part.model.memory)
    report("memory", "memory plan of all ranks", table=build.memory_table(executor, cache, limits))
    seconds = warm_up(executor, limits)
    build.check_all_read(part.checkpoint)
    report("warmup", "first step done", seconds=seconds)
    info = build.engine_info(settings, source, part.config, limits, executor.dtype)
    return LocalRunner(executor, limits), info


def serve_part(settings: Settings, source: ModelSource, leader: Channel, rank: int, size: int, meeting: Path) -> None:
    """Another rank's life: reads its part, then computes what the leader orders. RankLost when a rank is gone."""
    part = read_part(settings, source, rank, size)
    leader.send(Plan(part.shape.max_slots, part.cache.num_blocks))
    plan = leader.receive()
    if not isinstance(plan, Plan):
        raise ModelError("the leading rank sent something other than its plan")
    part.group.join(meeting, seconds=longest_exchange(settings))
    follow(TorchExecutor(part.model, plan.slots, part.shape.max_total_tokens, BLOCK_SIZE, plan.blocks), leader)


def read_part(settings: Settings, source: ModelSource, rank: int, size: int) -> Part:
    """The model with a rank's part of the weights bound by name, and how much cache there is memory for."""
    if settings.kernels == "native":
        raise ConfigError("--kernels native: the native kernels do not exchange between ranks; --num-shard uses torch")
    if source.kind != "gguf" and needs_hub_model(source.path):
        raise ConfigError(f"{source.path}: textmill has no file for this model_type; transformers runs it on one rank")
    torch.set_num_threads(max(1, (settings.cpu_threads or len(os.sched_getaffinity(0))) // size))
    checkpoint = open_checkpoint(source.path, dequantize=True)
    config = checkpoint.config.stretched(settings.rope_scaling, settings.rope_factor)
    shape = build.shape_of(settings, config)
    config = replace(config, max_total_tokens=shape.max_total_tokens)
    group = Ranks(rank, size)
    model = build_model(config, View(checkpoint, group=group))
    build.check_rope(settings, model)
    # The ranks share this machine's memory: each counts what all of them will take.
    weights, each = build.float_bytes(checkpoint), size * model.memory.bytes_per_slot(shape.max_total_tokens)
    if each:
        shape = replace(shape, max_slots=slots_that_fit(shape.max_slots, each, free_memory() - weights))
    taken = weights + shape.max_slots * each
    cache = build.sized(settings, shape, size * bytes_per_block(model, BLOCK_SIZE), taken)
    return Part(checkpoint, config, model, group, shape, cache)


def longest_exchange(settings: Settings) -> float:
    return PART_OF_HANG * settings.engine_hang_timeout or LONGEST_EXCHANGE


def agreed(part: Part, peers: Sequence[Channel]) -> tuple[CachePlan, Shape]:
    """The smallest of all plans, which every rank then follows; ModelError with a rank's reason if it has none."""
    slots, blocks = part.shape.max_slots, part.cache.num_blocks
    for rank, peer in enumerate(peers, 1):
        plan = peer.receive()
        if isinstance(plan, Failure):
            raise ModelError(f"rank {rank}: {plan.reason}")
        if isinstance(plan, Plan):
            slots, blocks = min(slots, plan.slots), min(blocks, plan.blocks)
    for peer in peers:
        peer.send(Plan(slots, blocks))
    return replace(part.cache, num_blocks=blocks), replace(part.shape, max_slots=slots)
