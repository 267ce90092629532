"""Frames between processes: typed, in order, never dropped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.messages import Abort, CacheReport, Delta, Deltas, Finished, Generate, Stats, StepOutput
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.processes.channels import MAX_PATH, Inbox, Outbox, address
from branchwise.runtime.server.processes.launch import RunDirectory, read_launch


@pytest.fixture
def run_dir() -> Iterator[Path]:
    keys = {"api_key": "hidden 1", "extra_api_keys": ("hidden 2",), "admin_api_key": "hidden 3"}
    config = ServerConfig(engine=EngineConfig(), namespace_secret="hidden 4", **keys)  # type: ignore[arg-type]
    directory = RunDirectory(config)
    yield directory.path
    directory.remove()
    assert not directory.path.exists()


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(0)


def receive(inbox: Inbox[Any], count: int) -> list[Any]:
    messages: list[Any] = []
    while len(messages) < count:
        new = inbox.receive(60_000)
        assert new, "nothing came"
        messages += new
    return messages


def test_messages_arrive_whole_and_in_order(context: zmq.Context[Any], run_dir: Path) -> None:
    outbox = Outbox(context, run_dir, "scheduler")  # connects before the other end is there
    params = SamplingParams(max_tokens=3, stop=("a",), logit_bias={5: 1.5}, seed=7)
    first = [Generate([1, 2], params, None, b"\1\0\0\0", ("owner", "salt"), -3, False), Abort(2)]
    outbox.send(first)
    inbox: Inbox[Any] = Inbox(context, run_dir, "scheduler")
    outbox.send([Abort(i) for i in range(3, 5000)])
    outbox.send([])
    messages = receive(inbox, 4999)
    assert messages[:2] == first
    assert [message.id for message in messages[2:]] == list(range(3, 5000))
    assert inbox.receive(0) == []


def test_the_way_out(context: zmq.Context[Any], run_dir: Path) -> None:
    inbox: Inbox[Any] = Inbox(context, run_dir, "http")
    outbox = Outbox(context, run_dir, "http")
    finish = Finished(1, "stop", 5, 2, CacheReport(3, "diverged", 3), matched=9)
    said = [Deltas([Delta(1, "é", b"\1\0\0\0"), Delta(2, finish=finish)]), Stats(running=1)]
    outbox.send(said)
    assert receive(inbox, 2) == said


def test_a_step_output_survives(context: zmq.Context[Any], run_dir: Path) -> None:
    inbox: Inbox[Any] = Inbox(context, run_dir, "detokenizer")
    outbox = Outbox(context, run_dir, "detokenizer")
    step = StepOutput(
        ids=b"12345678", tokens=b"1234", cache={7: CacheReport(0, "cold")}, finished=[Finished(7, "abort")]
    )
    outbox.send([step])
    assert receive(inbox, 1) == [step]


def test_an_inbox_takes_only_what_is_meant_for_it(context: zmq.Context[Any], run_dir: Path) -> None:
    inbox: Inbox[Any] = Inbox(context, run_dir, "tokenizer")
    outbox = Outbox(context, run_dir, "tokenizer")
    outbox.send([Stats()])
    with pytest.raises(msgspec.ValidationError):
        receive(inbox, 1)


def test_nothing_is_dropped_while_nobody_reads(context: zmq.Context[Any], run_dir: Path) -> None:
    """ZeroMQ's default high-water mark would block or drop after a thousand frames."""
    inbox: Inbox[Any] = Inbox(context, run_dir, "tokenizer")
    outbox = Outbox(context, run_dir, "tokenizer")

    def send() -> None:
        for i in range(20_000):
            outbox.send([Abort(i)])

    sender = threading.Thread(target=send)
    sender.start()
    sender.join(100)
    assert not sender.is_alive(), "sending must not block"
    assert [message.id for message in receive(inbox, 20_000)] == list(range(20_000))


def test_the_run_directory_is_private(run_dir: Path) -> None:
    assert run_dir.stat().st_mode & 0o777 == 0o700
    config = read_launch(run_dir)
    assert (config.api_key, config.extra_api_keys, config.admin_api_key) == (None, (), None)
    assert config.namespace_secret is None
    assert "hidden" not in (run_dir / "launch.json").read_text()


def test_a_long_tmpdir_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    directory = RunDirectory(ServerConfig(engine=EngineConfig()))
    try:
        assert len(address(directory.path, "detokenizer").removeprefix("ipc://")) <= MAX_PATH
    finally:
        directory.remove()
