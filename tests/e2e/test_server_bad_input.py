"""Whatever is wrong with a request: a 4xx that names the field, in OpenAI's shape, and the next good one is served."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hello", "max_tokens": 1, **fields}


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


@pytest.mark.parametrize("body", RAW_BODIES, ids=range(len(RAW_BODIES)))
@pytest.mark.parametrize("path", ["/v1/completions", "/generate", "/abort_request"])
def test_bodies_that_are_not_json_objects(server: Any, path: str, body: bytes) -> None:
    server.refused(path, None, content=body)


def test_too_long_is_known_for_text_and_ids(server: Any) -> None:
    """The tokenizer process counts a text's tokens; HTTP counts ids. Both answers name field and limit."""
    limit = str(server.info["max_model_len"])
    for prompt in ("word " * 60_000, [1] * 32_769, ["ok", "word " * 60_000]):
        message = server.refused("/v1/completions", "prompt", json={"prompt": prompt, "max_tokens": 0})
        assert limit in message
        server.refused("/v1/completions", "prompt", json={"prompt": prompt, "stream": True})
    message = server.refused("/generate", "text", json={"text": "word " * 60_000})
    assert limit in message
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 32_768}}
    assert limit in server.refused("/generate", "sampling_params.max_new_tokens", json=body)


def test_megabytes_of_text_are_refused_before_they_are_tokenized(server: Any) -> None:
    body = {"prompt": "word and page " * 500_000, "max_tokens": 1}
    assert "at least" in server.refused("/v1/completions", "prompt", json=body)
    for path in ("/cache/explain", "/cache/pin"):  # tokenized in the HTTP process
        assert "at least" in server.refused(path, "prompt", json={"prompt": body["prompt"]})


@pytest.mark.parametrize("path", ["/cache/explain", "/cache/pin", "/cache/evict"])
def test_what_the_context_cannot_hold_is_not_looked_for_in_the_cache(server: Any, path: str) -> None:
    limit = server.info["max_model_len"]
    assert f"more than the {limit} tokens" in server.refused(path, "prompt", json={"prompt": "x " * 100_000})


def test_a_text_of_megabytes_is_tokenized_beside_the_streams(server: Any) -> None:
    """Eight at once took all of the CPU: streams stood still for half a minute."""
    answer = server.http.post("/tokenize", json={"prompt": "x " * 600_000}, timeout=60)
    assert answer.json()["count"] > 600_000


@pytest.mark.parametrize("name", ["/v1/completions", "/generate"])
def test_numbers_of_a_schema_may_be_larger_than_a_message_holds(server: Any, name: str) -> None:
    schema = {"type": "integer", "minimum": -(10**30), "maximum": 10**400}
    body = {
        "prompt": "x",
        "max_tokens": 1,
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
    }
    if name == "/generate":
        body = {"text": "x", "sampling_params": {"max_new_tokens": 1, "json_schema": schema}}
    assert server.http.post(name, json=body).status_code in (200, 400)
    server.idle()


def test_many_prompts_are_bounded(server: Any) -> None:
    message = server.refused("/v1/completions", "prompt", json={"prompt": ["a"] * 600, "n": 2})
    assert "1024" in message


def test_one_bad_prompt_fails_the_request_and_frees_the_others(server: Any) -> None:
    server.refused("/v1/completions", "prompt", json={"prompt": ["good"] * 20 + ["word " * 60_000], "max_tokens": 5000})
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
        said = talk(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 400")
        assert b"headers are larger than 65536 bytes" in said
    assert server.http.get("/health", headers={"X": "x" * 30_000}).status_code == 200


def talk(server: Any, data: bytes) -> bytes:
    """Sends bytes and reads until the server closes the connection."""
    with socket.create_connection((server.info["host"], server.info["port"]), timeout=60) as raw:
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


def test_a_wrong_base_url_is_told_the_right_path(server: Any) -> None:
    for path, meant in (
        ("/chat/completions", "/v1/chat/completions"),  # openai without /v1
        ("/v1/v1/messages", "/v1/messages"),  # anthropic with it
        ("/v1/generate", "/generate"),
        ("/models", "/v1/models"),
        ("/v1/embeddings", None),
        ("/v1", None),
    ):
        answer = server.http.post(path, json={})
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "not_found_error"
        message = answer.json()["error"]["message"]
        assert message.startswith("no such route: ")
        assert (f"did you mean {meant}? " in message) == (meant is not None), message


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
    with socket.create_connection((server.info["host"], server.info["port"]), timeout=60) as raw:
        raw.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    assert server.stop() == 0
