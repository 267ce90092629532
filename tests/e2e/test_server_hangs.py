"""A process of the engine that hangs: /health says so, then every client is told and the server ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import httpx
import pytest

from branchwise.runtime.server.heartbeat import STALE_SECONDS

ROLES = ["tokenizer", "scheduler", "detokenizer"]
LIMIT = 4.0  # seconds after which a process has hung


@pytest.mark.parametrize("role", ROLES)
def test_a_process_that_stays_stopped_ends_the_server(start_server: Any, process_alive: Any, role: str) -> None:
    server = start_server(hang_timeout=LIMIT)
    os.kill(server.pids[role], signal.SIGSTOP)
    answers: list[httpx.Response] = []
    body = {"prompt": "go on", "max_tokens": 4}
    client = threading.Thread(target=lambda: answers.append(server.http.post("/v1/completions", json=body)))
    client.start()
    assert server.process.wait(60) == 1
    client.join(60)
    assert answers and answers[0].status_code == 500
    assert f"the {role} process has not answered for" in answers[0].text and "--hang-timeout" in answers[0].text
    assert f"the {role} process has not answered for" in server.log.read_text()
    assert not any(process_alive(pid) for pid in server.pids.values()) and not server.run_dirs


def test_a_stopped_process_is_reported_and_ready_again_when_it_goes_on(start_server: Any) -> None:
    server = start_server(hang_timeout=300)
    assert server.http.get("/health").json() == {"status": "ready"}
    answers: list[httpx.Response] = []
    body = {"prompt": "go on", "max_tokens": 4}
    client = threading.Thread(target=lambda: answers.append(server.http.post("/v1/completions", json=body)))
    with server.stopped("scheduler"):
        client.start()
        health = server.until(lambda: (r := httpx.get(f"{server.url}/health", timeout=60)).status_code == 503 and r)
        assert health.json() == {"status": "stalled", "process": "scheduler"}
        metrics = server.metrics()
        assert metrics["heartbeat_age_seconds"] >= STALE_SECONDS and metrics["step_age_seconds"] > 0
    server.until(lambda: server.http.get("/health").json() == {"status": "ready"})
    client.join(60)
    assert [answer.status_code for answer in answers] == [200]
    assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    assert server.metrics()["step_age_seconds"] == 0
    assert server.stop() == 0


def test_a_step_that_never_returns_is_the_scheduler_hanging(start_server: Any) -> None:
    """A device that hangs blocks the scheduler's thread in a step, while its process runs on."""
    server = start_server(hang_timeout=LIMIT, null_step_seconds=60.0)
    answer = server.http.post("/v1/completions", json={"prompt": "go on", "max_tokens": 4})
    assert answer.status_code == 500 and "the scheduler process has not answered for" in answer.text
    assert server.process.wait(60) == 1


def test_a_suspended_server_does_not_take_its_processes_for_hung(start_server: Any) -> None:
    server = start_server(hang_timeout=5)
    pids = [server.process.pid, *server.pids.values()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(6)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
    time.sleep(0.5)
    assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    assert server.stop() == 0
