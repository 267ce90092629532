"""Whoever refuses a request to ``/v1/messages``, its client gets Anthropic's error; other routes keep OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from branchwise.runtime.errors import EngineDead, InvalidRequest, Overloaded
from branchwise.runtime.server.http.anthropic.errors import MessagesErrors, error_event
from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.plumbing.errors import ClientGone
from branchwise.runtime.server.http.plumbing.request_id import RequestId
from branchwise.runtime.server.http.plumbing.shortcut import Shortcut
from branchwise.runtime.server.http.state import AppState

PATHS = ["/v1/messages", "/v1/messages/count_tokens"]
BODY = {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}


def connect(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


def error_of(answer: httpx.Response, status: int, kind: str) -> str:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.content)
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] == kind
    assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    assert body["request_id"].startswith("req_")
    return body["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_before_the_route(make_state: Callable[..., AppState], path: str) -> None:
    app = make_app(make_state(api_key="key", max_body_bytes=500, max_json_depth=8))
    async with connect(app) as http:
        denied = await http.post(path, json=BODY)
        assert "API key" in error_of(denied, 401, "authentication_error")
        assert denied.headers["www-authenticate"] == "Bearer"
        http.headers["x-api-key"] = "key"
        large = await http.post(path, content=b"x" * 501)
        assert "500 bytes" in error_of(large, 413, "request_too_large")
        assert large.headers["connection"] == "close"

        async def chunks() -> Any:
            for _ in range(6):
                yield b"x" * 100

        assert "500 bytes" in error_of(await http.post(path, content=chunks()), 413, "request_too_large")
        error_of(await http.get(path), 405, "invalid_request_error")
        error_of(await http.get(f"{path}/none"), 404, "not_found_error")
        assert "JSON" in error_of(await http.post(path, content=b"{"), 400, "invalid_request_error")
        model = await http.post(path, json={**BODY, "model": "other"})
        assert "'other'" in error_of(model, 404, "not_found_error")
        for other in ("/v1/messages2", "/v1/message", "/v1/completions"):
            answer = await http.post(other, content=b"{")
            assert "type" not in answer.json()
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert "request-id" not in answer.headers and answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest(None, "no", status=403), 403, "permission_error"),
        (InvalidRequest(None, "no", status=409), 409, "invalid_request_error"),
        (InvalidRequest(None, "no", status=429), 429, "rate_limit_error"),
        (Overloaded("full"), 529, "overloaded_error"),
        (EngineDead("dead"), 500, "api_error"),
        (ZeroDivisionError("secret"), 500, "api_error"),
    ],
)
async def test_from_the_route(error: Exception, status: int, kind: str) -> None:
    async def handler(_request: Request) -> Response:
        raise error

    async def application(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise AssertionError("the handler is there to answer")

    async with connect(RequestId(MessagesErrors(Shortcut(application, {"/v1/messages": handler})))) as http:
        answer = await http.post("/v1/messages")
    assert "secret" not in error_of(answer, status, kind)
    assert ("retry-after" in answer.headers) == (status in (429, 529))


async def test_nobody_is_told_when_the_client_has_gone() -> None:
    async def handler(_request: Request) -> Response:
        raise ClientGone

    app = RequestId(MessagesErrors(Shortcut(None, {"/v1/messages": handler})))  # type: ignore[arg-type]
    async with connect(app) as http:
        answer = await http.post("/v1/messages")
    assert (answer.status_code, answer.content) == (499, b"")


def test_in_the_middle_of_a_stream() -> None:
    sent = error_event(Overloaded("the server is shutting down"), "req_1")
    name, data = sent.decode().rstrip("\n").split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "the server is shutting down"},
        "request_id": "req_1",
    }
