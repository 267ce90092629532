"""Whatever is wrong with a responses request: a 4xx that names the client's own field, and the next one is served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

HUGE = 10**30
PATH = "/v1/responses"
USER = {"role": "user", "content": "hello"}
CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "ok"}
REASONING = {"type": "reasoning", "id": "rs_1", "summary": []}
LOGPROBS = ["message.output_text.logprobs"]


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def said(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    return [USER, {"role": role, "content": list(parts)}]


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "name": "f", "parameters": {"type": "object"}, **fields}


def form(**fields: Any) -> dict[str, Any]:
    return {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, **fields}}


# (field, values that must be refused)
FIELDS: list[tuple[str, list[Any]]] = [
    ("input", [None, [], {}, 7, True, 1.5, [7], [None], [[]], ["hello"], [{}], [USER, {"type": 7}]]),
    ("input", [[USER] * 20_000, "word " * 60_000, [{**USER, "x": deep(100)}]]),
    ("input", [[{"role": None, "content": "x"}], [{"role": 7, "content": "x"}], [{"role": ["user"], "content": "x"}]]),
    ("input", [[{"role": "tool", "content": "x"}], [{"role": "judge", "content": "x"}], [{"type": "message"}]]),
    ("input", [[{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": 7}]]),
    ("input", [[{"role": "assistant"}], [{"role": "assistant", "content": {"text": "x"}}]]),
    ("input", [said({"type": "input_text"}), said({"text": "x"}), said(None), said(7), said({"type": "x" * 1000})]),
    ("input", [said({"type": "input_text", "text": 7}), said({"type": "output_text", "text": None}, role="assistant")]),
    ("input", [said({"type": "input_image", "image_url": "http://169.254.1.1"}), said({"type": "input_file"})]),
    ("input", [said({"type": "input_audio", "input_audio": {}}), said({"type": "refusal", "refusal": "x"})]),
    ("input", [said(*[{"type": "input_text", "text": "x"}] * 5000), said({"type": "refusal"}, role="assistant")]),
    ("input", [said({"type": "input_text", "text": "x", "cache_control": 7})]),
    ("input", [said({"type": "input_text", "text": "x", "cache_control": {"type": "forever"}})]),
    ("input", [said({"type": "input_text", "text": "x", "prompt_cache_breakpoint": "yes"})]),
    ("input", [[USER, {**CALL, "name": value}] for value in (None, "", 7, "x" * 600)]),
    ("input", [[USER, {**CALL, "call_id": value}] for value in (None, "", 7, "x" * 600, [])]),
    ("input", [[USER, {**CALL, "arguments": value}] for value in (7, [], "{", "[1]", '"x"')]),
    ("input", [[USER, CALL, {**OUTPUT, "call_id": value}] for value in (None, "", 7, "x" * 600)]),
    ("input", [[USER, CALL, {**OUTPUT, "output": value}] for value in (None, 7, {}, [7], [{"type": "input_image"}])]),
    ("input", [[USER, {**REASONING, "content": value}] for value in ("x", 7, [7], [{}], [{"text": 7}])]),
    ("input", [[USER, {**REASONING, "summary": ["x"]}]]),
    ("input", [[USER, {"type": kind, "id": "x"}] for kind in ("item_reference", "web_search", "mcp", "")]),
    ("instructions", [7, [USER], {}, True]),
    ("model", ["someone-elses", "", 7]),
    ("max_output_tokens", [-1, HUGE, 1.5, "1", True, 32_768, [1]]),
    ("min_tokens", [-1, 2, HUGE, "1"]),
    ("temperature", [-0.1, 101, 1e300, "hot", True, [], {}]),
    ("top_p", [0, -1, 1.1, "1"]),
    ("top_k", [-2, HUGE, 1.5, "1"]),
    ("min_p", [-0.1, 1.1, "x"]),
    ("frequency_penalty", [-2.1, 2.1, "x"]),
    ("presence_penalty", [-2.1, 2.1, "x"]),
    ("repetition_penalty", [0, -1, 101, "x"]),
    ("seed", [2**63, HUGE, 1.5, "x", True]),
    ("stop", [[""], "", ["x"] * 10_000, "x" * 5000, [1], 7, {"a": 1}, [None]]),
    ("stop_token_ids", [[-1], [400_000], [HUGE], ["1"], 1, [0] * 10_000]),
    ("logit_bias", [{"-1": 1}, {"400000": 1}, {"x": 1}, {"1": 101}, {"1": "a"}, [1], {str(i): 1 for i in range(2000)}]),
    ("ignore_eos", ["no", 0]),
    ("stream", ["yes", 1, {}]),
    ("stream_options", [{"include_obfuscation": False}, 7, [], {"include_obfuscation": "yes"}]),
    ("include", [7, "x", [7], ["message.output_text.tokens"], ["x" * 1000], {}]),
    ("top_logprobs", [1, -1, 21, "1", True, 1.5]),  # 1: without include
    ("text", [7, "json", [], {"format": "json"}, {"format": {}}, {"format": {"type": "xml"}}, {"verbosity": "loud"}]),
    ("text", [{"format": {"type": ["text"]}}, form(schema=None), form(schema="{}"), form(schema=7)]),
    ("text", [form(schema={"type": "object", "description": "x" * 200_000}), form(schema=deep(100))]),
    ("tools", [7, {"type": "function"}, [7], [{}], [None], [tool(type="web_search")]]),
    ("tools", [[{"type": "function"}], [{"type": "function", "function": {"name": "f"}}], [tool(name="")]]),
    ("tools", [[tool(name="a b")], [tool(name=7)], [tool(name="x" * 100)], [tool(), tool()], [tool()] * 200]),
    ("tools", [[tool(parameters=deep(100))], [tool(parameters="{}")], [tool(parameters={"type": "array"})]]),
    ("tools", [[tool(strict=1)], [tool(description=7)], [tool(**{"async": True})]]),
    ("tools", [[tool(description="x" * 20_000)], [tool(parameters={"type": "object", "title": "x" * 70_000})]]),
    ("tools", [[tool()] * 20_000]),
    ("tool_choice", ["always", 7, "required", {"type": "function"}, {"type": "function", "name": "g"}]),
    ("tool_choice", [{"type": "function", "name": 7}, {"type": "allowed_tools", "mode": "auto", "tools": []}, {}]),
    ("tool_choice", [{"type": "web_search"}, {"type": "mcp", "server_label": "x"}]),
    ("parallel_tool_calls", ["no", 1]),
    ("reasoning", [7, "low", [], {"effort": 7}, {"effort": "x" * 600}, {"effort": ""}, {"summary": 7}]),
    ("metadata", [7, [], {"a": 1}, {"a": None}, {"a": "x" * 513}, {"x" * 65: "a"}, {str(i): "a" for i in range(17)}]),
    ("metadata", [{"a": deep(100)}, {"a": {"b": "c"}}]),
    ("user", [7, "x" * 600, []]),
    ("safety_identifier", [7, "x" * 600, []]),
    ("store", ["yes", 1, {}]),
    ("truncation", ["auto", "none", 7, True]),
    ("max_tool_calls", [0, -1, "1", 1.5]),
    ("cache_salt", [7, "x" * 5000, ["a"]]),
    ("prompt_cache_key", [7, "x" * 5000]),
    ("prompt_cache_options", [7, {"mode": "forever"}, {"ttl": "1y"}, {"ttl": -1}, {"mode": "off", "ttl": "5m"}]),
    ("prompt_cache_breakpoint", ["yes", [True] * 5, {"at": -1}, {"ttl": 0}]),
    ("priority", [2**31, -(2**31), "high", 1.5]),
    ("previous_response_id", ["resp_1", "", 7, {}]),
    ("conversation", ["conv_1", {"id": "conv_1"}]),
    ("background", [True, "yes", 1]),
    ("prompt", [{"id": "pmpt_1"}, "x", [1, 2, 3], []]),
    ("context_management", [[{"type": "compaction"}]]),
    ("moderation", [{"model": "omni"}]),
    ("messages", [[USER], "hello"]),
    ("max_tokens", [1]),
    ("max_completion_tokens", [1]),
    ("response_format", [{"type": "json_object"}, {"type": "text"}, 7]),
    ("reasoning_effort", ["low"]),
    ("logprobs", [True, 5]),
    ("n", [1, 2]),
    ("functions", [[{"name": "f"}]]),
    ("regex", [7, "[", "(" * 5000, "", "x" * 200_000]),
    ("structured_outputs", [7, {}, {"regex": 7}, {"xml": "x"}]),
    ("structured_outputs", [{"choice": value} for value in ([], "yes", [""], [7])]),
    ("chat_template", ["{{ messages }}"]),
    ("chat_template_kwargs", [7, {"tokenize": True}, {"messages": []}, {"unheard_of": 1}]),
    ("continue_final_message", ["yes", True]),
    ("add_generation_prompt", ["yes", 1]),
    ("documents", [7, ["text"]]),
    ("prompt_logprobs", [1]),
    ("best_of", [2]),
]


@pytest.fixture(autouse=True, scope="module")
def serves_afterwards(server: Any) -> Iterator[None]:
    yield
    server.idle()
    good(server)


def good(server: Any) -> None:
    answer = server.http.post(PATH, json={"input": "hello", "max_output_tokens": 2})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["output_tokens"] == 2


def refused(server: Any, field: str, body: Any) -> dict[str, Any]:
    """Sends it, checks the answer's shape and returns the error."""
    answer = server.http.post(PATH, json=body)
    assert 400 <= answer.status_code < 500, (body if len(str(body)) < 500 else field, answer.text[:500])
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"].split("[")[0].split(".")[0] == field, error
    assert field in error["message"], error
    assert len(error["message"]) < 500
    return error


@pytest.mark.parametrize(("field", "values"), FIELDS, ids=lambda value: value if isinstance(value, str) else "")
def test_fields(server: Any, field: str, values: list[Any]) -> None:
    for value in values:
        body = {"input": "hello", "max_output_tokens": 1, field: value}
        refused(server, field, body)
        if field not in ("stream", "stream_options"):
            # Before the first event an error of a streamed request is an ordinary one.
            refused(server, field, {**body, "stream": True})
    good(server)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("input[2].content[1].type", {"input": [USER, CALL, *said(USER, {"type": "input_image"})[1:]]}),
        ("input[1].name", {"input": [USER, {**CALL, "name": 7}], "instructions": "Be brief."}),
        ("input[1].arguments", {"input": [USER, {**CALL, "arguments": "["}], "instructions": "Be brief."}),
        ("input[1].content[0].cache_control.type", {"input": said({"text": "x", "cache_control": {"type": "x"}})}),
        ("tools[1].parameters.type", {"tools": [tool(), tool(name="g", parameters={"type": "string"})]}),
        ("tools[0].name", {"tools": [{"type": "function", "parameters": {}}]}),
        ("text.format.schema", {"text": form(schema=[])}),
        ("text.format", {"text": form(), "regex": "a"}),
        ("reasoning.effort", {"reasoning": {"effort": 7}}),
        ("metadata.a", {"metadata": {"a": 1}}),
        ("top_logprobs", {"include": LOGPROBS, "top_logprobs": 21}),
        ("include[1]", {"include": [*LOGPROBS, "x"]}),
        ("max_output_tokens", {"max_output_tokens": 30_000, "input": "word " * 4000}),
    ],
)
def test_the_place_is_named(server: Any, field: str, body: dict[str, Any]) -> None:
    if field == "input[2].content[1].type":
        body["input"][2]["content"][0] = {"type": "input_text", "text": "x"}
    if field.endswith("cache_control.type"):
        body["input"][1]["content"][0]["type"] = "input_text"
    error = refused(server, field.split(".")[0].split("[")[0], {"input": "hello", **body})
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"input":' * 50_000, b"\xff"])
def test_bodies_that_are_not_json_objects(server: Any, body: bytes) -> None:
    answer = server.http.post(PATH, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_what_changes_nothing_is_ignored(server: Any) -> None:
    body = {
        "input": [{**USER, "status": "completed", "phase": None}, {**REASONING, "encrypted_content": None}],
        "max_output_tokens": 1,
        "previous_response_id": None,
        "conversation": None,
        "background": False,
        "prompt": None,
        "store": True,
        "service_tier": "auto",
        "truncation": "disabled",
        "include": ["reasoning.encrypted_content"],
        "top_logprobs": 0,
        "text": {"format": {"type": "text"}, "verbosity": "high"},
        "reasoning": {"effort": "low", "summary": "auto", "context": "auto"},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "metadata": {},
        "user": "me",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "max_tool_calls": 3,
        "temperature": None,
        "max_tokens": None,
        "unheard_of": [1],
        "stream_options": None,
    }
    answer = server.http.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    streamed = server.http.post(PATH, json={**body, "stream": True, "stream_options": {"include_obfuscation": True}})
    assert "response.incomplete" in streamed.text


def test_flags_lower_the_bounds(start_server: Any) -> None:
    server = start_server(max_messages=3, max_tools=1, max_json_depth=8)
    for field, value, most in (
        ("input", [USER] * 4, "3"),
        ("tools", [tool(), tool(name="g")], "1"),
        ("metadata", deep(9), "8"),
    ):
        assert most in refused(server, field, {"input": "hello", field: value})["message"]
    good(server)
    assert server.stop() == 0
