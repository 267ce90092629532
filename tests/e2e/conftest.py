"""Servers in processes of their own, as people run them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig

LAUNCH = """
import json, sys
import msgspec
from branchwise.runtime.config import ServerConfig
from branchwise.runtime.errors import LoadError
from branchwise.runtime.server.server import run_server

def ready(info):
    print(json.dumps(info), flush=True)

try:
    sys.exit(run_server(msgspec.json.decode(sys.argv[1], type=ServerConfig), ready))
except LoadError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


class RunningServer:
    """One server process: where it answers, the processes it consists of, and its end."""

    def __init__(self, config: ServerConfig, run_root: Path) -> None:
        self.config = config
        self.run_root = run_root  # its run directory is made in here
        self.started = time.monotonic()
        self.log = run_root / "stderr.txt"
        environment = {**os.environ, "TMPDIR": str(run_root), "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, msgspec.json.encode(config).decode()],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.info: dict[str, Any] = {}
            return
        self._reach(json.loads(line), config.api_key)

    def _reach(self, info: dict[str, Any], api_key: str | None) -> None:
        self.info = info
        self.url: str = info["url"]
        self.pids: dict[str, int] = info["pids"]
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def __enter__(self) -> RunningServer:
        assert self.info, self.log.read_text()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """It must end with exit code 0, unless something went wrong with it before."""
        try:
            assert kind is not None or self.stop() == 0
        finally:
            self.close()

    @property
    def run_dirs(self) -> list[Path]:
        return list(self.run_root.glob("branchwise-*"))

    def stop(self, number: int = signal.SIGTERM, seconds: float = 90) -> int:
        """Signals the server and returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def until(self, reached: Callable[[], Any], seconds: float = 60) -> Any:
        """Waits until ``reached()`` is true; returns its value."""
        deadline = time.monotonic() + seconds
        while not (value := reached()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return value

    @contextlib.contextmanager
    def stopped(self, role: str) -> Iterator[None]:
        """Suspends a process meanwhile: without the detokenizer no request ends, however few tokens it has."""
        os.kill(self.pids[role], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pids[role], signal.SIGCONT)

    def in_flight(self) -> int:
        """Requests that HTTP has sent to the engine and that have not ended."""
        return int(self.http.get("/get_server_info").json()["requests_in_flight"])

    def stats(self) -> dict[str, Any]:
        return self.http.get("/get_server_info").json()["stats"]

    def metrics(self) -> dict[str, float]:
        """Samples of ``/metrics``, by name and labels, without ``branchwise_``."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("branchwise_"): float(value) for name, value in (one.rsplit(" ", 1) for one in lines)}

    def idle(self, seconds: float = 60) -> dict[str, Any]:
        """Waits until nothing is in flight and every page is free or cached; returns the stats."""
        deadline = time.monotonic() + seconds
        while True:
            info = self.http.get("/get_server_info").json()
            stats = info["stats"]
            held = stats["pages_total"] - stats["pages_free"] - stats["pages_cached"]
            if not (info["requests_in_flight"] or stats["running"] or stats["waiting"] or held):
                return stats
            assert time.monotonic() < deadline, f"still busy: {info['requests_in_flight']} in flight, {stats}"
            time.sleep(0.05)

    def empty_cache(self) -> None:
        """Flushes until nothing is left: requests that are ending, and copies between tiers, keep pages at first."""

        def empty() -> bool:
            self.http.post("/flush_cache").raise_for_status()
            info = self.http.get("/get_server_info").json()
            return not info["requests_in_flight"] and info["stats"]["pages_free"] == info["stats"]["pages_total"]

        self.until(empty)

    def refused(self, path: str, field: str | None, **request: Any) -> str:
        """POSTs what must be refused, checks that the answer has the right shape and names ``field``; its message."""
        answer = self.http.post(path, **request)
        sent = str(request)[:300]
        assert 400 <= answer.status_code < 500, f"{sent} -> {answer.status_code} {answer.text[:500]}"
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        if field is not None:
            said = f"{sent} -> {error}"
            assert (error["param"] or "").split("[")[0].split(".")[0] == field.split(".")[0], said
            assert field.split(".")[-1] in error["message"], said
        message: str = error["message"]
        assert len(message) < 500
        return message

    def close(self) -> None:
        if self.info:
            self.http.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class BorrowedServer(RunningServer):
    """The server of the pytest that runs this one: see `test_openai_majors`."""

    def __init__(self, info: str) -> None:
        self._reach(json.loads(info), None)

    def close(self) -> None:
        self.http.close()


StartServer = Callable[..., RunningServer]


def alive(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def null_config(folder: Path, **settings: Any) -> ServerConfig:
    """A server without a model: everything else is real, and it starts in a second."""
    engine = EngineConfig(model=str(folder), check_when_idle=True, **settings.pop("engine", {}))
    return ServerConfig(engine=engine, port=0, null_executor=True, **settings)


@pytest.fixture(scope="session")
def tokenizer_folder(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small real BPE tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    checkpoints.write_tokenizer(folder)
    (folder / "config.json").write_text("{}")  # what makes it a model's folder; nobody loads the model
    return folder


@pytest.fixture
def start_server(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """``start_server(**settings)`` starts a server without a model; ``config=`` starts any other."""
    servers: list[RunningServer] = []

    def start(config: ServerConfig | None = None, **settings: Any) -> RunningServer:
        server = RunningServer(config or null_config(tokenizer_folder, **settings), tmp_path_factory.mktemp("run"))
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server without a model for all tests that leave it as they found it; it must end with exit code 0."""
    config = null_config(tokenizer_folder, max_queued_requests=300)
    with RunningServer(config, tmp_path_factory.mktemp("run")) as running:
        yield running
        running.idle()
    assert not running.run_dirs


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server with the model that ships with the package, for tests that leave nothing running. In float32: tests
    compare what is computed warm and cold, and bfloat16, which some processors have, rounds much coarser.
    """
    borrowed = os.environ.get("BRANCHWISE_TEST_SERVER")
    if borrowed is not None:
        with contextlib.closing(BorrowedServer(borrowed)) as server:
            yield server
        return
    engine = EngineConfig(dtype="float32", kv_cache_tokens=40_000, check_when_idle=True)
    with RunningServer(ServerConfig(engine=engine, port=0), tmp_path_factory.mktemp("shipped")) as server:
        yield server
        server.idle()


@pytest.fixture(scope="session")
def client(shipped: RunningServer) -> Iterator[Any]:
    """The ``openai`` package at that server; of the major this pytest was started with."""
    import openai

    wanted = os.environ.get("BRANCHWISE_TEST_OPENAI", "")
    assert openai.__version__.startswith(wanted), f"openai {openai.__version__} was found, not {wanted}"
    with openai.OpenAI(base_url=f"{shipped.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def process_alive() -> Callable[[int], bool]:
    return alive


@pytest.fixture(scope="session")
def run_server_process() -> type[RunningServer]:
    """The class itself, for fixtures with a scope of their own."""
    return RunningServer


@pytest.fixture(scope="session")
def null_settings() -> Callable[..., ServerConfig]:
    """`null_config`, for the same."""
    return null_config
