"""What the front room's tests share."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

API_KEY = "the-key"


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port nobody listens on, nor can during the test."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """Of this process and those it starts."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.delenv("BRANCHWISE_API_KEY", raising=False)
    yield
    patch.undo()


@pytest.fixture
def branchwise() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``branchwise("doctor", "some/model", env={...})`` runs the command line."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "branchwise", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | (env or {}))

    return run


class Server:
    """A real `branchwise serve` of the shipped model, with a key. ``output`` is what it said until it was ready.

    In float32: in bfloat16, samples of the same seed can differ between a prompt that is cached and one that is not.
    """

    def __init__(self, *arguments: str) -> None:
        settings = ("--port", "0", "--kv-cache-tokens", "8192", "--dtype", "float32")
        command = [sys.executable, "-m", "branchwise", "serve", *settings, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
        assert self.process.stdout is not None
        self.output = ""
        self.url = ""
        for line in self.process.stdout:
            self.output += line
            if found := re.search(r"ready at (http://\S+)", line):
                self.url = found[1]
            if "branchwise tree" in line:
                return
        raise AssertionError(f"the server did not start: {self.output}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=240)
        return self.process.returncode


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    running = Server("--api-key", API_KEY)
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def open_server() -> Iterator[Server]:
    """One without a key."""
    running = Server()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def wanting_folder(checkpoint_wanting: Callable[..., Path]) -> Path:
    """A small model that wants to be greedy, in its own words."""
    return checkpoint_wanting(temperature=1.7, top_k=1)


@pytest.fixture(scope="session")
def wanting_server(wanting_folder: Path) -> Iterator[Server]:
    """A server of it, without a key."""
    running = Server(str(wanting_folder))
    yield running
    assert running.stop() == 0


@pytest.fixture
def tight_server() -> Iterator[Server]:
    """One with room for three branches, which live a second; to be killed."""
    running = Server("--max-branches", "3", "--branch-ttl", "1")
    yield running
    if running.process.poll() is None:
        running.stop()
