"""POST /cache/pin with ``warm`` tries twice; what happens to its first pin meanwhile is no error of the client's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.native import cache
from branchwise.runtime.server.http.state import AppState


async def test_a_first_pin_that_is_gone_is_no_error(
    make_state: Callable[..., AppState], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def ask(state: AppState, what: str, namespace: Any, **_: Any) -> dict[str, Any]:
        asked.append(what)
        if what == "cache_unpin":
            raise InvalidRequest("id", "pin-1 is not a pin: it has expired or never existed", status=404)
        tries = asked.count("cache_pin")
        return {"id": f"pin-{tries}", "tokens": 3, "missing_tokens": 2 - tries, "expires_in": 1.0}

    async def compute(*_: Any) -> list[Any]:
        return []

    monkeypatch.setattr(cache, "_ask", ask)
    monkeypatch.setattr(cache, "_compute", compute)
    transport = httpx.ASGITransport(make_app(make_state()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        answer = await http.post("/cache/pin", json={"prompt": "hello", "warm": True})
    assert (answer.status_code, answer.json()["id"]) == (200, "pin-2")
    assert asked == ["cache_pin", "cache_unpin", "cache_pin"]
