"""How many threads a step gets on a CPU.

Waking threads that sleep between parallel regions costs tens of microseconds, a hundred times a step. A small decode
step is faster on one thread, and leaves the other cores to other processes; prompts and large models need all threads.
Measured on 2 cores, 4-layer model of 5 M weights, 3 requests at 4k tokens: 13 ms a step on one thread, 15 to 19 on two.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..step import StepPlan
from .memory import MemoryPlan

# Of one thread, roughly: only the order of magnitude matters.
_BYTES_PER_SECOND = 5e9
_FLOPS_PER_SECOND = 50e9
_WORTH_SHARING = 0.025  # seconds of one thread's work


class ThreadChoice:
    """Sets the calling thread's number of torch threads for each step. Does nothing on a GPU.

    Args:
        memory: its weights are read once a step, and each costs a multiplication and an addition a token.
        ranks: how many processes compute each step together.
        fixed: every step gets the same number, a power of two: threads cut elementwise work at multiples of the vector
            width then, and what is left over for scalar code, which rounds differently, is nothing.
    """

    def __init__(self, memory: MemoryPlan, ranks: int = 1, *, fixed: bool = False) -> None:
        self._on_cpu = memory.device == "cpu"
        self._now = torch.get_num_threads()
        # torch counts the machine's processors; a container's quota may be smaller.
        self._all = max(1, min(self._now, container_processors(Path("/sys/fs/cgroup")) or self._now) // ranks)
        self._fixed = fixed
        if fixed:
            self._all = 1 << self._all.bit_length() - 1
        self._weight_bytes, self._token_bytes = memory.read_bytes, memory.layout.token_bytes
        self._weights = memory.read_bytes // memory.dtype.itemsize

    def seconds(self, plan: StepPlan) -> float:
        """Estimated duration on one thread. An upper bound: pages that requests share are counted for each."""
        read = self._weight_bytes + int(plan.kv_lens.sum()) * self._token_bytes
        return read / _BYTES_PER_SECOND + 2 * self._weights * plan.num_tokens / _FLOPS_PER_SECOND

    def set_for(self, plan: StepPlan) -> None:
        if not self._on_cpu or self._now == self._all == 1:
            return
        threads = self._all if self._fixed or self.seconds(plan) > _WORTH_SHARING else 1
        if threads != self._now:
            torch.set_num_threads(threads)
            self._now = threads


def container_processors(root: Path) -> int | None:
    """The control group's (version 2, then 1) quota of processors, rounded up; None without a quota."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and period.isdigit() and int(period):
            return max(1, math.ceil(int(quota) / int(period)))
    return None
