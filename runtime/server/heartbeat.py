"""Detects an engine process that hangs: stopped, deadlocked, or waiting for a device that never answers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from ..messages import Heartbeat, Message
from .processes.launch import Role

INTERVAL = 1.0  # seconds between heartbeats
STALE_SECONDS = 10.0  # after which the server is reported as stalled, or half the limit where that is less
_CHAIN: tuple[Role, ...] = ("tokenizer", "scheduler", "detokenizer")


class HeartbeatMonitor:
    """Sends a `Heartbeat` through the chain of processes each second and measures for how long the oldest is under way.

    At most two are under way, so that a hung process does not fill its queue. Two, because a process may be stopped
    when its report has been sent and the heartbeat itself still lies in the queue to the next process: which one hangs
    is read from the newest heartbeat. The time is counted in ticks of this event loop: after the whole server was
    suspended, its processes are not taken for hung.

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
        self._number = 0  # of the newest heartbeat
        self._passed: dict[Role, int] = dict.fromkeys(_CHAIN, 0)  # the newest that each process has passed on
        self._under_way: deque[tuple[int, float]] = deque()  # number, clock when sent
        self._clock = 0.0  # seconds, counted in ticks
        self._suspect: Role | None = None  # at the last tick
        self._handle: asyncio.TimerHandle | None = None

    @property
    def age(self) -> float:
        """Seconds that the oldest heartbeat has been under way; 0: all have come back."""
        return self._clock - self._under_way[0][1] if self._under_way else 0.0

    @property
    def stalled(self) -> Role | None:
        """The process that has not answered for too long, if any."""
        stale = min(STALE_SECONDS, self._limit / 2) if self._limit else STALE_SECONDS
        return self._suspect if self.age >= stale else None

    def start(self) -> None:
        """Call it once every process is ready: loading a model does not count. Again after the engine has restarted."""
        self._under_way.clear()
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
        if heartbeat.passed is None:
            return
        self._passed[heartbeat.passed] = max(self._passed[heartbeat.passed], heartbeat.number)
        back = min(self._passed.values())
        while self._under_way and self._under_way[0][0] <= back:
            self._under_way.popleft()

    def _beat(self) -> None:
        self._number += 1
        self._under_way.append((self._number, self._clock))
        self._send([Heartbeat(self._number)])

    def _schedule(self) -> None:
        self._handle = self._loop.call_later(INTERVAL, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        elapsed, self._ticked = min(now - self._ticked, 2 * INTERVAL), now
        self._clock += elapsed
        self._suspect = next((role for role in _CHAIN if self._passed[role] < self._number), None)
        if self._suspect is not None and self._limit and self.age >= self._limit:
            self._give_up(self._suspect, self.age)
            return
        if len(self._under_way) < 2:
            self._beat()
        self._schedule()
