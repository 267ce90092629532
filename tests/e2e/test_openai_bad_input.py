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

HUGE = 10**30
PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hello"}


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def called(**function: Any) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}", **function}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


# (field, values that must be refused)
FIELDS: list[tuple[str, list[Any]]] = [
    (
        "messages",
        [[], None, "hello", {"role": "user"}, 7, [7], ["hello"], [None], [[]], [USER] * 5000, [USER] * 20_000],
    ),
    ("messages", [[{}], [{"content": "x"}], [{"role": None, "content": "x"}], [{"role": 7, "content": "x"}]]),
    ("messages", [[{"role": "judge", "content": "x"}], [{"role": "function", "content": "x", "name": "f"}]]),
    ("messages", [[{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": 7}]]),
    ("messages", [[{"role": "user", "content": {"text": "x"}}], [{"role": "tool", "content": None}]]),
    ("messages", [[{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"text": "x"}]}]]),
    ("messages", [[{"role": "user", "content": [{"type": "text", "text": 7}]}], [{"role": "user", "content": [None]}]]),
    ("messages", [[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.1.1"}}]}]]),
    ("messages", [[{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]]),
    ("messages", [[{"role": "user", "content": [{"type": "text", "text": "x"}] * 5000}]]),
    (
        "messages",
        [[{"role": "user", "content": "x", "name": 7}], [{"role": "user", "content": "x", "name": "x" * 600}]],
    ),
    ("messages", [[USER, {"role": "user", "content": "x", "tool_calls": [{}]}], [USER, {**called(), "tool_calls": 7}]]),
    (
        "messages",
        [[USER, {"role": "assistant", "tool_calls": [7]}], [USER, called(name=None)], [USER, called(name="")]],
    ),
    ("messages", [[USER, called(arguments=7)], [USER, called(arguments="{")], [USER, called(arguments="[1]")]]),
    ("messages", [[USER, {"role": "assistant", "function_call": {"name": "f"}}], [USER, called(name="x" * 600)]]),
    ("messages", [[USER, {"role": "assistant", "content": "x", "audio": {"id": "a"}}]]),
    ("messages", [[{"role": "user", "content": "word " * 60_000}], [{**USER, "x": deep(100)}]]),
    ("model", ["someone-elses", "", 7]),
    ("max_tokens", [-1, HUGE, 1.5, "1", True, 32_768, [1]]),
    ("max_completion_tokens", [-1, HUGE, 1.5, "1", True, 32_768]),
    ("max_tokens", [2]),  # max_completion_tokens is 1
    ("min_tokens", [-1, 2, HUGE, "1"]),
    ("temperature", [-0.1, 101, 1e300, "hot", True, [], {}]),
    ("top_p", [0, -1, 1.1, "1"]),
    ("top_k", [-2, HUGE, 1.5, "1"]),
    ("min_p", [-0.1, 1.1, "x"]),
    ("frequency_penalty", [-2.1, 2.1, "x"]),
    ("presence_penalty", [-2.1, 2.1, "x"]),
    ("repetition_penalty", [0, -1, 101, "x"]),
    ("seed", [-1, 2**63, HUGE, 1.5, "x", True]),
    ("n", [0, -1, 129, 10**9, HUGE, "2", 1.5]),
    ("logprobs", [5, "yes", [1]]),
    ("top_logprobs", [1]),  # without logprobs
    ("stream", ["yes", 1, {}]),
    ("stream_options", [{"include_usage": True}, 7, [], {"include_usage": "yes"}]),
    ("stop", [[""], "", ["x"] * 10_000, "x" * 5000, [1], 7, {"a": 1}, [["a"]], [None]]),
    ("stop_token_ids", [[-1], [400_000], [HUGE], ["1"], 1, [0] * 10_000]),
    ("logit_bias", [{"-1": 1}, {"400000": 1}, {"x": 1}, {"1": 101}, {"1": "a"}, {"9" * 40: 1}, [1], {" 1": 1}]),
    ("logit_bias", [{str(i): 1 for i in range(2000)}]),
    ("ignore_eos", ["no", 0]),
    ("skip_special_tokens", ["no", 0]),
    ("tools", [7, {"type": "function"}, [7], [{}], [{"type": "retrieval"}], [tool(name="")], [tool(name="a b")]]),
    ("tools", [[tool()], [tool()] * 200, [tool(parameters=deep(100))], [tool(parameters="{}")], [tool(strict=1)]]),
    ("tool_choice", ["always", 7, "required", {"type": "function"}, {"type": "function", "function": {"name": "g"}}]),
    ("parallel_tool_calls", ["no", 1]),
    (
        "response_format",
        ["json", {"type": "xml"}, {}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": 1}],
    ),
    ("reasoning_effort", [7, "x" * 600]),
    ("modalities", [["audio"], "text", [1]]),
    ("chat_template", ["{{ messages }}"]),
    ("chat_template_kwargs", [7, {"tokenize": True}, {"chat_template": "x"}, {"messages": []}, {"unheard_of": 1}]),
    ("chat_template_kwargs", [{f"x{i}": 1 for i in range(100)}, {"enable_thinking": deep(100)}]),
    ("documents", [7, ["text"]]),
    ("continue_final_message", ["yes", True]),
    ("add_generation_prompt", ["yes", 1]),
    ("functions", [[{"name": "f"}]]),
    ("function_call", ["auto"]),
    ("audio", [{"voice": "alloy", "format": "wav"}]),
    ("web_search_options", [{"search_context_size": "low"}]),
    ("echo", [True]),
    ("best_of", [2]),
    ("prompt_logprobs", [1]),
    ("use_beam_search", [True]),
    ("cache_salt", [7, "x" * 5000, ["a"]]),
    ("priority", [2**31, -(2**31), "high", 1.5]),
    ("metadata", [deep(100), deep(63)]),
]
TOKENIZE: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {}),
    ("prompt", {"prompt": 7}),
    ("prompt", {"prompt": "x", "messages": [USER]}),
    ("model", {"prompt": "x", "model": "other"}),
    ("messages", {"messages": []}),
    ("messages", {"messages": [{"role": "user"}]}),
    ("tools", {"messages": [USER], "tools": [7]}),
    ("return_token_strs", {"prompt": "x", "return_token_strs": 1}),
]
DETOKENIZE: list[tuple[str, dict[str, Any]]] = [
    ("tokens", {}),
    ("tokens", {"tokens": "abc"}),
    ("tokens", {"tokens": [-1]}),
    ("tokens", {"tokens": [400_000]}),
    ("tokens", {"tokens": [HUGE]}),
    ("tokens", {"tokens": [1.5]}),
    ("tokens", {"tokens": [[1]]}),
    ("model", {"tokens": [1], "model": "other"}),
]


@pytest.fixture(autouse=True, scope="module")
def serves_afterwards(server: Any) -> Iterator[None]:
    yield
    server.idle()
    good(server)


def good(server: Any) -> None:
    answer = server.http.post(PATH, json={"messages": [USER], "max_completion_tokens": 2})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 2


def refused(server: Any, path: str, field: str, body: Any) -> str:
    """Sends it, checks the answer's shape and returns the message."""
    answer = server.http.post(path, json=body)
    assert 400 <= answer.status_code < 500, (body if len(str(body)) < 500 else field, answer.text[:500])
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"].split("[")[0].split(".")[0] == field, error
    assert field in error["message"], error
    assert len(error["message"]) < 500
    return error["message"]


@pytest.mark.parametrize(("field", "values"), FIELDS, ids=lambda value: value if isinstance(value, str) else "")
def test_chat_fields(server: Any, field: str, values: list[Any]) -> None:
    for value in values:
        body = {"messages": [USER], "max_completion_tokens": 1, field: value}
        refused(server, PATH, field, body)
        if field not in ("stream", "stream_options"):
            # Before the first event an error of a streamed request is an ordinary one.
            refused(server, PATH, field, {**body, "stream": True})
    good(server)


@pytest.mark.parametrize(("path", "cases"), [("/tokenize", TOKENIZE), ("/detokenize", DETOKENIZE)])
def test_token_routes(server: Any, path: str, cases: list[tuple[str, dict[str, Any]]]) -> None:
    for field, body in cases:
        refused(server, path, field, body)
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
        (PATH, {"messages": [USER], "metadata": deep(70)}),
    ):
        assert "nested at most 64 deep" in refused(server, path, "metadata", body)
        body["metadata"] = deep(62)  # 63 lists, in the body
        assert server.http.post(path, json=body).status_code == 200


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


def test_flags_lower_the_bounds(start_server: Any) -> None:
    server = start_server(
        max_n=2,
        max_stop_strings=1,
        max_logit_bias=1,
        max_top_logprobs=2,
        max_messages=3,
        max_tools=1,
        max_json_depth=12,
        max_header_bytes=4096,
        max_body_bytes=100_000,
        max_prompts_per_request=2,
        max_samples_per_request=3,
        max_stop_length=5,
        max_schema_bytes=200,
        max_schema_depth=4,
    )
    tools = [tool(name="f"), tool(name="g")]
    nested = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "null"}}}}}
    flat = {"type": "object", "properties": {f"field{i}": {"type": "null"} for i in range(20)}}
    for field, value, most in (
        ("n", 3, "2"),
        ("stop", ["a", "b"], "1"),
        ("logit_bias", {"1": 1, "2": 1}, "1"),
        ("messages", [USER] * 4, "3"),
        ("tools", tools, "1"),
        ("metadata", deep(11), "12 deep"),  # the body is a level too
        ("stop", "abcdef", "5"),
        ("regex", "a" * 201, "200"),
        ("guided_choice", ["a" * 100] * 2, "200"),
        ("guided_json", flat, "200"),
        ("guided_json", nested, "4 deep"),
        ("json_schema", json.dumps(nested), "4 deep"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": nested}}, "4 deep"),
        ("tools", [tool(parameters=flat)], "200"),
        ("tools", [tool(parameters=nested)], "4"),
    ):
        assert most in refused(server, PATH, field, {"messages": [USER], field: value})
    assert "2" in refused(server, PATH, "top_logprobs", {"messages": [USER], "logprobs": True, "top_logprobs": 3})
    assert "2" in refused(server, "/v1/completions", "n", {"prompt": "x", "n": 3})
    assert "2" in refused(server, "/v1/completions", "prompt", {"prompt": ["x", "y", "z"]})
    assert "2" in refused(server, "/v1/completions", "logprobs", {"prompt": "x", "logprobs": 3})
    assert "3 samples" in refused(server, "/v1/completions", "prompt", {"prompt": ["x", "y"], "n": 2})
    for sampling, most in (({"n": 3}, "2"), ({"stop": "abcdef"}, "5"), ({"json_schema": nested}, "4 deep")):
        assert most in refused(server, "/generate", "sampling_params", {"text": "x", "sampling_params": sampling})
    assert "2 prompts" in refused(server, "/generate", "text", {"text": ["x", "y", "z"]})
    assert "2 prompts" in refused(server, "/cache/warm", "prompts", {"prompts": ["x", "y", "z"]})
    assert "1" in refused(server, "/tokenize", "tools", {"messages": [USER], "tools": tools})
    branch = server.http.post("/branches", json={"text": "x"}).json()["id"]
    run = {"sampling_params": {"n": 3}}
    assert "2" in refused(server, f"/branches/{branch}/generate", "sampling_params", run)
    assert "3 samples" in refused(server, f"/branches/{branch}/score", "continuations", {"continuations": ["x"] * 4})
    server.http.delete(f"/branches/{branch}").raise_for_status()
    large = server.http.post(PATH, json={"messages": [{**USER, "content": "x" * 200_000}]})
    assert (large.status_code, "100000 bytes" in large.text) == (413, True)
    at_most = {"n": 2, "stop": "abcde", "logit_bias": {"1": 1}, "metadata": deep(10)}
    assert server.http.post(PATH, json={"messages": [USER] * 3, "max_tokens": 1, **at_most}).status_code == 200
    with socket.create_connection((server.info["host"], server.info["port"]), timeout=5) as raw:
        with contextlib.suppress(ConnectionError):  # it may close before it has read everything
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 3_000_000)
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
