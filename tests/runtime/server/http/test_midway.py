"""A request that fails after its stream has begun: the error is the last event, and nothing of it stays behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from branchwise.runtime.messages import Abort, Delta, Finished, Generate, Message, Refusal
from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.engine_client import EngineClient
from branchwise.runtime.server.http.state import AppState

PROMPTS = {"/v1/completions": "prompt[0]", "/v1/chat/completions": "messages", "/generate": "text[0]"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 5},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "n": 2},
    "/generate": {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 5}},
}


@pytest.mark.parametrize("status", [500, 503, 400])
@pytest.mark.parametrize("path", BODIES)
async def test_the_error_is_the_last_event_and_what_ran_beside_it_is_aborted(
    make_state: Callable[..., AppState], client: EngineClient, sent: list[Message], path: str, status: int
) -> None:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_app(make_state())), base_url="http://localhost"
    ) as http:
        asking = asyncio.create_task(http.post(path, json={**BODIES[path], "stream": True}))
        while not sent:
            await asyncio.sleep(0.01)
        ids = [id for message in sent if isinstance(message, Generate) for id in message.ids]
        assert len(ids) == 2
        client.deliver([Delta(id, "so far", b"\1\0\0\0", prompt_tokens=3) for id in ids])
        for _ in range(50):  # until it has been sent
            await asyncio.sleep(0)
        sent.clear()
        named = status != 503
        failure = Finished(ids[0], "error", error=Refusal("prompt" if named else None, "tore a page", status))
        client.deliver([Delta(ids[0], finish=failure)])
        answer = await asyncio.wait_for(asking, 60)
    assert answer.status_code == 200, "it had begun"
    *events, last = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert len(events) >= 2
    assert not any("error" in event for event in events)
    assert last["error"]["message"] == f"{PROMPTS[path]} tore a page" if named else "tore a page"
    assert last["error"]["param"] == (PROMPTS[path] if named else None)
    assert last["error"]["type"] == {500: "server_error", 503: "overloaded_error", 400: "invalid_request_error"}[status]
    assert sent == [Abort(ids[1])]
    assert client.in_flight == 1
    client.deliver([Delta(ids[1], finish=Finished(ids[1], "abort"))])
    assert client.in_flight == 0
