"""Whatever is wrong with a request: a 4xx that names the field, in OpenAI's shape, and the next good one is served."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

HUGE = 10**30


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hello", "max_tokens": 1, **fields}


def sampling(**fields: Any) -> dict[str, Any]:
    return {"text": "hello", "sampling_params": {"max_new_tokens": 1, **fields}}


# (field, values that must be refused) of /v1/completions
COMPLETION_FIELDS: list[tuple[str, list[Any]]] = [
    ("prompt", ["", [], [""], ["a", ""], [[]], [[], [1]], 7, True, {"a": 1}, [1, "a"], ["a", 1], [[1], "a"], [None]]),
    ("prompt", [[-1], [0, 400_000], [HUGE], [1.5], [True], [[1], [-1]], [[[1]]], [[1, None]], [[1, "2"]]]),
    ("model", ["someone-elses", "", 7]),
    ("max_tokens", [-1, HUGE, 1.5, "1", True, 32_768, [1]]),
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
    ("best_of", [0, 2, -1, "x"]),
    ("logprobs", [-1, 21, HUGE, "1", 1.5, True]),
    ("echo", ["yes", 1, []]),
    ("stream", ["yes", 1, {}]),
    ("stop", [[""], "", ["x"] * 10_000, "x" * 5000, [1], 7, {"a": 1}, [["a"]], [None]]),
    ("stop_token_ids", [[-1], [400_000], [HUGE], ["1"], 1, [0] * 10_000]),
    ("logit_bias", [{"-1": 1}, {"400000": 1}, {"x": 1}, {"1": 101}, {"1": "a"}, {"9" * 40: 1}, [1], {" 1": 1}]),
    ("logit_bias", [{str(i): 1 for i in range(2000)}]),
    ("ignore_eos", ["no", 0]),
    ("skip_special_tokens", ["no", 0]),
    ("cache_salt", [7, "x" * 5000, ["a"]]),
    ("priority", [2**31, -(2**31), "high", 1.5]),
    ("stream_options", [{"include_usage": True}, 7, []]),
    ("suffix", ["tail"]),
    ("guided_json", [{"not": {}}, "{", 7, [], "x" * 200_000, {"type": "string", "pattern": "(?=a)"}]),
    ("guided_regex", ["", "[", "(?=a)b", 7, "a" * 200_000]),
    ("guided_choice", [[], [""], ["a", 7], "a", ["a"] * 2000]),
    ("guided_grammar", ["", "nothing at all", 7]),
    ("guided_decoding_backend", ["outlines"]),
    ("regex", ["["]),
    ("response_format", ["json_object", {}, {"type": "yaml"}, {"type": "json_schema"}, {"type": "structural_tag"}]),
    ("response_format", [{"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}]),
    ("structured_outputs", [{}, {"regex": "["}, {"whitespace_pattern": " "}, {"json": 7}, {"structural_tag": "{}"}]),
    ("use_beam_search", [True]),
    ("allowed_token_ids", [[1]]),
    ("lora_path", ["x"]),
    ("prompt_embeds", ["AAAA"]),
]

# (field within sampling_params, values that must be refused) of /generate
SAMPLING_FIELDS: list[tuple[str, list[Any]]] = [
    ("max_new_tokens", [-1, HUGE, 1.5, "1", 32_768]),
    ("min_new_tokens", [-1, 2, "1"]),
    ("temperature", [-0.1, 101, "hot"]),
    ("top_p", [0, 1.1, "1"]),
    ("top_k", [-2, HUGE]),
    ("min_p", [-0.1, 1.1]),
    ("n", [0, 129, HUGE]),
    ("sampling_seed", [-1, 2**63]),
    ("stop", [[""], ["x"] * 10_000, [1]]),
    ("stop_token_ids", [[-1], [400_000]]),
    ("logit_bias", [{"400000": 1}, {"1": -101}]),
    ("regex", ["", "[", 7]),
    ("json_schema", ["", "[", '{"not": {}}', {"uniqueItems": True}, 7]),
    ("ebnf", ["", "nothing at all", 7]),
    ("choices", [[], [""], "a"]),
    ("stop_regex", ["a"]),
    ("temprature", [0.5]),  # a typo must not be silently ignored
]

# (field, body) of /generate
GENERATE_BODIES: list[tuple[str | None, dict[str, Any]]] = [
    ("text", {}),
    ("text", {"text": ""}),
    ("text", {"text": 7}),
    ("text", {"text": ["a", 7]}),
    ("text", {"text": "a", "input_ids": [1]}),
    ("input_ids", {"input_ids": []}),
    ("input_ids", {"input_ids": "abc"}),
    ("input_ids", {"input_ids": ["abc"]}),
    ("input_ids", {"input_ids": [-1]}),
    ("input_ids", {"input_ids": [[1], [400_000]]}),
    ("sampling_params", {"text": "a", "sampling_params": [{}, {}]}),
    ("sampling_params", {"text": "a", "sampling_params": 7}),
    ("rid", {"text": "a", "rid": 7}),
    ("rid", {"text": "a", "rid": ["a", "b"]}),
    ("rid", {"text": "a", "rid": "x" * 5000}),
    ("top_logprobs_num", {"text": "a", "return_logprob": True, "top_logprobs_num": 21}),
    ("top_logprobs_num", {"text": "a", "return_logprob": True, "top_logprobs_num": -1}),
    ("logprob_start_len", {"text": "a", "return_logprob": True, "logprob_start_len": -2}),
    ("return_logprob", {"text": "a", "return_logprob": "yes"}),
    ("image_data", {"text": "a", "image_data": "http://169.254.169.254/"}),
    ("lora_path", {"text": "a", "lora_path": "x"}),
    ("input_embeds", {"input_embeds": [[0.0]]}),
    ("session_params", {"text": "a", "session_params": {"id": "x"}}),
    ("custom_logit_processor", {"text": "a", "custom_logit_processor": "gAS..."}),
    ("extra_key", {"text": "a", "extra_key": 7}),
]

# Bodies that are not JSON objects
RAW_BODIES: list[bytes] = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"prompt"',
    b'{"prompt": "a"} trailing',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": -Infinity}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\\ud800 alone"}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
]


@pytest.fixture(autouse=True, scope="module")
def serves_afterwards(server: Any) -> Iterator[None]:
    """After all of it nothing is in flight, the books balance (the server checks them when idle) and it serves."""
    yield
    server.idle()
    good(server)


def good(server: Any) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2})
    assert answer.status_code == 200, answer.text


def refused(server: Any, path: str, field: str | None, **request: Any) -> str:
    """Sends it, checks the answer's shape and returns the message."""
    answer = server.http.post(path, **request)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if field is not None:
        assert error["param"].split("[")[0].split(".")[0] == field.split(".")[0], error
        assert field.split(".")[-1] in error["message"], error
    assert len(error["message"]) < 500
    return error["message"]


@pytest.mark.parametrize(
    ("field", "values"), COMPLETION_FIELDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_completion_fields(server: Any, field: str, values: list[Any]) -> None:
    for value in values:
        refused(server, "/v1/completions", field, json=completion(**{field: value}))
        if field != "stream":
            # Before the first event an error of a streamed request is an ordinary one.
            streamed = {field: value, **({} if field == "stream_options" else {"stream": True})}
            refused(server, "/v1/completions", field, json=completion(**streamed))
    good(server)


@pytest.mark.parametrize(
    ("field", "values"), SAMPLING_FIELDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_sampling_fields(server: Any, field: str, values: list[Any]) -> None:
    for value in values:
        refused(server, "/generate", f"sampling_params.{field}", json=sampling(**{field: value}))
    good(server)


@pytest.mark.parametrize(("field", "body"), GENERATE_BODIES)
def test_generate_bodies(server: Any, field: str | None, body: dict[str, Any]) -> None:
    refused(server, "/generate", field, json=body)
    good(server)


@pytest.mark.parametrize("body", RAW_BODIES, ids=range(len(RAW_BODIES)))
@pytest.mark.parametrize("path", ["/v1/completions", "/generate", "/abort_request"])
def test_bodies_that_are_not_json_objects(server: Any, path: str, body: bytes) -> None:
    refused(server, path, None, content=body)


def test_too_long_is_known_for_text_and_ids(server: Any) -> None:
    """The tokenizer process counts a text's tokens; HTTP counts ids. Both answers name field and limit."""
    limit = str(server.info["max_model_len"])
    for prompt in ("word " * 60_000, [1] * 32_769, ["ok", "word " * 60_000]):
        message = refused(server, "/v1/completions", "prompt", json={"prompt": prompt, "max_tokens": 0})
        assert limit in message
        refused(server, "/v1/completions", "prompt", json={"prompt": prompt, "stream": True})
    message = refused(server, "/generate", "text", json={"text": "word " * 60_000})
    assert limit in message
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 32_768}}
    assert limit in refused(server, "/generate", "sampling_params.max_new_tokens", json=body)


def test_megabytes_of_text_are_refused_before_they_are_tokenized(server: Any) -> None:
    body = {"prompt": "word and page " * 500_000, "max_tokens": 1}
    assert "at least" in refused(server, "/v1/completions", "prompt", json=body)


def test_many_prompts_are_bounded(server: Any) -> None:
    message = refused(server, "/v1/completions", "prompt", json={"prompt": ["a"] * 600, "n": 2})
    assert "1024" in message


def test_one_bad_prompt_fails_the_request_and_frees_the_others(server: Any) -> None:
    refused(
        server, "/v1/completions", "prompt", json={"prompt": ["good"] * 20 + ["word " * 60_000], "max_tokens": 5000}
    )
    server.idle()


def test_what_is_not_http(server: Any) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        assert b'"invalid_request_error"' in talk(server, data)


def test_endless_headers_are_cut_off(server: Any) -> None:
    many = b"".join(b"X-%d: %s\r\n" % (i, b"x" * 1000) for i in range(3000))
    for head in (many, b"X: " + b"x" * 3_000_000):
        said = talk(server, b"GET /health HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 400")
        assert b"headers are larger than 65536 bytes" in said
    assert server.http.get("/health", headers={"X": "x" * 30_000}).status_code == 200


def talk(server: Any, data: bytes) -> bytes:
    """Sends bytes and reads until the server closes the connection."""
    with socket.create_connection((server.info["host"], server.info["port"]), timeout=5) as raw:
        with contextlib.suppress(ConnectionError):  # it may close before it has read everything
            raw.sendall(data)
        said = b""
        with contextlib.suppress(ConnectionError):
            while piece := raw.recv(65536):
                said += piece
        return said


def test_unknown_routes_and_methods(server: Any) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/generate", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/cache/tree?format=xml", 400),
        ("GET", "/cache/tree?max_nodes=-1", 400),
        ("GET", "/cache/tree?max_nodes=9999999999", 400),
        ("POST", "/abort_request", 400),
    ):
        answer = server.http.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == status, (path, answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_fields_that_change_nothing_are_ignored(server: Any) -> None:
    body = completion(user="me", metadata={"a": 1}, store=True, unheard_of=[1])
    assert server.http.post("/v1/completions", json=body).status_code == 200


def test_body_over_the_limit(start_server: Any) -> None:
    server = start_server(max_body_bytes=10_000)
    body = json.dumps(completion(prompt="x" * 20_000)).encode()
    for request in ({"content": body}, {"content": iter([body[:5000], body[5000:]])}):  # with a length, and chunked
        answer = server.http.post("/v1/completions", **request)
        assert answer.status_code == 413
        assert "10000 bytes" in answer.json()["error"]["message"]
    good(server)
    # A length that lies: the answer comes before the body does.
    with socket.create_connection((server.info["host"], server.info["port"]), timeout=5) as raw:
        raw.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    assert server.stop() == 0
