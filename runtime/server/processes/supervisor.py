"""Starts the children, watches them, and leaves none behind."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .launch import ROLES, Role

logger = logging.getLogger(__name__)

_STDERR = 2


class Supervisor:
    """The children of one server. They start in parallel: their imports and loading overlap.

    ``on_exit(role, returncode)`` is called once for each child that ends, from a watcher thread, whether that was
    wanted or not: the caller knows which.
    """

    def __init__(self, run_dir: Path, on_exit: Callable[[Role, int], object]) -> None:
        self._run_dir = run_dir
        self._on_exit = on_exit
        self._children: dict[Role, subprocess.Popen[bytes]] = {}
        self._watchers: list[threading.Thread] = []

    @property
    def pids(self) -> dict[Role, int]:
        return {role: child.pid for role, child in self._children.items()}

    def start(self) -> None:
        """Call it from a thread that lives as long as the server: Linux ends the children when that thread ends."""
        for role in ROLES:
            child = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", role, str(self._run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
                start_new_session=True,  # Ctrl-C in the terminal is ours to answer, not theirs
            )
            self._children[role] = child
            # wait() in a thread works everywhere and tells at once; polling or SIGCHLD handlers would not.
            watcher = threading.Thread(target=self._watch, args=(role, child), name=f"watch-{role}", daemon=True)
            watcher.start()
            self._watchers.append(watcher)

    def _watch(self, role: Role, child: subprocess.Popen[bytes]) -> None:
        returncode = child.wait()
        logger.debug("%s (process %d) ended with code %d", role, child.pid, returncode)
        self._on_exit(role, returncode)

    def wait(self, seconds: float) -> bool:
        """Waits for the children to leave by themselves. Returns whether all of them did."""
        deadline = time.monotonic() + seconds
        for watcher in self._watchers:
            watcher.join(max(0.0, deadline - time.monotonic()))
        return not any(watcher.is_alive() for watcher in self._watchers)

    def kill(self) -> None:
        """Ends and reaps every child that is still there. Idempotent."""
        for child in self._children.values():
            child.kill()  # does nothing to a child that has been reaped
        for watcher in self._watchers:
            watcher.join()
