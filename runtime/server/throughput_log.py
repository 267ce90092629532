"""The line about the load that a busy server logs every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..messages import Stats


class ThroughputLog:
    """Takes every `Stats`; logs a line every ``seconds`` while the engine computes, and none while it is idle.

    Args:
        seconds: Least time between two lines. 0: no lines.
        log: Takes a line.
        clock: Monotonic seconds.
    """

    def __init__(
        self, seconds: float, log: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds, self._log, self._clock = seconds, log, clock
        self._since = 0.0
        self._before: Stats | None = None  # at ``_since``; None: the engine was idle

    def update(self, stats: Stats) -> None:
        now = self._clock()
        if not self._seconds:
            return
        if self._before is None:
            self._since, self._before = now, stats
        elif now - self._since >= self._seconds:
            self._log(describe(self._before, stats, now - self._since))
            self._since, self._before = now, stats
        if not stats.running and not stats.waiting:
            self._before = None


def describe(before: Stats, now: Stats, seconds: float) -> str:
    """The load between two `Stats` that are ``seconds`` apart."""
    cached, computed = now.cached_tokens - before.cached_tokens, now.computed_tokens - before.computed_tokens
    used = now.pages_total - now.pages_free - now.pages_cached
    share = f"{cached / (cached + computed):.1%} cached" if cached + computed else "none new"
    parts = [
        f"{now.running} running, {now.waiting} waiting",
        f"{(now.generated_tokens - before.generated_tokens) / seconds:,.1f} tokens/s generated",
        f"prompts {(cached + computed) / seconds:,.1f} tokens/s, {share}",
        f"KV {used / max(now.pages_total, 1):.1%} in use, {now.pages_cached / max(now.pages_total, 1):.1%} cached",
    ]
    if now.retractions > before.retractions:
        parts.append(f"{now.retractions - before.retractions} retracted")
    return "; ".join(parts)
