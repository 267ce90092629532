"""The HTTP application: routes, errors, and the two checks every request passes first."""

from __future__ import annotations

from fastapi import FastAPI

from ... import __version__
from . import admin, branches, cache, completions, errors, generate, models, openapi, tokens
from .anthropic import count as messages_count
from .anthropic import route as messages
from .anthropic.errors import ErrorShape
from .auth import AuthMiddleware
from .body import BodyLimit
from .chat import route as chat
from .request_id import RequestId
from .responses import route as responses
from .shortcut import Handler, Shortcut
from .site import Site


def make_app(site: Site) -> FastAPI:
    # The interactive documentation pages load scripts from elsewhere; the schema itself is served, behind the key.
    app = FastAPI(title="Branchwise", version=__version__, docs_url=None, redoc_url=None)
    busy: dict[str, Handler] = {}
    for module in (chat, responses, completions, generate, messages, messages_count):
        busy[module.PATH] = module.handler(site)
        app.post(module.PATH, openapi_extra=module.schema())(busy[module.PATH])
    for module in (responses, branches, models, tokens, cache, admin):
        app.include_router(module.router(site))
    openapi.document(app, keyed=site.config.api_key is not None)
    errors.install(app, {*busy, "/v1/models"})
    # The last one added runs first: nobody without the key gets to send a body.
    app.add_middleware(Shortcut, handlers=busy)
    config = site.config
    app.add_middleware(
        BodyLimit,
        max_bytes=config.max_body_bytes,
        max_depth=config.max_json_depth,
        max_values=config.max_json_values,
    )
    app.add_middleware(
        AuthMiddleware,
        api_key=site.config.api_key,
        extra_api_keys=site.config.extra_api_keys,
        admin_api_key=site.config.admin_api_key,
    )
    app.add_middleware(ErrorShape)
    app.add_middleware(RequestId)
    return app
