"""A server that runs out of descriptors, of memory for bodies, or of readers of its log, and goes on serving."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

REQUEST = {"prompt": "a", "max_tokens": 2}


def connections(server: Any, stack: contextlib.ExitStack, count: int) -> list[socket.socket]:
    made = []
    for _ in range(count):
        one = stack.enter_context(socket.create_connection((server.info["host"], server.info["port"]), timeout=60))
        made.append(one)
    return made


def descriptors(pid: int) -> list[int]:
    return [int(one.name) for one in Path(f"/proc/{pid}/fd").iterdir()]


def posted(server: Any) -> httpx.Response:
    """The answer to a client that tries again for as long as the server is full: it learns of the connections that
    others have closed a moment later than they."""
    deadline = time.monotonic() + 60
    while True:
        try:
            answer = httpx.post(f"{server.url}/v1/completions", json=REQUEST, timeout=60)
            if answer.status_code != 503:
                return answer
            assert "try again later" in answer.text
            seconds = float(answer.headers["retry-after"])
        except httpx.TransportError:  # refused before the request was sent, which resets the connection
            seconds = 1.0
        assert time.monotonic() < deadline, "the server has not recovered"
        time.sleep(seconds)


def test_more_connections_than_descriptors(start_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -n 512\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        server = start_server()
    waiting, refused = [], 0
    with contextlib.ExitStack() as stack:
        for one in connections(server, stack, 700):
            one.setblocking(False)
            waiting.append(one)
        deadline = time.monotonic() + 60
        while refused <= 100:
            assert time.monotonic() < deadline
            for one in list(waiting):
                with contextlib.suppress(BlockingIOError, ConnectionResetError):
                    refused += one.recv(1000).startswith(b"HTTP/1.1 503 ")
                    waiting.remove(one)
        assert len(descriptors(server.process.pid)) < 400
    assert posted(server).status_code == 200
    assert server.log.stat().st_size < 1000, server.log.read_text()[:2000]
    assert server.stop() == 0


def test_no_descriptors_at_all_are_a_line_and_not_megabytes(start_server: Any) -> None:
    server = start_server()
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = max(descriptors(pid))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 4, before[1]))
    with contextlib.ExitStack() as stack:
        connections(server, stack, 100)
        deadline = time.monotonic() + 60
        while "cannot accept connections" not in server.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(2)  # the time of two more tries, and of megabytes of log
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    # asyncio accepts again after a second
    assert httpx.post(f"{server.url}/v1/completions", json=REQUEST, timeout=60).status_code == 200
    log = server.log.read_text()
    assert "cannot accept connections: [Errno 24] Too many open files" in log and len(log) < 2000
    assert server.stop() == 0


def test_requests_that_are_not_http_are_a_line_in_ten_seconds(start_server: Any) -> None:
    server = start_server()
    for _ in range(200):
        with socket.create_connection(("127.0.0.1", server.info["port"]), timeout=60) as connection:
            connection.sendall(b"\0\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert 1 <= server.log.read_text().count("Invalid HTTP request received.") <= 4
    assert server.stop() == 0


def test_a_log_that_nobody_reads_does_not_stop_the_server() -> None:
    arguments = ["serve", "--port", "0", "--kv-cache-tokens", "8192", "--log-level", "debug"]
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "branchwise", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        url = next(found[1] for line in process.stdout if (found := re.search(r"ready at (http://\S+)", line)))
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(3500):  # a line of about 140 bytes for each
                assert client.get("/version").status_code == 200
            assert client.post("/v1/completions", json=REQUEST).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 0
    assert re.search(r"WARNING \S+ \S+: \d+ lines of the log were dropped", log), log[-2000:]
