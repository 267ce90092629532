"""Models that transformers computes, split over ranks by transformers' plan: the same logits as one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from branchwise import LoadError
from branchwise.kernels import ops
from branchwise.kernels.attention.base import AttentionBatch
from branchwise.kernels.attention.torch_backend import TorchAttention
from branchwise.kernels.kv_pool import KVLayout, KVPool
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.models.decoder import StepTokens
from branchwise.runtime.models.hf.config import load_transformers_config
from branchwise.runtime.models.hf.loader import load_model
from branchwise.runtime.models.hf.model import make_decoder
from branchwise.runtime.models.implementation import load_model_config

CPU = torch.device("cpu")
PROMPT = np.random.default_rng(0).integers(4, 300, 40).tolist()

# One of each way to cut: columns and rows, biases, latent attention, sinks, gathered queries and keys, fused layers,
# experts, shared experts, experts alone.
FAMILIES = ["phi", "minicpm3", "granite-swa", "olmo2", "phi3", "qwen3-moe", "ernie-moe", "hunyuan-moe", "afmoe"]
WHOLE_ATTENTION = {"olmo2", "phi3", "hunyuan-moe", "afmoe"}


def logits_of_rank(folder: Path, size: int, whole_attention: bool, group: Any) -> torch.Tensor:
    """Of `PROMPT`, run as one step."""
    config = load_transformers_config(folder, size)
    decoder = make_decoder(config, load_model(config, torch.float32), ops, CPU, group, int8=False)
    heads = decoder.config.num_kv_heads
    assert heads == config.num_kv_heads // (1 if whole_attention else size)
    pool = KVPool.allocate(KVLayout(config.num_layers, 64, heads, config.head_dim, torch.float32), 1, CPU)
    attention = TorchAttention(pool, decoder.layer_specs(), decoder.config.num_heads)
    table, length = np.zeros((1, 1), np.int32), np.array([len(PROMPT)], np.int32)
    positions = torch.arange(len(PROMPT))
    with torch.inference_mode():
        attention.plan(AttentionBatch(np.zeros(1, np.int32), length, length, 0, 64, torch.from_numpy(table), table))
        tokens = StepTokens(torch.tensor(PROMPT), positions, positions)
        return decoder.logits(decoder.forward(tokens, pool, attention))


@pytest.mark.parametrize(("family", "size"), [*((family, 2) for family in FAMILIES), ("gpt-neox", 4)])
def test_ranks_compute_what_one_does(family: str, size: int, on_ranks: Any, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(family)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
    for got in on_ranks(size, lambda group: logits_of_rank(folder, size, family in WHOLE_ATTENTION, group)):
        assert got.shape == expected.shape and (got - expected).abs().max() < 1e-4


def test_experts_are_split_and_counted(checkpoint: Callable[[str], Path]) -> None:
    """Attention, experts and the output layer are cut; embedding, routers and norms are on both ranks."""
    one, two = (load_transformers_config(checkpoint("qwen3-moe"), ranks) for ranks in (1, 2))
    sizes = [
        sum(int(np.prod(part.shape)) for part in config.parameters if any(name in part.module for name in cut))
        for config in (one, two)
        for cut in (["experts", "proj"], ["embed", "norm", "gate"])
    ]
    assert sizes[2] == sizes[0] / 2 and sizes[3] == sizes[1]
    weights = [
        config.weight_bytes(torch.bfloat16, torch.device("cuda"), int8=False, fp8=False) for config in (one, two)
    ]
    assert weights[1] < 0.6 * weights[0]
    assert two.note is None
    assert "every rank has all attention heads" in (load_transformers_config(checkpoint("olmo2"), 2).note or "")


@pytest.mark.parametrize(
    ("family", "ranks", "reason"),
    [
        ("cwm", 4, "CwmForCausalLM with transformers: 4 attention heads and 2 KV heads cannot be divided by it"),
        ("gpt2", 2, "has no plan that cuts it"),
        ("diffllama", 2, "has no plan that cuts it"),
        ("qwen3-moe", 3, "channels of .* cannot be divided by it"),
    ],
)
def test_what_cannot_be_split_is_refused(
    family: str, ranks: int, reason: str, checkpoint: Callable[[str], Path]
) -> None:
    config = EngineConfig(model_impl="transformers", tensor_parallel_size=ranks)
    with pytest.raises(LoadError, match=f"--tensor-parallel-size {ranks}: .*{reason}") as raised:
        load_model_config(config, checkpoint(family))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "style", "reason"),
    [
        ("layers.*.mlp.gate", "moe_identity_expert", r"cuts model.layers.0.mlp.gate in a way \(moe_identity_expert\)"),
        ("layers.*.self_attn.o_proj", "replicate", "do not fit together"),
        ("layers.*.self_attn.k_proj", "replicate", "2 of 4 attention heads would attend to 2 of 2 KV heads"),
        ("layers.*.mlp.experts.down_proj", "replicate", "does not cut model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_a_plan_that_is_not_understood_is_refused(
    pattern: str, style: str, reason: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(transformers.Qwen3MoeConfig.base_model_tp_plan, pattern, style)
    with pytest.raises(LoadError, match=reason):
        load_transformers_config(checkpoint("qwen3-moe"), 2)
