"""Whatever is wrong with a message: a 4xx that names the field in Anthropic's shape; the next good one is served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

HUGE = 10**30
PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
USER = {"role": "user", "content": "hello"}
TEXT = {"type": "text", "text": "x"}
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
MARK = {"type": "ephemeral"}
FORMAT = {"type": "json_schema", "schema": {"type": "object"}}


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def user(*blocks: Any) -> list[Any]:
    return [{"role": "user", "content": list(blocks)}]


def assistant(*blocks: Any) -> list[Any]:
    return [USER, {"role": "assistant", "content": list(blocks)}, USER]


def result(**fields: Any) -> list[Any]:
    return [USER, {"role": "assistant", "content": [USE]}, *user({**RESULT, **fields})]


# (what the message must name, values of the field before the first dot or bracket)
CONVERSATION: list[tuple[str, list[Any]]] = [
    ("messages", [[], None, "hello", USER, 7, [USER] * 17_000, [USER] * 20_000]),
    ("messages[0]", [[7], ["hello"], [None], [[]]]),
    ("messages[0].role", [[{}], [{"content": "x"}], [{"role": None, "content": "x"}], [{"role": 7, "content": "x"}]]),
    ("messages[0].role", [[{"role": "tool", "content": "x"}], [{"role": ["user"], "content": "x"}]]),
    (
        "messages[0].content",
        [[{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": 7}]],
    ),
    (
        "messages[0].content",
        [[{"role": "user", "content": ""}], [{"role": "user", "content": []}], user(*[TEXT] * 5000)],
    ),
    ("messages[0].content", [user(*[TEXT] * 20_000), [{"role": "user", "content": {"text": "x"}}]]),
    ("messages[0].content[0]", [user(7), user(None), user("x"), user([])]),
    (
        "messages[0].content[0].type",
        [user({}), user({"type": 7, "text": "x"}), user({"text": "x"}), user({"type": []})],
    ),
    ("messages[0].content[0].type", [user({"type": "input_text", "text": "x"}), user({"type": "server_tool_use"})]),
    ("messages[0].content[1].type", [user(TEXT, {"type": "image", "source": {"type": "base64", "data": "x"}})]),
    (
        "messages[0].content[0].type",
        [user({"type": "document", "source": {"type": "url", "url": "http://169.254.1.1"}})],
    ),
    ("messages[0].content[0].type", [user({"type": "search_result"}), user({"type": "container_upload"}), user(USE)]),
    ("messages[0].content[0].text", [user({"type": "text"}), user({"type": "text", "text": 7})]),
    ("messages[0].content[0].text", [user({"type": "text", "text": ["x"]}), user({"type": "text", "text": None})]),
    ("messages[1].content[0].type", [assistant(RESULT), assistant({"type": "web_search_tool_result"})]),
    (
        "messages[1].content[0].id",
        [assistant({**USE, "id": None}), assistant({**USE, "id": 7}), assistant({**USE, "id": ""})],
    ),
    ("messages[1].content[0].id", [assistant({**USE, "id": "x" * 600})]),
    ("messages[1].content[0].name", [assistant({**USE, "name": None}), assistant({**USE, "name": "x" * 600})]),
    ("messages[1].content[0].input", [assistant({**USE, "input": 7}), assistant({**USE, "input": "{}"})]),
    ("messages[1].content[0].input", [assistant({**USE, "input": [1]}), assistant({**USE, "input": None})]),
    ("messages[1].content[0].thinking", [assistant({"type": "thinking", "signature": ""}, TEXT)]),
    ("messages[1].content[0].signature", [assistant({"type": "thinking", "thinking": "x", "signature": 7})]),
    ("messages[1].content[0].cache_control", [assistant({"type": "thinking", "thinking": "x", "cache_control": MARK})]),
    ("messages[1].content[0].data", [assistant({"type": "redacted_thinking", "data": 7})]),
    ("messages[1]", [[USER, {"role": "assistant", "content": [TEXT, USE]}]]),
    ("messages[2].content[0].tool_use_id", [result(tool_use_id="b"), result(tool_use_id=None), result(tool_use_id=7)]),
    ("messages[0].content[0].tool_use_id", [user(RESULT)]),
    ("messages[2].content[0].content", [result(content=7), result(content={"text": "x"}), result(content=[7])]),
    ("messages[2].content[0].content[1].type", [result(content=[TEXT, {"type": "image"}]), result(content=[TEXT, {}])]),
    ("messages[2].content[0].content[0].text", [result(content=[{"type": "text", "text": 7}])]),
    ("messages[2].content[0].is_error", [result(is_error="no"), result(is_error=1)]),
    ("messages[0].content[0].cache_control", [user({**TEXT, "cache_control": value}) for value in (True, 7, "x", [])]),
    (
        "messages[0].content[0].cache_control.type",
        [user({**TEXT, "cache_control": value}) for value in ({}, {"type": "x"})],
    ),
    ("messages[0].content[0].cache_control.ttl", [user({**TEXT, "cache_control": {**MARK, "ttl": "1d"}})]),
    ("messages[0].content[0].cache_control.ttl", [user({**TEXT, "cache_control": {**MARK, "ttl": 300}})]),
    ("messages[0].content[4].cache_control", [user(*[{**TEXT, "cache_control": MARK}] * 5)]),
    (
        "messages",
        [[{**USER, "x": deep(100)}], user({**TEXT, "x": deep(100)}), assistant({**USE, "input": {"x": deep(70)}})],
    ),
    ("model", ["someone-elses", "", 7]),
    ("system", [7, {"text": "x"}, True]),
    ("system[0]", [[7], ["x"], [None]]),
    ("system[0].type", [[{}], [{"type": "image"}], [USE]]),
    ("system[1].text", [[TEXT, {"type": "text"}], [TEXT, {"type": "text", "text": 7}]]),
    ("system[0].cache_control", [[{**TEXT, "cache_control": True}]]),
    ("tools", [7, {"name": "f"}, "f", [TOOL] * 2, [{**TOOL, "name": f"f{i}"} for i in range(200)]]),
    ("tools[0]", [[7], [None], ["f"], [[]]]),
    (
        "tools[0].name",
        [[{"input_schema": {}}], [{**TOOL, "name": 7}], [{**TOOL, "name": ""}], [{**TOOL, "name": "a b"}]],
    ),
    ("tools[0].name", [[{**TOOL, "name": "x" * 600}], [{"type": "custom", "name": None, "input_schema": {}}]]),
    ("tools[0].description", [[{**TOOL, "description": 7}]]),
    ("tools[0].input_schema", [[{"name": "f"}], [{**TOOL, "input_schema": "{}"}], [{**TOOL, "input_schema": [1]}]]),
    ("tools[0].input_schema", [[{**TOOL, "input_schema": {"x": "y" * 70_000}}], [{**TOOL, "input_schema": None}]]),
    ("tools[0].input_schema.type", [[{**TOOL, "input_schema": {"type": "string"}}]]),
    ("tools[0].input_schema.properties", [[{**TOOL, "input_schema": {"type": "object", "properties": 7}}]]),
    ("tools", [[{**TOOL, "input_schema": {"x": deep(100)}}]]),
    ("tools[0].strict", [[{**TOOL, "strict": 1}], [{**TOOL, "strict": "yes"}]]),
    ("tools[1].type", [[TOOL, {**TOOL, "type": 7}]]),
    ("tools[0].type", [[{"type": "function", "function": TOOL}]]),
    ("tools[0].defer_loading", [[{**TOOL, "defer_loading": "yes"}]]),
    ("tools[0].input_examples", [[{**TOOL, "input_examples": ["x"]}]]),
    ("tools[0].cache_control.ttl", [[{**TOOL, "cache_control": {**MARK, "ttl": "2h"}}]]),
    ("tool_choice", ["auto", 7, ["auto"]]),
    ("tool_choice.type", [{}, {"type": "required"}, {"type": 7}, {"type": "any"}, {"name": "f"}]),
    ("tool_choice", [{"type": "tool", "name": "g"}]),
    ("tool_choice.name", [{"type": "tool"}, {"type": "tool", "name": 7}]),
    ("tool_choice.disable_parallel_tool_use", [{"type": "auto", "disable_parallel_tool_use": "no"}]),
    ("thinking", ["enabled", True, 7]),
    ("thinking.type", [{}, {"type": "much"}, {"type": True}, {"type": "between_tools"}]),
    (
        "thinking.budget_tokens",
        [{"type": "enabled", "budget_tokens": "many"}, {"type": "enabled", "budget_tokens": 1.5}],
    ),
    ("thinking.display", [{"type": "adaptive", "display": "omitted"}]),
    ("cache_control", [True, 7, "5m"]),
    ("cache_control.type", [{}, {"type": "forever"}]),
    ("cache_control.ttl", [{**MARK, "ttl": "1000d"}, {**MARK, "ttl": 7}]),
    ("output_config", [7, "low", [1]]),
    ("output_config.effort", [{"effort": 7}, {"effort": "x" * 600}]),
    ("output_config.format", [{"format": 7}, {"format": "json"}, {"format": {**FORMAT, "schema": {"x-guidance": {}}}}]),
    ("output_config.format.type", [{"format": {"schema": {}}}, {"format": {"type": "json_object"}}]),
    ("output_config.format.schema", [{"format": {"type": "json_schema"}}, {"format": {**FORMAT, "schema": "{}"}}]),
    ("output_format", [7, "json", {**FORMAT, "schema": {"x-guidance": {}}}]),
    ("output_format.type", [{}, {"type": "xml"}]),
    ("container", ["abc", {"id": "x"}]),
    ("mcp_servers", [[{"type": "url", "url": "http://169.254.1.1", "name": "x"}]]),
    ("response_format", [{"type": "json_object"}]),
    ("regex", ["a+"]),
    ("guided_json", [{}, {"type": "object"}][1:]),
    ("metadata", [{"user_id": deep(100)}, deep(100)]),
]
SAMPLING: list[tuple[str, list[Any]]] = [
    ("max_tokens", [-1, 1.5, "1", True, [1], None]),
    ("thinking.budget_tokens", [{"type": "enabled", "budget_tokens": value} for value in (0, -1, 1, HUGE)]),
    ("stop_sequences", ["x", [""], ["x"] * 10_000, ["x" * 5000], {"a": 1}]),
    ("stop_sequences[0]", [[1], [["a"]], [None]]),
    ("temperature", [-0.1, 101, 1e300, "hot", True, [], {}]),
    ("top_p", [0, -1, 1.1, "1"]),
    ("top_k", [-2, HUGE, 1.5, "1"]),
    ("min_p", [-0.1, 1.1, "x"]),
    ("seed", [-(2**63) - 1, 2**63, HUGE, 1.5, "x", True]),
    ("stream", ["yes", 1, {}]),
    ("cache_salt", [7, "x" * 5000, ["a"]]),
    ("prompt_cache_key", [7, "x" * 5000]),
    ("metadata", [7, "me"]),
    ("metadata.user_id", [{"user_id": 7}]),
]


@pytest.fixture(autouse=True, scope="module")
def serves_afterwards(server: Any) -> Iterator[None]:
    yield
    server.empty_cache()
    good(server)


def good(server: Any) -> None:
    answer = server.http.post(PATH, json={"messages": [USER], "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["output_tokens"] == 2


def refused(server: Any, path: str, name: str, body: Any) -> str:
    """Sends it, checks the answer's shape and returns the message."""
    answer = server.http.post(path, json=body)
    assert 400 <= answer.status_code < 500, (name, str(body)[:500], answer.text[:500])
    assert answer.headers["content-type"] == "application/json"
    said = answer.json()
    assert set(said) == {"type", "error", "request_id"}
    error = said["error"]
    assert set(error) == {"type", "message"}
    assert error["type"] == ("not_found_error" if answer.status_code == 404 else "invalid_request_error")
    message = error["message"]
    assert name in message, (str(body)[:300], error)
    assert len(message) < 500
    return message


@pytest.mark.parametrize(("name", "values"), CONVERSATION, ids=lambda value: value if isinstance(value, str) else "")
def test_what_shapes_the_prompt(server: Any, name: str, values: list[Any]) -> None:
    field = name.split(".")[0].split("[")[0]
    for value in values:
        body = {"messages": [USER], field: value}
        if name == "tool_choice":
            body["tools"] = [TOOL]
        for more in ({}, {"stream": True}):
            # Before the first event an error of a streamed request is an ordinary one.
            refused(server, PATH, name, {"max_tokens": 1, **body, **more})
        if name not in ("output_config.format", "output_format") or "x-guidance" not in str(value):
            refused(server, COUNT, name, body)
    good(server)


@pytest.mark.parametrize(("name", "values"), SAMPLING, ids=lambda value: value if isinstance(value, str) else "")
def test_what_says_how_to_answer(server: Any, name: str, values: list[Any]) -> None:
    field = name.split(".")[0].split("[")[0]
    for value in values:
        body = {"messages": [USER], "max_tokens": 1, field: value}
        refused(server, PATH, name, body)
        if field != "stream":
            refused(server, PATH, name, {**body, "stream": True})
    good(server)


def test_tools_need_a_template_that_writes_them(server: Any) -> None:
    assert "not supported" in refused(server, PATH, "tools", {"messages": [USER], "max_tokens": 1, "tools": [TOOL]})


def test_a_prompt_that_is_too_long_is_named(server: Any) -> None:
    long = [{"role": "user", "content": "word " * 60_000}]
    assert "32768" in refused(server, PATH, "messages", {"messages": long, "max_tokens": 1})


@pytest.mark.parametrize("path", [PATH, COUNT])
@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"messages":' * 50_000, b"\xff"])
def test_bodies_that_are_not_json_objects(server: Any, path: str, body: bytes) -> None:
    answer = server.http.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_what_changes_nothing_is_ignored(server: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": [{**TEXT, "citations": None, "cache_control": None}]}],
        "max_tokens": 1,
        "system": None,
        "metadata": {"user_id": "me", "more": 1},
        "service_tier": "standard_only",
        "inference_geo": "eu",
        "context_management": {"edits": []},
        "diagnostics": {"previous_message_id": None},
        "speed": "standard",
        "thinking": {"type": "disabled"},
        "tools": [],
        "tool_choice": {"type": "auto"},
        "output_config": {"effort": None, "format": None},
        "stop_sequences": [],
        "container": None,
        "mcp_servers": [],
        "unheard_of": [1],
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
    assert server.http.post(PATH, json=body, headers=headers).status_code == 200


def test_the_schema_is_in_openapi(server: Any) -> None:
    document = server.http.get("/openapi.json").json()
    for path, required in ((PATH, {"messages", "max_tokens"}), (COUNT, {"messages"})):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schema = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]
        assert set(schema["required"]) == required
        assert {"system", "tools", "thinking", "cache_control"} <= schema["properties"].keys()
