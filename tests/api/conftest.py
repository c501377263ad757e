"""The whole app over a scripted engine, with and without a socket."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from api_harness import INFO, Live, ScriptedEngine, balance, write_tokenizer

from textmill.api.app import create_app
from textmill.api.router import Place, build_state, serve
from textmill.api.state import RouterState
from textmill.config import Settings
from textmill.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    made = ScriptedEngine(tokenizer)
    made.says("hello world")
    return made


@pytest.fixture
def settings() -> Settings:
    return Settings(max_concurrent_requests=8, max_best_of=4, payload_limit=20_000)


@pytest.fixture
def state(engine: ScriptedEngine, tokenizer: Tokenizer, settings: Settings) -> RouterState:
    return build_state(settings, Place(-1, ""), engine, tokenizer, INFO, "")


@pytest.fixture
async def client(state: RouterState) -> AsyncIterator[httpx.AsyncClient]:
    """The app without a socket; the ledger must balance afterwards."""
    transport = httpx.ASGITransport(create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as one:
        yield one
    balance(state)


@pytest.fixture
async def live(state: RouterState, tmp_path: Path) -> AsyncIterator[Live]:
    """A running router on a loopback port; SIGTERM ends it; the ledger must balance then."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    ready = asyncio.Event()
    task = asyncio.create_task(serve(state, listener, str(tmp_path / "private"), ready.set))
    await asyncio.wait_for(ready.wait(), 5)
    yield Live(state, port, task)
    while not task.done():  # the first signal begins the drain, the second ends what still runs
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait([task], timeout=0.2)
    await task
    balance(state)
