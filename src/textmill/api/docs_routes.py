"""/docs and the OpenAPI document behind it; the page needs nothing from any other server."""

from __future__ import annotations

from importlib.resources import files

from textmill.api.exchange import Exchange
from textmill.api.openapi import document

HTML = b"text/html; charset=utf-8"


async def openapi(exchange: Exchange) -> None:
    """GET /openapi.json and /api-doc/openapi.json."""
    await exchange.json(document(exchange.state))


async def docs(exchange: Exchange) -> None:
    """GET /docs."""
    page = files("textmill.api").joinpath("docs.html").read_bytes()
    await exchange.answer(200, page, HTML)
