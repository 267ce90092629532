"""Every field of every request gets what it must not be: a 4xx that names it, and the next good request is served.

The tables say what is wrong with a value of the right type. Values of other types are made from the requests' models,
and so are absurd ones, which a field may take as long as nothing breaks. A field that is in no table fails a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from branchwise.runtime.server.http.fields.cache import PromptCacheOptions
from branchwise.runtime.server.http.fields.parse import StreamOptions
from branchwise.runtime.server.http.native.admin import AbortRequest
from branchwise.runtime.server.http.native.branches import (
    BatchOperation,
    CreateRequest,
    ForkRequest,
    RunRequest,
    ScoreRequest,
)
from branchwise.runtime.server.http.native.cache import PinRequest, PromptRequest, UnpinRequest, WarmRequest
from branchwise.runtime.server.http.native.tokens import DetokenizeRequest, TokenizeRequest
from branchwise.runtime.server.http.openai.chat.request import ChatRequest
from branchwise.runtime.server.http.openai.completions import CompletionRequest
from branchwise.runtime.server.http.sglang.request import GenerateRequest, GenerateSampling
from branchwise.runtime.server.http.vllm.request import InferenceRequest, InferenceSampling

HUGE = 10**30
USER = {"role": "user", "content": "hello"}
ExtendRequest = CreateRequest.__mro__[1]  # a branch is created of what another is extended with, and more

# JSON values of every type. Those that a field's type does not take are refused.
TYPES: list[Any] = [True, 7, -1, 1.5, "x", "", ["x"], [7], [1.5], [None], [[]], [], {}, {"a": 1}, {"a": None}, [{}]]
# And absurd ones. Those that a field's type takes are refused or mean nothing.
ABSURD: list[Any] = [
    HUGE,
    -HUGE,
    1e300,
    -1e300,
    5e-324,
    "x" * 100_000,
    "\0",
    "\U0010ffff",
    ["x"] * 20_000,
    [7] * 20_000,
]
ABSURD += [[[7] * 10] * 2000, [None] * 2000, {str(i): i for i in range(5000)}, {"": {}}, [{"a": []}], [{}] * 5000]

Table = list[tuple[str, list[Any]]]


class Whole(dict[str, Any]):
    """Instead of a field's value: the whole body."""


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


# -- tables: (field, values that must be refused) ----------------------------------------------------------------------

CACHE: Table = [
    ("cache_salt", ["x" * 5000]),
    ("prompt_cache_key", ["k" * 513]),
    ("extra_key", ["x" * 5000]),
    ("prompt_cache_options", [{"mode": "never"}, {"mode": "off", "ttl": "5m"}, {"ttl": "5 minutes"}, {"ttl": 1e12}]),
    ("prompt_cache_options", [{"ttl": -1}, {"ttl": HUGE}, {"ttl": True}, {"mode": 7}]),
    ("prompt_cache_breakpoint", [3, "x", [3], [True] * 5, {"at": 0}, {"at": True}, {"at": 1 << 70}, {"ttl": []}]),
]
SAMPLING: Table = [
    ("temperature", [-0.1, 101, 1e300]),
    ("top_p", [0, -1, 1.1]),
    ("top_k", [-2, HUGE]),
    ("min_p", [-0.1, 1.1]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("presence_penalty", [-2.1, 2.1]),
    ("repetition_penalty", [0, -1, 101]),
    ("n", [0, -1, 129, 10**9, HUGE]),
    ("stop", [[""], "", ["x"] * 10_000, "x" * 5000, [["a"]], [None]]),
    ("stop_token_ids", [[-1], [400_000], [HUGE], ["1"], [0] * 10_000]),
    ("logit_bias", [{"-1": 1}, {"400000": 1}, {"x": 1}, {"1": 101}, {"1": "a"}, {"9" * 40: 1}, {" 1": 1}]),
    ("logit_bias", [{str(i): 1 for i in range(2000)}]),
]
STRUCTURED: Table = [
    *((f"guided_{name}", ["x"]) for name in ("json", "regex", "choice", "grammar", "decoding_backend")),
    ("structured_outputs", [{"json": schema} for schema in ({"not": {}}, "{", "x" * 200_000)]),
    ("structured_outputs", [{"json": {"type": "string", "pattern": "(?=a)"}}]),
    ("structured_outputs", [{"json": {"type": "array", "maxItems": number}} for number in (2**64, HUGE, -HUGE)]),
    ("structured_outputs", [{"regex": regex} for regex in ("", "(?=a)b", "a" * 200_000)]),
    ("structured_outputs", [{"choice": choices} for choices in ([], [""], ["a", 7], ["a"] * 2000)]),
    ("structured_outputs", [{"grammar": grammar} for grammar in ("", "nothing at all")]),
    ("regex", ["", "["]),
    ("json_schema", ["", "[", '{"not": {}}', {"uniqueItems": True}]),
    ("ebnf", ["", "nothing at all"]),
    ("response_format", [{}, {"type": "yaml"}, {"type": "json_schema"}, {"type": "structural_tag"}]),
    ("response_format", [{"type": "json_schema", "json_schema": 1}]),
    ("response_format", [{"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}]),
    ("structured_outputs", [{}, {"regex": "["}, {"whitespace_pattern": " "}, {"json": 7}, {"structural_tag": "{}"}]),
]
OPENAI: Table = [
    *CACHE,
    *SAMPLING,
    *STRUCTURED,
    ("model", ["someone-elses", ""]),
    ("prompt_logprobs", [-1, 21, HUGE]),
    ("max_tokens", [-1, HUGE, 32_768]),
    ("min_tokens", [-1, 2, HUGE]),
    ("rid", ["x" * 5000]),
    ("seed", [-(2**63) - 1, 2**63, HUGE]),
    ("stream_options", [{"include_usage": True}, {"include_usage": "yes"}]),  # without stream
    ("priority", [2**31, -(2**31)]),
    ("use_beam_search", [True]),
    ("allowed_token_ids", [[1]]),
    ("lora_path", ["x"]),
    ("prompt_embeds", ["AAAA"]),
]
COMPLETION: Table = [
    *OPENAI,
    ("prompt", ["", [], [""], ["a", ""], [[]], [[], [1]], 7, True, {"a": 1}, [1, "a"], ["a", 1], [[1], "a"], [None]]),
    ("prompt", [[-1], [0, 400_000], [HUGE], [1.5], [True], [[1], [-1]], [[[1]]], [[1, None]], [[1, "2"]], Whole()]),
    ("best_of", [0, 2, -1]),
    ("logprobs", [-1, 21, HUGE]),
    ("suffix", ["tail"]),
]
CHAT: Table = [
    *OPENAI,
    ("messages", [[], [7], ["hello"], [None], [[]], [USER] * 5000, [USER] * 20_000, Whole(), Whole(messages=None)]),
    ("messages", [[{}], [{"content": "x"}], [{"role": None, "content": "x"}], [{"role": 7, "content": "x"}]]),
    ("messages", [[{"role": "judge", "content": "x"}], [{"role": "function", "content": "x", "name": "f"}]]),
    ("messages", [[{"role": "user"}], [{"role": "user", "content": None}], [{"role": "user", "content": 7}]]),
    ("messages", [[{"role": "user", "content": {"text": "x"}}], [{"role": "tool", "content": None}]]),
    ("messages", [[{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"text": "x"}]}]]),
    ("messages", [[{"role": "user", "content": [{"type": "text", "text": 7}]}], [{"role": "user", "content": [None]}]]),
    ("messages", [[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.1.1"}}]}]]),
    ("messages", [[{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]]),
    ("messages", [[{"role": "user", "content": [{"type": "text", "text": "x"}] * 5000}]]),
    ("messages", [[{**USER, "name": 7}], [{**USER, "name": "x" * 600}]]),
    ("messages", [[USER, {**USER, "tool_calls": [{}]}], [USER, {**called(), "tool_calls": 7}]]),
    (
        "messages",
        [[USER, {"role": "assistant", "tool_calls": [7]}], [USER, called(name=None)], [USER, called(name="")]],
    ),
    ("messages", [[USER, called(arguments=7)], [USER, called(arguments="{")], [USER, called(arguments="[1]")]]),
    ("messages", [[USER, called(arguments='{"a":' + "[" * 900 + "]" * 900 + "}")]]),
    ("messages", [[USER, {"role": "assistant", "function_call": {"name": "f"}}], [USER, called(name="x" * 600)]]),
    ("messages", [[USER, {"role": "assistant", "content": "x", "audio": {"id": "a"}}]]),
    ("messages", [[{"role": "user", "content": "word " * 60_000}], [{**USER, "x": deep(100)}]]),
    ("max_completion_tokens", [-1, HUGE, 32_768]),
    ("max_tokens", [2]),  # max_completion_tokens is 1
    ("top_logprobs", [1, -1]),  # without logprobs
    ("tools", [[7], [{}], [tool(name="")], [tool(name="a b")]]),
    ("tools", [[tool()], [tool()] * 200, [tool(parameters=deep(100))], [tool(parameters="{}")], [tool(strict=1)]]),
    ("tool_choice", ["always", "required", {"type": "function"}, {"type": "function", "function": {"name": "g"}}]),
    ("reasoning_effort", ["x" * 600]),
    ("modalities", [["audio"], []]),
    ("chat_template", ["{{ messages }}"]),
    ("chat_template_kwargs", [{"tokenize": True}, {"chat_template": "x"}, {"messages": []}, {"unheard_of": 1}]),
    ("chat_template_kwargs", [{f"x{i}": 1 for i in range(100)}, {"enable_thinking": deep(100)}]),
    ("documents", [["text"], [7], [[]]]),
    ("continue_final_message", [True]),
    ("functions", [[{"name": "f"}]]),
    ("function_call", ["auto"]),
    ("audio", [{"voice": "alloy", "format": "wav"}]),
    ("web_search_options", [{"search_context_size": "low"}]),
    ("echo", [True]),
    ("best_of", [2]),
    ("metadata", [deep(100), deep(63)]),
]
GENERATE_SAMPLING: Table = [
    *SAMPLING,
    *((name, values) for name, values in STRUCTURED if name in ("regex", "json_schema", "ebnf")),
    ("max_new_tokens", [-1, HUGE, 32_768]),
    ("min_new_tokens", [-1, 2]),
    ("sampling_seed", [-(2**63) - 1, 2**63]),
    ("choices", [[], [""], ["a"] * 2000]),
    ("stop_regex", ["a"]),
    ("temprature", [0.5]),  # a typo must not be silently ignored
]
RUN: Table = [
    ("sampling_params", [{"max_new_tokens": -1}, {"nonsense": 1}, {"n": 129}, {"json_schema": "["}]),
    ("logprob_start_len", [Whole(return_logprob=True, logprob_start_len=-2)]),
    ("top_logprobs_num", [Whole(return_logprob=True, top_logprobs_num=number) for number in (21, -1, HUGE)]),
    ("rid", ["x" * 5000]),
    ("priority", [2**31, -(2**31)]),
]
GENERATE: Table = [
    *CACHE,
    *(
        (name, [Whole(text="a", **value) if isinstance(value, Whole) else value for value in them])
        for name, them in RUN
    ),
    ("text", ["", ["a", ""], [], Whole(), Whole(text="a", input_ids=[1]), Whole(text=["a", 7])]),
    (
        "input_ids",
        [Whole(input_ids=value) for value in ([], "abc", ["abc"], [-1], [[1], [400_000]], 7, {}, [[]], [1.5])],
    ),
    ("sampling_params", [[{}, {}], [{}] * 5000, [{"n": 0}], []]),
    ("rid", [["a", "b"], []]),
    ("return_logprob", [[True, True], []]),
    ("extra_key", ["x" * 5000]),
    ("image_data", ["http://169.254.169.254/"]),
    ("lora_path", ["x"]),
    ("input_embeds", [Whole(input_embeds=[[0.0]])]),
    ("session_params", [{"id": "x"}]),
    ("custom_logit_processor", ["gAS..."]),
]
INFERENCE_SAMPLING: Table = [
    *SAMPLING,
    ("structured_outputs", [{}, {"regex": "["}, {"json": 7}]),
    ("max_tokens", [-1, HUGE, 32_768]),
    ("min_tokens", [-1, 2]),
    ("logprobs", [-1, 21, HUGE]),
    ("prompt_logprobs", [-1, 21, HUGE]),
    ("seed", [-(2**63) - 1, 2**63]),
    ("prompt_logprob_start", [1]),
    ("bad_words", [["a"]]),
    ("temprature", [0.5]),
]
INFERENCE: Table = [
    *CACHE,
    ("token_ids", ["abc", [], [-1], [400_000], [HUGE], [[1], [2]], [1.5], ["a"], 7, {}, Whole(sampling_params={})]),
    ("sampling_params", [Whole(token_ids=[1]), {"max_tokens": -1}, {"nonsense": 1}, {"n": 129}]),
    ("sampling_params", [Whole(token_ids=[1], stream=True, sampling_params={"prompt_logprobs": 1})]),
    ("output_mode", ["derender", ""]),
    ("request_id", ["x" * 5000]),
    ("priority", [2**31, -(2**31)]),
    ("model", ["someone-elses"]),
    ("stream_options", [{"include_usage": True}]),  # without stream
    ("features", [{"mm_hashes": {}}]),
    ("content_parts", [[{"type": "text"}]]),
    ("kv_transfer_params", [{"do_remote_decode": True}]),
]
TEXT: Table = [
    ("text", [Whole(text="a", input_ids=[1]), Whole(text="a", input_ids=[])]),
    (
        "input_ids",
        [Whole(input_ids=value) for value in ([-1], [400_000], [1, "a"], [[1]], 7, "abc", {}, [1.5], [HUGE])],
    ),
]
CREATE: Table = [
    *TEXT,
    ("messages", [Whole(messages=value) for value in ("hi", [7], 7)]),
    ("branch", [Whole(parent="nobody"), Whole(parent="x" * 5000)]),
    *((name, ["x" * 600]) for name in ("cache_salt", "extra_key", "prompt_cache_key")),
    ("ttl", [0, -1, 601, 1e300]),
]
PROMPT: Table = [
    *CACHE,
    (
        "prompt",
        [Whole(), Whole(prompt="a", input_ids=[5]), ["a", "b"], "", [], [[]], 7, True, {}, [None], [-1], [HUGE]],
    ),
    ("input_ids", [Whole(input_ids=value) for value in ("text", [-1], [10**9], [5, "x"], [[1]], [], 7, {})]),
    ("messages", [Whole(messages=value) for value in ([], [{"role": "nobody", "content": "hi"}], "hi", 7)]),
    ("extra_key", ["x" * 5000]),
    ("prompt_cache_options", [{"mode": "off"}, {"ttl": 5}]),  # there is nothing to keep
    ("prompt_cache_breakpoint", [True, {"ttl": 5}]),
]


@dataclass(frozen=True)
class Route:
    """Where requests of a model go, and a good one."""

    path: str
    model: type[BaseModel]
    good: dict[str, Any]
    table: Table
    within: str = ""  # the field of the body that the model is of
    anything: frozenset[str] = field(default_factory=frozenset)  # fields whose every value of their type is a good one

    def body(self, name: str, value: Any) -> dict[str, Any]:
        if isinstance(value, Whole):
            return value
        if self.within:
            return {**self.good, self.within: {**self.good.get(self.within, {}), name: value}}
        return {**self.good, name: value}

    def called(self, name: str) -> str:
        return f"{self.within}.{name}" if self.within else name

    def takes(self, name: str, value: Any) -> bool:
        """Whether it is of the field's type."""
        try:
            self.model.__pydantic_validator__.validate_assignment(self.model.model_construct(), name, value)
        except ValidationError:
            return False
        return True

    def cases(self) -> Iterator[tuple[str, Any]]:
        """(field, what must be refused)"""
        yield from ((name, value) for name, values in self.table for value in values)
        for name in self.model.model_fields:
            yield from ((name, value) for value in TYPES if not self.takes(name, value))


STREAMED = {"stream": True}
ROUTES = {
    "completions": Route(
        "/v1/completions",
        CompletionRequest,
        {"prompt": "hello", "max_tokens": 1},
        COMPLETION,
        anything=frozenset({"user"}),
    ),
    "chat": Route(
        "/v1/chat/completions",
        ChatRequest,
        {"messages": [USER], "max_completion_tokens": 1},
        CHAT,
        anything=frozenset({"user"}),
    ),
    "generate": Route(
        "/generate", GenerateRequest, {"text": "hello", "sampling_params": {"max_new_tokens": 1}}, GENERATE
    ),
    "sampling_params": Route(
        "/generate",
        GenerateSampling,
        {"text": "hello", "sampling_params": {"max_new_tokens": 1}},
        GENERATE_SAMPLING,
        within="sampling_params",
        anything=frozenset({"stream_interval"}),
    ),
    "inference": Route(
        "/inference/v1/generate",
        InferenceRequest,
        {"token_ids": [5, 6], "sampling_params": {"max_tokens": 1}},
        INFERENCE,
    ),
    "inference_sampling": Route(
        "/inference/v1/generate",
        InferenceSampling,
        {"token_ids": [5, 6], "sampling_params": {"max_tokens": 1}},
        INFERENCE_SAMPLING,
        within="sampling_params",
        anything=frozenset({"output_kind"}),
    ),
    "stream_options": Route(
        "/v1/completions",
        StreamOptions,
        {"prompt": "hello", "max_tokens": 1, "stream": True},
        [],
        within="stream_options",
    ),
    "prompt_cache_options": Route(
        "/v1/completions",
        PromptCacheOptions,
        {"prompt": "hello", "max_tokens": 1},
        [("mode", ["never"]), ("ttl", ["5 minutes", "", 1e12, -1, 0, HUGE])],
        within="prompt_cache_options",
    ),
    # An unknown parent is an unknown branch: that is the row.
    "branches": Route("/branches", CreateRequest, {}, CREATE, anything=frozenset({"parent"})),
    "fork": Route("/branches/{branch}/fork", ForkRequest, {"n": 1}, [("n", [0, -1, 5000, HUGE])]),
    "extend": Route("/branches/{branch}/extend", ExtendRequest, {"text": "x"}, [*TEXT, ("text", [Whole()])]),
    "run": Route(
        "/branches/{branch}/generate",
        RunRequest,
        {"sampling_params": {"max_new_tokens": 1}},
        [*RUN, ("extend", [7, {}, True, [-1], [400_000], [1.5], [[1]], ["x"], [None]])],
    ),
    "score": Route(
        "/branches/{branch}/score",
        ScoreRequest,
        {"continuations": ["x"]},
        [
            ("continuations", [[], [""], ["a", 7], ["a"] * 1025, [[-1]], [[]], [None], [{}], [True], Whole()]),
            ("priority", [2**31]),
        ],
    ),
    "explain": Route("/cache/explain", PromptRequest, {"prompt": "hello"}, PROMPT),
    "pin": Route(
        "/cache/pin",
        PinRequest,
        {"prompt": "hello", "warm": True},
        [
            *PROMPT,
            ("ttl", [0, -1, "x", "", 1e300, HUGE, True]),
            ("input_ids", [Whole(input_ids=[7] * 40_000, warm=True)]),
        ],
    ),
    "unpin": Route("/cache/unpin", UnpinRequest, {"id": "x"}, [("id", [Whole(), ""])]),
    "evict": Route("/cache/evict", PromptRequest, {"prompt": "hello"}, PROMPT),
    "warm": Route(
        "/cache/warm",
        WarmRequest,
        {"prompts": ["hello"]},
        [
            *CACHE,
            ("prompts", [Whole(), [], "x", 7, [["a"]], [""], [[]], [[-1]], [None], {}, ["x"] * 1025, [1, 2]]),
            ("prompt_cache_options", [{"mode": "off"}]),
            ("extra_key", ["x" * 5000]),
            ("namespaces", [[], ["x"], [["x"]], [["x", 7]], [["x", "y"], ["x", "y"]], [["x", "y" * 5000]], {}, 7]),
            ("priority", [1 << 40]),
        ],
    ),
    "abort": Route(
        "/abort_request", AbortRequest, {"rid": "nobody's"}, [("rid", [Whole(), "", Whole(abort_all=False)])]
    ),
    "tokenize": Route(
        "/tokenize",
        TokenizeRequest,
        {"prompt": "hello"},
        [
            ("prompt", [Whole(), Whole(prompt="x", messages=[USER])]),
            ("messages", [Whole(messages=value) for value in ([], [{"role": "user"}], "x")]),
            ("tools", [Whole(messages=[USER], tools=[7])]),
            ("model", ["other"]),
            ("add_special_tokens", [7, "x"]),
        ],
    ),
    "detokenize": Route(
        "/detokenize",
        DetokenizeRequest,
        {"tokens": [1]},
        [
            ("tokens", [Whole(), "abc", 7, {}, True, [-1], [400_000], [HUGE], [1.5], [[1]], [None]]),
            ("model", ["other"]),
        ],
    ),
}


@pytest.fixture
def branch(server: Any) -> Iterator[str]:
    id = server.http.post("/branches", json={"text": "hello"}).json()["id"]
    yield id
    server.http.delete(f"/branches/{id}").raise_for_status()
    assert server.http.get("/branches").json()["branches"] == 0
    server.empty_cache()  # and what breakpoints keep


@pytest.fixture
def route(request: Any, server: Any, branch: str) -> Iterator[Route]:
    """A route that serves a good request afterwards, and nothing is left of all the others."""
    route = ROUTES[request.param]
    route = replace(route, path=route.path.format(branch=branch))
    yield route
    answer = server.http.post(route.path, json=route.good)
    assert answer.status_code == (404 if request.param == "unpin" else 200), answer.text
    undo(server, route, answer)


def undo(server: Any, route: Route, answer: httpx.Response) -> None:
    """Ends the branches that a request has made."""
    if route.path == "/branches" or route.path.endswith("/fork"):
        for id in answer.json().get("ids", [answer.json().get("id")]):
            server.http.delete(f"/branches/{id}")  # if its time is not over already


def every(names: Sequence[str]) -> Any:
    return pytest.mark.parametrize("route", names, indirect=True)


@every(list(ROUTES))
def test_what_is_wrong_with_a_field_is_said_by_its_name(server: Any, route: Route, branch: str) -> None:
    before = server.http.get(f"/branches/{branch}?input_ids=true").json()["input_ids"]
    for name, value in route.cases():
        server.refused(route.path, route.called(name), json=route.body(name, value))
    assert server.http.get(f"/branches/{branch}?input_ids=true").json()["input_ids"] == before


@every(["completions", "chat", "generate", "sampling_params", "run"])
def test_before_its_first_event_a_stream_is_refused_as_any_other(server: Any, route: Route) -> None:
    for name, value in route.cases():
        if name not in ("stream", "stream_options"):
            server.refused(route.path, route.called(name), json={**route.body(name, value), **STREAMED})


@every(list(ROUTES))
def test_an_absurd_value_is_refused_or_means_nothing(server: Any, route: Route) -> None:
    for name in route.model.model_fields:
        for value in ABSURD:
            answer = server.http.post(route.path, json=route.body(name, value))
            shown = f"{name}: {str(value)[:60]} -> {answer.status_code} {answer.text[:300]}"
            assert answer.status_code < 500, shown
            if answer.status_code == 200:
                undo(server, route, answer)
            else:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, shown


@pytest.mark.parametrize("name", ROUTES)
def test_no_field_is_forgotten(name: str) -> None:
    """A field that takes more than true and false has a row that says what of its own type is wrong."""
    route = ROUTES[name]
    rows = {name for name, _ in route.table}
    taking = {
        name
        for name in route.model.model_fields
        if any(route.takes(name, value) for value in TYPES if not isinstance(value, bool))
    }
    assert taking - rows - route.anything == set()
    assert route.anything <= route.model.model_fields.keys()


def test_operations_of_a_batch_are_refused_one_by_one(server: Any, branch: str) -> None:
    route = Route(
        "/branches/batch", BatchOperation, {"op": "fork", "id": branch}, [("op", ["make"]), ("id", ["", "nobody"])]
    )
    for name, value in route.cases():
        [result] = server.http.post(route.path, json={"ops": [route.body(name, value)]}).json()["results"]
        assert 400 <= result["status"] < 500
        assert name in result["error"]["message"] or "branch" in result["error"]["message"], result
    for ops in ([], "x", 7, [{}] * 1025, None):
        server.refused(route.path, "ops", json={"ops": ops})
    results = server.http.post(route.path, json={"ops": [7, None, "x", [], {"op": "fork"}, {"id": branch}]}).json()
    assert all(400 <= result["status"] < 500 for result in results["results"])
