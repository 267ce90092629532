"""--restart: a dead engine is replaced, clients in flight are told, and it does not go on forever."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

BODY = {"prompt": "go on", "max_tokens": 25_000, "stream": True}


def stream(server: Any) -> tuple[threading.Thread, list[str]]:
    """A stream in a thread that has begun, and its lines."""
    lines: list[str] = []

    def run() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY, timeout=60) as response:
            lines.extend(line for line in response.iter_lines() if line)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.http.get("/get_server_info").json()["requests_in_flight"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return thread, lines


def children(server: Any, role: str) -> list[int]:
    """Process ids of the living children of a role."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if role.encode() in words and int(parent) == server.process.pid and state != "Z":
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("role", ["scheduler", "tokenizer"])
def test_a_dead_engine_is_replaced_a_bounded_number_of_times(start_server: Any, role: str) -> None:
    server = start_server(restart=1)
    thread, lines = stream(server)
    os.kill(server.pids[role], signal.SIGKILL)
    thread.join(90)
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "engine_dead"
    assert "the engine is restarting" in error["message"]
    health = server.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "restarting")
    refused = server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    deadline = time.monotonic() + 60
    while server.http.get("/health").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    server.idle()
    assert len(server.run_dirs) == 1
    [again] = children(server, role)
    assert again != server.pids[role]
    os.kill(again, signal.SIGKILL)
    assert server.process.wait(60) == 1, "one restart was allowed"
    assert not server.run_dirs


def test_a_server_stops_while_its_engine_restarts(start_server: Any) -> None:
    server = start_server(restart=3)
    os.kill(server.pids["detokenizer"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while server.http.get("/health").json()["status"] != "restarting":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server.stop() == 0
    assert not server.run_dirs
