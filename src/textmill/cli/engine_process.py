"""`textmill serve-engine`: the model side in a process of its own, started by the launcher."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from textmill.cli.child import Handed, adopt, die_with, leave, read_handed
from textmill.cli.status import StatusPipe
from textmill.config import Settings
from textmill.errors import TextmillError
from textmill.observe import logs

if TYPE_CHECKING:
    from textmill.cli.ranks import RankProcesses
    from textmill.core import EngineInfo
    from textmill.engine.engine import Engine
    from textmill.runner.native_runner import NativeRunner
    from textmill.runner.runner import LocalRunner

log = logging.getLogger(__name__)

SECONDS_BETWEEN_BEATS = 0.5
SECONDS_BETWEEN_PROFILES = 10.0
REST_SECONDS = 0.001  # about what a token needs from the engine to the client's socket


def serve_engine(settings: str, socket: str, status_fd: int | None, parent: int) -> None:
    """Load the model and serve it to routers over a Unix socket."""
    import uvloop

    die_with(parent, "textmill-engine")
    status = StatusPipe(status_fd)
    handed = read_handed(Path(settings))
    adopt("engine", handed.settings)
    ranks = start_ranks(handed, Path(settings), Path(socket), status)
    try:
        engine, info = build(handed, status, ranks)
        uvloop.run(serve(engine, info, Path(socket), handed.settings, status))
    except TextmillError as error:
        log.debug("the engine ends", exc_info=error)
        status.fail(error.message if ranks is None else ranks.named(error.message))
        leave(1)
    except Exception as error:
        # Fault boundary: a bug. The launcher shows one line, the log keeps the rest.
        log.exception("the engine ends by an error of its own")
        reason = f"{type(error).__name__}: {error}"
        status.fail(reason if ranks is None else ranks.named(reason))
        leave(1)
    leave(0)


def start_ranks(handed: Handed, settings: Path, socket: Path, status: StatusPipe) -> RankProcesses | None:
    """The engine's other ranks, watched: when one ends, the engine does as well."""
    size = handed.settings.num_shard or 1
    if size == 1:
        return None
    from textmill.cli.ranks import LAST_WORDS, RankProcesses

    def on_end(reason: str) -> None:
        log.error("%s; the engine cannot go on without it", reason)
        time.sleep(LAST_WORDS)  # what runs fails by itself, and says so to its clients
        status.fail(reason)
        leave(1)

    ranks = RankProcesses(settings, socket, size)
    ranks.watch(on_end)
    return ranks


def build(handed: Handed, status: StatusPipe, ranks: RankProcesses | None = None) -> tuple[Engine, EngineInfo]:
    """The engine with its warm runner. Raises ConfigError, ModelError; with ranks also RankLost."""
    from textmill.engine.engine import Engine
    from textmill.engine.scheduler import EngineSettings

    runner, info = build_runner(handed, status, ranks)
    settings = EngineSettings(
        max_batch_prefill_tokens=info.max_batch_prefill_tokens,
        max_total_tokens=info.max_total_tokens,
        max_batch_size=handed.settings.max_batch_size,
        prefix_caching=handed.settings.prefix_caching,
        prefill_pacing=handed.settings.prefill_pacing,
        speculate=handed.settings.speculate or 0,
        rest_seconds=REST_SECONDS if takes_every_core(handed.settings, info.device) else 0.0,
    )
    return Engine(runner, settings), info


def takes_every_core(settings: Settings, device: str) -> bool:
    """Whether kernels run on all cores that the routers have, too."""
    cores = len(os.sched_getaffinity(0))
    return device == "cpu" and (settings.cpu_threads or cores) >= cores


def build_runner(
    handed: Handed, status: StatusPipe, ranks: RankProcesses | None
) -> tuple[LocalRunner | NativeRunner, EngineInfo]:
    from textmill.weights.source import ModelSource

    source = ModelSource(**(handed.source | {"path": Path(handed.source["path"])}))
    if ranks is None:
        from textmill.runner import build

        return build.build_runner(handed.settings, source, status.report)
    from textmill.runner.sharded import build_leader

    return build_leader(handed.settings, source, status.report, ranks.channels, ranks.meeting)


async def serve(engine: Engine, info: EngineInfo, socket: Path, settings: Settings, status: StatusPipe) -> None:
    """Serve until SIGTERM, then finish what runs. Raises TextmillError if the engine fails by itself."""
    from textmill.wire.server import run_engine_server

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    def on_ready() -> None:
        threading.Thread(target=beat, args=(engine, status), name="beat", daemon=True).start()
        if settings.profile:
            threading.Thread(target=log_gains, args=(engine,), name="profile", daemon=True).start()
        status.ready(f"{info.model_id} is served on {info.device}")

    grace = float(settings.graceful_termination_timeout)
    await run_engine_server(engine, info, socket, on_ready, stop, drain_seconds=grace)


def beat(engine: Engine, status: StatusPipe) -> None:
    """Tell the launcher again and again how far the engine is; its silence, too, tells it something."""
    while True:
        health = engine.health()
        status.beat(health.step, health.step_age_ns / 1e9, health.working)
        time.sleep(SECONDS_BETWEEN_BEATS)


def log_gains(engine: Engine) -> None:
    """Beside the runner's tables of kernels: how much each of the engine's numbers grew."""
    before = engine.stats()
    while True:
        time.sleep(SECONDS_BETWEEN_PROFILES)
        after = engine.stats()
        gains = gained(before, after)
        if gains:
            logs.event(log, logging.INFO, "profile", **gains)
        before = after


def gained(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The numbers that changed, each with its change."""
    changes = {name: round(value - before.get(name, 0.0), 6) for name, value in after.items()}
    return {name: change for name, change in changes.items() if change}


command = click.Command(
    "serve-engine",
    callback=serve_engine,
    params=[
        click.Option(["--settings"], required=True, help="File that the launcher wrote."),
        click.Option(["--socket"], required=True, help="Where to serve."),
        click.Option(["--status-fd"], type=int, help="Where to say how it is going."),
        click.Option(["--parent"], type=int, default=0, help="Process to die with."),
    ],
    help=serve_engine.__doc__,
)
