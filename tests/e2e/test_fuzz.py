"""Random requests, most of them nearly right: whatever comes, no 5xx, no hang, and a server that is as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from branchwise.runtime.server.http.native.admin import AbortRequest
from branchwise.runtime.server.http.native.branches import CreateRequest, ForkRequest, RunRequest, ScoreRequest
from branchwise.runtime.server.http.native.cache import PinRequest, PromptRequest, UnpinRequest, WarmRequest
from branchwise.runtime.server.http.native.tokens import DetokenizeRequest, TokenizeRequest
from branchwise.runtime.server.http.openai.chat.request import ChatRequest
from branchwise.runtime.server.http.openai.completions import CompletionRequest
from branchwise.runtime.server.http.sglang.request import GenerateRequest, GenerateSampling

EXAMPLES = 150
LONGEST = 20.0  # seconds an answer may take; the most there is to do is some 128 × 250 made-up tokens

ROUTES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "hello"}),
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9}),
    "/generate": (GenerateRequest, {"text": "hello"}),
    "/branches": (CreateRequest, {}),
    "/branches/BRANCH/fork": (ForkRequest, {}),
    "/branches/BRANCH/extend": (CreateRequest, {"text": "hello"}),
    "/branches/BRANCH/generate": (RunRequest, {"sampling_params": {"max_new_tokens": 9}}),
    "/branches/BRANCH/score": (ScoreRequest, {"continuations": ["hello"]}),
    "/branches/batch": (CreateRequest, {"ops": [{"op": "create"}]}),
    "/cache/explain": (PromptRequest, {"prompt": "hello"}),
    "/cache/pin": (PinRequest, {"prompt": "hello", "ttl": 1}),
    "/cache/unpin": (UnpinRequest, {"id": "x"}),
    "/cache/evict": (PromptRequest, {"prompt": "hello"}),
    "/cache/warm": (WarmRequest, {"prompts": ["hello"]}),
    "/tokenize": (TokenizeRequest, {"prompt": "hello"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
    "/abort_request": (AbortRequest, {"rid": "x"}),
}

# -- values ------------------------------------------------------------------------------------------------------------

WORDS = ["user", "assistant", "system", "tool", "text", "function", "auto", "required", "none", "json_object", "object"]
WORDS += [
    "json_schema",
    "string",
    "integer",
    "array",
    "off",
    "explicit",
    "ephemeral",
    "5m",
    "x",
    "",
    "[",
    "a+b*",
    "(?=a)",
]
WORDS += [
    "<|im_start|>",
    "\0",
    "東京",
    "\ud800",
    "{",
    '{"type": "object"}',
    'root ::= "a"',
    "start: /a/",
    "low",
    "create",
]
KEYS = [
    "role",
    "content",
    "type",
    "text",
    "function",
    "name",
    "arguments",
    "parameters",
    "properties",
    "schema",
    "json",
]
KEYS += [
    "json_schema",
    "ttl",
    "at",
    "mode",
    "op",
    "id",
    "include_usage",
    "items",
    "enum",
    "anyOf",
    "pattern",
    "minimum",
]
KEYS += [
    "tool_calls",
    "tool_call_id",
    "strict",
    "required",
    "cache_control",
    "prompt_cache_breakpoint",
    "1",
    "$ref",
    "n",
]

numbers = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, -(2**31), 2**63, 2**64, 10**30]), st.floats(allow_nan=False, width=32)
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(WORDS), st.text(max_size=20))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), inner)
    ),
    max_leaves=12,
)
parts = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("text"), "text": st.text(max_size=9) | scalars},
        optional={"cache_control": values, "prompt_cache_breakpoint": values},
    ),
    max_size=3,
)
schemas = st.recursive(
    st.sampled_from([{"type": "integer"}, {"type": "string"}, {"type": "null"}, {"enum": [1, "a"]}, True]) | values,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(st.text(max_size=3), inner)}),
        st.fixed_dictionaries({"type": st.just("array"), "items": inner}, optional={"maxItems": numbers}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=3)}),
    ),
    max_leaves=6,
)
functions = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"]) | scalars}, optional={"parameters": schemas, "strict": scalars}
)
calls = st.lists(
    st.fixed_dictionaries(
        {"id": scalars, "function": st.fixed_dictionaries({"name": st.sampled_from(WORDS), "arguments": scalars})}
    ),
    max_size=2,
)
ids = st.lists(st.integers(-1, 400), max_size=300)
SHAPES: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(WORDS[:4]) | scalars, "content": st.text(max_size=30) | parts | values},
            optional={"tool_calls": calls | values, "name": scalars, "reasoning_content": scalars},
        ),
        max_size=4,
    ),
    "tools": st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": functions}), max_size=3),
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["json_schema", "json_object", "text"])},
        optional={"json_schema": st.fixed_dictionaries({"schema": schemas}) | values},
    ),
    "sampling_params": st.dictionaries(st.sampled_from(sorted(GenerateSampling.model_fields)), values, max_size=4),
    "ops": st.lists(
        st.dictionaries(st.sampled_from(["op", "id", "n", "text", "input_ids", "parent", "ttl"]), values), max_size=5
    ),
    "json_schema": schemas,
    **dict.fromkeys(("prompt", "input_ids", "tokens", "extend"), ids),
    **dict.fromkeys(("prompts", "continuations"), st.lists(ids | st.text(max_size=9), max_size=4)),
    **dict.fromkeys(("n", "max_tokens", "logprobs", "top_logprobs", "best_of", "min_tokens"), st.integers(0, 30)),
}


SIMPLE = [True, False, 0, 1, 2, 0.5, 1.0, "x", "a+", "none", "5m", ["x"], [1, 2], {"1": 1}, {}, [], {"type": "object"}]


@cache
def taken(model: type[BaseModel], name: str) -> list[Any]:
    """Simple values of the field's type."""

    def takes(value: Any) -> bool:
        try:
            model.__pydantic_validator__.validate_assignment(model.model_construct(), name, value)
        except ValidationError:
            return False
        return True

    return [value for value in SIMPLE if name not in model.model_fields or takes(value)] or [None]


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and a body: a good one with some fields changed, and now and then bytes of it, too."""
    path = draw(st.sampled_from(sorted(ROUTES)))
    model, good = ROUTES[path]
    names = st.sampled_from(sorted({*model.model_fields, *good, "stream"}))
    body = {**good}
    for name in draw(st.lists(names, max_size=4, unique=True)):
        right = st.sampled_from(taken(model, name))
        body[name] = draw(values if draw(st.integers(0, 6)) == 0 else SHAPES.get(name, right) | right)
    data = json.dumps(body).encode()
    if draw(st.integers(0, 7)) == 0:
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + length :]
    return path, data


# -- the server --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(
    run_server_process: Any, null_settings: Any, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A short context, so that no answer is long; few branches and pins, so that there is no room as often as not."""
    engine = {"max_model_len": 256, "max_branches": 40, "kv_cache_tokens": 20_000, "max_pin_ttl": 5.0}
    with run_server_process(null_settings(tokenizer_folder, engine=engine), tmp_path_factory.mktemp("run")) as running:
        running.http.timeout = httpx.Timeout(LONGEST)
        yield running
        assert "Traceback" not in running.log.read_text()


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.headers["content-type"].startswith("text/event-stream"):
        *events, last = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert not any("error" in json.loads(event) for event in events)
        assert last == "[DONE]" or json.loads(last)["error"]["type"] != "server_error", last
    elif answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(error["message"]) < 500


def test_nothing_that_is_sent_breaks_the_server(small: Any) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(requests())
    def send(request: tuple[str, bytes]) -> None:
        path, body = request
        branch = ""
        if "BRANCH" in path:
            made = small.http.post("/branches", json={"text": "hello"})
            branch = made.json()["id"] if made.status_code == 200 else "there-is-no-room"
        check(small.http.post(path.replace("BRANCH", branch), content=body))
        if branch:
            small.http.delete(f"/branches/{branch}")

    send()
    assert small.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2}).status_code == 200
    small.http.post("/flush_cache").raise_for_status()
    assert small.http.get("/cache/check").json() == {"check": "clean"}
    info = small.http.get("/get_server_info").json()
    assert (info["requests_in_flight"], info["stats"]["running"], info["stats"]["waiting"]) == (0, 0, 0)
