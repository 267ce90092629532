"""A server with ``--request-timeout``: what takes longer ends with an error that says so, and all it had is back."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

SECONDS = 2.0
LONG = 20_000  # tokens, a step of 10 ms for each
USER = [{"role": "user", "content": "go on"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["go on", "and on"], "max_tokens": LONG, "n": 2},
    "/v1/chat/completions": {"messages": USER, "max_completion_tokens": LONG, "n": 3},
    "/generate": {"text": ["go on", "and on"], "sampling_params": {"max_new_tokens": LONG, "n": 2}},
}


@pytest.fixture(scope="module")
def hasty(
    run_server_process: Any, null_settings: Any, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    config = null_settings(tokenizer_folder, request_timeout=SECONDS, null_step_seconds=0.01)
    with run_server_process(config, tmp_path_factory.mktemp("run")) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(hasty: Any) -> Iterator[None]:
    yield
    hasty.idle()
    assert hasty.http.get("/cache/check").json() == {"check": "clean"}
    assert hasty.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2}).status_code == 200


def assert_timed_out(error: dict[str, Any]) -> None:
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("timeout_error", "request_timeout")
    assert "2 s" in error["message"] and "--request-timeout" in error["message"]


def aborted(server: Any) -> float:
    """Terminal messages so far about requests that were aborted."""
    count: float = server.metrics()['requests_total{finish_reason="abort"}']
    return count


def ask_all(server: Any, **fields: Any) -> list[httpx.Response]:
    """Answers to a request of each path, all sent at once."""
    with ThreadPoolExecutor(len(BODIES)) as pool:
        return list(pool.map(lambda path: server.http.post(path, json={**BODIES[path], **fields}), BODIES))


def test_a_whole_answer_that_takes_too_long_is_a_504(hasty: Any) -> None:
    before, asked = aborted(hasty), time.monotonic()
    answers = ask_all(hasty)
    assert time.monotonic() - asked >= SECONDS
    for answer in answers:
        assert answer.status_code == 504
        assert_timed_out(answer.json()["error"])
    hasty.idle()
    assert aborted(hasty) - before == 4 + 3 + 4, "one end for each of their samples"


def test_a_stream_that_takes_too_long_ends_with_the_error(hasty: Any) -> None:
    for answer in ask_all(hasty, stream=True):
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert "[DONE]" not in lines
        assert len(lines) > 1
        assert not any("error" in json.loads(line) for line in lines[:-1])
        assert_timed_out(json.loads(lines[-1])["error"])


def test_before_its_first_event_a_stream_is_a_504_too(hasty: Any) -> None:
    with hasty.stopped("scheduler"):
        answers = ask_all(hasty, stream=True)
    for answer in answers:
        assert answer.status_code == 504
        assert_timed_out(answer.json()["error"])


def test_what_is_quick_enough_is_not_touched(hasty: Any) -> None:
    """Also beside requests that are not, and however many of them there are."""
    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(hasty.http.post, path, json=body) for path, body in BODIES.items()]
        quick = [
            pool.submit(hasty.http.post, "/v1/completions", json={"prompt": "x", "max_tokens": 5}) for _ in range(12)
        ]
        assert [one.result().status_code for one in quick] == [200] * 12
        assert [one.result().status_code for one in slow] == [504] * 3


def test_a_branch_is_free_again_after_a_run_that_took_too_long(hasty: Any) -> None:
    branch = hasty.http.post("/branches", json={"text": "go on"}).json()["id"]
    try:
        for stream in (False, True):
            run = {"sampling_params": {"max_new_tokens": LONG}, "stream": stream}
            answer = hasty.http.post(f"/branches/{branch}/generate", json=run)
            assert answer.status_code == (200 if stream else 504)
            last = answer.text.rstrip().rsplit("\n", 1)[-1]
            assert_timed_out(json.loads(last.removeprefix("data: "))["error"])
            hasty.until(lambda: not hasty.http.get("/branches").json()["generating"])
            run = {"sampling_params": {"max_new_tokens": 2}}
            assert hasty.http.post(f"/branches/{branch}/generate", json=run).status_code == 200
    finally:
        hasty.http.delete(f"/branches/{branch}").raise_for_status()


def test_a_client_that_does_not_read_keeps_nothing(hasty: Any) -> None:
    """Its stream is stuck in the sockets' buffers: the time-out does not wait for it to move."""
    body = {"input_ids": [5] * 2000, "sampling_params": {"max_new_tokens": LONG, "n": 64}, "stream": True}
    data = json.dumps({**body, "return_prompt_token_ids": True}).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((hasty.info["host"], hasty.info["port"]))
        raw.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        hasty.idle()
