"""A request that is cancelled because the server ends gets an error in the usual shape."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from branchwise.runtime.errors import EngineDead
from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.native import tokens
from branchwise.runtime.server.http.state import AppState


@pytest.mark.parametrize(("state", "status", "code"), [("dead", 500, "engine_dead"), ("draining", 503, "overloaded")])
async def test_a_text_that_is_being_tokenized_when_the_server_ends(
    make_state: Callable[..., AppState], monkeypatch: pytest.MonkeyPatch, state: Any, status: int, code: str
) -> None:
    app_state, begun, gate = make_state(), threading.Event(), threading.Event()
    monkeypatch.setattr(app_state.tokenizer, "encode", lambda *_: begun.set() or gate.wait(200))
    before = asyncio.all_tasks()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_app(app_state)), base_url="http://localhost"
    ) as http:
        request = asyncio.create_task(http.post("/tokenize", json={"prompt": "x" * (tokens.INLINE + 1)}))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        if state == "dead":
            app_state.client.died(EngineDead("the engine has stopped; the server is going down"))
        app_state.client.state = state
        for task in asyncio.all_tasks() - before:
            task.cancel()  # as the HTTP server does
        answer = await asyncio.wait_for(request, 60)
        gate.set()
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code


async def test_a_client_that_leaves_is_still_cancelled(
    make_state: Callable[..., AppState], monkeypatch: pytest.MonkeyPatch
) -> None:
    app_state, begun, gate = make_state(), threading.Event(), threading.Event()
    monkeypatch.setattr(app_state.tokenizer, "encode", lambda *_: begun.set() or gate.wait(200))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_app(app_state)), base_url="http://localhost"
    ) as http:
        request = asyncio.create_task(http.post("/tokenize", json={"prompt": "x" * (tokens.INLINE + 1)}))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        gate.set()
