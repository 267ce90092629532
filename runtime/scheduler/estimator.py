"""How much output to expect: admission counts on the expectation, not on ``max_tokens``."""

from __future__ import annotations

import numpy as np

from .rows import FREE, Rows

_CLIP = 4096  # tokens of one request's future that are ever counted on


class OutputEstimator:
    """The fraction of ``max_tokens`` that requests really use, learned from those that finish.

    A retraction says the estimate was too low and raises it at once; finished requests bring it back slowly.
    (SGLang's new-token ratio, with the decay replaced by what was observed.)
    """

    def __init__(self, fraction: float = 0.7, rate: float = 0.05, floor: float = 0.1) -> None:
        self.fraction = fraction
        self._rate = rate
        self._floor = floor

    def finished(self, outputs: int, max_tokens: int) -> None:
        if max_tokens > 0:
            self.fraction += self._rate * (max(self._floor, outputs / max_tokens) - self.fraction)

    def retracted(self) -> None:
        self.fraction = min(1.0, self.fraction * 1.25 + 0.1)

    def expected_length(self, prompt_len: int, num_tokens: int, limit: int) -> int:
        """Tokens that will need KV by the time the request ends."""
        expected = prompt_len + min(_CLIP, int(self.fraction * (limit - prompt_len)))
        return min(limit, max(expected, num_tokens + 1))

    def pages_still_wanted(self, rows: Rows, page_size: int) -> int:
        """Pages the running requests are expected to take beyond those they hold."""
        active = np.flatnonzero(rows.phase != FREE)
        if len(active) == 0:
            return 0
        prompt_len, limit = rows.prompt_len[active], rows.limit[active]
        expected = prompt_len + np.minimum(_CLIP, (self.fraction * (limit - prompt_len)).astype(np.int32))
        expected = np.minimum(limit, np.maximum(expected, rows.length[active] + 1))
        wanted = -(-expected // page_size) - rows.held[active]
        return int(np.maximum(wanted, 0).sum())
