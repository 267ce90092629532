"""Expected output lengths. Admission reserves for these, not for ``max_tokens``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .rows import Rows

_CLIP = 4096  # future tokens of one request that are taken into account at most


class OutputEstimator:
    """The fraction of ``max_tokens`` that requests use, learned from those that finish.

    A retraction means that the estimate was too low, and raises it at once; finished requests lower it slowly.
    (SGLang's new-token ratio, with observations instead of a decay.)
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
        """Expected number of tokens with KV when the request ends."""
        expected = prompt_len + min(_CLIP, int(self.fraction * (limit - prompt_len)))
        return min(limit, max(expected, num_tokens + 1))

    def expected_lengths(self, rows: Rows, active: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """`expected_length` of the requests in the rows ``active``, int64 [n]."""
        prompt_len, limit = rows.prompt_len[active], rows.limit[active]
        expected = prompt_len + np.minimum(_CLIP, (self.fraction * (limit - prompt_len)).astype(np.int32))
        return np.minimum(limit, np.maximum(expected, rows.length[active] + 1)).astype(np.int64)

    def expected_pages(self, rows: Rows, page_size: int) -> int:
        """Pages that running requests are expected to need beyond those they have."""
        active = rows.active()
        missing = -(-self.expected_lengths(rows, active) // page_size) - rows.pages[active]
        return int(np.maximum(missing, 0).sum())
