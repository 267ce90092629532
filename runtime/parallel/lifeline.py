"""Ties the life of a child process to its parent's, and keeps signals meant for the parent away from it."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_POLL_SECONDS = 0.25


def ignore_stop_signals() -> None:
    """Ignores SIGINT and SIGTERM, which may reach the whole process group: the parent ends its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die_with_parent(parent: int, run_dir: Path | None = None) -> None:
    """Ends this process when process ``parent`` ends for any reason, SIGKILL included.

    With ``run_dir``, this process then removes that directory. One child does, so that a killed server leaves no
    sockets behind. Linux ends the others by a signal; the one that cleans up polls in a thread, as a signal's handler
    in Python would not run while the main thread waits for a message. Call it from the main thread.
    """
    if sys.platform == "linux" and run_dir is None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    else:
        threading.Thread(target=_watch, args=(parent, run_dir), name="lifeline", daemon=True).start()
    if os.getppid() != parent:  # it ended before the signal was set up
        _leave(run_dir)


def _watch(parent: int, run_dir: Path | None) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    _leave(run_dir)


def _leave(run_dir: Path | None) -> None:
    if run_dir is not None:
        shutil.rmtree(run_dir, ignore_errors=True)
    os._exit(1)
