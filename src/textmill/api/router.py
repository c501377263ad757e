"""A router process: connects to the engine, serves the app on an inherited socket, and drains when told to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from textmill.api.app import create_app
from textmill.api.engine import EngineClient
from textmill.api.exchange import ABORT, PIPE
from textmill.api.peers import serve_snapshots
from textmill.api.permits import LocalPermits, PipePermits
from textmill.api.state import RouterState
from textmill.config import Settings
from textmill.core import EngineInfo
from textmill.errors import Draining
from textmill.images.load import load_sight
from textmill.observe.router_metrics import RouterMetrics
from textmill.text.chat import ChatTemplate
from textmill.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from textmill.images.prompt import Sight

HEADERS_LIMIT = 65536  # bytes of request line and headers
IDLE_CONNECTION = 75  # seconds
SOCKET_PAUSE = 0.01  # seconds between looks for the engine's socket
ENGINE_WAIT = 86400.0  # seconds; the launcher ends us sooner if the engine does not come up
LAST_WORDS = 3  # seconds beyond the drain in which answers may still leave
Ready = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a router stands: the descriptors it inherits, the engine's socket, and its number among the routers."""

    listen_fd: int
    engine_socket: str
    permits_fd: int | None = None
    index: int = 0

    def private_socket(self, index: int) -> str:
        return f"{self.engine_socket}.router-{index}"


class ChunkPipe:
    """Chunks of one uvicorn answer, straight into its connection."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self.cycle = cycle

    @property
    def ready(self) -> bool:
        cycle = self.cycle
        begun = cycle.chunked_encoding and not cycle.response_complete
        return bool(begun and not cycle.flow.write_paused and not cycle.disconnected)

    def write(self, data: bytes) -> None:
        self.cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with bounded headers, and ways for the app to cut a connection, and to write to it."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.header_bytes = 0
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not None and self.cycle is not before:  # the app runs later
            self.scope["extensions"][PIPE] = ChunkPipe(self.cycle)  # type: ignore[assignment]

    def _count(self, size: int) -> None:
        """Raising here makes the parser answer 400 and close."""
        self.header_bytes += size
        if self.header_bytes > HEADERS_LIMIT:
            raise ValueError("the request's headers are too long")


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, telling when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Ready) -> None:
        super().__init__(config)
        self.on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(settings: Settings, place: Place, model_path: Path, on_ready: Ready, compute_type: str = "") -> None:
    """Run a router to its end; `on_ready` is called once when it listens. Raises ModelError, ConfigError."""
    import uvloop

    uvloop.run(run_router(settings, place, model_path, on_ready, compute_type))


async def run_router(
    settings: Settings, place: Place, model_path: Path, on_ready: Ready, compute_type: str = ""
) -> None:
    """Wait for the engine while the tokenizer is read, then serve until SIGTERM or SIGINT."""
    from textmill.wire.client import EngineClient as WireClient

    reading = asyncio.create_task(
        asyncio.to_thread(load_tokenizer, model_path, tokenizer_config_path=settings.tokenizer_config_path)
    )
    while not Path(place.engine_socket).exists() and not (reading.done() and reading.exception()):
        await asyncio.sleep(SOCKET_PAUSE)
    tokenizer = await reading
    sight = load_sight(model_path, tokenizer.backend, settings, tokenizer.eos_token)
    engine = WireClient(Path(place.engine_socket))
    await engine.connect(ENGINE_WAIT)
    try:
        state = build_state(settings, place, engine, tokenizer, await engine.info(), compute_type, sight)
        engine.on_received = lambda seconds: state.metrics.step_seconds.add(seconds, ("receive",))
        await serve(state, socket.socket(fileno=place.listen_fd), place.private_socket(place.index), on_ready)
    finally:
        if sight is not None:
            await sight.close()
        await engine.close()


def build_state(
    settings: Settings,
    place: Place,
    engine: EngineClient,
    tokenizer: Tokenizer,
    info: EngineInfo,
    compute_type: str,
    sight: Sight | None = None,
) -> RouterState:
    fd = place.permits_fd
    return RouterState(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token),
        settings=settings,
        info=info,
        metrics=RouterMetrics(info),
        permits=LocalPermits(settings.max_concurrent_requests) if fd is None else PipePermits(fd),
        compute_type=compute_type or f"{info.device or 'cpu'}+optimized",
        peers=tuple(place.private_socket(one) for one in range(settings.router_workers) if one != place.index),
        sight=sight,
    )


async def serve(state: RouterState, listener: socket.socket, private_path: str, on_ready: Ready) -> None:
    """Serve on the socket until a signal, then drain. The private socket is removed at the end."""
    grace = state.settings.graceful_termination_timeout
    options: dict[str, Any] = {"loop": "none", "http": Protocol, "ws": "none", "lifespan": "off", "interface": "asgi3"}
    config = uvicorn.Config(
        create_app(state),
        **options,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=IDLE_CONNECTION,
        timeout_graceful_shutdown=grace + LAST_WORDS,
    )
    server = Server(config, on_ready)
    drain = Drain(state, server, grace)
    Path(private_path).unlink(missing_ok=True)
    private = await serve_snapshots(state.metrics.registry, private_path)
    try:
        with drain.on_signals():
            await server.serve(sockets=[listener])
    finally:
        private.close()
        Path(private_path).unlink(missing_ok=True)
        if state.pool is not None:
            state.pool.shutdown(wait=False, cancel_futures=True)


class Drain:
    """What SIGTERM begins: no new requests, time for the running ones, then an end with clear last words.

    A second signal ends them at once.
    """

    def __init__(self, state: RouterState, server: uvicorn.Server, grace: float) -> None:
        self.state = state
        self.server = server
        self.grace = grace
        self.timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for one in signals:
            loop.add_signal_handler(one, self.begin)
        try:
            yield
        finally:
            for one in signals:
                loop.remove_signal_handler(one)
            if self.timer is not None:
                self.timer.cancel()

    def begin(self) -> None:
        if self.state.draining:
            self.end()
            return
        self.state.draining = True
        self.server.should_exit = True
        self.timer = asyncio.get_running_loop().call_later(self.grace, self.end)

    def end(self) -> None:
        self.state.interrupt_all(Draining("The server is shutting down: the request was not finished in time"))
