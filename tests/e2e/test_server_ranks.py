"""A server whose model is split over two processes: it answers as one, and ends when one of them does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig

PROMPT = "A tree of tokens grows a branch for every question."
LIMIT = 5.0  # seconds without an answer after which a process has hung


def config(checkpoint: Callable[[str], Path], ranks: int = 2, **settings: Any) -> ServerConfig:
    engine = EngineConfig(
        model=str(checkpoint("llama-gqa")),
        device="cpu",
        kv_cache_tokens=2048,
        tensor_parallel_size=ranks,
        max_num_seqs=2,
        check_when_idle=True,
    )
    return ServerConfig(engine=engine, port=0, **settings)


def until_gone(alive: Callable[[int], bool], pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Clients:
    """Requests in threads, of which each will fail: (status, text). Two samples run at a time, for many seconds."""

    def __init__(self, server: Any, count: int) -> None:
        self.answers: list[tuple[int, str]] = []
        self._threads = [threading.Thread(target=self._ask, args=(server,)) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self, server: Any) -> None:
        body = {"prompt": PROMPT, "n": 16, "max_tokens": 400, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        self.answers.append((answer.status_code, answer.text))

    def join(self) -> list[tuple[int, str]]:
        for thread in self._threads:
            thread.join(90)
        assert len(self.answers) == len(self._threads)
        return self.answers


def test_two_ranks_serve_what_one_does(
    start_server: Any, checkpoint: Callable[[str], Path], process_alive: Callable[[int], bool]
) -> None:
    texts = []
    for ranks in (1, 2):
        server = start_server(config(checkpoint, ranks))
        assert len(server.info["rank_pids"]) == ranks - 1
        body = {"prompt": [PROMPT, PROMPT * 3], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        for _ in range(2):
            texts.append([one["text"] for one in server.http.post("/v1/completions", json=body).json()["choices"]])
        if ranks == 2:
            assert any(line.startswith("rank 1") for line in server.info["memory_plan"])
        time.sleep(1.5)  # a heartbeat while idle
        assert server.http.get("/health").json() == {"status": "ready"}
        assert server.stop() == 0
        assert not any(process_alive(pid) for pid in server.info["rank_pids"]) and not server.run_dirs
    assert texts[0] == texts[1] == texts[2] == texts[3]


@pytest.mark.parametrize("busy", [False, True])
def test_a_rank_that_is_killed_ends_the_server(
    busy: bool, start_server: Any, checkpoint: Callable[[str], Path], process_alive: Callable[[int], bool]
) -> None:
    server = start_server(config(checkpoint))
    pids = [*server.pids.values(), *server.info["rank_pids"]]
    clients = Clients(server, 3 if busy else 0)
    server.until(lambda: not busy or server.stats()["generated_tokens"] >= 10)
    os.kill(server.info["rank_pids"][0], signal.SIGKILL)
    assert server.process.wait(60) == 1
    for status, text in clients.join():
        assert status == 500 and "rank 1 was killed by signal 9" in text
    assert "rank 1 was killed by signal 9" in server.log.read_text()
    until_gone(process_alive, pids)
    assert not server.run_dirs


@pytest.mark.parametrize("busy", [False, True])
def test_a_rank_that_is_stopped_ends_the_server(
    busy: bool, start_server: Any, checkpoint: Callable[[str], Path], process_alive: Callable[[int], bool]
) -> None:
    server = start_server(config(checkpoint, hang_timeout=LIMIT))
    pids = [*server.pids.values(), *server.info["rank_pids"]]
    clients = Clients(server, 2 if busy else 0)
    server.until(lambda: not busy or server.stats()["generated_tokens"] >= 10)
    os.kill(server.info["rank_pids"][0], signal.SIGSTOP)
    assert server.process.wait(60) == 1
    for status, text in clients.join():
        assert status == 500 and "has not answered for" in text and "rank" in text
    until_gone(process_alive, pids)
    assert not server.run_dirs


def test_a_killed_server_leaves_no_rank(
    start_server: Any, checkpoint: Callable[[str], Path], process_alive: Callable[[int], bool]
) -> None:
    server = start_server(config(checkpoint))
    os.kill(server.info["rank_pids"][0], signal.SIGSTOP)
    server.process.kill()
    until_gone(process_alive, [*server.pids.values(), *server.info["rank_pids"]])


def test_a_split_that_cannot_be_made_is_one_line(start_server: Any, checkpoint: Callable[[str], Path]) -> None:
    server = start_server(config(checkpoint, ranks=3))
    assert server.process.wait(60) == 2
    said = "--tensor-parallel-size 3: 4 attention heads and 2 KV heads cannot be divided by it"
    assert said in server.log.read_text() and "Traceback" not in server.log.read_text()
