"""Calls the handlers of generating routes without FastAPI's routing.

Routing, dependencies, exit stacks and two layers of exception handling took 0.16 of a request's 0.65 ms, and the
requests of a burst wait for each other (tests/benchmarks/bench_http.py). The same handlers are registered as ordinary
routes too, for the OpenAPI document and for wrong methods.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import response_for

Handler = Callable[[Request], Awaitable[Response]]


class Shortcut:
    """``handlers``: by the exact path of a POST. Every other request passes to the application."""

    def __init__(self, app: ASGIApp, handlers: Mapping[str, Handler]) -> None:
        self._app = app
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handlers.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await handler(Request(scope, receive))
        except Exception as error:
            response = response_for(error)
        await response(scope, receive, send)
