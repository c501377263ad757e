"""From settings to a running model: open the checkpoint, build, size the cache, warm up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from textmill import __version__
from textmill.config import Settings
from textmill.core import EngineInfo, RunnerLimits
from textmill.errors import ConfigError
from textmill.kernels.dispatch import native_available
from textmill.kernels.limits import machine_limits
from textmill.kernels.rows import Unrecordable
from textmill.layers.causal_lm import CausalLM
from textmill.layers.memory import Memory
from textmill.models.registry import build_model
from textmill.runner.hub_model import load_hub_model, needs_hub_model
from textmill.runner.memory import MIB, CachePlan, free_memory, plan_cache, slots_that_fit
from textmill.runner.profile import Profiler
from textmill.runner.runner import Executor, LocalRunner
from textmill.runner.warmup import warm_up
from textmill.weights.checkpoint import Checkpoint, open_checkpoint
from textmill.weights.config import ModelConfig
from textmill.weights.source import ModelSource
from textmill.weights.view import View

if TYPE_CHECKING:
    from textmill.runner.native_runner import NativeRunner

BLOCK_SIZE = 16
# Rows of one step on the CPU: enough to reuse every weight while it is in cache, few enough to keep steps short.
CPU_STEP_ROWS = 512
DEFAULT_PREFILL_TOKENS = 4096

Report = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that executors are built for."""

    max_rows: int
    max_slots: int
    max_total_tokens: int
    max_top_n: int
    threads: int


def build_runner(
    settings: Settings, source: ModelSource, report: Report
) -> tuple[LocalRunner | NativeRunner, EngineInfo]:
    """A warm runner for `source` and what routers need to know of it.

    `report(phase, message, **fields)` tells progress. Raises ConfigError or ModelError, whose text the user reads.
    """
    if source.kind != "gguf" and needs_hub_model(source.path):
        return build_hub_runner(settings, source, report)
    started = time.perf_counter()
    native = uses_native(settings)
    checkpoint = open_checkpoint(source.path, dequantize=settings.dtype == "float32" or not native)
    c = checkpoint.config.stretched(settings.rope_scaling, settings.rope_factor)
    shape = shape_of(settings, c)
    c = replace(c, max_total_tokens=shape.max_total_tokens)
    report("load", f"reading {source.model_id} ({c.model_type}, {'native' if native else 'torch'} kernels)")
    missing = ""
    try:
        model = build_model(c, View(checkpoint))
        check_rope(settings, model)
        shape = with_room(shape, model, float_bytes(checkpoint))
        executor, plan = build_executor(
            settings, model, c, shape, packed=checkpoint.packed, native=native, unread_bytes=float_bytes(checkpoint)
        )
    except Unrecordable as error:
        missing = error.operation
    if missing:  # beyond the handler, which would keep what was read so far
        report_fallback(settings, missing, checkpoint, report)
        checkpoint = open_checkpoint(source.path, dequantize=True)
        model = build_model(c, View(checkpoint))
        shape = with_room(shape, model, float_bytes(checkpoint))
        executor, plan = build_executor(
            settings, model, c, shape, packed=False, native=False, unread_bytes=float_bytes(checkpoint)
        )
    report("load", "weights are in place", seconds=time.perf_counter() - started)
    limits = limits_of(settings, c, shape, plan, model.memory)
    report("memory", "memory plan", table=memory_table(executor, plan, limits))
    seconds = warm_up(executor, limits)
    check_all_read(checkpoint)
    report("warmup", "first step done", seconds=seconds)
    return runner_of(settings, executor, limits), engine_info(settings, source, c, limits, executor.dtype)


def runner_of(settings: Settings, executor: Executor, limits: RunnerLimits) -> LocalRunner | NativeRunner:
    """What runs the executor's steps: natively back to back, unless there is more to do than the native call."""
    if settings.profile:
        return LocalRunner(executor, limits, profiler_of(executor))
    from textmill.runner.native_executor import NativeExecutor

    if isinstance(executor, NativeExecutor) and not executor.sees:
        from textmill.runner.native_runner import NativeRunner

        return NativeRunner(executor, limits)
    return LocalRunner(executor, limits)


def build_hub_runner(settings: Settings, source: ModelSource, report: Report) -> tuple[LocalRunner, EngineInfo]:
    """A model that textmill has no file for, run by transformers: a state per slot, nothing paged, shared or cut."""
    from textmill.runner.fallback import HubExecutor, bytes_per_token

    if settings.kernels == "native" or (settings.num_shard or 1) > 1:
        raise ConfigError(f"{source.path}: textmill has no file for this model_type; transformers runs it on one rank")
    if settings.rope_scaling or settings.rope_factor:
        raise ConfigError(f"--rope-scaling, --rope-factor: {source.path} has a model_type that transformers runs")
    started = time.perf_counter()
    report("load", f"reading {source.model_id}: textmill has no file for it, so transformers runs it")
    model, c = load_hub_model(source.path, trust_remote_code=settings.trust_remote_code, threads=settings.cpu_threads)
    shape = shape_of(settings, c)
    executor = HubExecutor(model, shape.max_slots, shape.max_total_tokens, BLOCK_SIZE)
    plan = sized(settings, shape, BLOCK_SIZE * bytes_per_token(c))
    report("load", "weights are in place; a state per sequence, nothing paged", seconds=time.perf_counter() - started)
    limits = replace(limits_of(settings, c, shape, plan, Memory()), forward_only=True)
    report("memory", "memory plan", table=memory_table(executor, plan, limits))
    report("warmup", "first step done", seconds=warm_up(executor, limits))
    return LocalRunner(executor, limits), engine_info(settings, source, c, limits, executor.dtype)


def report_fallback(settings: Settings, missing: str, checkpoint: Checkpoint, report: Report) -> None:
    """Says why a model is served with torch, or refuses it (ConfigError) where only the native kernels will do."""
    if settings.kernels == "native":
        raise ConfigError(f"--kernels native: the native kernels have no {missing}, which this model uses")
    weights = "; packed weights become float32" if checkpoint.packed else ""
    report("load", f"the native kernels have no {missing}: this model runs with the torch kernels{weights}")


def uses_native(settings: Settings) -> bool:
    if settings.kernels == "torch" or settings.disable_custom_kernels:
        return False
    if settings.kernels == "native" and not native_available():
        raise ConfigError(
            "--kernels native: the native module is not installed; reinstall textmill with a C++ compiler"
        )
    return native_available()


def shape_of(settings: Settings, c: ModelConfig) -> Shape:
    total = settings.max_total_tokens or c.max_position_embeddings
    if total > c.context:
        raise ConfigError(f"`max_total_tokens`({total}) must be <= the model's context of {c.context} tokens")
    slots = min(settings.max_batch_size or settings.max_concurrent_requests, 1024)
    return Shape(max(CPU_STEP_ROWS, slots), slots, total, settings.max_top_n_tokens, settings.cpu_threads)


def with_room(shape: Shape, model: CausalLM, unread_bytes: int) -> Shape:
    """As many slots as there is memory for what a slot holds beside its blocks, which is mostly nothing."""
    each = model.memory.bytes_per_slot(shape.max_total_tokens)
    if not each:
        return shape
    return replace(shape, max_slots=slots_that_fit(shape.max_slots, each, free_memory() - unread_bytes))


def build_executor(
    settings: Settings,
    model: CausalLM,
    c: ModelConfig,
    shape: Shape,
    *,
    packed: bool,
    native: bool,
    unread_bytes: int = 0,
) -> tuple[Executor, CachePlan]:
    """The executor with its cache allocated; the cache is sized after the weights are in memory.

    Float models are exact: their cache is float32. Packed ones keep 16-bit keys and values. Torch reads the weights at
    the first step, so room is left for their `unread_bytes`.
    """
    held = shape.max_slots * model.memory.bytes_per_slot(shape.max_total_tokens)
    if native:
        from textmill.kernels.native import Program
        from textmill.runner.native_executor import NativeExecutor

        program = Program(
            max_rows=shape.max_rows,
            max_slots=shape.max_slots,
            max_total_tokens=shape.max_total_tokens,
            block_size=BLOCK_SIZE,
            vocab_size=c.vocab_size,
            max_top_n=shape.max_top_n,
            kv_dtype="float16" if packed else "float32",
            threads=shape.threads,
        )
        executor = NativeExecutor(model, program, dtype="packed" if packed else "float32")
        plan = sized(settings, shape, program.kv_bytes_per_block, held)
        program.allocate(plan.num_blocks)
        return executor, plan
    from textmill.runner.torch_executor import TorchExecutor, bytes_per_block

    plan = sized(settings, shape, bytes_per_block(model, BLOCK_SIZE), unread_bytes + held)
    eager = TorchExecutor(model, shape.max_slots, shape.max_total_tokens, BLOCK_SIZE, plan.num_blocks)
    eager.weight_bytes = unread_bytes
    return eager, plan


def float_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors as float32."""
    return 4 * sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())


def profiler_of(executor: Executor) -> Profiler | None:
    """What times the kernels of steps from now on; None where there are no native ones."""
    program = getattr(executor, "program", None)
    return None if program is None else Profiler(program, machine_limits(), packed=executor.dtype == "packed")


def sized(settings: Settings, shape: Shape, bytes_per_block: int, unread_bytes: int = 0) -> CachePlan:
    free = free_memory() - unread_bytes
    if free <= 0:
        raise ConfigError(
            f"Not enough memory: the weights take {unread_bytes / MIB:,.0f} MiB as float32, "
            f"{(free + unread_bytes) / MIB:,.0f} MiB are free"
        )
    if not bytes_per_block:  # no layer keeps keys: blocks are numbers only, as many as could ever be wanted
        tokens = settings.max_batch_total_tokens or shape.max_slots * shape.max_total_tokens
        return CachePlan(-(-tokens // BLOCK_SIZE), BLOCK_SIZE, 0, free)
    return plan_cache(
        block_size=BLOCK_SIZE,
        bytes_per_block=bytes_per_block,
        max_total_tokens=shape.max_total_tokens,
        requested_bytes=settings.kv_cache_memory * MIB if settings.kv_cache_memory else None,
        requested_tokens=settings.max_batch_total_tokens,
        free_bytes=free,
    )


def check_rope(settings: Settings, model: CausalLM) -> None:
    """Positions that are not rotary cannot be stretched."""
    rotary = any(spec.rope_cos is not None for spec in model.memory.attention)
    if not rotary and (settings.rope_scaling or settings.rope_factor):
        raise ConfigError("--rope-scaling, --rope-factor: this model's positions are not rotary")


def check_all_read(checkpoint: Checkpoint) -> None:
    """A tensor nobody asked for means that the model is not the one the checkpoint holds."""
    unread = checkpoint.unread()
    if unread:
        shown = ", ".join(sorted(unread)[:5])
        raise ConfigError(f"{len(unread)} tensors of the checkpoint are not used by this architecture: {shown} …")


def limits_of(settings: Settings, c: ModelConfig, shape: Shape, plan: CachePlan, memory: Memory) -> RunnerLimits:
    limits = RunnerLimits(
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        max_slots=shape.max_slots,
        max_step_tokens=shape.max_rows,
        max_total_tokens=shape.max_total_tokens,
        vocab_size=c.vocab_size,
    )
    limits = memory.limited(limits)
    if settings.max_total_tokens and settings.max_total_tokens > limits.max_total_tokens:
        raise ConfigError(f"Not enough memory to handle `max_total_tokens={settings.max_total_tokens}`")
    return limits


def memory_table(executor: Executor, plan: CachePlan, limits: RunnerLimits) -> list[tuple[str, str]]:
    """Rows (what, how much) for the launcher to print."""
    return [
        ("weights", f"{executor.weight_bytes / MIB:,.0f} MiB"),
        ("step buffers", f"{executor.buffer_bytes / MIB:,.0f} MiB"),
        ("free before the KV cache", f"{plan.free_bytes / MIB:,.0f} MiB"),
        ("KV cache", f"{plan.total_bytes / MIB:,.0f} MiB ({plan.num_blocks:,} blocks of {plan.block_size} tokens)"),
        ("tokens that fit", f"{plan.tokens:,}"),
        ("longest request", f"{limits.max_total_tokens:,} tokens"),
    ]


def engine_info(
    settings: Settings, source: ModelSource, c: ModelConfig, limits: RunnerLimits, dtype: str
) -> EngineInfo:
    longest = settings.max_input_tokens or settings.max_input_length or limits.max_total_tokens - 1
    if longest >= limits.max_total_tokens:
        raise ConfigError(f"`max_input_tokens`({longest}) must be < `max_total_tokens`({limits.max_total_tokens})")
    fields: dict[str, Any] = {
        "model_id": source.model_id,
        "model_path": str(source.path),
        "model_type": c.model_type,
        "revision": source.revision or "",
        "dtype": dtype,
        "device": "cpu",
        "quantize": "gguf" if dtype == "packed" else "",
        "vocab_size": limits.vocab_size,
        "max_input_tokens": longest,
        "max_total_tokens": limits.max_total_tokens,
        "max_batch_prefill_tokens": settings.max_batch_prefill_tokens or DEFAULT_PREFILL_TOKENS,
        "max_batch_total_tokens": limits.num_blocks * limits.block_size,
        "block_size": limits.block_size,
        "num_blocks": limits.num_blocks,
        "max_slots": limits.max_slots,
        "version": __version__,
        "decoder_start_token_id": c.raw["decoder_start_token_id"] if limits.encodes else -1,
    }
    return EngineInfo(**fields)
