"""The launcher: starts one engine and its routers, shows how they come up, keeps them alive, ends them in order.

Whatever way it ends, no child process, port, socket or folder is left. It never imports torch, gRPC or the web stack.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from textmill.cli.child import Handed
from textmill.cli.permits import fill_permits
from textmill.cli.processes import Child, Exited, Said, Signalled, Watch
from textmill.cli.progress import show
from textmill.cli.runtime_dir import RuntimeDirectory
from textmill.cli.status import BEAT, READY, Status
from textmill.config import Settings
from textmill.observe.logs import event

log = logging.getLogger(__name__)

TEXTMILL = (sys.executable, "-P", "-m", "textmill")
RESTART_WINDOW = 600.0  # seconds in which `engine_restarts` are counted
ROUTER_MARGIN = 4.0  # seconds a router may take beyond the drain it was promised
LAST_WORDS = 2.0  # seconds a router gets, after a second SIGTERM, to tell its clients that this is the end
ENGINE_GRACE = 5.0  # seconds an engine may take to end once no router needs it
FAILURE_GRACE = 1.0  # seconds until that second SIGTERM when nothing can go on
HURRY = 1.0  # seconds for last words when a second signal says: now
DUMP_GRACE = 1.0  # seconds a hung engine gets to write its stacks before it is killed


@dataclass(frozen=True, slots=True)
class Commands:
    """The programs of the child processes; our arguments are appended. Tests put small stand-ins here."""

    engine: Sequence[str] = (*TEXTMILL, "serve-engine")
    router: Sequence[str] = (*TEXTMILL, "router")


class Launcher:
    """Supervises the processes of one server. `source` holds the fields of the resolved `ModelSource`.

    `listener` is bound, not listening; a router starts to listen when it can answer. `begun` is when the start
    began, on the monotonic clock.
    """

    def __init__(
        self,
        settings: Settings,
        source: dict[str, Any],
        listener: socket.socket,
        commands: Commands | None = None,
        begun: float | None = None,
    ) -> None:
        self.settings = settings
        self.source = source
        self.listener = listener
        self.commands = commands or Commands()
        self.begun = time.monotonic() if begun is None else begun
        self.watch = Watch()
        self.engine: Child | None = None
        self.routers: list[Child] = []
        self.engine_has_served = False
        self.restarts: deque[float] = deque()
        self.code: int | None = None  # decided as soon as we begin to stop
        self.deadline: float | None = None  # when what is left of the present stage is killed
        self.hurried = False
        self.last_call = False  # routers have been told to end at once
        self.done = False
        self.failure = ""

    def run(self) -> int:
        """Serve until a signal or a failure ends it; returns the exit code. `failure` then holds the reason, if any."""
        with RuntimeDirectory() as place:
            self.watch.open()
            try:
                self._start(place)
                while not self.done:
                    for happened in self.watch.wait(self._timeout()):
                        self._handle(happened)
                    self._check_time()
            finally:
                for child in list(self.watch.children):
                    child.kill()
                self.watch.close()
        return 1 if self.code is None else self.code

    # --- starting

    def _start(self, place: RuntimeDirectory) -> None:
        self.socket_path = place.path / "engine"
        self.settings_path = place.write_private("settings.json", Handed(self.settings, self.source).to_json())
        self._start_engine()
        self.permits = fill_permits(self.settings.max_concurrent_requests)
        for index in range(self.settings.router_workers):
            self._start_router(index)

    def _start_engine(self) -> None:
        self.socket_path.unlink(missing_ok=True)
        command = [*self.commands.engine, "--settings", str(self.settings_path), "--socket", str(self.socket_path)]
        self.engine = Child("engine", command)
        self.watch.add(self.engine)
        event(log, logging.DEBUG, "started the engine", pid=self.engine.process.pid)

    def _start_router(self, index: int) -> None:
        command = [*self.commands.router, "--settings", str(self.settings_path)]
        command += ["--engine-socket", str(self.socket_path), "--index", str(index)]
        command += ["--listen-fd", str(self.listener.fileno()), "--permits-fd", str(self.permits)]
        router = Child(f"router {index}", command, (self.listener.fileno(), self.permits))
        self.routers.append(router)
        self.watch.add(router)
        event(log, logging.DEBUG, "started a router", index=index, pid=router.process.pid)

    # --- what happens

    def _handle(self, happened: Signalled | Said | Exited) -> None:
        match happened:
            case Signalled(number):
                self._on_signal(number)
            case Said(child, status):
                self._on_status(child, status)
            case Exited(child) if child is self.engine:
                self._on_engine_exit(child)
            case Exited(child):
                self._on_router_exit(child)

    def _on_signal(self, number: int) -> None:
        """The first signal drains, the second ends within moments, the third kills."""
        name = signal.Signals(number).name
        if self.code is None:
            event(log, logging.INFO, f"{name}: no new requests; running ones get to finish")
            code = 128 + number if number == signal.SIGINT else 0
            self._stop(code, self.settings.graceful_termination_timeout + ROUTER_MARGIN)
        elif not self.hurried:
            event(log, logging.WARNING, f"{name} again: ending now")
            self.hurried = True
            self.code = self.code or 128 + number
            self._last_call(HURRY)
        else:
            self.done = True

    def _on_status(self, child: Child, status: Status) -> None:
        if status.error:
            child.reason = status.error
        elif status.phase == BEAT:
            self._on_beat(child, status)
        else:
            show(log, child.name, status)
        if status.phase == READY and not child.ready:
            child.ready = True
            child.last_beat = time.monotonic()
            self._on_ready(child)

    def _on_beat(self, child: Child, status: Status) -> None:
        child.last_beat = time.monotonic()
        age = float(status.fields.get("age", 0.0))
        child.stalled_since = child.last_beat - age if status.fields.get("working") else None

    def _on_ready(self, child: Child) -> None:
        restarted = child is self.engine and self.engine_has_served
        self.engine_has_served = self.engine_has_served or child is self.engine
        if restarted:
            event(log, logging.INFO, "the engine serves again", seconds=time.monotonic() - child.started)
        elif self.engine_has_served and all(router.ready for router in self.routers):
            # From here on a successor may take the port over while old connections linger.
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            seconds = time.monotonic() - self.begun
            where = url(self.listener)
            event(log, logging.INFO, f"Ready in {seconds:.1f} s: {self.source.get('model_id')} at {where}")

    def _on_router_exit(self, router: Child) -> None:
        self.routers.remove(router)
        if self.code is None:
            verb = "failed" if router.ready else "cannot start"
            self._fail(f"Webserver {verb}: {router.reason or f'{router.name} {router.how_it_ended()}'}")
        elif not self.routers:
            self._stop_engine()

    def _on_engine_exit(self, engine: Child) -> None:
        self.engine = None
        why = engine.reason or f"the engine {engine.how_it_ended()}"
        if self.code is not None:
            # Nothing that runs can finish any more: routers get just long enough to say so.
            self.deadline = min(self.deadline or 0.0, time.monotonic() + FAILURE_GRACE)
            self.done = not self.routers
        elif not self.engine_has_served:
            self._fail(f"Shard cannot start: {why}")
        elif self._may_restart():
            event(log, logging.ERROR, f"{why}; starting it again", restart=len(self.restarts))
            self._start_engine()
        else:
            self._fail(f"Shard failed: {why}")

    def _may_restart(self) -> bool:
        now = time.monotonic()
        while self.restarts and now - self.restarts[0] > RESTART_WINDOW:
            self.restarts.popleft()
        if len(self.restarts) >= self.settings.engine_restarts:
            return False
        self.restarts.append(now)
        return True

    # --- stopping

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._stop(1, FAILURE_GRACE)

    def _stop(self, code: int, grace: float) -> None:
        """Routers first: they finish what runs, for which they need the engine."""
        self.code = code
        self.deadline = time.monotonic() + grace
        self.listener.close()  # once the routers have closed theirs, new connections are refused
        for router in self.routers:
            router.send(signal.SIGTERM)
        if not self.routers:
            self._stop_engine()

    def _stop_engine(self) -> None:
        if self.engine is None:
            self.done = True
            return
        self.deadline = time.monotonic() + ENGINE_GRACE
        self.engine.send(signal.SIGTERM)

    # --- time

    def _timeout(self) -> float | None:
        if self.deadline is not None:
            return max(0.0, self.deadline - time.monotonic())
        return 1.0 if self.engine is not None and self.engine.ready and self.settings.engine_hang_timeout else None

    def _check_time(self) -> None:
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline:
            self._end_stage()
        elif self.deadline is None and self.engine is not None and self.engine.ready:
            self._check_hang(self.engine, now)

    def _last_call(self, grace: float) -> None:
        """Tell routers a second time to end: now they end what runs, with last words to its clients."""
        self.last_call = True
        self.deadline = time.monotonic() + grace
        for router in self.routers:
            router.send(signal.SIGTERM)

    def _end_stage(self) -> None:
        """The time of this stage is over: kill who is left in it. Their exits lead to the next stage."""
        if self.routers and not self.last_call:
            self._last_call(LAST_WORDS)
            return
        for child in self.routers or ([self.engine] if self.engine is not None else []):
            event(log, logging.WARNING, f"{child.name} did not end in time and is killed")
            child.send(signal.SIGKILL)
        self.deadline = time.monotonic() + ENGINE_GRACE

    def _check_hang(self, engine: Child, now: float) -> None:
        """Kill an engine that shows no sign of life, or works without finishing a step; its stacks are logged first."""
        limit = self.settings.engine_hang_timeout
        if engine.kill_at is not None:
            if now >= engine.kill_at:
                engine.send(signal.SIGKILL)
            return
        silent = now - engine.last_beat
        stalled = 0.0 if engine.stalled_since is None else now - engine.stalled_since
        if limit and max(silent, stalled) > limit:
            engine.reason = f"the engine hung for {max(silent, stalled):.0f} s and was killed"
            engine.kill_at = now + DUMP_GRACE
            engine.send(signal.SIGUSR1)


def url(listener: socket.socket) -> str:
    """The address a person can open; 0.0.0.0 is shown as it is."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
