"""Every route needs the key, by whatever name the request reaches it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Route

from branchwise.runtime.server.http.app import make_app, make_framework, make_routes
from branchwise.runtime.server.http.plumbing.auth import OPEN_PATHS, Namespaces
from branchwise.runtime.server.http.state import AppState
from branchwise.runtime.server.http.ui import page

KEY = "sesame-ключ"


@pytest.fixture
def app(make_state: Callable[..., AppState]) -> Any:
    return make_app(make_state(api_key=KEY))


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


def paths(app: FastAPI) -> Iterator[tuple[str, str]]:
    """(method, path) of every route FastAPI would serve, parameters filled in."""
    found = {
        (method.upper(), path.replace("{id}", "model"))
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }
    found |= {("GET", route.path) for route in app.routes if isinstance(route, Route) and "{" not in route.path}
    yield from sorted(found)


async def test_every_route_but_health_needs_the_key(app: Any, make_state: Callable[..., AppState]) -> None:
    state = make_state(api_key=KEY)
    routes = list(paths(make_framework(state, make_routes(state))))
    assert {path for _, path in routes} >= {
        *(
            "/generate",
            "/v1/completions",
            "/v1/models",
            "/v1/models/model",
            "/metrics",
            "/cache/tree",
            "/cache/check",
            "/health",
        ),
        *("/cache/check", "/flush_cache", "/abort_request", "/get_server_info", "/server_info", "/openapi.json"),
    }
    async with client(app) as http:
        for method, path in [*routes, ("GET", "/nowhere"), ("OPTIONS", "/generate"), ("HEAD", "/metrics")]:
            answer = await http.request(method, path)
            if path in OPEN_PATHS or path in page.open_paths():  # the page's files are the same for everybody
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, (method, path)
            if method != "HEAD":
                assert answer.json()["error"]["type"] == "authentication_error"
    assert {"/health"} == OPEN_PATHS


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer  {KEY}"},
        {"X-API-Key": KEY},
        {"X-API-Key": KEY, "Authorization": "Bearer other"},
    ],
)
async def test_the_key_opens(app: Any, headers: dict[str, str]) -> None:
    async with client(app) as http:
        answer = await http.get("/v1/models", headers={name: value.encode() for name, value in headers.items()})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": KEY},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Basic {KEY}"},
        {"X-API-Key": ""},
        {"X-API-Key": KEY[:-1]},
        {"Cookie": f"key={KEY}"},
        # Routing uses the path of the request line; what a Host header makes of the URL must not matter.
        {"Host": "test/health?"},
        {"Host": "/health"},
    ],
)
async def test_nothing_else_opens(app: Any, headers: dict[str, str]) -> None:
    async with client(app) as http:
        answer = await http.get("/v1/models", headers={name: value.encode() for name, value in headers.items()})
        assert answer.status_code == 401


@pytest.mark.parametrize("path", ["//health", "/health/", "/health/../v1/models", "/v1/models?/health", "/Health"])
async def test_only_the_exact_path_is_open(app: Any, path: str) -> None:
    statuses: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    path, _, query = path.partition("?")
    scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": []}
    await app(scope, receive, send)
    assert statuses == [401]


async def test_websockets_are_closed(app: Any) -> None:
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    await app({"type": "websocket", "path": "/generate", "headers": []}, asyncio.Queue().get, send)
    assert messages == [{"type": "websocket.close", "code": 1008}]


async def test_no_key_no_questions(make_state: Callable[..., AppState]) -> None:
    async with client(make_app(make_state())) as http:
        assert (await http.get("/v1/models")).status_code == 200


def test_namespaces() -> None:
    assert Namespaces(None).of(None) == ("", "")
    keyed = Namespaces(KEY)
    owner, salt = keyed.of("salt")
    assert len(owner) == len(salt) == 32
    assert KEY not in owner
    assert "salt" not in salt, "the tree is shown to people; a salt is a secret"
    assert keyed.of("salt") == (owner, salt)
    assert keyed.of(None) == keyed.of("") == (owner, "")
    both = [keyed.of(*pair)[1] for pair in (("ab", "c"), ("a", "bc"), ("abc", None), (None, "abc"), ("2:abc", None))]
    assert both[2] == both[3], "two words for one thing"
    assert len({*both, salt, ""}) == 6, "no two ways of dividing meet"
    # No client can name another key's namespace: owners come from the key and a secret of this very process.
    assert Namespaces("other").of("salt")[0] not in ("", owner)
    assert Namespaces(KEY).of(None)[0] != owner
