"""A replica's process without a model, and without Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from branchwise import EngineConfig, ServerConfig
from branchwise.frontend.cluster import replica
from branchwise.frontend.cluster.replica import ReplicaProcess


@pytest.fixture
def stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReplicaProcess:
    """Its process writes a line that is no report, and stays."""
    (tmp_path / "a_child_that_stays.py").write_text("import time\nprint('hello', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(replica, "CHILD", "a_child_that_stays")
    return ReplicaProcess(ServerConfig(engine=EngineConfig()), "one")


async def test_a_process_that_reports_nothing_readable_is_ended(stays: ReplicaProcess) -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        await stays.start(60)
    assert stays._process is not None and stays._process.returncode is not None


async def test_a_start_that_is_cancelled_ends_the_process(stays: ReplicaProcess) -> None:
    starting = asyncio.create_task(stays.start(60))
    while stays._process is None:
        await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert stays._process.returncode is not None
