"""A decoder split over ranks, each a thread, against transformers: every family, and every way heads are divided."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from branchwise.kernels.addends import Addends

TOLERANCE = 1e-4
PAGE_SIZE = 16


class ThreadGroup:
    """A `TensorGroup` whose ranks are threads of one process."""

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._slots, self._barrier = slots, barrier

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._slots[self.rank] = x.clone()
        self._barrier.wait(30)
        everyone = list(self._slots)
        self._barrier.wait(30)
        return everyone

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self._exchange(x)).sum(0))

    def addends(self, x: torch.Tensor) -> Addends:
        return Addends(tuple(self._exchange(x)), torch.empty(0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x))

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self._exchange(x)[0])


def on_ranks(size: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What ``work`` returns on each of ``size`` ranks."""
    slots, barrier = [None] * size, threading.Barrier(size)
    groups = [ThreadGroup(rank, size, slots, barrier) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, groups))


def check(family: str, size: int, harness: Any, reference: Any, prompt: np.ndarray) -> None:
    def work(group: ThreadGroup) -> torch.Tensor:
        model = harness(family, PAGE_SIZE, group=group)
        parts = model.step([(1, prompt[:50], 0)]) + model.step([(1, prompt[50:90], 50)])
        for at in range(90, 94):
            parts += model.step([(1, prompt[at : at + 1], at)], num_decodes=1)
        return torch.cat(parts)

    expected = reference(family)[:94]
    for got in on_ranks(size, work):
        assert (got - expected).abs().max() < TOLERANCE


def test_two_ranks_compute_what_one_does(family: str, harness: Any, reference: Any, prompt: np.ndarray) -> None:
    check(family, 2, harness, reference, prompt)


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-mqa", "olmo2"])
def test_four_ranks_share_kv_heads(family: str, harness: Any, reference: Any, prompt: np.ndarray) -> None:
    """4, 2, 1 and 2 KV heads over 4 ranks."""
    check(family, 4, harness, reference, prompt)
