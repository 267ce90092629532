"""How long a step takes: a linear model, fitted to measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class StepTimes(NamedTuple):
    """Seconds of a step: ``base + per_prompt_token * prompt tokens + per_kv_token * KV tokens that decodes read``.

    The defaults are modelled, not measured: an 8B model in bfloat16 on one H200 (weights read in 5 ms, prompts at 40 %
    of its arithmetic, keys and values at 4 TB/s).
    """

    base: float = 0.005
    per_prompt_token: float = 45e-6
    per_kv_token: float = 33e-9

    def seconds(self, prompt_tokens: int, kv_tokens: int) -> float:
        """Of one step."""
        return self.base + self.per_prompt_token * prompt_tokens + self.per_kv_token * kv_tokens


def fit(samples: Sequence[tuple[int, int, float]]) -> StepTimes:
    """The model nearest to measured steps (prompt tokens, KV tokens read by decodes, seconds): least squares of
    relative errors, so that short steps count as much as long ones. Raises ValueError with fewer than three samples."""
    if len(samples) < 3:
        raise ValueError("three measured steps at least are needed to fit three coefficients")
    data = np.array(samples, np.float64)
    weights = 1 / data[:, 2]
    columns = np.column_stack((np.ones(len(data)), data[:, 0], data[:, 1])) * weights[:, None]
    found, *_ = np.linalg.lstsq(columns, data[:, 2] * weights, rcond=None)
    return StepTimes(*(max(0.0, float(each)) for each in found))
