"""How often a server replaces an engine that died or hung, and after how long."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 3600.0
LONGEST_DELAY = 60.0  # seconds


class Restarts:
    """At most ``most`` restarts within an hour, after 1, 2, 4, … seconds."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._times: deque[float] = deque()

    def next_delay(self) -> float | None:
        """Counts a restart; returns the seconds to wait before it. None: there were too many."""
        now = self._clock()
        while self._times and self._times[0] <= now - WINDOW_SECONDS:
            self._times.popleft()
        if len(self._times) >= self._most:
            return None
        self._times.append(now)
        return min(LONGEST_DELAY, 2.0 ** (len(self._times) - 1))
