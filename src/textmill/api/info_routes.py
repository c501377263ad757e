"""What the server says about itself: /info, /health, /v1/models, /metrics."""

from __future__ import annotations

import asyncio

from textmill.api.exchange import Exchange
from textmill.api.peers import peer_snapshot
from textmill.api.schema import Info
from textmill.api.state import RouterState
from textmill.errors import Draining, TextmillError, Unhealthy
from textmill.observe.engine_metrics import engine_snapshot
from textmill.observe.metrics import merge, render

STATS_TIMEOUT = 1.0
PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"


def info_of(state: RouterState) -> Info:
    settings, engine = state.settings, state.info
    return Info(
        model_id=state.model_name,
        model_sha=engine.revision or None,
        model_pipeline_tag=None,
        max_concurrent_requests=settings.max_concurrent_requests,
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stop_sequences,
        max_input_tokens=engine.max_input_tokens,
        max_total_tokens=engine.max_total_tokens,
        validation_workers=settings.validation_workers,
        max_client_batch_size=settings.max_client_batch_size,
        router="text-generation-router",
        version=engine.version,
        sha=None,
        docker_label=None,
    )


async def info(exchange: Exchange) -> None:
    """GET /info."""
    await exchange.json(info_of(exchange.state))


async def models(exchange: Exchange) -> None:
    """GET /v1/models: a list of one."""
    name = exchange.state.model_name
    data = [{"id": name, "object": "model", "created": 0, "owned_by": name}]
    await exchange.json({"object": "list", "data": data})


async def health(exchange: Exchange) -> None:
    """GET /health, /ping and /: an empty 200 if the engine makes progress, else 503."""
    await check_health(exchange.state)
    await exchange.empty(200)


async def live(exchange: Exchange) -> None:
    """GET /health/live: this process turns its loop."""
    await exchange.empty(200)


async def ready(exchange: Exchange) -> None:
    """GET /health/ready: new requests are welcome."""
    if exchange.state.draining:
        raise Draining
    await check_health(exchange.state)
    await exchange.empty(200)


async def check_health(state: RouterState) -> None:
    """Raise Unhealthy unless the engine answers and, if it has work, has finished a step lately."""
    limit = state.settings.engine_hang_timeout
    if state.draining or not state.engine.connected:
        raise Unhealthy
    try:
        async with asyncio.timeout(min(limit, 5.0)):
            engine = await state.engine.health()
    except (TimeoutError, ConnectionError, TextmillError):
        raise Unhealthy from None
    if engine.draining or (engine.working and engine.step_age_ns > limit * 1e9):
        raise Unhealthy


async def metrics(exchange: Exchange) -> None:
    """GET /metrics: this router's figures and its peers' added up, and the engine's."""
    state = exchange.state
    peers = await asyncio.gather(*(peer_snapshot(path) for path in state.peers))
    whole = merge([state.metrics.registry.snapshot(), *peers, engine_snapshot(await _engine_stats(state))])
    await exchange.answer(200, render(whole).encode(), PROMETHEUS)


async def _engine_stats(state: RouterState) -> dict[str, float]:
    """The engine's figures; none while it is away, for the router's own must be readable just then."""
    if not state.engine.connected:
        return {}
    try:
        async with asyncio.timeout(STATS_TIMEOUT):
            return await state.engine.stats()
    except (TimeoutError, ConnectionError, TextmillError):
        return {}
