"""What a start spends its time on, for one line of the log."""

from __future__ import annotations

import time


class StartupTimes:
    """Seconds of the parts of a start, from its construction on."""

    def __init__(self) -> None:
        self._begun = self._at = time.monotonic()
        self._parts: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Counts the time since the last call as ``part``'s."""
        now = time.monotonic()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._at
        self._at = now

    def __str__(self) -> str:
        """``4.1 s: weights 3.0, CUDA graphs 1.1``."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._parts.items())
        return f"{self._at - self._begun:.1f} s: {parts}"
