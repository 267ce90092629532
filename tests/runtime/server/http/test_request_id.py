"""Every answer has an id, the client's or ours, whoever gives the answer."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.state import AppState


@pytest.fixture
async def http(make_state: Callable[..., AppState]) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(make_app(make_state(api_key="key")), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_each_answer_has_an_id_of_its_own(http: httpx.AsyncClient) -> None:
    answers = [await http.get("/nowhere"), await http.get("/health"), await http.post("/v1/completions", content=b"{")]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(id.startswith("req_") for id in ids) and len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("given", "kept"), [("trace-7/a", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)]
)
async def test_a_clients_own_is_given_back(http: httpx.AsyncClient, given: str, kept: bool) -> None:
    answer = await http.get("/health", headers={"X-Request-Id": given})
    assert (answer.headers["x-request-id"] == given) is kept
