"""Starts the child processes, watches them and ends them."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .children import start_child
from .launch import Role

logger = logging.getLogger(__name__)

KILL_SECONDS = 5.0  # how long killed children may take to end


class Supervisor:
    """The child processes of one server.

    ``torch``: whether the scheduler needs torch. ``on_exit(role, returncode)`` is called once for each child that
    exits, expected or not, from a watcher thread.
    """

    def __init__(self, run_dir: Path, on_exit: Callable[[Role, int], object], *, torch: bool) -> None:
        self._run_dir, self._torch = run_dir, torch
        self._on_exit = on_exit
        self._children: dict[Role, subprocess.Popen[bytes]] = {}
        self._watchers: list[threading.Thread] = []

    @property
    def pids(self) -> dict[Role, int]:
        return {role: child.pid for role, child in self._children.items()}

    def start(self, *roles: Role) -> None:
        """Call it from a thread that outlives the server: Linux kills the children when that thread ends."""
        for role in roles:
            self._children[role] = child = start_child(role, self._run_dir, torch=self._torch)
            # A thread in wait() reports an exit at once, on every platform, without a SIGCHLD handler.
            watcher = threading.Thread(target=self._watch, args=(role, child), name=f"watch-{role}", daemon=True)
            watcher.start()
            self._watchers.append(watcher)

    def _watch(self, role: Role, child: subprocess.Popen[bytes]) -> None:
        returncode = child.wait()
        logger.debug("%s (process %d) ended with code %d", role, child.pid, returncode)
        self._on_exit(role, returncode)

    def wait(self, seconds: float) -> bool:
        """Waits up to ``seconds`` for the children to exit. Returns whether all of them did."""
        deadline = time.monotonic() + seconds
        for watcher in self._watchers:
            watcher.join(max(0.0, deadline - time.monotonic()))
        return not any(watcher.is_alive() for watcher in self._watchers)

    def kill(self) -> None:
        """Kills and reaps every child that is still running. Idempotent.

        A child that waits for a broken device in the kernel cannot be reaped: after `KILL_SECONDS` it is left.
        """
        for child in self._children.values():
            child.kill()  # no effect on a child that has been reaped
        self.wait(KILL_SECONDS)
