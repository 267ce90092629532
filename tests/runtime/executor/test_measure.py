"""Measuring a step's memory, on a simulated device: which step runs, not how much it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from branchwise.kernels import ops
from branchwise.runtime.executor import measure, sampler
from branchwise.runtime.models.config import load_config
from branchwise.runtime.models.decoder import Decoder
from branchwise.runtime.models.loader import load_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize(("tokens", "rows", "sampled"), [(64, 8, 8), (16, 40, 16), (600, 8, 8)])
def test_no_more_rows_sample_than_there_are_tokens(
    tokens: int, rows: int, sampled: int, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--max-num-batched-tokens`` may be less than ``--max-num-seqs``."""
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    seen: list[int] = []
    sample = sampler.Sampler.sample
    monkeypatch.setattr(
        sampler.Sampler, "sample", lambda self, logits, *rest: seen.append(len(logits)) or sample(self, logits, *rest)
    )
    model = load_config(checkpoint("llama-gqa"))
    decoder = Decoder(model, load_weights(checkpoint("llama-gqa"), model, torch.float32, CPU), ops)
    measure.measure_activations(decoder, model, torch.float32, CPU, tokens, rows, 512)
    assert seen == [sampled]
