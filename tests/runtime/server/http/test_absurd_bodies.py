"""Large bodies that are wrong are refused at once: everybody waits for the loop that looks at them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.state import AppState

USER = {"role": "user", "content": "a"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MANY = 300_000
PARTS = [{"type": "text", "text": "a"}] * 4096
HUGE_SCHEMA = {"type": "object", "enum": [7] * (20 * MANY // 5)}
TOOL = {"type": "function", "function": {"name": "f", "parameters": HUGE_SCHEMA}}

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
# (path, field the error names, body)
WRONG: list[tuple[str, str, dict[str, Any]]] = [
    (CHAT, "stop_token_ids", {"messages": [USER], "stop_token_ids": ["a"] * MANY}),
    (CHAT, "structured_outputs", {"messages": [USER], "structured_outputs": {"choice": [7] * MANY}}),
    (CHAT, "documents", {"messages": [USER], "documents": [{}] * MANY}),
    (CHAT, "messages", {"messages": [{"role": "assistant", "tool_calls": [CALL] * 100_000}]}),
    (CHAT, "messages", {"messages": [{"role": "user", "content": PARTS}] * 50}),
    (CHAT, "messages", {"messages": [{"role": [7] * MANY}]}),
    (CHAT, "prompt_cache_breakpoint", {"messages": [USER], "prompt_cache_breakpoint": {"at": [7] * MANY}}),
    (CHAT, "tools", {"messages": [USER], "tools": [{"type": [7] * MANY}]}),
    (CHAT, "tools", {"messages": [USER], "tools": [TOOL]}),
    (MESSAGES, "tools", {"messages": [USER], "max_tokens": 5, "tools": [{"name": "f", "input_schema": HUGE_SCHEMA}]}),
    (RESPONSES, "include", {"input": "a", "include": [7] * MANY}),
    (RESPONSES, "metadata", {"input": "a", "metadata": {str(i): "" for i in range(MANY)}}),
    (RESPONSES, "input", {"input": [{"type": "reasoning", "content": [{"text": "a"}] * MANY}]}),
    (RESPONSES, "logit_bias", {"input": "a", "logit_bias": {"a." * MANY: 1}}),
    (MESSAGES, "stop_sequences", {"messages": [USER], "max_tokens": 5, "stop_sequences": [7] * MANY}),
    ("/generate", "return_logprob", {"text": "a", "return_logprob": [7] * MANY}),
    ("/generate", "sampling_params", {"text": "a", "sampling_params": {"choices": [7] * MANY}}),
    ("/generate", "sampling_params", {"text": "a", "sampling_params": {"a" * MANY: 1}}),
    ("/v1/completions", "logit_bias", {"prompt": "a", "logit_bias": {"a" * MANY: "a"}}),
    ("/cache/warm", "prompts", {"prompts": ["a"] * MANY}),
]


@pytest.mark.parametrize(("path", "field", "body"), WRONG, ids=[f"{path} {field}" for path, field, _ in WRONG])
async def test_it_is_refused_at_once_and_in_few_words(
    make_state: Callable[..., AppState], path: str, field: str, body: dict[str, Any]
) -> None:
    """Four million strings where numbers were due took a minute, in which nobody else was answered."""
    transport = httpx.ASGITransport(make_app(make_state(max_json_values=10_000_000)))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        content = msgspec.json.encode(body)
        started = time.process_time()
        answer = await http.post(path, content=content)
        assert time.process_time() - started < 5.0
    assert answer.status_code == 400, answer.text[:300]
    assert len(answer.content) < 2000
    error = answer.json()["error"]
    assert field in error["message"]
    if path != MESSAGES:
        assert error["param"].split("[")[0].split(".")[0] == field
