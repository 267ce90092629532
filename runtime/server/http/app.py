"""The HTTP application: its routes, its middleware, its errors."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

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


def make_app(state: AppState) -> FastAPI:
    # FastAPI's /docs loads scripts from other hosts; `ui/page.py` has one that does not.
    app = FastAPI(title="Branchwise", version=__version__, docs_url=None, redoc_url=None)
    routes = [module.routes(state) for module in _MODULES]
    if state.config.has_ui:
        routes += [page.routes(), live.routes(state), node.routes(state)]
    fast: dict[str, Handler] = {}
    for one in routes:
        app.include_router(one.router)
        fast |= one.fast
    openapi.document(app, routes, keyed=state.config.api_key is not None)
    errors.install(app, {*fast, "/v1/models"})
    # The last one added runs first: a client without the key cannot send a body.
    app.add_middleware(Shortcut, handlers=fast)
    config = state.config
    app.add_middleware(
        BodyLimit,
        max_bytes=config.max_body_bytes,
        max_depth=config.max_json_depth,
        max_values=config.max_json_values,
        max_total_bytes=config.max_total_body_bytes,
    )
    app.add_middleware(
        AuthMiddleware,
        api_key=state.config.api_key,
        extra_api_keys=state.config.extra_api_keys,
        admin_api_key=state.config.admin_api_key,
        open_paths=page.open_paths() if config.has_ui else (),
    )
    if config.api_key is None:
        app.add_middleware(BrowserGuard, host=config.host, allowed=config.allowed_hosts, origins=config.allow_origins)
    app.add_middleware(AnswerCancelled, client=state.client)
    app.add_middleware(MessagesErrors)
    if config.allow_origins:  # outside of the keys' check: a preflight carries no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "request-id", "retry-after", CACHE_HEADER),
        )
    sinks = [sink for sink in (log_line if config.log_requests else None, span_sink(state.model_name)) if sink]
    if sinks:
        app.add_middleware(RequestLog, sinks=sinks)
    app.add_middleware(RequestId)
    return app
