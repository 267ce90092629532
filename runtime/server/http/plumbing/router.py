"""Calls the handler of a request's route. Every error has an answer in OpenAI's shape."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

from starlette.datastructures import URL
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from ....errors import InvalidRequest
from ..engine_client import EngineClient
from .auth import require_admin
from .errors import error_response, response_for
from .routes import Route

_BASE_URLS = "The base_url of OpenAI's clients ends with /v1, that of Anthropic's does not"


class Router:
    """The application inside of all middleware.

    A handler that waits for the engine gets its error from there. One that tokenizes a long text while the server ends
    is cancelled by uvicorn, which would answer with a plain "Internal Server Error".

    Starlette's routing would try one route after the other, and FastAPI's took 0.16 of a request's 0.65 ms, while the
    requests of a burst wait for each other (tests/benchmarks/bench_http.py).
    """

    def __init__(self, routes: Iterable[Route], client: EngineClient) -> None:
        self._client = client
        self._exact: dict[str, dict[str, Route]] = {}  # by path and method
        self._patterns: list[tuple[re.Pattern[str], Route]] = []
        for route in routes:
            if "{" in route.path:
                self._patterns.append((compile_path(route.path)[0], route))
            else:
                self._exact.setdefault(route.path, {})[route.method] = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: ASGIApp
        try:
            response = await self._answer(scope, receive)
        except asyncio.CancelledError:
            if self._client.state in ("ready", "leaving"):
                raise
            response = response_for(self._client.unavailable())
        except Exception as error:
            response = response_for(error)
        await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        path, method = scope["path"], scope["method"]
        route = self._exact.get(path, {}).get(method)
        if route is None:
            found = self._matching(path)
            if not found:
                return self._absent(scope)
            if method not in found:
                headers = {"Allow": ", ".join(sorted(found))}
                return error_response(405, "this route does not take that method", headers=headers)
            route, scope["path_params"] = found[method]
        if route.admin:
            require_admin()
        return await route.handler(Request(scope, receive))

    def _matching(self, path: str) -> dict[str, tuple[Route, dict[str, str]]]:
        """The routes of a path by method, with the path's parameters."""
        found: dict[str, tuple[Route, dict[str, str]]] = {}
        for pattern, route in self._patterns:
            match = pattern.match(path)
            if match is not None:
                found.setdefault(route.method, (route, match.groupdict()))
        return found | {method: (route, {}) for method, route in self._exact.get(path, {}).items()}

    def _absent(self, scope: Scope) -> Response:
        """Redirects from a path with a slash too many. Raises `InvalidRequest` with the path that was meant, if any."""
        path = scope["path"]
        shorter = path.rstrip("/")
        if shorter != path and self._matching(shorter):
            return RedirectResponse(str(URL(scope={**scope, "path": shorter})))
        problem = "GET /openapi.json lists what there is, POST /v1/chat/completions and /generate among it"
        rest = path.removeprefix("/v1")
        for meant in (rest, f"/v1{rest}"):
            if meant in self._exact:
                problem = f"did you mean {meant}? {_BASE_URLS}"
                break
        raise InvalidRequest(None, f"no such route: {problem}", status=404)
