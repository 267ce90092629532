"""The routes that do the work, reached without the framework's way there.

Routing, dependencies, exit stacks and two layers of exception handling were 0.16 of a request's 0.65 ms, and a burst of
requests waits for it one after the other (tests/benchmarks/bench_http.py). The same handlers are also ordinary routes:
the schema and wrong methods are the framework's business.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import response_for

Handler = Callable[[Request], Awaitable[Response]]


class Shortcut:
    """``handlers``: what a POST to exactly this path is answered by. Everything else goes on to the application."""

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
