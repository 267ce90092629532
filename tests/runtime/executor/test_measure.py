"""Measuring a step's memory, on a simulated device: which step runs, not how much it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from branchwise.kernels import ops
from branchwise.kernels.kv_pool import KVPool
from branchwise.runtime.executor import measure, sampler
from branchwise.runtime.models.config import load_config
from branchwise.runtime.models.decoder import Decoder, StepTokens
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


def test_what_attention_read_and_wrote_is_free_when_the_mlp_runs(checkpoint: Callable[[str], Path]) -> None:
    """The MLP's own tensors are a step's largest."""
    model = load_config(checkpoint("llama-gqa"))
    decoder = Decoder(model, load_weights(checkpoint("llama-gqa"), model, torch.float32, CPU), ops)
    decoder.reserve(8)
    before: list[StorageWeakRef] = []
    ran: list[int] = []

    class Attention(measure._NoAttention):
        def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
            found = super().run(layer, q, k, v)
            before[:] = [StorageWeakRef(x.untyped_storage()) for x in (q, k, v, found)]
            return found

    class Mlp:
        quantizer = None

        def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
            self._inner = inner

        def __call__(self, x: Tensor) -> Tensor:
            ran.append(len([each for each in before if not each.expired()]))
            return self._inner(x)

    for layer in decoder._layers:
        layer.mlp = Mlp(layer.mlp)  # type: ignore[assignment]
    ids = torch.zeros(8, dtype=torch.int64)
    pool = KVPool(torch.zeros(model.num_layers, 2, 1, 8, model.num_kv_heads, model.head_dim))
    with torch.inference_mode():
        decoder.forward(StepTokens(ids, ids, ids), pool, Attention())
    assert ran == [0] * model.num_layers
