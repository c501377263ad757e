"""A whole engine process without a model: `python scripted_server.py SOCKET SECONDS_PER_STEP`; says "ready"."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from scripted import ScriptedRunner, limits

from textmill.core import EngineInfo, RunnerLimits
from textmill.engine.engine import Engine
from textmill.wire.server import run_engine_server

LIMITS = limits(block_size=16, num_blocks=4096, max_slots=64, max_step_tokens=512, max_total_tokens=1024)


def info(its: RunnerLimits = LIMITS) -> EngineInfo:
    return EngineInfo(
        model_id="scripted",
        model_path="/nowhere",
        model_type="scripted",
        revision="",
        dtype="float32",
        device="cpu",
        quantize="",
        vocab_size=its.vocab_size,
        max_input_tokens=its.max_total_tokens - 1,
        max_total_tokens=its.max_total_tokens,
        max_batch_prefill_tokens=its.max_step_tokens,
        max_batch_total_tokens=its.num_blocks * its.block_size,
        block_size=its.block_size,
        num_blocks=its.num_blocks,
        max_slots=its.max_slots,
        version="0",
    )


async def main(socket: Path, seconds: float) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    engine = Engine(ScriptedRunner(LIMITS, seconds, verify=False))
    await run_engine_server(engine, info(), socket, lambda: print("ready", flush=True), stop)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2])))
