"""Ranks that cannot be started, because the system is short of something."""

from __future__ import annotations

import errno
import multiprocessing.connection
import subprocess
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from branchwise import LoadError
from branchwise.runtime.parallel import ranks
from branchwise.runtime.parallel.ranks import Ranks

WAITS = "branchwise.runtime.executor.rank_worker"


def test_a_rank_whose_process_cannot_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    failed: Future[str] = Future()
    with monkeypatch.context() as full:
        full.setattr(subprocess, "Popen", short)
        started = Ranks(2, WAITS, failed)
        assert "rank 1 could not be started: " in failed.result(60)
    with pytest.raises(LoadError, match="Cannot allocate memory"):
        started.wait("loaded")
    started.close()


def test_ranks_without_descriptors_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third rank's connection fails: the first two end, and their folder is removed."""
    made: list[Path] = []
    pipes = 0
    make_folder, make_pipe = ranks.tempfile.mkdtemp, multiprocessing.connection.Pipe

    def folder(**options: Any) -> str:
        made.append(Path(make_folder(**options)))
        return str(made[-1])

    def pipe() -> Any:
        nonlocal pipes
        pipes += 1
        if pipes > 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return make_pipe()

    monkeypatch.setattr(ranks.tempfile, "mkdtemp", folder)
    monkeypatch.setattr(ranks, "Pipe", pipe)
    with pytest.raises(OSError, match="Too many open files"):
        Ranks(4, WAITS, Future())
    assert len(made) == 1 and not made[0].exists()
    assert not [each.name for each in threading.enumerate() if each.name.startswith("branchwise-rank-")]
