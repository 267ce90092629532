"""What reaches a server below and beside its routes: floods, half requests, absurd but well-formed bodies."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request

import pytest

CHUNKED = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"


def flood(port: int, start: bytes, piece: bytes, megabytes: int) -> int:
    """Sends until the server closes the connection; returns the bytes it took."""
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(start)
        try:
            while sent < megabytes << 20:
                connection.sendall(piece)
                sent += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
    return sent


def answer(url: str, path: str, body: dict) -> tuple[int, dict]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("what", ["trailers", "pipelined requests", "a head"])
def test_a_flood_without_a_body_is_cut(server, what):
    start, piece = {
        "trailers": (CHUNKED, b"X-Trailer: " + b"a" * 1000 + b"\r\n"),
        "pipelined requests": (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 30),
        "a head": (b"GET /health HTTP/1.1\r\n", b"X-Header: " + b"a" * 1000 + b"\r\n"),
    }[what]
    assert flood(server.info["port"], start, piece * 16, 64) < 32 << 20
    assert urllib.request.urlopen(server.url + "/health", timeout=60).status == 200


def test_fifty_pipelined_requests_are_answered(server):
    with socket.create_connection(("127.0.0.1", server.info["port"]), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        got = b""
        while got.count(b"200 OK") < 50:
            got += connection.recv(1 << 16)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate", {"input_ids": [[1]] * 20_000}, "input_ids"),
        ("/v1/completions", {"prompt": ["x"] * 20_000}, "prompt"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): 1 for i in range(20_000)}}, "logit_bias"),
        ("/v1/completions", {"prompt": "x"} | {f"k{i}": 1 for i in range(300)}, "fields"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("/generate", {"text": "x", "max_new_tokens": 1}, "sampling_params"),
        ("/generate", {"text": "x", "temperature": 0}, "sampling_params"),
    ],
)
def test_absurd_or_misplaced_fields_are_named(server, path, body, field):
    status, reply = answer(server.url, path, body)
    assert status == 400
    assert field in reply["error"]["message"]


def test_head_health(server):
    request = urllib.request.Request(server.url + "/health", method="HEAD")
    assert urllib.request.urlopen(request, timeout=60).status == 200
