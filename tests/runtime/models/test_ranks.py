"""A decoder split over ranks, each a thread, against transformers: every family, and every way heads are divided."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

TOLERANCE = 1e-4
PAGE_SIZE = 16


def check(family: str, size: int, on_ranks: Any, harness: Any, reference: Any, prompt: np.ndarray) -> None:
    def work(group: Any) -> torch.Tensor:
        model = harness(family, PAGE_SIZE, group=group)
        parts = model.step([(1, prompt[:50], 0)]) + model.step([(1, prompt[50:90], 50)])
        for at in range(90, 94):
            parts += model.step([(1, prompt[at : at + 1], at)], num_decodes=1)
        return torch.cat(parts)

    expected = reference(family)[:94]
    for got in on_ranks(size, work):
        assert (got - expected).abs().max() < TOLERANCE


def test_two_ranks_compute_what_one_does(
    family: str, on_ranks: Any, harness: Any, reference: Any, prompt: np.ndarray
) -> None:
    check(family, 2, on_ranks, harness, reference, prompt)


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-mqa", "olmo2"])
def test_four_ranks_share_kv_heads(
    family: str, on_ranks: Any, harness: Any, reference: Any, prompt: np.ndarray
) -> None:
    """4, 2, 1 and 2 KV heads over 4 ranks."""
    check(family, 4, on_ranks, harness, reference, prompt)
