"""How many threads a step is worth on a CPU.

Waking threads that sleep between parallel regions costs tens of microseconds, a hundred times a step. A small decode
step is faster on one thread, and leaves the other cores to the processes around it; a prompt or a large model is not.
Measured on 2 cores, 4-layer model of 5 M weights, 3 requests at 4k tokens: 13 ms a step on one thread, 15 to 19 on two.
"""

from __future__ import annotations

import torch

from ..step import StepPlan
from .memory import MemoryPlan

# What one thread does, roughly: only the order of magnitude matters.
_BYTES_PER_SECOND = 5e9
_FLOPS_PER_SECOND = 50e9
_WORTH_SHARING = 0.025  # seconds of one thread's work


class ThreadChoice:
    """Sets torch's threads for each step; they are the calling thread's own. Does nothing on a GPU.

    Args:
        memory: its weights are read once a step, and each costs a multiplication and an addition a token.
    """

    def __init__(self, memory: MemoryPlan) -> None:
        self._all = torch.get_num_threads() if memory.device == "cpu" else 1
        self._now = self._all
        self._weight_bytes, self._token_bytes = memory.weight_bytes, memory.token_bytes
        self._weights = memory.weight_bytes // memory.dtype.itemsize

    def seconds(self, plan: StepPlan) -> float:
        """What the step would take one thread. What requests share is counted for each: an upper bound."""
        read = self._weight_bytes + int(plan.kv_lens.sum()) * self._token_bytes
        return read / _BYTES_PER_SECOND + 2 * self._weights * plan.num_tokens / _FLOPS_PER_SECOND

    def set_for(self, plan: StepPlan) -> None:
        if self._all == 1:
            return
        wanted = self._all if self.seconds(plan) > _WORTH_SHARING else 1
        if wanted != self._now:
            torch.set_num_threads(wanted)
            self._now = wanted
