"""How late the event loop is: the time anything that is ready waits for what the loop is busy with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL = 0.02  # seconds between the moments that are looked at
_MOST = 3000  # moments of one stall: a minute. A process that was stopped for longer was not late, it was stopped


class LoopLag:
    """Tells ``observe(seconds)`` for one moment in every `INTERVAL` how long it had to wait for the loop.

    A stall counts for each of the moments in it, with what was left of it then: so that a share of the observations is
    the same share of the time, and a long stall does not hide behind being one.
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
