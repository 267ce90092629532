"""Each request reaches the handler of its route, and whatever that raises has an answer."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.engine_client import EngineClient
from branchwise.runtime.server.http.plumbing.errors import ClientGone
from branchwise.runtime.server.http.plumbing.router import Router
from branchwise.runtime.server.http.plumbing.routes import Method, Route
from branchwise.runtime.server.http.state import AppState


def connect(app: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


def route(method: Method, path: str) -> Route:
    async def handler(request: Request) -> Response:
        return Response(f"{path} {request.path_params.get('id')}")

    return Route(method, path, handler)


async def test_exact_paths_come_before_patterns_of_the_same_method(client: EngineClient) -> None:
    routes = [route("GET", "/a/{id}"), route("POST", "/a/b"), route("GET", "/a"), route("GET", "/p/{id:path}")]
    async with connect(Router(routes, client)) as http:
        for method, path, found in (
            ("GET", "/a", "/a None"),
            ("GET", "/a/x%20y", "/a/{id} x y"),
            ("POST", "/a/b", "/a/b None"),
            ("GET", "/a/b", "/a/{id} b"),
            ("GET", "/p/q/r", "/p/{id:path} q/r"),
        ):
            assert (await http.request(method, path)).text == found
        for method, path, allowed in (("DELETE", "/a/b", "GET, POST"), ("POST", "/a/x", "GET"), ("HEAD", "/a", "GET")):
            refused = await http.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        assert (await http.get("/a/b/c")).status_code == 404


async def test_a_slash_too_many_is_redirected(make_state: Callable[..., AppState]) -> None:
    async with connect(make_app(make_state())) as http:
        moved = await http.post("/v1/completions/", json={})
        assert (moved.status_code, moved.headers["location"]) == (307, "http://localhost/v1/completions")
        assert (await http.post("/nowhere/", json={})).status_code == 404


async def test_the_document_has_every_generating_route(make_state: Callable[..., AppState]) -> None:
    async with connect(make_app(make_state())) as http:
        schema = (await http.get("/openapi.json")).json()
    for path, field in (("/v1/completions", "prompt"), ("/generate", "input_ids")):
        described = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert field in schema["components"]["schemas"][described.rpartition("/")[2]]["properties"]


@pytest.mark.parametrize(("error", "status"), [(ClientGone(), 499), (ZeroDivisionError("secret"), 500)])
async def test_any_error_has_an_answer(client: EngineClient, error: Exception, status: int) -> None:
    async def handler(_: Request) -> Response:
        raise error

    async with connect(Router([Route("POST", "/busy", handler)], client)) as http:
        answer = await http.post("/busy")
    assert answer.status_code == status
    assert "secret" not in answer.text
