"""The scheduler's time. Plans depend on it through pins and branches that expire, so it is an input like any other."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Seconds, constant between two calls of `tick`.

    ``source`` is read by `tick` alone, which the scheduler, the cache service and the branch service call once for each
    input (a message, the poll before a plan, a result). Replaying the inputs with the same readings gives the same
    plans. Calling the clock returns the last reading.
    """

    def __init__(self, source: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._now = source()

    def __call__(self) -> float:
        return self._now

    def tick(self) -> None:
        self._now = self._source()
