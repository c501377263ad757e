"""/info, /health, /metrics, /docs, keys and CORS, and the log line of a request."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_harness import INFO, Live, ScriptedEngine

from textmill.api.app import ROUTES, create_app
from textmill.api.openapi import OPERATIONS
from textmill.api.peers import peer_snapshot, serve_snapshots
from textmill.api.state import RouterState
from textmill.observe.router_metrics import SECONDS, RouterMetrics

INFO_KEYS = [
    "model_id",
    "model_sha",
    "model_pipeline_tag",
    "max_concurrent_requests",
    "max_best_of",
    "max_stop_sequences",
    "max_input_tokens",
    "max_total_tokens",
    "validation_workers",
    "max_client_batch_size",
    "router",
    "version",
    "sha",
    "docker_label",
]


async def test_info(client: httpx.AsyncClient) -> None:
    body = (await client.get("/info")).json()
    assert list(body) == INFO_KEYS
    assert body["model_id"] == "test/model"
    assert body["model_sha"] is None
    assert body["max_input_tokens"] == 40
    assert body["router"] == "text-generation-router"


@pytest.mark.parametrize("path", ["/health", "/ping", "/"])
async def test_health(client: httpx.AsyncClient, engine: ScriptedEngine, state: RouterState, path: str) -> None:
    answer = await client.get(path)
    assert (answer.status_code, answer.content) == (200, b"")
    engine.state.step_age_ns = int(1e12)  # idle for long: well
    assert (await client.get(path)).status_code == 200
    engine.state.working = True
    answer = await client.get(path)
    assert answer.status_code == 503
    assert answer.json() == {"error": "unhealthy", "error_type": "healthcheck"}
    engine.state.step_age_ns = int(1e9)
    assert (await client.get(path)).status_code == 200
    engine.connected = False
    assert (await client.get(path)).status_code == 503
    engine.connected, state.draining = True, True
    assert (await client.get(path)).status_code == 503


async def test_live_and_ready(client: httpx.AsyncClient, engine: ScriptedEngine, state: RouterState) -> None:
    assert (await client.get("/health/ready")).status_code == 200
    engine.connected = False
    assert (await client.get("/health/ready")).status_code == 503
    assert (await client.get("/health/live")).status_code == 200
    engine.connected, state.draining = True, True
    assert (await client.get("/health/ready")).json()["error_type"] == "draining"
    assert (await client.get("/health/live")).status_code == 200


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


async def test_metrics(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.figures = {
        "queue_size": 3,
        "kv_blocks_used": 7,
        "kv_blocks_total": 40,
        "preemptions": 2,
        "prefix_hit_tokens": 16,
        "batch_inference_count_decode": 5,
        "batch_inference_success_decode": 4,
        "tgi_batch_inference_duration|decode|0": 1,
        "tgi_batch_inference_duration|decode|18": 3,
        "tgi_batch_inference_duration|decode|sum": 0.25,
        "tgi_batch_next_size||1": 5,
    }
    await client.post("/generate", json={"inputs": "a"})
    await client.post("/generate", json={"inputs": ""})
    await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    found = await metrics(client)
    assert found["tgi_request_count"] == 3
    assert found["tgi_request_success"] == 2
    assert found['tgi_request_failure{err="validation"}'] == 1
    for name in ("duration", "validation_duration", "queue_duration", "inference_duration"):
        assert found[f"tgi_request_{name}_count"] == 2
        assert found[f'tgi_request_{name}_bucket{{le="+Inf"}}'] == 2
        assert f'tgi_request_{name}_bucket{{le="0.00015"}}' in found
    assert found["tgi_request_mean_time_per_token_duration_count"] == 2
    assert found["tgi_request_generated_tokens_sum"] == 6
    assert found["tgi_request_input_length_count"] == 2
    assert found["tgi_request_max_new_tokens_count"] == 2
    assert found["textmill_time_to_first_token_seconds_count"] == 2
    assert found["textmill_inter_token_seconds_count"] == 4
    assert found["tgi_request_skipped_tokens_count"] == 2
    assert found["tgi_queue_size"] == 3
    assert found["textmill_kv_blocks_used"] == 7
    assert found["textmill_preemptions"] == 2
    assert found["textmill_prefix_cache_hit_tokens"] == 16
    assert found['tgi_batch_inference_count{method="decode"}'] == 5
    assert found['tgi_batch_inference_duration_sum{method="decode"}'] == 0.25
    assert found['tgi_batch_inference_duration_count{method="decode"}'] == 4
    assert found['tgi_batch_inference_duration_bucket{method="decode",le="0.00015"}'] == 1
    assert found['tgi_batch_next_size_bucket{le="2"}'] == 5
    for name in ("forward", "decode", "filter", "concat"):
        assert f'tgi_batch_{name}_duration_count{{method="decode"}}' in found
    assert found['textmill_ledger_requests{state="completed"}'] == 2
    assert found['textmill_ledger_requests{state="rejected"}'] == 1
    assert found["textmill_ledger_open"] == 0


async def test_metrics_without_an_engine(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.connected, engine.figures = False, {"queue_size": 3}
    assert "tgi_queue_size" not in await metrics(client)


def test_buckets() -> None:
    assert len(SECONDS) == 35
    assert SECONDS[-1] == pytest.approx(145.6, abs=0.1)
    assert len(RouterMetrics(INFO).input_length.bounds) == 100
    assert RouterMetrics(INFO).input_length.bounds[-1] == pytest.approx(40)


async def test_metrics_of_all_routers_are_added_up(
    client: httpx.AsyncClient, state: RouterState, tmp_path: Path
) -> None:
    other = RouterMetrics(INFO)
    other.requests.add(5)
    other.failures.add(2, ("overloaded",))
    other.seconds["duration"].observe(1.0)
    server = await serve_snapshots(other.registry, str(tmp_path / "peer"))
    state.peers = (str(tmp_path / "peer"), str(tmp_path / "nobody"))
    await client.post("/generate", json={"inputs": "a"})
    found = await metrics(client)
    assert found["tgi_request_count"] == 6
    assert found['tgi_request_failure{err="overloaded"}'] == 2
    assert found["tgi_request_duration_count"] == 2
    server.close()


async def test_private_sockets_answer_nothing_else(tmp_path: Path) -> None:
    server = await serve_snapshots(RouterMetrics(INFO).registry, str(tmp_path / "peer"))
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "peer"))
    writer.write(b"GET /generate HTTP/1.0\r\n\r\n")
    assert await reader.read() == b""
    writer.close()
    assert await peer_snapshot(str(tmp_path / "peer"))
    server.close()


async def test_docs_and_openapi(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    document = (await client.get("/openapi.json")).json()
    assert document == (await client.get("/api-doc/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    parameters = document["components"]["schemas"]["GenerateParameters"]["properties"]
    assert parameters["do_sample"]["default"] is False
    assert "At most 4." in parameters["best_of"]["description"]
    text = json.dumps(document)
    names = set(document["components"]["schemas"])
    assert {one.split('"')[0] for one in text.split("#/components/schemas/")[1:]} <= names


def test_the_document_covers_every_route() -> None:
    documented = {(one.method.upper(), one.path, one.guarded) for one in OPERATIONS}
    assert documented == {(one.method, one.path, one.guarded) for one in ROUTES}


BODY = {"inputs": "a", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
WRONG: list[dict[str, str]] = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "Bearer SECRET"},
    {"authorization": "Bearer secretx"},
    {"authorization": "Basic secret"},
    {"authorization": "secret"},
    {"authorization": "Bearer "},
    {"x-api-key": "secret"},
]


@pytest.mark.parametrize("entry", ROUTES, ids=lambda one: f"{one.method} {one.path}")
async def test_every_route_wants_the_key_or_is_listed(
    client: httpx.AsyncClient, state: RouterState, entry: Any
) -> None:
    object.__setattr__(state.settings, "api_key", "secret")
    for headers in WRONG:
        body = {"json": BODY} if entry.method == "POST" else {}
        answer = await client.request(entry.method, entry.path, headers=headers, params={"key": "secret"}, **body)
        assert answer.status_code == (401 if entry.method == "POST" else 200)
        assert entry.method == "GET" or answer.content == b""
    if entry.method == "POST":
        for scheme in ("Bearer", "bearer"):
            headers = {"authorization": f"{scheme} secret"}
            assert (await client.post(entry.path, json=BODY, headers=headers)).status_code == 200


async def test_cors(client: httpx.AsyncClient) -> None:
    origin = {"origin": "https://example.org"}
    assert (await client.get("/info", headers=origin)).headers["access-control-allow-origin"] == "*"
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    answer = await client.options("/generate", headers=origin | asked)
    assert answer.status_code == 200
    assert "POST" in answer.headers["access-control-allow-methods"]


async def test_cors_with_a_list_of_origins(state: RouterState) -> None:
    object.__setattr__(state.settings, "cors_allow_origin", ("https://good.org",))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(state)), base_url="http://test") as client:
        good = await client.get("/info", headers={"origin": "https://good.org"})
        assert good.headers["access-control-allow-origin"] == "https://good.org"
        bad = await client.get("/info", headers={"origin": "https://bad.org"})
        assert "access-control-allow-origin" not in bad.headers


async def test_one_log_line_without_content(
    client: httpx.AsyncClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "textmill.router")
    engine.says("canary-out")
    body = {"inputs": "canary-in", "parameters": {"do_sample": True, "seed": 4, "stop": ["canary-stop"]}}
    await client.post("/generate", json=body)
    await client.post("/generate", json={"inputs": "canary", "parameters": {"top_k": 0}})
    lines = [one for one in caplog.records if one.name == "textmill.router"]
    fields: list[Any] = [vars(one)["fields"] for one in lines]
    assert [one["status"] for one in fields] == [200, 422]
    assert fields[0] | {"route": "/generate", "finish": "eos_token", "seed": 4, "generated_tokens": 11} == fields[0]
    assert fields[1]["error"] == "validation"
    assert "canary" not in str([vars(one) for one in lines])


async def test_docs_over_a_socket(live: Live) -> None:
    async with httpx.AsyncClient(base_url=live.url) as client:
        answer = await client.get("/docs")
        assert answer.status_code == 200
        assert "server" not in answer.headers
        assert (await client.head("/health")).status_code == 200
