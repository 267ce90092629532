"""The line about the load that a server at work logs every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..messages import Stats


class ThroughputLog:
    """Fed every `Stats`; says a line once the seconds have passed, and none about a time in which nothing was computed.

    Args:
        seconds: from line to line, at least. 0: no lines.
        say: takes the line.
        clock: seconds, monotonic.
    """

    def __init__(
        self, seconds: float, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds, self._say, self._clock = seconds, say, clock
        self._begun = 0.0
        self._before: Stats | None = None  # None: no stretch of work has begun

    def update(self, stats: Stats) -> None:
        now = self._clock()
        if not self._seconds:
            return
        if self._before is None:
            self._begun, self._before = now, stats
        elif now - self._begun >= self._seconds:
            self._say(describe(self._before, stats, now - self._begun))
            self._begun, self._before = now, stats
        if not stats.running and not stats.waiting:
            self._before = None


def describe(before: Stats, now: Stats, seconds: float) -> str:
    """What happened between two looks, ``seconds`` apart."""
    cached, computed = now.cached_tokens - before.cached_tokens, now.computed_tokens - before.computed_tokens
    used = now.pages_total - now.pages_free - now.pages_cached
    share = f"{cached / (cached + computed):.1%} cached" if cached + computed else "none new"
    parts = [
        f"{now.running} running, {now.waiting} waiting",
        f"{(now.generated_tokens - before.generated_tokens) / seconds:,.1f} tokens/s generated",
        f"prompts {(cached + computed) / seconds:,.1f} tokens/s, {share}",
        f"KV {used / max(now.pages_total, 1):.1%} held, {now.pages_cached / max(now.pages_total, 1):.1%} remembered",
    ]
    if now.retractions > before.retractions:
        parts.append(f"{now.retractions - before.retractions} retracted")
    return "; ".join(parts)
