"""Whether a copy pays: running estimates of how fast tiers are read and prompts computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...radix.node import DISK, HOST

_RATE = 0.2  # weight of a new observation
_SMALLEST = 64  # tokens and pages: observations of less are mostly overhead
# A refusal raises the estimate by this factor, so that what was slow once is tried again.
_RECOVERY = 1.02
# Seconds between the end of a copy and the step that uses it. No more: other requests' steps run meanwhile, and the
# time of the device that is saved serves them.
_DELAY = 0.003
_GUESSES = {HOST: 10e9, DISK: 1e9}  # bytes/s, until a first copy has been measured


@dataclass(slots=True)
class Gate:
    """Estimates from observations; a decision is a function of them alone.

    ``page_bytes``: of one page, in every tier. ``reading``: bytes/s of each lower tier. ``computing``: prompt tokens/s
    of the device, 0 until measured.
    """

    page_bytes: int
    page_size: int
    reading: dict[int, float] = field(default_factory=lambda: dict(_GUESSES))
    computing: float = 0.0
    stored: int = 0  # pages that were copied to the host since the last judgement of one-shot pages
    loaded: int = 0  # pages that were copied back meanwhile

    def read(self, tier: int, pages: int, seconds: float) -> None:
        """A copy of ``pages`` from ``tier`` took ``seconds``."""
        if tier == HOST:
            self.loaded += pages
        if seconds > 0:
            rate = pages * self.page_bytes / seconds
            weight = _RATE * min(1.0, pages / _SMALLEST)
            self.reading[tier] += weight * (rate - self.reading[tier])

    def computed(self, prompt_tokens: int, tokens: int, seconds: float) -> None:
        """A step of ``tokens``, of which ``prompt_tokens`` of prompts, took ``seconds``."""
        if seconds > 0 and prompt_tokens >= max(_SMALLEST, tokens // 2):
            rate = prompt_tokens / seconds
            self.computing += (_RATE if self.computing else 1.0) * (rate - self.computing)

    def seconds(self, host_pages: int, disk_pages: int, queued: int = 0) -> float:
        """The time until these pages are on the device, behind ``queued`` others."""
        host = (host_pages + disk_pages + queued) * self.page_bytes / self.reading[HOST]
        return host + disk_pages * self.page_bytes / self.reading[DISK] + _DELAY

    def pays(self, tokens: int, host_pages: int, disk_pages: int, queued: int) -> bool:
        """Whether to copy these pages instead of computing their ``tokens``. True while nothing was measured."""
        if not self.computing or self.seconds(host_pages, disk_pages, queued) < tokens / self.computing:
            return True
        for tier, pages in ((HOST, host_pages), (DISK, disk_pages)):
            if pages:
                self.reading[tier] *= _RECOVERY
        return False

    def keeps_one_shot(self) -> bool | None:
        """Whether pages that were used once are worth copying to the host: whether enough of what was copied came back.
        None: too few were copied since the last answer."""
        if self.stored < 64 * _SMALLEST:
            return None
        returned = self.loaded / self.stored
        self.stored = self.loaded = 0
        if not self.computing:
            return True
        copy = self.page_bytes / self.reading[HOST]
        return returned * self.page_size / self.computing > copy
