"""The HTTP application: its routes, its middleware, its errors."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from .... import __version__
from .anthropic import route as messages
from .anthropic.errors import MessagesErrors
from .fields.usage import CACHE_HEADER
from .native import admin, branches, cache, models, tokens, tree
from .openai import completions
from .openai.chat import route as chat
from .openai.responses import route as responses
from .plumbing import errors, openapi
from .plumbing.auth import AuthMiddleware
from .plumbing.body import BodyLimit
from .plumbing.browsers import BrowserGuard
from .plumbing.ending import AnswerCancelled
from .plumbing.request_id import RequestId
from .plumbing.request_log import RequestLog, log_line
from .plumbing.routes import Routes
from .plumbing.shortcut import Handler, Shortcut
from .plumbing.tracing import span_sink
from .sglang import generate
from .state import AppState
from .ui import live, node, page
from .vllm import generate as inference

_MODULES = (
    chat,
    completions,
    responses,
    messages,
    generate,
    inference,
    branches,
    cache,
    tree,
    models,
    tokens,
    admin,
)


def make_app(state: AppState) -> ASGIApp:
    """The application that a server runs. FastAPI, its innermost part, gets the requests that `Shortcut` leaves."""
    config = state.config
    routes = make_routes(state)
    fast: dict[str, Handler] = {}
    for one in routes:
        fast |= one.fast
    # The last one added runs first: a client without the key cannot send a body.
    app: ASGIApp = Shortcut(make_framework(state, routes), fast)
    app = BodyLimit(
        app,
        max_bytes=config.max_body_bytes,
        max_depth=config.max_json_depth,
        max_values=config.max_json_values,
        max_total_bytes=config.max_total_body_bytes,
    )
    app = AuthMiddleware(
        app,
        api_key=config.api_key,
        extra_api_keys=config.extra_api_keys,
        admin_api_key=config.admin_api_key,
        open_paths=page.open_paths() if config.has_ui else (),
    )
    if config.api_key is None:
        app = BrowserGuard(app, host=config.host, allowed=config.allowed_hosts, origins=config.allow_origins)
    app = AnswerCancelled(app, state.client)
    app = MessagesErrors(app)
    if config.allow_origins:  # outside of the keys' check: a preflight carries no key
        app = CORSMiddleware(
            app,
            allow_origins=config.allow_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "request-id", "retry-after", CACHE_HEADER),
        )
    sinks = [sink for sink in (log_line if config.log_requests else None, span_sink(state.model_name)) if sink]
    if sinks:
        app = RequestLog(app, sinks)
    return RequestId(app)


def make_routes(state: AppState) -> list[Routes]:
    routes = [module.routes(state) for module in _MODULES]
    if state.config.has_ui:
        routes += [page.routes(), live.routes(state), node.routes(state)]
    return routes


def make_framework(state: AppState, routes: Sequence[Routes]) -> FastAPI:
    """Every route, and the OpenAPI document, without the server's middleware."""
    # FastAPI's /docs loads scripts from other hosts; `ui/page.py` has one that does not.
    app = FastAPI(title="Branchwise", version=__version__, docs_url=None, redoc_url=None)
    for one in routes:
        app.include_router(one.router)
    openapi.document(app, routes, keyed=state.config.api_key is not None)
    errors.install(app, {"/v1/models", *(path for one in routes for path in one.fast)})
    return app
