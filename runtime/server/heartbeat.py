"""Detects an engine process that hangs: stopped, deadlocked, or waiting for a device that never answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ..messages import Heartbeat, Message
from .processes.launch import Role

INTERVAL = 1.0  # seconds between heartbeats
STALE_SECONDS = 10.0  # after which the server is reported as stalled, or half the limit where that is less
_CHAIN: tuple[Role, ...] = ("tokenizer", "scheduler", "detokenizer")


class HeartbeatMonitor:
    """Sends a `Heartbeat` through the chain of processes and measures how long the newest one has been under way.

    Only one is under way at a time, so a hung process does not fill its queue. The time is counted in ticks of this
    event loop: after the whole server was suspended, its processes are not taken for hung.

    Args:
        send: Delivers messages to the tokenizer, the first of the chain.
        limit: Seconds after which ``give_up(role, seconds)`` is called, once, with the process that has not answered.
            0: never.
    """

    def __init__(
        self, send: Callable[[Sequence[Message]], None], limit: float, give_up: Callable[[Role, float], object]
    ) -> None:
        self._send = send
        self._limit = limit
        self._give_up = give_up
        self._number = 0
        self._passed: set[Role] = set()
        self._handle: asyncio.TimerHandle | None = None
        self.age = 0.0  # seconds that the newest heartbeat has been under way; 0: it has come back

    @property
    def stalled(self) -> Role | None:
        """The process that has not answered for too long, if any."""
        stale = min(STALE_SECONDS, self._limit / 2) if self._limit else STALE_SECONDS
        return self._waiting_for() if self.age >= stale else None

    def start(self) -> None:
        """Call it once every process is ready: loading a model does not count. Again after the engine has restarted."""
        self.age = 0.0
        self._loop = asyncio.get_running_loop()
        self._ticked = self._loop.time()
        self._beat()
        self._schedule()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def receive(self, heartbeat: Heartbeat) -> None:
        """Takes the report of one process. Reports of different processes may arrive in any order."""
        if heartbeat.number == self._number and heartbeat.passed is not None:
            self._passed.add(heartbeat.passed)
            if self._waiting_for() is None:
                self.age = 0.0

    def _waiting_for(self) -> Role | None:
        return next((role for role in _CHAIN if role not in self._passed), None)

    def _beat(self) -> None:
        self._number += 1
        self._passed.clear()
        self._send([Heartbeat(self._number)])

    def _schedule(self) -> None:
        self._handle = self._loop.call_later(INTERVAL, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        elapsed, self._ticked = min(now - self._ticked, 2 * INTERVAL), now
        role = self._waiting_for()
        if role is None:
            self._beat()
        else:
            self.age += elapsed
            if self._limit and self.age >= self._limit:
                self._give_up(role, self.age)
                return
        self._schedule()
