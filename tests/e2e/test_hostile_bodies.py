"""Bodies of millions of values: refused by every route in its own words, while streams go on and nothing is left."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

MEGABYTES = 16 * 1024 * 1024
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]
POSTS += ["/generate", "/branches", "/branches/batch", "/branches/x/fork", "/branches/x/extend", "/branches/x/generate"]
POSTS += ["/branches/x/score", "/tokenize", "/detokenize", "/cache/explain", "/cache/pin", "/cache/unpin"]
POSTS += ["/cache/evict", "/cache/warm", "/abort_request"]


def full(start: str, unit: str, end: str) -> bytes:
    times = (MEGABYTES - len(start) - len(end)) // (len(unit) + 1)
    return f"{start}{f'{unit},' * (times - 1)}{unit}{end}".encode()


HOSTILE = {
    "objects": full('{"messages":[', "{}", "]}"),
    "nests": full('{"chat_template_kwargs":{"a":[', "[" * 50 + "]" * 50, "]}}"),
    "names": full('{"logit_bias":{', '"a":0', "}}"),
    "numbers": full('{"prompt":[', "1.5", "]}"),
    "ids": full('{"prompt":[', "1", "]}"),
    "escapes": b'{"prompt":"' + b"\\n" * 8_000_000 + b'"}',
    "not ended": full('{"tools":[', '{"a":0}', ""),
}


@contextmanager
def stream(server: Any) -> Iterator[list[str]]:
    """The lines so far of a stream that runs while inside, and to its end."""
    lines: list[str] = []
    begun = threading.Event()
    ask = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}

    def follow() -> None:
        with server.http.stream("POST", "/v1/completions", json=ask) as reply:
            for line in reply.iter_lines():
                if line:
                    lines.append(line)
                    begun.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert begun.wait(60)
    yield lines
    thread.join()
    assert lines[-1] == "data: [DONE]"


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def steady(tokenizer_folder: Any, tmp_path_factory: Any, run_server_process: Any, null_settings: Any) -> Iterator[Any]:
    with run_server_process(
        null_settings(tokenizer_folder, null_step_seconds=0.005), tmp_path_factory.mktemp("run")
    ) as server:
        yield server


def test_every_route_refuses_them_while_a_stream_goes_on(steady: Any) -> None:
    """Parsing one such body took one to seven seconds of the event loop, while nobody got tokens."""
    before = processor_seconds(steady.process.pid)
    with stream(steady) as lines:
        begun = len(lines)
        for name, path in zip(itertools.cycle(HOSTILE), POSTS, strict=False):
            answer = steady.http.post(path, content=HOSTILE[name])
            assert answer.status_code == 413, (path, name, answer.text[:300])
            error = answer.json()["error"]
            assert error["type"] == "request_too_large"
            assert error["message"].startswith("the body must have at most ")
            assert answer.json().get("type") == ("error" if path.startswith("/v1/messages") else None)
        assert len(lines) > begun + 10
    spent = processor_seconds(steady.process.pid) - before
    assert spent < 0.5 * len(POSTS), "processor time, whatever else runs on the machine"
    steady.idle()


def test_a_flag_lowers_and_raises_the_bound(start_server: Any) -> None:
    server = start_server(max_json_values=1000)
    body: dict[str, Any] = {"prompt": [5] * 3000, "max_tokens": 1, "metadata": [0] * 900}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    answer = server.http.post("/v1/completions", json=body | {"metadata": [0] * 1000})
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "request_too_large")
    assert "at most 1000 names and values (--max-json-values)" in answer.json()["error"]["message"]
    text = json.dumps({"prompt": "a, [b] {c: d}\n" * 500, "max_tokens": 1})
    assert server.http.post("/v1/completions", content=text).status_code == 200
    server.idle()
