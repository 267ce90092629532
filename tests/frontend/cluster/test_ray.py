"""The Ray Serve application, whole: ``branchwise cluster up``. Skipped without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray")

CONFIG = """
port: {port}
replicas: 2
num_cpus: 0.5
drain_seconds: 30
engine: {{kv_cache_tokens: 32768, max_model_len: 4096}}
server: {{null_executor: true, null_step_seconds: 0.01, stats_log_seconds: 0}}
"""


def ids(n: int, start: int = 3) -> list[int]:
    return [(start + 11 * i) % 300 + 5 for i in range(n)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = tmp_path_factory.mktemp("cluster") / "cluster.yaml"
    file.write_text(CONFIG.format(port=port))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "branchwise", "cluster", "up", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if "ready" in line:
            break
    else:
        raise AssertionError(f"it did not start: {process.wait()}")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        yield http
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0


def home(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-branchwise-replica"]


def test_prompts_go_where_they_are_cached(cluster: httpx.Client) -> None:
    time.sleep(3)  # the first reports of the replicas, by which the routers find their events
    bodies = [{"prompt": ids(400, 37 * number), "max_tokens": 2} for number in range(6)]
    homes = [home(cluster.post("/v1/completions", json=body)) for body in bodies]
    assert sorted(map(homes.count, set(homes))) == [3, 3]
    time.sleep(0.5)
    for body, expected in zip(bodies, homes, strict=True):
        answer = cluster.post("/v1/completions", json=body)
        assert home(answer) == expected
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 399
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True}
    assert cluster.post("/v1/chat/completions", json=chat).text.rstrip().endswith("data: [DONE]")
    made = cluster.post("/branches", json={"input_ids": ids(50)})
    for _ in range(4):
        assert home(cluster.get(f"/branches/{made.json()['id']}")) == home(made)
    assert cluster.post("/flush_cache").json()["evicted_pages"] > 6 * 25


def test_a_killed_server_is_replaced_and_its_clients_get_one_error(cluster: httpx.Client) -> None:
    body = {"prompt": ids(64), "max_tokens": 2000, "stream": True}
    with cluster.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        name = answer.headers["x-branchwise-replica"]
        os.kill(server_of(name), signal.SIGKILL)
        errors = [line for line in lines if '"error"' in line]
    assert len(errors) == 1 and "replica" in errors[0]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        answer = cluster.post("/v1/completions", json={"prompt": ids(64), "max_tokens": 1})
        assert answer.status_code == 200, "the others serve"
        prompts = ({"prompt": ids(99, number), "max_tokens": 1} for number in range(4))
        if len({home(cluster.post("/v1/completions", json=prompt)) for prompt in prompts}) == 2:
            return
        time.sleep(1)
    raise AssertionError("no other replica was started")


def server_of(name: str) -> int:
    """The process id of a replica's server."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"branchwise.frontend.cluster.child" in command and name.encode() in command:
                return int(entry.name)
    raise AssertionError(f"no server of replica {name}")
