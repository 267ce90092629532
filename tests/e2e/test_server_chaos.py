"""What a server does when clients leave, when it is told to stop, and when a part of it is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

LONG = 25_000  # tokens: many seconds of made-up ones
BODIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "/v1/completions": lambda tokens: {"prompt": "go on", "max_tokens": tokens},
    "/v1/chat/completions": lambda tokens: {"messages": [{"role": "user", "content": "go on"}], "max_tokens": tokens},
    "/generate": lambda tokens: {"text": "go on", "sampling_params": {"max_new_tokens": tokens}},
}
ROLES = ["tokenizer", "scheduler", "detokenizer"]


class Background:
    """A request in a thread: its whole answer, or the error."""

    def __init__(self, server: Any, path: str, **body: Any) -> None:
        self.lines: list[str] = []
        self.status: int | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(server, path, body))
        self._thread.start()

    def _run(self, server: Any, path: str, body: dict[str, Any]) -> None:
        try:
            with (
                httpx.Client(base_url=server.url, timeout=240) as client,
                client.stream("POST", path, json=body) as response,
            ):
                self.status = response.status_code
                for line in response.iter_lines():
                    if line:
                        self.lines.append(line)
        except httpx.HTTPError as error:
            self.error = error

    def first(self) -> None:
        """Waits for the first event."""
        deadline = time.monotonic() + 60
        while not self.lines:
            assert time.monotonic() < deadline, self.error
            time.sleep(0.005)

    def join(self) -> None:
        self._thread.join(90)
        assert not self._thread.is_alive()


def streaming(server: Any, tokens: int = LONG, path: str = "/v1/completions") -> Background:
    return Background(server, path, **BODIES[path](tokens), stream=True)


def waiting(server: Any, tokens: int = LONG, path: str = "/generate") -> Background:
    return Background(server, path, **BODIES[path](tokens))


def until_in_flight(server: Any, count: int) -> None:
    server.until(lambda: server.in_flight() >= count)


def until_not_ready(server: Any) -> httpx.Response:
    """Waits until /health has another status, which says that the server has taken notice of a signal."""
    return server.until(lambda: (answer := server.http.get("/health")).status_code == 503 and answer)


def gone(server: Any, process_alive: Any, seconds: float = 60) -> bool:
    """Whether no child and no run directory is left."""
    deadline = time.monotonic() + seconds
    while any(process_alive(pid) for pid in server.pids.values()) or server.run_dirs:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("role", ROLES)
def test_a_killed_child_is_an_error_for_everybody_and_the_end(start_server: Any, process_alive: Any, role: str) -> None:
    server = start_server()
    requests = [*(streaming(server, path=path) for path in BODIES), *(waiting(server, path=path) for path in BODIES)]
    for request in requests[:3]:
        request.first()
    until_in_flight(server, 6)
    os.kill(server.pids[role], signal.SIGKILL)
    for request in requests:
        request.join()
        assert request.error is None
    for request in requests[:3]:
        assert request.status == 200
        *events, last = [json.loads(line.removeprefix("data: ")) for line in request.lines]
        assert not any("error" in event for event in events), "it is the last one, and no [DONE] follows"
        assert last["error"]["code"] == "engine_dead"
        assert role in last["error"]["message"]
    for request in requests[3:]:
        assert request.status == 500
        assert json.loads(request.lines[0])["error"]["code"] == "engine_dead"
    assert server.process.wait(60) == 1
    assert gone(server, process_alive)
    assert f"the {role} process was killed by signal 9" in server.log.read_text()


def test_a_killed_server_leaves_nothing_behind(start_server: Any, process_alive: Any) -> None:
    server = start_server()
    request = streaming(server)
    request.first()
    server.process.kill()
    server.process.wait()
    request.join()
    assert gone(server, process_alive)


def test_what_a_killed_server_could_not_clean_up_is_cleaned_up_by_the_next(
    start_server: Any, process_alive: Any, run_server_process: Any, null_settings: Any, tokenizer_folder: Path
) -> None:
    """A child that is stopped when its server is killed cannot end by itself, nor remove the run directory."""
    server = start_server()
    os.kill(server.pids["detokenizer"], signal.SIGSTOP)
    server.process.kill()
    server.process.wait()
    [left] = server.run_dirs
    assert process_alive(server.pids["detokenizer"])
    with run_server_process(null_settings(tokenizer_folder), server.run_root) as second:
        assert left not in second.run_dirs
        assert not process_alive(server.pids["detokenizer"])
        assert second.http.get("/health").status_code == 200
        # What belongs to a living server stays, whoever starts beside it.
        with run_server_process(null_settings(tokenizer_folder), server.run_root) as third:
            assert len(third.run_dirs) == 2
        assert second.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_sigterm_drains(start_server: Any, process_alive: Any) -> None:
    server = start_server()
    with server.stopped("detokenizer"):
        requests = [streaming(server, 3000), waiting(server, 3000)]
        until_in_flight(server, 2)
        server.process.send_signal(signal.SIGTERM)
        health = until_not_ready(server)
        said = (health.status_code, health.json(), health.headers["connection"])
        assert said == (503, {"status": "draining"}, "close")
        refused = server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert refused.status_code == 503 and "shutting down" in refused.text
    for request in requests:
        request.join()
        assert request.error is None
        assert request.status == 200
    assert requests[0].lines[-1] == "data: [DONE]"
    assert json.loads(requests[1].lines[0])["meta_info"]["completion_tokens"] == 3000
    assert server.process.wait(60) == 0
    assert gone(server, process_alive)


def test_a_drain_delay_takes_requests_while_load_balancers_leave(start_server: Any, process_alive: Any) -> None:
    server = start_server(drain_delay=5.0)
    server.http.get("/health")  # this connection is kept alive
    server.process.send_signal(signal.SIGTERM)
    with httpx.Client(base_url=server.url, timeout=240) as other:
        while (health := other.get("/health")).status_code == 200:
            time.sleep(0.01)
    assert health.json() == {"status": "leaving"}
    body = {"prompt": "a", "max_tokens": 2}
    kept = server.http.post("/v1/completions", json=body)
    assert (kept.status_code, kept.headers["connection"]) == (200, "close")
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=240).status_code == 200
    assert server.process.wait(60) == 0
    assert gone(server, process_alive)


def test_a_second_signal_ends_the_delay_too(start_server: Any) -> None:
    server = start_server(drain_delay=300)
    server.process.send_signal(signal.SIGTERM)
    until_not_ready(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 1


def test_draining_has_an_end(start_server: Any, process_alive: Any) -> None:
    server = start_server(drain_seconds=0.3)  # of requests that would take far longer than the limit below
    requests = [streaming(server), waiting(server)]
    requests[0].first()
    until_in_flight(server, 2)
    assert server.stop() == 0
    for request in requests:
        request.join()
    assert "shutting down" in requests[0].lines[-1]
    assert (requests[1].status, requests[1].error) == (503, None)
    assert gone(server, process_alive)


def test_a_client_that_does_not_read_is_no_error_when_the_server_ends(start_server: Any) -> None:
    server = start_server(drain_seconds=0.3)
    data = json.dumps({"input_ids": [5], "sampling_params": {"max_new_tokens": LONG, "n": 64}, "stream": True}).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((server.info["host"], server.info["port"]))
        raw.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        until_sent = server.stats()["generated_tokens"] + 64 * 1000  # megabytes, of which the buffers hold some
        server.until(lambda: server.stats()["generated_tokens"] >= until_sent)
        assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


def test_a_second_signal_does_not_wait(start_server: Any, process_alive: Any) -> None:
    server = start_server(drain_seconds=300)
    request = streaming(server)
    request.first()
    server.process.send_signal(signal.SIGINT)
    until_not_ready(server)
    assert server.process.poll() is None, "the first signal drains"
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 1
    request.join()
    assert gone(server, process_alive)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_stops_at_once(start_server: Any, process_alive: Any, number: int) -> None:
    server = start_server(drain_seconds=300)
    server.http.get("/health")  # an idle keep-alive connection must not hold it up
    assert server.stop(number) == 0
    assert gone(server, process_alive)


def test_signals_to_the_whole_group_do_not_kill_children(start_server: Any) -> None:
    server = start_server()
    request = streaming(server, 3000)
    request.first()
    for pid in server.pids.values():
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert server.stop() == 0
    request.join()
    assert request.lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(server: Any, path: str, stream: bool) -> None:
    body = {"stream": stream, "prompt": ["go", "on"], "max_tokens": LONG, "n": 2}
    if path == "/generate":
        body = {"stream": stream, "text": ["go", "on"], "sampling_params": {"max_new_tokens": LONG, "n": 2}}
    before = server.idle()["generated_tokens"]
    with socket.create_connection((server.info["host"], server.info["port"])) as raw:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        raw.sendall(head + data)
        if stream:
            assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        until_in_flight(server, 4)
    assert server.idle()["generated_tokens"] - before < 4 * LONG


def test_clients_that_leave_after_every_event(server: Any) -> None:
    """Disconnects at each of the first events, over and over; afterwards the books balance and it serves."""
    body = {"prompt": "again and again", "max_tokens": LONG, "stream": True}
    for events in range(12):
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            for _ in range(events):
                next(lines)
    server.idle()
    assert server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_client_that_leaves_before_its_body_is_sent(server: Any) -> None:
    for _ in range(5):
        with socket.create_connection((server.info["host"], server.info["port"])) as raw:
            raw.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    server.idle()
    assert server.http.get("/health").status_code == 200


def test_a_stopped_detokenizer_delays_and_loses_nothing(server: Any) -> None:
    before = server.idle()["finished"]
    with server.stopped("detokenizer"):
        request = waiting(server, 200)
        server.until(lambda: server.stats()["finished"] > before)
        assert server.in_flight() == 1
    request.join()
    assert json.loads(request.lines[0])["meta_info"]["completion_tokens"] == 200
    server.idle()


def test_the_run_directory_is_private_and_knows_no_key(start_server: Any) -> None:
    server = start_server(api_key="very-secret")
    [run_dir] = server.run_dirs
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert "very-secret" not in (run_dir / "launch.json").read_text()
    for pid in [server.process.pid, *server.pids.values()]:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert pid == server.process.pid or b"very-secret" not in command
    assert {path.name for path in run_dir.glob("*.sock")} == {f"{role}.sock" for role in [*ROLES, "http"]}
    assert server.stop() == 0


def test_a_model_that_cannot_be_loaded_is_one_line(start_server: Any, server: Any, tmp_path: Path) -> None:
    from branchwise.runtime.config import EngineConfig, ServerConfig

    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    taken = server.info["port"]
    for config, said in (
        (ServerConfig(engine=EngineConfig(model=str(tmp_path / "missing")), port=0), "missing"),
        (ServerConfig(engine=EngineConfig(model=str(tmp_path / "empty")), port=0), "empty"),
        (ServerConfig(engine=EngineConfig(model=str(tmp_path / "hollow")), port=taken), f"{taken}"),
        (ServerConfig(engine=EngineConfig(page_size=0), port=0), "page-size"),
    ):
        failed = start_server(config)
        assert failed.process.wait(90) == 2
        [line] = failed.log.read_text().splitlines()
        assert said in line
        assert not failed.run_dirs


def test_only_the_scheduler_imports_torch() -> None:
    """HTTP, tokenizer and detokenizer must come up in a fraction of a second."""
    code = (
        "import sys\n"
        "import branchwise.runtime.server.server, branchwise.runtime.server.http.app\n"
        "import branchwise.runtime.server.processes.tokenizer_worker\n"
        "import branchwise.runtime.server.processes.detokenizer_worker\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
