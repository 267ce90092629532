"""Tools and structured output over HTTP, of a model whose markers are added tokens and not special, as Qwen 3's are."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

PATH = Path(__file__).parents[1] / "runtime" / "grammar" / "added_tokens.py"
X = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
ASKED = [{"role": "user", "content": "x"}]


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": X, **more}}


@pytest.fixture(scope="module")
def folder(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("branchwise_added_tokens", PATH)
    assert spec is not None and spec.loader is not None
    added = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(added)
    made: Path = checkpoints.build("llama-gqa", tmp_path_factory.mktemp("qwen") / "model", vocab_size=420)
    added.add(made, added.QWEN, added.THINKING)
    return made


@pytest.fixture(scope="module")
def running(folder: Path, run_server_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    engine = EngineConfig(model=str(folder), kv_cache_tokens=4096, check_when_idle=True)
    with run_server_process(ServerConfig(engine=engine, port=0), tmp_path_factory.mktemp("run")) as server:
        yield server
        server.idle()


def answer(server: Any, folder: Path, stream: bool, biased: dict[str, float], **fields: Any) -> dict[str, Any]:
    """The first choice, folded from chunks if it is streamed: content, reasoning, calls [(name, arguments)], finish."""
    tokenizer = Tokenizer.load(folder)
    bias = {str(tokenizer.backend.token_to_id(text)): value for text, value in biased.items()}
    body = {"messages": ASKED, "max_tokens": 100, "temperature": 0, "logit_bias": bias, "stream": stream, **fields}
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    if not stream:
        choice = reply.json()["choices"][0]
        parts, finish = [choice["message"]], choice["finish_reason"]
    else:
        chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        assert not [chunk for chunk in chunks if "error" in chunk], chunks[-1]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        parts, finish = [choice["delta"] for choice in choices], choices[-1]["finish_reason"]
    calls: dict[int, list[str]] = {}
    for part in parts:
        for i, call in enumerate(part.get("tool_calls") or []):
            made = calls.setdefault(call.get("index", i), ["", ""])
            made[0] += call["function"].get("name") or ""
            made[1] += call["function"].get("arguments") or ""
    joined = {name: "".join(part.get(name) or "" for part in parts) for name in ("content", "reasoning_content")}
    return {**joined, "calls": [tuple(call) for call in calls.values()], "finish": finish}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g"}}])
def test_a_forced_call(running: Any, folder: Path, choice: Any, thinks: bool, stream: bool) -> None:
    fields = {
        "tools": [tool("g"), tool("h")] if choice == "required" else [tool("f"), tool("g")],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"enable_thinking": thinks},
    }
    got = answer(running, folder, stream, {"<think>": 50.0, "</think>": 100.0}, **fields)
    [(name, arguments)] = got["calls"]
    assert name in ("g", "h") and json.loads(arguments)["x"] in (1, 2)
    assert got["finish"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_strict_tool_with_auto(running: Any, folder: Path, stream: bool) -> None:
    fields = {"tools": [tool("f", strict=True)], "parallel_tool_calls": False}
    got = answer(running, folder, stream, {"<tool_call>": 100.0}, **fields)
    [(name, arguments)] = got["calls"]
    assert name == "f" and json.loads(arguments)["x"] in (1, 2) and got["finish"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinks", [False, True])
def test_a_schema_with_and_without_thinking(running: Any, folder: Path, thinks: bool, stream: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": X, "strict": True}}
    biased = {"<think>": 50.0, "</think>": 100.0}
    fields = {"response_format": wanted, "chat_template_kwargs": {"enable_thinking": thinks}}
    got = answer(running, folder, stream, biased, **fields)
    assert json.loads(got["content"])["x"] in (1, 2) and got["finish"] == "stop", got


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"structured_outputs": {"regex": "<think>a</think>b"}}, "<think>a</think>b"),
        ({"structured_outputs": {"choice": ["<tool_call>x"]}}, "<tool_call>x"),
        ({"json_schema": '{"const": "</tool_call>"}'}, '"</tool_call>"'),
    ],
)
def test_text_that_holds_a_marker(running: Any, fields: dict[str, Any], text: str, stream: bool) -> None:
    body = {"prompt": "x", "max_tokens": 40, "stream": stream, **fields}
    reply = running.http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    if not stream:
        assert reply.json()["choices"][0]["text"] == text
        return
    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk.get("choices")) == text
