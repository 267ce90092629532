"""The two busy routes answer alike with and without the framework around them."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from branchwise.runtime.server.http.app import make_app, make_framework, make_routes
from branchwise.runtime.server.http.plumbing.errors import ClientGone
from branchwise.runtime.server.http.plumbing.request_id import RequestId
from branchwise.runtime.server.http.plumbing.shortcut import Shortcut
from branchwise.runtime.server.http.state import AppState


def connect(app: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"prompt": [400]}', b'{"prompt": "", "text": ""}'])
async def test_refusals_are_the_same(make_state: Callable[..., AppState], path: str, body: bytes) -> None:
    app = make_app(make_state())
    state = make_state()
    bare = RequestId(make_framework(state, make_routes(state)))
    async with connect(app) as short, connect(bare) as long:
        named = {"X-Request-Id": "1"}
        ours, theirs = [await http.post(path, content=body, headers=named) for http in (short, long)]
    assert 400 <= ours.status_code < 500
    assert (ours.status_code, ours.json(), ours.headers) == (theirs.status_code, theirs.json(), theirs.headers)


async def test_what_the_framework_is_still_for(make_state: Callable[..., AppState]) -> None:
    async with connect(make_app(make_state())) as http:
        assert (await http.get("/generate")).status_code == 405
        assert (await http.post("/v1/completions/")).status_code in (307, 404)
        schema = (await http.get("/openapi.json")).json()
    for path, field in (("/v1/completions", "prompt"), ("/generate", "input_ids")):
        described = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert field in schema["components"]["schemas"][described.rpartition("/")[2]]["properties"]


@pytest.mark.parametrize(("error", "status"), [(ClientGone(), 499), (ZeroDivisionError("secret"), 500)])
async def test_any_error_has_an_answer(error: Exception, status: int) -> None:
    async def handler(_request: Request) -> Response:
        raise error

    async def application(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise AssertionError("the handler is there to answer")

    async with connect(Shortcut(application, {"/busy": handler})) as http:
        answer = await http.post("/busy")
    assert answer.status_code == status
    assert "secret" not in answer.text
