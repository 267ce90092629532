"""Starts a server's child processes. The scheduler's, which has the most to import, can start before its settings are
known."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

_STDERR = 2
_TORCH = "torch"
_early: list[subprocess.Popen[bytes]] = []


def start_scheduler_early() -> None:
    """Starts a scheduler process, which imports torch and then waits for `start_child` to name its run directory. It
    ends with this process. Call it from the main thread."""
    with contextlib.suppress(OSError):  # `start_child` tries again and reports the failure
        _early.append(_spawn("scheduler", _TORCH))


def start_child(role: str, run_dir: Path, *, torch: bool) -> subprocess.Popen[bytes]:
    """Starts the process of a role, or takes the one that `start_scheduler_early` has started.

    ``torch``: the scheduler imports torch while it reads its settings. Call it from a thread that outlives the server:
    Linux kills the children when that thread ends.
    """
    first = role == "scheduler" and torch
    child = _early.pop() if first and _early else _spawn(role, *([_TORCH] if first else []))
    assert child.stdin is not None
    with contextlib.suppress(OSError), child.stdin:  # a broken pipe: it has ended, which its watcher notices
        child.stdin.write(os.fsencode(run_dir) + b"\n")
    return child


def _spawn(role: str, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.worker", role, str(os.getpid()), *options],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=_STDERR,
        start_new_session=True,  # Ctrl-C in a terminal must not reach the children
    )
