"""Whatever is wrong with a chat: a 4xx that names the field, in OpenAI's shape, and the next good one is served."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hello"}


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.fixture(autouse=True, scope="module")
def serves_afterwards(server: Any) -> Iterator[None]:
    yield
    server.idle()
    good(server)


def good(server: Any) -> None:
    answer = server.http.post(PATH, json={"messages": [USER], "max_completion_tokens": 2})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_no_tokens_and_no_special_ones(server: Any) -> None:
    assert server.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    body = {"prompt": "", "add_special_tokens": False}
    assert server.http.post("/tokenize", json=body).json()["tokens"] == []
    assert server.http.post("/tokenize", json={**body, "add_special_tokens": True}).json()["count"] == 1, "<bos>"


@pytest.mark.parametrize("path", [PATH, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"messages":' * 50_000, b"\xff"])
def test_bodies_that_are_not_json_objects(server: Any, path: str, body: bytes) -> None:
    answer = server.http.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_nesting_is_bounded_on_every_route(server: Any) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x", "metadata": deep(70)}),
        ("/generate", {"text": "x", "metadata": deep(70)}),
        (PATH, {"messages": [USER], "max_tokens": 1, "metadata": deep(70)}),
    ):
        assert "nested at most 64 deep" in server.refused(path, "metadata", json=body)
        body["metadata"] = deep(62)  # 63 lists, in the body
        assert server.http.post(path, json=body).status_code == 200


def test_tools_that_the_template_would_leave_out_are_refused_on_every_route(server: Any) -> None:
    """Where a conversation is only counted or looked up too: its prompt would be another than was meant."""
    body = {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}
    for path in (PATH, "/tokenize", "/cache/explain", "/branches"):
        assert "are not supported: this model's chat template" in server.refused(path, "tools", json=body)


def test_what_changes_nothing_is_ignored(server: Any) -> None:
    body = {
        "messages": [USER],
        "max_completion_tokens": 1,
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "verbosity": "low",
        "prediction": {"type": "content", "content": "x"},
        "unheard_of": [1],
        "chat_template_kwargs": {"enable_thinking": False},
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "logit_bias": {},
        "stop": None,
        "n": None,
        "max_tokens": None,
    }
    assert server.http.post(PATH, json=body).status_code == 200


def test_what_an_output_must_be_is_bounded(server: Any) -> None:
    """By the same limits whichever route and whichever field it comes through."""
    deep_text = '{"not":' * 65 + "{}" + "}" * 65  # as text: the levels of a body are bounded too
    long = {"type": "object", "description": "x" * 131_072}
    for field, value, most in (
        ("regex", "a" * 131_073, "131072"),
        ("structured_outputs.choice", {"choice": ["a" * 65_536] * 2}, "131072"),
        ("structured_outputs.json", {"json": long}, "131072"),
        ("json_schema", deep_text, "64 deep"),
        ("tools", [tool(parameters=long)], "65536"),
    ):
        assert most in server.refused(PATH, field, json={"messages": [USER], field.split(".")[0]: value})
    sampling = {"json_schema": deep_text}
    assert "64 deep" in server.refused("/generate", "sampling_params", json={"text": "x", "sampling_params": sampling})
    branch = server.http.post("/branches", json={"text": "x"}).json()["id"]
    run = {"sampling_params": {"n": 129}}
    assert "128" in server.refused(f"/branches/{branch}/generate", "sampling_params", json=run)
    server.http.delete(f"/branches/{branch}").raise_for_status()


def test_flags_lower_the_bounds(start_server: Any) -> None:
    server = start_server(
        max_messages=3,
        max_tools=1,
        max_json_depth=12,
        max_header_bytes=4096,
        max_body_bytes=100_000,
        max_prompts_per_request=2,
        max_samples_per_request=3,
    )
    tools = [tool(name="f"), tool(name="g")]
    for field, value, most in (
        ("messages", [USER] * 4, "3"),
        ("tools", tools, "1"),
        ("metadata", deep(11), "12 deep"),  # the body is a level too
    ):
        assert most in server.refused(PATH, field, json={"messages": [USER], field: value})
    assert "2" in server.refused("/v1/completions", "prompt", json={"prompt": ["x", "y", "z"]})
    assert "3 samples" in server.refused("/v1/completions", "prompt", json={"prompt": ["x", "y"], "n": 2})
    assert "2 prompts" in server.refused("/generate", "text", json={"text": ["x", "y", "z"]})
    assert "2 prompts" in server.refused("/cache/warm", "prompts", json={"prompts": ["x", "y", "z"]})
    assert "1" in server.refused("/tokenize", "tools", json={"messages": [USER], "tools": tools})
    branch = server.http.post("/branches", json={"text": "x"}).json()["id"]
    assert "3 samples" in server.refused(
        f"/branches/{branch}/score", "continuations", json={"continuations": ["x"] * 4}
    )
    server.http.delete(f"/branches/{branch}").raise_for_status()
    large = server.http.post(PATH, json={"messages": [{**USER, "content": "x" * 200_000}]})
    assert (large.status_code, "100000 bytes" in large.text) == (413, True)
    at_most = {"n": 2, "metadata": deep(10)}
    assert server.http.post(PATH, json={"messages": [USER] * 3, "max_tokens": 1, **at_most}).status_code == 200
    with socket.create_connection((server.info["host"], server.info["port"]), timeout=60) as raw:
        with contextlib.suppress(ConnectionError):  # it may close before it has read everything
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 3_000_000)
        said = raw.recv(65536)
    assert b"400" in said.split(b"\r\n")[0]
    assert "4096 bytes" in json.loads(said.split(b"\r\n\r\n")[1])["error"]["message"]
    good(server)
    assert server.stop() == 0


def test_a_model_without_a_template_says_so(start_server: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tokenizer_folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    server = start_server(ServerConfig(engine=EngineConfig(model=str(folder)), port=0, null_executor=True))
    answer = server.http.post(PATH, json={"messages": [USER]})
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]
    assert server.http.get("/tokenizer_info").json()["chat_template"] is None
    assert server.stop() == 0
