"""The HTTP application: routes, errors, and the two checks every request passes first."""

from __future__ import annotations

from fastapi import FastAPI

from ... import __version__
from . import admin, completions, errors, generate, models
from .auth import AuthMiddleware
from .body import BodyLimit
from .site import Site


def make_app(site: Site) -> FastAPI:
    # The interactive documentation pages load scripts from elsewhere; the schema itself is served, behind the key.
    app = FastAPI(title="Branchwise", version=__version__, docs_url=None, redoc_url=None)
    for module in (completions, generate, models, admin):  # routes are tried in order: the busy ones first
        app.include_router(module.router(site))
    errors.install(app)
    # The last one added runs first: nobody without the key gets to send a body.
    app.add_middleware(BodyLimit, max_bytes=site.config.max_body_bytes)
    app.add_middleware(AuthMiddleware, api_key=site.config.api_key)
    return app
