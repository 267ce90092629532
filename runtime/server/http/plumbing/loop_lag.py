"""The lag of the event loop: how long a ready callback waits for the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL = 0.02  # seconds between observations
_MOST = 3000  # observations of one stall, a minute: after a longer one the process had been stopped


class LoopLag:
    """Calls ``observe(seconds)`` once per `INTERVAL` with the lag at that time.

    A stall is observed once for every interval in it, with the rest of the stall then: a quantile over observations is
    a quantile over time, and one long stall is not hidden by many short ones.
    """

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + INTERVAL
        self._handle = self._loop.call_at(self._due, self._look)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _look(self) -> None:
        now = self._loop.time()
        self._due = max(self._due, now - _MOST * INTERVAL)
        while self._due <= now:
            self._observe(now - self._due)
            self._due += INTERVAL
        self._handle = self._loop.call_at(self._due, self._look)
