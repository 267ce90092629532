"""A server inside another process: on a thread of its own, or on somebody's event loop. Nothing of it is left after."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import zmq

from branchwise import EngineConfig, Server, ServerConfig
from branchwise.runtime.config import check_server
from branchwise.runtime.errors import EngineDead, LoadError
from branchwise.runtime.server import engine_processes
from branchwise.runtime.server.engine_processes import EngineProcesses
from branchwise.runtime.server.processes.launch import RunDirectory
from branchwise.runtime.server.server import ServerStopped


@pytest.fixture
def run_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where run directories are made. A path as long as that of ``tmp_path`` would be too long for their sockets."""
    with tempfile.TemporaryDirectory(prefix="run-", dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


@pytest.fixture
def config(checkpoints: Any, tmp_path: Path, run_root: Path) -> Callable[..., ServerConfig]:
    """A server without a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    checkpoints.write_tokenizer(folder)
    (folder / "config.json").write_text("{}")

    def make(**settings: Any) -> ServerConfig:
        return ServerConfig(engine=EngineConfig(model=str(folder)), port=0, null_executor=True, **settings)

    return make


def complete(server: Server, tokens: int = 5) -> int:
    body = {"prompt": "hello", "max_tokens": tokens}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=90).json()["usage"]["completion_tokens"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_twice_one_after_the_other(config: Callable[..., ServerConfig], run_root: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for _ in range(2):
        with Server(config()) as server:
            assert complete(server) == 5
            pids = server.info["pids"].values()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        assert not any(map(alive, pids))
        assert not list(run_root.iterdir())
        assert not [thread for thread in threading.enumerate() if thread.name == "branchwise-server"]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_two_at_once(config: Callable[..., ServerConfig]) -> None:
    with Server(config(served_model_name="one")) as one:
        with Server(config(served_model_name="two")) as two:
            names = [httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] for server in (one, two)]
            assert names == ["one", "two"]
            assert (complete(one), complete(two)) == (5, 5)
        assert complete(one) == 5


async def test_on_an_event_loop_requests_in_flight_finish(config: Callable[..., ServerConfig]) -> None:
    server = Server(config(null_step_seconds=0.005))
    with pytest.raises(RuntimeError, match="not ready"):
        _ = server.info
    info = await server.start()
    assert info["pids"].keys() == {"tokenizer", "scheduler", "detokenizer"}
    with pytest.raises(RuntimeError, match="make another"):
        await server.start()
    request = asyncio.create_task(asyncio.to_thread(complete, server, 100))
    while not await busy(server):
        await asyncio.sleep(0.01)
    await server.stop()
    assert await request == 100
    await server.wait()


async def busy(server: Server) -> bool:
    async with httpx.AsyncClient() as client:
        return bool((await client.get(f"{server.url}/get_server_info")).json()["requests_in_flight"])


async def begun(starting: asyncio.Task[Any], run_root: Path) -> None:
    """Waits until the server starts its processes, which need a while until they are ready."""
    while not list(run_root.iterdir()):
        assert not starting.done()
        await asyncio.sleep(0.001)


async def test_a_stop_before_it_is_ready(config: Callable[..., ServerConfig], run_root: Path) -> None:
    server = Server(config())
    starting = asyncio.create_task(server.start())
    await begun(starting, run_root)
    await server.stop()
    with pytest.raises(ServerStopped):
        await starting
    assert not list(run_root.iterdir())


async def test_a_cancelled_start_leaves_nothing(config: Callable[..., ServerConfig], run_root: Path) -> None:
    starting = asyncio.create_task(Server(config()).start())
    await begun(starting, run_root)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not list(run_root.iterdir())


@pytest.mark.parametrize(
    ("number", "why"),
    [(signal.SIGKILL, ""), (signal.SIGBUS, ": a file it had mapped, such as the model's weights, was truncated")],
)
async def test_a_killed_process_is_an_error_for_who_waits(
    config: Callable[..., ServerConfig], number: int, why: str
) -> None:
    server = Server(config())
    info = await server.start()
    waiting = asyncio.create_task(server.wait())
    os.kill(info["pids"]["scheduler"], number)
    with pytest.raises(EngineDead, match=f"the scheduler process was killed by signal {number}{why}; the server is"):
        await asyncio.wait_for(waiting, 60)


def test_what_cannot_start_says_why(config: Callable[..., ServerConfig]) -> None:
    with Server(config()) as server:
        taken = config()
        settings = {name: getattr(taken, name) for name in taken.__struct_fields__} | {"port": server.info["port"]}
        with pytest.raises(LoadError, match="already in use"), Server(ServerConfig(**settings)):
            pass
    for settings, says in (
        ({"tool_call_parser": "nonsense"}, "--tool-call-parser"),
        ({"tool_call_parser": "pythonic", "reasoning_parser": "mistral"}, "--tool-call-parser and --reasoning-parser"),
        ({"drain_seconds": "soon"}, "--drain-seconds: Expected `float`"),
        ({"log_level": "loud"}, "--log-level: must be one of debug, info, warning, error, got 'loud'"),
    ):
        with pytest.raises(LoadError, match=says):
            Server(config(**settings))


@pytest.mark.parametrize("key", ["", " ", "\t", "two words", "line\n", "\0"])
@pytest.mark.parametrize("flag", ["--api-key", "--extra-api-key", "--admin-api-key", "--api-key-file"])
def test_a_key_that_no_client_can_send_is_refused(
    config: Callable[..., ServerConfig], tmp_path: Path, flag: str, key: str
) -> None:
    """An empty key must not mean a server that asks for none."""
    (tmp_path / "key").write_text(key + "x\n" if key.strip() == "line" else key)
    settings: dict[str, Any] = {
        "--api-key": {"api_key": key},
        "--extra-api-key": {"api_key": "good", "extra_api_keys": ("fine", key)},
        "--admin-api-key": {"api_key": "good", "admin_api_key": key},
        "--api-key-file": {"api_key_file": str(tmp_path / "key")},
    }[flag]
    with pytest.raises(LoadError, match=f"{flag}: a key must not be empty"):
        Server(config(**settings))


@pytest.mark.parametrize(
    "keys",
    [{"extra_api_keys": ("good",)}, {"extra_api_keys": ("a", "a")}, {"extra_api_keys": ("a",), "admin_api_key": "a"}],
)
def test_one_key_is_not_two_tenants(config: Callable[..., ServerConfig], keys: dict[str, Any]) -> None:
    """A tenant whose key is also the admin key would be an admin."""
    with pytest.raises(LoadError, match="--extra-api-key: a key must differ"):
        Server(config(api_key="good", **keys))
    Server(config(api_key="good", extra_api_keys=("a", "b"), admin_api_key="good"))


def test_a_key_from_a_file(config: Callable[..., ServerConfig], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    file = str(tmp_path / "key")
    with Server(config(api_key_file=file)) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200
    with pytest.raises(LoadError, match="give one of them"):
        check_server(config(api_key="a", api_key_file=file))
    with pytest.raises(LoadError, match="cannot be read"):
        check_server(config(api_key_file=str(tmp_path / "none")))


def test_each_key_has_an_equal_share_of_what_is_limited_in_total(config: Callable[..., ServerConfig]) -> None:
    alone = config(api_key="a")
    assert check_server(alone) == alone
    shared = check_server(config(api_key="a", extra_api_keys=("b", "c")))
    assert shared.max_queued_per_key == 1366
    assert shared.engine.max_branches_per_key == 1366
    assert shared.engine.pinned_share_per_key == pytest.approx(1 / 3)
    assert check_server(shared) == shared
    assert check_server(config(api_key="a", extra_api_keys=("b",), max_queued_per_key=9)).max_queued_per_key == 9


def test_a_disk_without_space_or_inodes_is_one_line(
    config: Callable[..., ServerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(LoadError, match="No space left on device; set TMPDIR"):
        RunDirectory(config())


@pytest.mark.parametrize("step", ["hold_lock", "Path.write_bytes"])
def test_a_run_directory_that_cannot_be_filled_is_removed(
    config: Callable[..., ServerConfig], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    paths: list[str] = []
    make = tempfile.mkdtemp

    def noted(**options: Any) -> str:
        paths.append(make(**options))
        return paths[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    monkeypatch.setattr(f"{RunDirectory.__module__}.{step}", Mock(side_effect=OSError(errno.ENOSPC, "it is full")))
    with pytest.raises(LoadError, match="it is full; set TMPDIR"):
        RunDirectory(config())
    assert len(paths) == 1 and not Path(paths[0]).exists()


async def test_a_server_without_descriptors_for_its_channels_leaves_no_directory(
    config: Callable[..., ServerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[RunDirectory] = []

    def outbox(context: Any, run_dir: Path, name: str) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    class Noted(RunDirectory):
        def __init__(self, config: ServerConfig) -> None:
            super().__init__(config)
            made.append(self)

    monkeypatch.setattr(engine_processes, "RunDirectory", Noted)
    monkeypatch.setattr(engine_processes, "Outbox", outbox)
    with pytest.raises(zmq.ZMQError, match="Too many open files"):
        EngineProcesses(config(), lambda message: None)
    assert len(made) == 1 and not made[0].path.exists() and made[0]._lock.closed
