"""The web side as a value: `create_app(state)` is an ASGI app with every route, and `ROUTES` lists them."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from textmill.api import docs_routes, info_routes, openai_routes, routes
from textmill.api.decoding import Refusal
from textmill.api.exchange import Exchange, Handler, Receive, Scope, Send
from textmill.api.state import RouterState


@dataclass(frozen=True, slots=True)
class Entry:
    """A route; `guarded` ones want the API key, if the server has one."""

    method: str
    path: str
    handler: Handler
    guarded: bool = False


ROUTES = (
    Entry("POST", "/", routes.compat_generate, guarded=True),
    Entry("POST", "/generate", routes.generate, guarded=True),
    Entry("POST", "/generate_stream", routes.generate_stream, guarded=True),
    Entry("POST", "/tokenize", routes.tokenize, guarded=True),
    Entry("POST", "/v1/chat/completions", openai_routes.chat, guarded=True),
    Entry("POST", "/v1/completions", openai_routes.completions, guarded=True),
    Entry("POST", "/chat_tokenize", openai_routes.chat_tokenize, guarded=True),
    Entry("GET", "/v1/models", info_routes.models),
    Entry("GET", "/", info_routes.health),
    Entry("GET", "/health", info_routes.health),
    Entry("GET", "/health/live", info_routes.live),
    Entry("GET", "/health/ready", info_routes.ready),
    Entry("GET", "/ping", info_routes.health),
    Entry("GET", "/info", info_routes.info),
    Entry("GET", "/metrics", info_routes.metrics),
    Entry("GET", "/openapi.json", docs_routes.openapi),
    Entry("GET", "/api-doc/openapi.json", docs_routes.openapi),
    Entry("GET", "/docs", docs_routes.docs),
)


class Endpoint:
    """One path's ASGI app: the key first, then the handler of the method."""

    def __init__(self, state: RouterState, entries: list[Entry]) -> None:
        self.state = state
        self.entries = {entry.method: entry for entry in entries}
        if "GET" in self.entries:
            self.entries["HEAD"] = self.entries["GET"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self.state, scope, receive, send)
        entry = self.entries[scope["method"]]
        await exchange.run(self._with_key(entry) if entry.guarded else entry.handler)

    def _with_key(self, entry: Entry) -> Handler:
        async def handler(exchange: Exchange) -> None:
            wanted = self.state.settings.api_key
            if wanted is not None and not hmac.compare_digest(exchange.bearer(), wanted.encode()):
                raise Refusal(401)
            await entry.handler(exchange)

        return handler


async def empty_error(request: Request, error: Exception) -> Response:
    """404 and 405 have no body."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    return Response(status_code=status, headers=dict(headers or {}))


def create_app(state: RouterState) -> ASGIApp:
    """The app for one router's state."""
    origins = state.settings.cors_allow_origin or ("*",)
    cors = Middleware(
        CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["content-type"]
    )
    by_path: dict[str, list[Entry]] = {}
    for entry in ROUTES:
        by_path.setdefault(entry.path, []).append(entry)
    found = [
        Route(path, Endpoint(state, some), methods=[one.method for one in some], name=path)
        for path, some in by_path.items()
    ]
    app = Starlette(routes=found, middleware=[cors], exception_handlers={404: empty_error, 405: empty_error})
    app.router.redirect_slashes = False
    return app
